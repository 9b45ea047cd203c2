#include <gtest/gtest.h>

#include <atomic>
#include <cmath>
#include <vector>

#include "common/half.h"
#include "common/parallel.h"

namespace freqrank {

TEST(Parallel, CoversEveryIndexOnce) {
  for (const auto& parallel_for : {serial(), thread_pool(1), thread_pool(4)}) {
    for (std::int64_t n : {0, 1, 2, 7, 1000}) {
      std::vector<std::atomic<int>> seen(static_cast<std::size_t>(n));
      parallel_for(n, 3, [&](std::int64_t begin, std::int64_t end) {
        for (auto i = begin; i < end; ++i) seen[static_cast<std::size_t>(i)]++;
      });
      for (auto& count : seen) EXPECT_EQ(count, 1);
    }
  }
}

TEST(Parallel, NestedCallsRunSerially) {
  const auto parallel_for = thread_pool(3);
  std::atomic<int> total{0};
  parallel_for(6, 1, [&](std::int64_t begin, std::int64_t end) {
    parallel_for(10, 1, [&](std::int64_t b, std::int64_t e) { total += static_cast<int>((e - b) * (end - begin)); });
  });
  EXPECT_EQ(total, 60);
}

TEST(Half, EveryFloat16RoundTrips) {
  for (std::uint32_t bits = 0; bits < 0x10000; ++bits) {
    const float16 h{static_cast<std::uint16_t>(bits)};
    const float x = to_float(h);
    if (std::isnan(x)) {
      EXPECT_TRUE(std::isnan(to_float(from_float<float16>(x))));
    } else {
      EXPECT_EQ(from_float<float16>(x).bits, h.bits);
    }
  }
}

TEST(Half, RoundsToNearestEven) {
  for (std::uint32_t bits = 0; bits < 0x7c00; ++bits) {
    const float low = to_float(float16{static_cast<std::uint16_t>(bits)});
    const float high = bits + 1 == 0x7c00 ? 65536.0f : to_float(float16{static_cast<std::uint16_t>(bits + 1)});
    const float middle = low + (high - low) / 2;
    EXPECT_EQ(from_float<float16>(middle).bits, bits & 1 ? bits + 1 : bits);
    EXPECT_EQ(from_float<float16>(std::nextafter(middle, 0.0f)).bits, bits);
    EXPECT_EQ(from_float<float16>(std::nextafter(middle, 1e9f)).bits, bits + 1);
  }
  EXPECT_EQ(from_float<bfloat16>(1.00390625f).bits, 0x3f80);
  EXPECT_EQ(from_float<bfloat16>(1.01171875f).bits, 0x3f82);
  EXPECT_TRUE(std::isnan(to_float(from_float<bfloat16>(NAN))));
}

}  // namespace freqrank
