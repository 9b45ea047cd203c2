#pragma once
// Benchmarks on the current GPU: timed by events, the L2 cache overwritten before each run.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <memory>
#include <stdexcept>
#include <vector>

#include "bench.h"
#include "common/cuda_device.h"

namespace freqrank::bench {

inline void check(cudaError_t status) {
  if (status != cudaSuccess) throw std::runtime_error(cudaGetErrorString(status));
}

using Memory = std::unique_ptr<void, cudaError_t (*)(void*)>;

inline Memory allocate(std::size_t bytes) {
  void* pointer = nullptr;
  check(cudaMalloc(&pointer, std::max<std::size_t>(bytes, 1)));
  return Memory(pointer, cudaFree);
}

class Clock {
 public:
  Clock() : flush_(allocate(kFlush)) {
    check(cudaEventCreate(&begin_));
    check(cudaEventCreate(&end_));
  }
  ~Clock() {
    cudaEventDestroy(begin_);
    cudaEventDestroy(end_);
  }
  Clock(const Clock&) = delete;
  Clock& operator=(const Clock&) = delete;

  template <class Run>
  double seconds(const Run& run) {
    check(cudaMemsetAsync(flush_.get(), 0, kFlush));  // also long enough to hide the launch
    check(cudaEventRecord(begin_));
    run();
    check(cudaEventRecord(end_));
    check(cudaEventSynchronize(end_));
    float milliseconds = 0;
    check(cudaEventElapsedTime(&milliseconds, begin_, end_));
    return 1e-3 * milliseconds;
  }

 private:
  static constexpr std::size_t kFlush = std::size_t{256} << 20;
  Memory flush_;
  cudaEvent_t begin_ = nullptr, end_ = nullptr;
};

inline GpuLimits current_gpu_limits() {
  int device = 0;
  check(cudaGetDevice(&device));
  return gpu_limits(device);
}

inline bool has_gpu() {
  int devices = 0;
  return cudaGetDeviceCount(&devices) == cudaSuccess && devices > 0;
}

// Times what `run` puts on the default stream, beside a copy of as many bytes.
template <class Run>
void measure_cuda(benchmark::State& state, std::int64_t n, std::int64_t bytes, const Run& run) {
  Clock clock;
  const auto half = static_cast<std::size_t>(bytes / 2);
  double copy = 0;
  {
    const Memory from = allocate(half), to = allocate(half);
    std::vector<double> times;
    for (int i = 0; i < 10; ++i)
      times.push_back(
          clock.seconds([&] { check(cudaMemcpyAsync(to.get(), from.get(), half, cudaMemcpyDeviceToDevice)); }));
    std::nth_element(times.begin(), times.begin() + 5, times.end());
    copy = static_cast<double>(bytes) / times[5];
  }
  clock.seconds(run);
  double total = 0;
  for (auto _ : state) {
    const double time = clock.seconds(run);
    state.SetIterationTime(time);
    total += time;
  }
  report(state, n, bytes, total, copy);
}

// What is thrown becomes the benchmark's error.
template <class Run>
auto reporting_errors(const Run& run) {
  return [run](benchmark::State& state) {
    try {
      run(state);
    } catch (const std::exception& error) {
      state.SkipWithError(error.what());
    }
  };
}

}  // namespace freqrank::bench
