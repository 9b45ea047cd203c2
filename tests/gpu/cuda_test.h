#pragma once
// What the C++ tests of this folder share: plain programs, so that they build where there is no test framework.
//
//   test_<family>_cuda [--small], exit status 77 without a GPU. --small is for compute-sanitizer.
//
// Every buffer lies between guards: a write outside an output or the workspace is seen, and so is a read outside an
// input, for what lies there is NaN.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/cuda_device.h"
#include "common/half.h"

namespace freqrank::cuda_test {

inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + explain_cuda_error(error));
}

// --- memory -------------------------------------------------------------------------------------------------------

constexpr std::size_t kGuard = 4096;
constexpr unsigned char kPaint = 0xff;  // NaN in every dtype

// The tests' stream does not wait for the one on which cudaMemset and cudaMemcpy work, and these may return before the
// GPU is done.
inline void wait_for_copies() { check(cudaDeviceSynchronize(), "the GPU cannot be prepared"); }

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
  void paint() const {
    check(cudaMemset(data(), kPaint, bytes_), "cudaMemset");
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

// Dtype: of a family, float16, bfloat16, float32, float64.
template <class Dtype>
int size_of(Dtype dtype) {
  return dtype == Dtype::float64 ? 8 : dtype == Dtype::float32 ? 4 : 2;
}

template <class Dtype>
void put(Dtype dtype, std::vector<char>& bytes, std::int64_t i, double value) {
  char* const at = bytes.data() + i * size_of(dtype);
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

template <class Dtype>
double get(Dtype dtype, const std::vector<char>& bytes, std::int64_t i) {
  const char* const at = bytes.data() + i * size_of(dtype);
  switch (dtype) {
    case Dtype::float16: return read_as<float16>(at);
    case Dtype::bfloat16: return read_as<bfloat16>(at);
    case Dtype::float32: return read_as<float>(at);
    default: return read_as<double>(at);
  }
}

// The elements that the sizes and strides reach, in C order, as offsets.
inline void each_offset(const std::vector<std::int64_t>& sizes, const std::vector<std::int64_t>& strides,
                        const std::function<void(std::int64_t)>& f, std::size_t d = 0, std::int64_t offset = 0) {
  if (d == sizes.size()) return f(offset);
  for (std::int64_t i = 0; i < sizes[d]; ++i) each_offset(sizes, strides, f, d + 1, offset + i * strides[d]);
}

inline const char* dtype_name(int dtype) {
  static const char* const names[] = {"float16", "bfloat16", "float32", "float64"};
  return names[dtype];
}

// --- launches -----------------------------------------------------------------------------------------------------

// Runs what `enqueue` puts on the stream, and waits for it.
inline void run_once(cudaStream_t stream, const std::function<void()>& enqueue) {
  enqueue();
  check(cudaStreamSynchronize(stream), "the kernels");
}

// The same as a captured graph.
inline void run_captured(cudaStream_t stream, const std::function<void()>& enqueue) {
  cudaGraph_t graph;
  cudaGraphExec_t executable;
  check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "capture");
  enqueue();
  check(cudaStreamEndCapture(stream, &graph), "capture");
  check(cudaGraphInstantiate(&executable, graph, 0), "the captured graph");
  check(cudaGraphLaunch(executable, stream), "the captured graph");
  check(cudaStreamSynchronize(stream), "the captured graph");
  cudaGraphExecDestroy(executable);
  cudaGraphDestroy(graph);
}

class Stream {
 public:
  Stream() { check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "cudaStreamCreate"); }
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;
  ~Stream() { cudaStreamDestroy(stream_); }
  operator cudaStream_t() const { return stream_; }

 private:
  cudaStream_t stream_ = nullptr;
};

inline GpuLimits current_gpu_limits() {
  int device = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  return gpu_limits(device);
}

// --- the program --------------------------------------------------------------------------------------------------

// Counts problems and failures, and prints these.
class Tally {
 public:
  // `fault` gives what is wrong, nothing if all is well; `describe` what was planned.
  void test(const std::string& problem, const std::function<std::string()>& fault,
            const std::function<std::string()>& describe) {
    ++problems_;
    try {
      const std::string found = fault();
      if (found.empty()) return;
      std::printf("FAILED %s: %s\n%s", problem.c_str(), found.c_str(), describe().c_str());
    } catch (const std::exception& error) {
      std::printf("FAILED %s: %s\n", problem.c_str(), error.what());
    }
    std::fflush(stdout);
    ++failures_;
    check(cudaDeviceSynchronize(), "the GPU cannot go on");
  }
  int problems() const { return problems_; }
  int finish(const std::string& kernels) const {
    std::printf("%d problems, %d failed; %s\n", problems_, failures_, kernels.c_str());
    return failures_ ? 1 : 0;
  }

 private:
  int problems_ = 0, failures_ = 0;
};

// main() of a test; `run` takes whether only small problems are wanted and returns the exit status.
inline int run_program(int argc, char** argv, const std::function<int(bool)>& run) {
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
    std::printf("no GPU: %s\n", error == cudaSuccess ? "none found" : explain_cuda_error(error).c_str());
    return 77;
  }
  try {
    return run(small);
  } catch (const std::exception& error) {
    std::printf("FAILED: %s\n", error.what());
    return 1;
  }
}

}  // namespace freqrank::cuda_test
