// The executor's test kernels, launched on a GPU: that they compile is what is checked here.

#include "machine_kernels.h"

namespace freqrank::machine_tests {

void launch_all(Queue& queue) {
  queue.launch<Reverse<float>>({1, 32, 400}, {});
  queue.launch<Reverse<bfloat16>>({1, 32, 400}, {});
  queue.launch<Pipeline>({1, 64, 8 * Pipeline::chunk}, {});
  queue.launch<Transpose>({1, 256, 33 * 32 * 4}, {});
  queue.launch<Neighbours>({1, 128, 512}, {});
  queue.launch<Histogram>({1, 64, 0}, {});
  queue.launch<Sums>({1, 256, 32}, {});
  queue.launch<Product<bfloat16>>({1, 32, 4096}, {});
  queue.launch<Product<float16>>({1, 32, 4096}, {});
  queue.launch<Product<tf32>>({1, 32, 4096}, {});
  queue.launch<Product<double>>({1, 32, 4096}, {});
  queue.launch<Product<std::int8_t>>({1, 32, 4096}, {});
  queue.launch<MatrixLoads>({1, 32, 1024}, {});
}

}  // namespace freqrank::machine_tests
