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
constexpr std::int64_t kMostRows = std::int64_t{1} << 30;

int shared_bytes_of_block(Dtype dtype, int n) {
  return dtype == Dtype::float64 ? device::block_bytes<double>(n) : device::block_bytes<float>(n);
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

const char* name(Dtype dtype) { return dtype == Dtype::float64 ? "float64" : "float32"; }

}  // namespace

DeviceCholeskyPlan plan_device_cholesky(BatchSizes batch, std::int64_t n, Dtype dtype, bool ladder,
                                        const GpuLimits& limits) {
  DeviceCholeskyPlan plan;
  plan.batch = std::move(batch);
  plan.n = n;
  plan.dtype = dtype;
  plan.ladder = ladder;
  plan.launches = 1;
  if (n <= 32) {
    plan.kernel = CholeskyKernel::warp;
    plan.columns = n <= 8 ? 8 : n <= 16 ? 16 : 32;
    plan.shared_bytes = device::warp_bytes(plan.columns, static_cast<int>(bytes_of(dtype)));
    return plan;
  }
  // no GPU has room for more, and what the bytes are is only known of an int
  constexpr std::int64_t most = 1024;
  if (n <= most && shared_bytes_of_block(dtype, static_cast<int>(n)) <= limits.shared_bytes) {
    plan.kernel = CholeskyKernel::block;
    plan.threads = n <= kFewColumns ? kFewThreads : kManyThreads;
    plan.shared_bytes = shared_bytes_of_block(dtype, static_cast<int>(n));
    return plan;
  }
  plan.kernel = CholeskyKernel::panels;
  std::tie(plan.rows, plan.shared_bytes) = step_of(n, dtype, limits);
  const std::int64_t levels = ladder ? kDampingLevelCount : 1, steps = ceil_div(n, plan.rows);
  plan.launches = levels * 2 * steps + (ladder ? 2 : 1);
  const auto count = static_cast<std::size_t>(plan.batch.count());
  plan.words_at = ladder ? count * sizeof(double) : 0;
  plan.bytes = plan.words_at + static_cast<std::size_t>(2 * levels) * count * sizeof(std::int32_t);
  return plan;
}

std::size_t workspace_bytes(const DeviceCholeskyPlan& plan) { return plan.bytes; }

std::string describe(const DeviceCholeskyPlan& plan) {
  std::ostringstream text;
  text << plan.batch.count() << " matrices of " << plan.n << " rows, " << name(plan.dtype)
       << (plan.ladder ? ", with the ladder" : "") << ": ";
  switch (plan.kernel) {
    case CholeskyKernel::warp: text << 32 / plan.columns << " in the registers of a warp"; break;
    case CholeskyKernel::block: text << "one in the shared memory of a block of " << plan.threads << " threads"; break;
    case CholeskyKernel::panels: text << plan.rows << " rows a step"; break;
  }
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
