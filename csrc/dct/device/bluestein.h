#pragma once
// Lengths with large prime factors: Bluestein's convolution with a chirp, by two FFTs of a smooth length in the same
// block's shared memory.

#include "dct/device/mixed_radix.h"

namespace freqrank::dct::device {

// The FFT, of a length of any kind, of every row.
template <class T>
SIMT_DEVICE void fft_of_any_length(const RowParams<T>& p, const Rows<T>& z, int rows) {
  const BlockFft& f = p.fft;
  const bool bluestein = f.inner != f.n;
  if (bluestein) {
    each(z, rows, f.by_inner,
         [&](int row, int k) { return k < f.inputs ? z.load(row, k) * table_at(p.chirp, k) : Complex<T>{T(0), T(0)}; });
  }
  const int stages = bluestein ? 2 * f.stages : f.stages;
  for (int i = 0; i < stages; ++i) {
    if (bluestein && i == f.stages) {  // the second FFT is an inverse one: real and imaginary parts exchanged
      each(z, rows, f.by_inner, [&](int row, int k) { return swapped(z.load(row, k) * table_at(p.spectrum, k)); });
    }
    fft_stage(f, i < f.stages ? i : i - f.stages, z, rows, p.roots);
  }
  if (bluestein) {
    each(z, rows, f.by_n, [&](int row, int k) { return swapped(z.load(row, k)) * table_at(p.chirp, k); });
  }
}

template <class T>
struct BluesteinKernel {
  using Params = RowParams<T>;
  static constexpr const char* name = sizeof(T) == 8 ? "dct_bluestein_double" : "dct_bluestein";
  static constexpr int max_threads = block_threads_limit(sizeof(T) == 8), min_blocks = 1;
  SIMT_DEVICE static void run(const Params& p) {
    transform_rows(p, [&](const Rows<T>& z, int rows) { fft_of_any_length(p, z, rows); });
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
