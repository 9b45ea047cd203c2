#pragma once
// Kernels for the executor's own tests: right ones and, by a run-time switch, wrong ones. Compiled by nvcc as well.

#include "simt/simt.h"

namespace freqrank::machine_tests {

// y[b, i] = x[b, n - 1 - i] through shared memory.
template <class T>
struct Reverse {
  struct Params {
    simt::global<const T> x;
    simt::global<T> y;
    int n;
    bool missing_barrier;
  };
  static constexpr const char* name = "test_reverse";
  static constexpr int max_threads = 256, min_blocks = 2;
  SIMT_DEVICE static void run(const Params& p) {
    const auto tile = simt::shared_array<float>(0, p.n);
    const auto x = p.x + simt::block() * p.n;
    const auto y = p.y + simt::block() * p.n;
    for (int i = simt::thread(); i < p.n; i += simt::threads()) tile.store(i, simt::to_float(x.load(i)));
    if (!p.missing_barrier) simt::barrier();
    for (int i = simt::thread(); i < p.n; i += simt::threads()) y.store(i, simt::from_float<T>(tile.load(p.n - 1 - i)));
  }
};

}  // namespace freqrank::machine_tests
