// The operations of csrc/simt on a GPU: the kernels on which the host executor is tested, against the same
// expectations. A plain program like test_dct_cuda; exit status 77 without a GPU.

#include <cuda_runtime_api.h>

#include <cstdio>
#include <stdexcept>

#include "../simt/machine_cases.h"

namespace freqrank::machine_tests {
namespace {

void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(explain_cuda_error(error));
}

class CudaDevice {
 public:
  CudaDevice() : queue_(nullptr) {}
  ~CudaDevice() {
    for (void* p : memory_) cudaFree(p);
  }
  CudaDevice(const CudaDevice&) = delete;
  CudaDevice& operator=(const CudaDevice&) = delete;

  Queue& queue() { return queue_; }
  template <class T>
  T* put(const std::vector<T>& values) {
    T* const to = make<T>(values.size());
    check(cudaMemcpy(to, values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice));
    return to;
  }
  template <class T>
  T* make(std::size_t count) {
    void* p = nullptr;
    check(cudaMalloc(&p, count * sizeof(T)));
    memory_.push_back(p);
    check(cudaMemset(p, 0xff, count * sizeof(T)));
    return static_cast<T*>(p);
  }
  template <class T>
  std::vector<T> get(const T* from, std::size_t count) {
    if (!queue_.ok()) throw std::runtime_error(queue_.message());
    std::vector<T> out(count);
    check(cudaMemcpy(out.data(), from, count * sizeof(T), cudaMemcpyDeviceToHost));
    return out;
  }

 private:
  Queue queue_;
  std::vector<void*> memory_;
};

}  // namespace
}  // namespace freqrank::machine_tests

int main() {
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
    std::puts("no GPU");
    return 77;
  }
  freqrank::machine_tests::Problems problems;
  try {
    freqrank::machine_tests::CudaDevice device;
    problems = freqrank::machine_tests::run_all_cases(device);
  } catch (const std::exception& e) {
    problems.push_back(e.what());
  }
  for (const std::string& problem : problems) std::printf("FAILED %s\n", problem.c_str());
  std::printf("%zu problems, simt operations\n", problems.size());
  return problems.empty() ? 0 : 1;
}
