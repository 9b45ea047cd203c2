#include <algorithm>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>

#include "whitening/cholesky_device.h"
#include "whitening/device/cholesky_layout.h"

namespace freqrank::whitening {

namespace {

// A step's rows: more of them read the rest of the matrix less often. Those that fit into shared memory are taken.
constexpr int kRows[] = {128, 64};
// The first matrices that need more than a warp gain nothing from eight of them.
constexpr int kFewThreads = 128, kManyThreads = 256, kFewColumns = 64;
// Right-hand sides that are solved in the launch that factors, and of those how many a block has at a time. More are
// worth blocks of their own.
constexpr std::int64_t kMostSolved = 512;
constexpr int kWidth = 64;
constexpr std::int64_t kMostRows = std::int64_t{1} << 30;
// No GPU has room for more in a block, and what the bytes are is only known of an int.
constexpr std::int64_t kMostBlockRows = 1024;

int shared_bytes_of_block(Dtype dtype, int n, int width) {
  return dtype == Dtype::float64 ? device::block_bytes<double>(n, width) : device::block_bytes<float>(n, width);
}
int shared_bytes_of_solve(Dtype dtype, int rows) {
  return dtype == Dtype::float64 ? device::solve_bytes<double>(rows) : device::solve_bytes<float>(rows);
}
int shared_bytes_of_update(Dtype dtype) {
  return dtype == Dtype::float64 ? device::update_bytes<double>() : device::update_bytes<float>();
}

// Rows of a step, and what its launches need.
std::pair<int, int> step_of(std::int64_t n, Dtype dtype, const GpuLimits& limits) {
  if (n > kMostRows)
    throw std::invalid_argument("whitening: a matrix may have at most 2^30 rows; got " + std::to_string(n));
  for (const int most : kRows) {
    const int rows = static_cast<int>(std::min<std::int64_t>(most, n));
    const int bytes = std::max(shared_bytes_of_solve(dtype, rows), n > rows ? shared_bytes_of_update(dtype) : 0);
    if (bytes <= limits.shared_bytes) return {rows, bytes};
  }
  throw std::invalid_argument("whitening: matrices of " + std::to_string(n) +
                              " rows need more shared memory than this GPU's " + std::to_string(limits.shared_bytes) +
                              " bytes a block");
}

// Says where right-hand sides are solved. `bytes_of_width(width)`: of shared memory, with so many of them in it.
template <class Bytes>
DeviceCholeskyPlan with_solve(DeviceCholeskyPlan plan, const GpuLimits& limits, const Bytes& bytes_of_width) {
  const int width = static_cast<int>(std::min<std::int64_t>(kWidth, round_up(plan.right_sides, 4)));
  plan.shared_bytes = bytes_of_width(0);
  if (plan.right_sides <= 0 || plan.n == 0) return plan;
  if (plan.kernel != CholeskyKernel::panels && plan.right_sides <= kMostSolved &&
      bytes_of_width(width) <= limits.shared_bytes) {
    plan.width = width;
    plan.shared_bytes = bytes_of_width(width);
    return plan;
  }
  plan.solve = plan_device_triangular(plan.batch, plan.n, plan.right_sides, plan.dtype, limits);
  plan.launches += 2 * plan.solve.launches;
  plan.shared_bytes = std::max(plan.shared_bytes, plan.solve.shared_bytes);
  return plan;
}

const char* name(Dtype dtype) { return dtype == Dtype::float64 ? "float64" : "float32"; }

}  // namespace

DeviceCholeskyPlan plan_device_cholesky(BatchSizes batch, std::int64_t n, Dtype dtype, bool ladder,
                                        const GpuLimits& limits, std::int64_t right_sides) {
  DeviceCholeskyPlan plan;
  plan.batch = std::move(batch);
  plan.n = n;
  plan.dtype = dtype;
  plan.ladder = ladder;
  plan.right_sides = right_sides;
  plan.launches = 1;
  if (n <= 32) {
    plan.kernel = CholeskyKernel::warp;
    plan.columns = n <= 8 ? 8 : n <= 16 ? 16 : 32;
    return with_solve(plan, limits, [&](int width) {
      return device::warp_bytes(plan.columns, static_cast<int>(bytes_of(dtype)), width > 0);
    });
  }
  if (n <= kMostBlockRows && shared_bytes_of_block(dtype, static_cast<int>(n), 0) <= limits.shared_bytes) {
    plan.kernel = CholeskyKernel::block;
    plan.threads = n <= kFewColumns ? kFewThreads : kManyThreads;
    return with_solve(plan, limits,
                      [&](int width) { return shared_bytes_of_block(dtype, static_cast<int>(n), width); });
  }
  plan.kernel = CholeskyKernel::panels;
  std::tie(plan.rows, plan.shared_bytes) = step_of(n, dtype, limits);
  const std::int64_t levels = ladder ? kDampingLevelCount : 1, steps = ceil_div(n, plan.rows);
  plan.launches = levels * 2 * steps + (ladder ? 2 : 1);
  const auto count = static_cast<std::size_t>(plan.batch.count());
  plan.words_at = ladder ? count * sizeof(double) : 0;
  plan.bytes = plan.words_at + static_cast<std::size_t>(2 * levels) * count * sizeof(std::int32_t);
  return with_solve(plan, limits, [&, bytes = plan.shared_bytes](int) { return bytes; });
}

std::size_t workspace_bytes(const DeviceCholeskyPlan& plan) { return plan.bytes; }

std::string describe(const DeviceCholeskyPlan& plan) {
  std::ostringstream text;
  text << plan.batch.count() << " matrices of " << plan.n << " rows, " << name(plan.dtype)
       << (plan.ladder ? ", with the ladder" : "");
  if (plan.right_sides > 0) text << ", " << plan.right_sides << " right-hand sides each";
  text << ": ";
  switch (plan.kernel) {
    case CholeskyKernel::warp: text << 32 / plan.columns << " in the registers of a warp"; break;
    case CholeskyKernel::block: text << "one in the shared memory of a block of " << plan.threads << " threads"; break;
    case CholeskyKernel::panels: text << plan.rows << " rows a step"; break;
  }
  if (plan.width > 0) text << ", the right-hand sides in the same launch";
  if (plan.solve.launches > 0) text << ", the right-hand sides by triangular solves";
  text << "; launches: " << plan.launches << ", bytes of shared memory: " << plan.shared_bytes;
  return text.str();
}

DeviceTriangularPlan plan_device_triangular(BatchSizes batch, std::int64_t n, std::int64_t columns, Dtype dtype,
                                            const GpuLimits& limits) {
  DeviceTriangularPlan plan;
  plan.batch = std::move(batch);
  plan.n = n;
  plan.columns = columns;
  plan.dtype = dtype;
  if (n == 0 || columns == 0) return plan;
  std::tie(plan.rows, plan.shared_bytes) = step_of(n, dtype, limits);
  plan.launches = 2 * ceil_div(n, plan.rows) - 1;
  return plan;
}

std::string describe(const DeviceTriangularPlan& plan) {
  std::ostringstream text;
  text << plan.batch.count() << " triangles of " << plan.n << " rows, " << plan.columns << " right-hand sides, "
       << name(plan.dtype) << ": " << plan.rows << " rows a step; launches: " << plan.launches
       << ", bytes of shared memory: " << plan.shared_bytes;
  return text.str();
}

}  // namespace freqrank::whitening
