// On the current GPU, timed by events, the L2 cache overwritten before each run.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <memory>
#include <stdexcept>

#include "common/cuda_device.h"
#include "dct/launch.h"
#include "dct_cases.h"

namespace freqrank::bench {

namespace {

void check(cudaError_t status) {
  if (status != cudaSuccess) throw std::runtime_error(cudaGetErrorString(status));
}

using Memory = std::unique_ptr<void, cudaError_t (*)(void*)>;

Memory allocate(std::size_t bytes) {
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

void run_case(const DctCase& each, benchmark::State& state) {
  int device = 0;
  check(cudaGetDevice(&device));
  const dct::DevicePlan plan = dct::plan_device(each.problem(), gpu_limits(device));
  const auto half = static_cast<std::size_t>(each.bytes() / 2);
  const Memory in = allocate(half), out = allocate(half), workspace = allocate(dct::workspace_bytes(plan));
  const std::vector<float> host = normal(half / sizeof(float));
  check(cudaMemcpy(in.get(), host.data(), half, cudaMemcpyHostToDevice));
  Clock clock;
  std::vector<double> copies;
  for (int i = 0; i < 10; ++i)
    copies.push_back(
        clock.seconds([&] { check(cudaMemcpyAsync(out.get(), in.get(), half, cudaMemcpyDeviceToDevice)); }));
  std::nth_element(copies.begin(), copies.begin() + 5, copies.end());
  const auto transform = [&] { dct::run(plan, {in.get(), out.get()}, workspace.get(), nullptr); };
  clock.seconds(transform);
  double total = 0;
  for (auto _ : state) {
    const double time = clock.seconds(transform);
    state.SetIterationTime(time);
    total += time;
  }
  report(state, each.n, each.bytes(), total, static_cast<double>(each.bytes()) / copies[5]);
}

}  // namespace

void add_dct_cuda() {
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) return;
  for (const DctCase& each : dct_cases(1 << 26)) {
    add(each.name("cuda"), [each](benchmark::State& state) {
      try {
        run_case(each, state);
      } catch (const std::exception& error) {
        state.SkipWithError(error.what());
      }
    });
  }
}

}  // namespace freqrank::bench
