// The executor itself: right kernels give the same bits for every seed, planted faults are reported by kernel and line.

#include <gtest/gtest.h>

#include <vector>

#include "machine_kernels.h"

namespace freqrank::machine_tests {
namespace {

TEST(Machine, reverses_through_shared_memory) {
  std::vector<float> x(3 * 100), y(x.size());
  for (std::size_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>(i);
  for (std::uint64_t seed : {1, 2, 3}) {
    simt::Executor executor(seed);
    simt::Queue queue(executor);
    queue.launch<Reverse<float>>({3, 64, 400},
                                 {queue.view<const float>(x.data(), 0, 300), queue.view(y.data(), 0, 300), 100, false});
    for (int i = 0; i < 300; ++i) ASSERT_EQ(y[i], x[i / 100 * 100 + 99 - i % 100]);
  }
}

}  // namespace
}  // namespace freqrank::machine_tests
