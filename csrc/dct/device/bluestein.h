#pragma once
// Lengths with large prime factors: Bluestein's convolution with a chirp, by two FFTs of a smooth length in the same
// block's shared memory.

#include "dct/device/mixed_radix.h"

namespace freqrank::dct::device {

template <class T>
struct BluesteinKernel {
  using Params = RowParams<T>;
  static constexpr const char* name = sizeof(T) == 8 ? "dct_bluestein_double" : "dct_bluestein";
  static constexpr int max_threads = block_threads_limit(sizeof(T) == 8), min_blocks = 1;
  SIMT_DEVICE static void run(const Params& p) {
    const BlockFft& f = p.fft;
    transform_rows(p, [&](const Rows<T>& z, int rows) {
      each(z, rows, f.by_inner,
           [&](int row, int k) { return k < f.n ? z.load(row, k) * table_at(p.chirp, k) : Complex<T>{T(0), T(0)}; });
      for (int i = 0; i < 2 * f.stages; ++i) {
        if (i == f.stages) {  // the second FFT is an inverse one: real and imaginary parts exchanged
          each(z, rows, f.by_inner, [&](int row, int k) { return swapped(z.load(row, k) * table_at(p.spectrum, k)); });
        }
        fft_stage(f, i < f.stages ? i : i - f.stages, z, rows, p.roots);
      }
      each(z, rows, f.by_n, [&](int row, int k) { return swapped(z.load(row, k)) * table_at(p.chirp, k); });
    });
  }
};

template <class Queue>
void enqueue_bluestein(const Step& step, const StepPointers& pointers, Queue& queue) {
  const simt::Grid grid{step.blocks, step.threads, step.shared_bytes};
  if (step.wide) {
    queue.template launch<BluesteinKernel<double>>(grid, row_params<double>(step, pointers, queue));
  } else {
    queue.template launch<BluesteinKernel<float>>(grid, row_params<float>(step, pointers, queue));
  }
}

}  // namespace freqrank::dct::device
