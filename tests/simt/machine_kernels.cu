// The executor's test kernels, launched on a GPU: that they compile is what is checked here.

#include "machine_kernels.h"

namespace freqrank::machine_tests {

void launch_all(simt::Queue& queue) {
  queue.launch<Reverse<float>>({1, 32, 400}, {});
  queue.launch<Reverse<bfloat16>>({1, 32, 400}, {});
}

}  // namespace freqrank::machine_tests
