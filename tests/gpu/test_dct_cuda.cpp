// The DCT's CUDA kernels against the CPU back end in float64. A plain program, so that it builds where there is no test
// framework: test_dct_cuda [--small], exit status 77 without a GPU. --small is for compute-sanitizer.
//
// Every buffer lies between guards: a write outside the output or the workspace is seen, and so is a read outside the
// input, for what lies there is NaN.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <random>
#include <set>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/cuda_device.h"
#include "common/half.h"
#include "dct/dct.h"
#include "dct/launch.h"

namespace freqrank::dct {

namespace {

using Sizes = std::vector<std::int64_t>;

void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + explain_cuda_error(error));
}

// --- memory -------------------------------------------------------------------------------------------------------

constexpr std::size_t kGuard = 4096;
constexpr unsigned char kPaint = 0xff;  // NaN in every dtype

// The tests' stream does not wait for the one on which cudaMemset and cudaMemcpy work, and these may return before the
// GPU is done.
void wait_for_copies() { check(cudaDeviceSynchronize(), "the GPU cannot be prepared"); }

class Guarded {
 public:
  Guarded(std::size_t bytes, int shift) : bytes_(bytes), shift_(static_cast<std::size_t>(shift)) {
    check(cudaMalloc(reinterpret_cast<void**>(&base_), bytes + 2 * kGuard), "cudaMalloc");
    check(cudaMemset(base_, kPaint, bytes + 2 * kGuard), "cudaMemset");
    wait_for_copies();
  }
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;
  ~Guarded() { cudaFree(base_); }

  void* data() const { return base_ + kGuard + shift_; }
  void fill(const std::vector<char>& from) const {
    check(cudaMemcpy(data(), from.data(), from.size(), cudaMemcpyHostToDevice), "copy to the GPU");
    wait_for_copies();
  }
  std::vector<char> read() const {
    std::vector<char> to(bytes_);
    check(cudaMemcpy(to.data(), data(), bytes_, cudaMemcpyDeviceToHost), "copy from the GPU");
    return to;
  }
  bool intact() const {
    std::vector<unsigned char> all(bytes_ + 2 * kGuard);
    check(cudaMemcpy(all.data(), base_, all.size(), cudaMemcpyDeviceToHost), "copy from the GPU");
    const auto painted = [](unsigned char byte) { return byte == kPaint; };
    const auto begin = all.begin() + static_cast<std::ptrdiff_t>(kGuard + shift_);
    return std::all_of(all.begin(), begin, painted) &&
           std::all_of(begin + static_cast<std::ptrdiff_t>(bytes_), all.end(), painted);
  }

 private:
  std::size_t bytes_, shift_;
  char* base_ = nullptr;
};

void put(Dtype dtype, std::vector<char>& bytes, std::int64_t i, double value) {
  char* const at = bytes.data() + i * bytes_of(dtype);
  const auto store = [&](auto v) { std::memcpy(at, &v, sizeof v); };
  switch (dtype) {
    case Dtype::float16: store(from_float<float16>(static_cast<float>(value))); break;
    case Dtype::bfloat16: store(from_float<bfloat16>(static_cast<float>(value))); break;
    case Dtype::float32: store(static_cast<float>(value)); break;
    case Dtype::float64: store(value); break;
  }
}

template <class T>
double read_as(const char* at) {
  T v;
  std::memcpy(&v, at, sizeof v);
  return static_cast<double>(to_float(v));
}

double get(Dtype dtype, const std::vector<char>& bytes, std::int64_t i) {
  const char* const at = bytes.data() + i * bytes_of(dtype);
  switch (dtype) {
    case Dtype::float16: return read_as<float16>(at);
    case Dtype::bfloat16: return read_as<bfloat16>(at);
    case Dtype::float32: return read_as<float>(at);
    default: return read_as<double>(at);
  }
}

// --- problems -----------------------------------------------------------------------------------------------------

std::int64_t contiguous(const Sizes& sizes, Sizes& strides) {
  strides.assign(sizes.size(), 0);
  std::int64_t stride = 1;
  for (std::size_t d = sizes.size(); d-- > 0; stride *= sizes[d]) strides[d] = stride;
  return stride;
}

Problem problem(Dtype dtype, int type, const Sizes& sizes, const std::vector<int>& dims, const Sizes& lengths,
                const Sizes& out_sizes) {
  Problem p;
  p.dtype = dtype;
  p.type = type;
  p.norm = 1;
  p.in_ends = type == 1 || type == 3 ? 1 : 0;
  p.out_ends = type <= 2 ? 1 : 0;
  p.in_sizes = sizes;
  p.out_sizes = out_sizes;
  p.dims = dims;
  p.lengths = lengths;
  contiguous(p.in_sizes, p.in_strides);
  contiguous(p.out_sizes, p.out_strides);
  return p;
}

Problem rows(Dtype dtype, int type, std::int64_t count, std::int64_t n) {
  return problem(dtype, type, {count, n}, {1}, {n}, {count, n});
}

Problem columns(Dtype dtype, int type, std::int64_t n, std::int64_t count) {
  return problem(dtype, type, {n, count}, {0}, {n}, {n, count});
}

// The elements that the sizes and strides reach, in C order, as offsets.
void each_offset(const Sizes& sizes, const Sizes& strides, const std::function<void(std::int64_t)>& f,
                 std::size_t d = 0, std::int64_t offset = 0) {
  if (d == sizes.size()) return f(offset);
  for (std::int64_t i = 0; i < sizes[d]; ++i) each_offset(sizes, strides, f, d + 1, offset + i * strides[d]);
}

std::vector<double> on_the_cpu(Problem p, const std::vector<double>& in) {
  p.dtype = Dtype::float64;
  contiguous(p.in_sizes, p.in_strides);
  std::vector<double> out(static_cast<std::size_t>(contiguous(p.out_sizes, p.out_strides)));
  const Plan made = plan(p);
  std::vector<std::vector<char>> tables;
  std::vector<const void*> pointers;
  for (const Row& row : made.rows) {
    tables.emplace_back(row.table_bytes());
    fill_table(row, tables.back().data());
    pointers.push_back(tables.back().data());
  }
  std::vector<char> workspace(workspace_bytes(made));
  run(made, {in.data(), out.data(), pointers.data()}, workspace.data(), serial());
  return out;
}

double tolerance(const Problem& p) {
  double logs = 0;
  for (const std::int64_t n : p.lengths) logs += std::max(1.0, std::log2(static_cast<double>(n)));
  switch (p.dtype) {
    case Dtype::float16: return 4e-7 * logs + 0x1p-11;
    case Dtype::bfloat16: return 4e-7 * logs + 0x1p-8;
    case Dtype::float32: return 4e-7 * logs;
    default: return 1e-15 * logs;
  }
}

std::string words(const Problem& p) {
  static const char* const names[] = {"float16", "bfloat16", "float32", "float64"};
  std::string text = std::string(names[static_cast<int>(p.dtype)]) + " type " + std::to_string(p.type) + " [";
  for (const std::int64_t size : p.in_sizes) text += std::to_string(size) + " ";
  text += "] dims";
  for (std::size_t i = 0; i < p.dims.size(); ++i) {
    text += " " + std::to_string(p.dims[i]) + ":" + std::to_string(p.lengths[i]);
  }
  return text;
}

// --- the test -----------------------------------------------------------------------------------------------------

class Tester {
 public:
  Tester() {
    check(cudaGetDevice(&device_), "cudaGetDevice");
    limits_ = gpu_limits(device_);
    check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "cudaStreamCreate");
  }
  ~Tester() { cudaStreamDestroy(stream_); }

  // Input and output start `shift` elements behind where vectors can be loaded from.
  void test(const Problem& p, int shift = 0) {
    ++problems_;
    try {
      const std::string fault = fault_of(p, shift);
      if (fault.empty()) return;
      std::printf("FAILED %s: %s\n%s", words(p).c_str(), fault.c_str(), describe(plan_device(p, limits_)).c_str());
    } catch (const std::exception& error) {
      std::printf("FAILED %s: %s\n", words(p).c_str(), error.what());
    }
    std::fflush(stdout);
    ++failures_;
    check(cudaDeviceSynchronize(), "the GPU cannot go on");
  }

  int finish() {
    std::string names;
    for (const std::string& algorithm : algorithms_) names += (names.empty() ? "" : ", ") + algorithm;
    std::printf("%d problems, %d failed; algorithms: %s\n", problems_, failures_, names.c_str());
    return failures_ ? 1 : 0;
  }

 private:
  std::string fault_of(const Problem& p, int shift) {
    const DevicePlan made = plan_device(p, limits_);
    for (const Step& step : made.steps) algorithms_.insert(name(step.algorithm));

    std::int64_t in_elements = 1, out_elements = 1;
    for (std::size_t d = 0; d < p.in_sizes.size(); ++d) {
      in_elements += std::max<std::int64_t>(0, p.in_sizes[d] - 1) * p.in_strides[d];
      out_elements *= p.out_sizes[d];
    }
    const int bytes = bytes_of(p.dtype);
    std::vector<char> packed(static_cast<std::size_t>(in_elements * bytes), static_cast<char>(kPaint));
    std::vector<double> values;
    std::mt19937_64 random(static_cast<std::uint64_t>(problems_));
    std::normal_distribution<double> normal;
    each_offset(p.in_sizes, p.in_strides, [&](std::int64_t offset) {
      put(p.dtype, packed, offset, normal(random));
      values.push_back(get(p.dtype, packed, offset));
    });

    const Guarded in(packed.size(), shift * bytes), out(static_cast<std::size_t>(out_elements * bytes), shift * bytes),
        workspace(workspace_bytes(made), 0);
    in.fill(packed);
    const auto enqueue = [&] { run(made, {in.data(), out.data()}, workspace.data(), stream_); };
    enqueue();
    check(cudaStreamSynchronize(stream_), "the kernels");
    const std::vector<char> first = out.read();

    cudaGraph_t graph;
    cudaGraphExec_t executable;
    check(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal), "capture");
    enqueue();
    check(cudaStreamEndCapture(stream_, &graph), "capture");
    check(cudaGraphInstantiate(&executable, graph, 0), "the captured graph");
    check(cudaMemset(workspace.data(), kPaint, workspace_bytes(made)), "cudaMemset");
    check(cudaMemset(out.data(), kPaint, first.size()), "cudaMemset");
    wait_for_copies();
    check(cudaGraphLaunch(executable, stream_), "the captured graph");
    check(cudaStreamSynchronize(stream_), "the captured graph");
    cudaGraphExecDestroy(executable);
    cudaGraphDestroy(graph);
    if (out.read() != first) return "the captured graph gives other bits";

    if (!in.intact() || in.read() != packed) return "the input was written to";
    if (!out.intact()) return "a write beyond the output";
    if (!workspace.intact()) return "a write beyond the workspace";

    const std::vector<double> want = on_the_cpu(p, values);
    double difference = 0, norm = 0;
    for (std::size_t i = 0; i < want.size(); ++i) {
      const double d = get(p.dtype, first, static_cast<std::int64_t>(i)) - want[i];
      difference += d * d;
      norm += want[i] * want[i];
    }
    const double error = std::sqrt(difference / std::max(norm, 1e-300));
    if (!(error <= tolerance(p))) {
      char text[80];
      std::snprintf(text, sizeof text, "relative error %.3g, allowed %.3g", error, tolerance(p));
      return text;
    }
    return "";
  }

  int device_ = 0, problems_ = 0, failures_ = 0;
  DeviceLimits limits_;
  cudaStream_t stream_ = nullptr;
  std::set<std::string> algorithms_;
};

void test_everything(Tester& tester, bool small) {
  using D = Dtype;
  const std::vector<D> dtypes = {D::float16, D::bfloat16, D::float32, D::float64};
  const Sizes lengths = small
                            ? Sizes{2, 8, 30, 34, 64, 1000, 1024, 4097}
                            : Sizes{1,    2,    3,    4,    5,    7,    8,    15,   16,   17,   30,    31,   32,   60,
                                    64,   96,   97,   100,  121,  128,  210,  256,  343,  360,  512,   997,  1000, 1009,
                                    1024, 1025, 2000, 2048, 3125, 4096, 4097, 6000, 8192, 8193, 10007, 16384};
  for (const std::int64_t n : lengths) {
    for (int type = 1; type <= 4; ++type) {
      if (type == 1 && n < 2) continue;
      for (const D dtype : dtypes) {
        if (small && (dtype == D::bfloat16 || (dtype == D::float64 && type != 2))) continue;
        const std::int64_t many = std::max<std::int64_t>(2, (small ? 2000 : 20000) / n);
        tester.test(rows(dtype, type, 1, n));
        tester.test(rows(dtype, type, many + 1, n));
        if (!small || type == 2) tester.test(columns(dtype, type, n, 7));
        if (!small) tester.test(columns(dtype, type, n, std::max<std::int64_t>(1, many / 2)));
      }
    }
    tester.test(problem(D::float32, 2, {5, n}, {1}, {n + 3}, {5, n + 3}));  // padded
    tester.test(problem(D::float32, 3, {5, n + 2}, {1}, {n}, {5, n}));      // cropped
    tester.test(problem(D::bfloat16, 4, {3, n, 5}, {1}, {n}, {3, std::max<std::int64_t>(1, n / 2), 5}));
    Problem gaps = rows(D::float32, 2, 5, n);
    gaps.in_strides = {n + 1, 1};
    tester.test(gaps);
    gaps.in_strides = {2 * n, 2};
    tester.test(gaps);
    for (const D dtype : dtypes) tester.test(rows(dtype, 2, 5, n), 1);
  }
  const std::vector<std::pair<std::int64_t, std::int64_t>> tiles =
      small ? std::vector<std::pair<std::int64_t, std::int64_t>>{{8, 8}, {64, 32}, {31, 30}}
            : std::vector<std::pair<std::int64_t, std::int64_t>>{{1, 1},   {2, 3},    {8, 8},     {7, 64},   {32, 32},
                                                                 {31, 33}, {64, 64},  {100, 60},  {128, 64}, {128, 128},
                                                                 {97, 61}, {130, 64}, {256, 256}, {3, 2000}};
  for (const auto& [a, b] : tiles) {
    for (const D dtype : dtypes) {
      for (int type = 1; type <= 4; ++type) {
        if (type == 1 && a < 2) continue;
        tester.test(problem(dtype, type, {3, a, b}, {1, 2}, {a, b}, {3, a, b}));
        if (!small) tester.test(problem(dtype, type, {a, b, 3}, {0, 1}, {a, b}, {a, b, 3}));
      }
    }
    tester.test(problem(D::float32, 2, {2, a, b}, {1, 2}, {a + 1, b + 2}, {2, a + 1, b + 2}));
    tester.test(problem(D::float16, 2, {2, a + 1, b + 2}, {1, 2}, {a, b}, {2, a, b}));
  }
  tester.test(problem(D::float32, 2, {9, 10, 11}, {0, 1, 2}, {9, 10, 11}, {9, 10, 11}));
  tester.test(problem(D::float32, 2, {0, 10}, {1}, {10}, {0, 10}));
  tester.test(problem(D::float32, 2, {10, 0}, {1}, {6}, {10, 6}));
  if (small) return;
  for (const std::int64_t n : {32768, 65536, 65537, 100003, 1 << 20, 1000003}) {
    for (int type = 1; type <= 4; ++type) {
      tester.test(rows(D::float32, type, 2, n));
      if (n <= 100003) tester.test(rows(D::float64, type, 1, n));
    }
    tester.test(columns(D::float32, 2, n, 3));
  }
  tester.test(rows(D::float32, 2, 300000, 32));
  tester.test(rows(D::float16, 2, 100001, 60));
}

}  // namespace

}  // namespace freqrank::dct

int main(int argc, char** argv) {
  bool small = false;
  for (int i = 1; i < argc; ++i) {
    if (std::strcmp(argv[i], "--small") != 0) {
      std::fprintf(stderr, "usage: %s [--small]\n", argv[0]);
      return 2;
    }
    small = true;
  }
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error != cudaSuccess || count == 0) {
    std::printf("no GPU: %s\n", error == cudaSuccess ? "none found" : freqrank::explain_cuda_error(error).c_str());
    return 77;
  }
  try {
    freqrank::dct::Tester tester;
    freqrank::dct::test_everything(tester, small);
    return tester.finish();
  } catch (const std::exception& error) {
    std::printf("FAILED: %s\n", error.what());
    return 1;
  }
}
