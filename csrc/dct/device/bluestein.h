#pragma once
// Lengths with large prime factors: Bluestein's convolution with a chirp, by an FFT of a smooth length and one back in
// the same block's shared memory. An inverse FFT is a forward one with real and imaginary parts exchanged.
//
// Nothing but stages of the two FFTs goes through shared memory: the first one multiplies by the chirp what it reads,
// the last one what it writes; the last stage of the first FFT and the first one back meet in registers, with the
// product with the filter's spectrum between, for they have the same radix and so the same elements in each thread. An
// odd row of type II or III is real on one side, half of a spectrum on the other: these stages take it and give it as
// it is.

#include "dct/device/mixed_radix.h"

namespace freqrank::dct::device {

// Element j of what the convolution takes, times the chirp.
template <class T>
SIMT_DEVICE Complex<T> convolution_input(const RowParams<T>& p, const Rows<T>& z, int row, int j) {
  if (j >= p.fft.inputs) return {T(0), T(0)};
  const Complex<T> chirp = table_at(p.chirp_in, j);
  if (!p.fused) return z.load(row, j) * chirp;
  const T x = z.real(row, j);
  if (p.type == 2) return {x * chirp.re, x * chirp.im};
  // 2 V_j = 2 exp(i pi j / 2n) (x_j - i x_n-j), exchanged; twice, in place of V_n-j: the real part is the same
  const T twice = p.scale + p.scale;
  if (j == 0) return Complex<T>{T(0), x * twice * p.in_end} * chirp;
  return Complex<T>{-z.real(row, p.tile.n - j) * twice, x * twice} * chirp;
}

// Element k of what it gives, which still lacks the chirp.
template <class T>
SIMT_DEVICE void convolution_output(const RowParams<T>& p, const Rows<T>& z, int row, int k, const Complex<T>& a) {
  if (k >= p.fft.outputs) return;
  const Complex<T> y = swapped(a) * table_at(p.chirp_out, k);
  if (!p.fused) {
    z.store(row, k, y);
  } else if (p.type == 3) {
    z.set_real(row, k, y.im);
  } else {
    const T twice = p.scale + p.scale;
    z.set_real(row, k, y.re * (k == 0 ? twice * p.out_end : twice));
    if (k != 0) z.set_real(row, p.tile.n - k, -y.im * twice);
  }
}

// The first stage of the first FFT, or the last one of the second.
template <int R, class T>
SIMT_DEVICE void outer_stage(const RowParams<T>& p, bool first, const Rows<T>& z, int rows) {
  const BlockFft::Stage& s = p.fft.stage[0];
  const int count = s.by_count.divisor();
  staged<kBlockPerThread / R, Butterfly<R, T>>(
      rows, s.by_count,
      [&](int row, int u) {
        Butterfly<R, T> b;
        SIMT_UNROLL
        for (int t = 0; t < R; ++t) {
          const int j = u + t * count;
          b.a[t] = first ? convolution_input(p, z, row, j) : z.load(row, j);
        }
        butterfly<R>(b.a);
        if (first) turn<R>(b.a, table_at(p.roots, u));
        return b;
      },
      [&](int row, int u, const Butterfly<R, T>& b) {
        SIMT_UNROLL
        for (int t = 0; t < R; ++t) {
          if (first) {
            z.store(row, R * u + t, b.a[t]);
          } else {
            convolution_output(p, z, row, u + t * count, b.a[t]);
          }
        }
      });
}

// The last stage of the first FFT, the product with the spectrum and the first stage of the second.
template <int R, class T>
SIMT_DEVICE void middle_stage(const RowParams<T>& p, const Rows<T>& z, int rows) {
  const BlockFft::Stage& s = p.fft.stage[p.fft.stages];
  const int count = s.by_count.divisor();
  staged<kBlockPerThread / R, Butterfly<R, T>>(
      rows, s.by_count,
      [&](int row, int u) {
        Butterfly<R, T> b;
        SIMT_UNROLL
        for (int t = 0; t < R; ++t) b.a[t] = z.load(row, u + t * count);
        butterfly<R>(b.a);
        SIMT_UNROLL
        for (int t = 0; t < R; ++t) b.a[t] = swapped(b.a[t] * table_at(p.spectrum, u + t * count));
        butterfly<R>(b.a);
        turn<R>(b.a, table_at(p.roots, u));
        return b;
      },
      [&](int row, int u, const Butterfly<R, T>& b) {
        SIMT_UNROLL
        for (int t = 0; t < R; ++t) z.store(row, R * u + t, b.a[t]);
      });
}

// The stages between.
template <class T>
SIMT_DEVICE void inner_stage(const BlockFft& f, int i, const Rows<T>& z, int rows, simt::global<const T> roots) {
  const BlockFft::Stage& s = f.stage[i];
  switch (s.radix) {
    case 5: stage<5>(f, s, z, rows, roots); break;
    case 8: stage<8>(f, s, z, rows, roots); break;
    case 10: stage<10>(f, s, z, rows, roots); break;
    case 12: stage<12>(f, s, z, rows, roots); break;
    default: stage<16>(f, s, z, rows, roots); break;
  }
}

// The stages of one FFT, or those of a convolution, of which inner(i) does the ones between; `Tile`: of a tile's side.
template <bool Tile, class T, class Inner>
SIMT_DEVICE void all_stages(const RowParams<T>& p, const Rows<T>& z, int rows, const Inner& inner) {
  const BlockFft& f = p.fft;
  const bool bluestein = f.bluestein();
  const int middle = bluestein ? f.stages : -1, last = (bluestein ? 2 : 1) * f.stages - 1;
  SIMT_NO_UNROLL
  for (int i = 0; i <= last; ++i) {
    const int radix = f.stage[i].radix;
    if (bluestein && (i == 0 || i == last)) {
      if (radix == 8) {
        outer_stage<8>(p, i == 0, z, rows);
      } else if constexpr (convolution_first_limit(Tile) == 16) {
        outer_stage<16>(p, i == 0, z, rows);
      }
    } else if (i == middle) {
      if (radix == 4) {
        middle_stage<4>(p, z, rows);
      } else if (radix == 8) {
        middle_stage<8>(p, z, rows);
      } else if constexpr (convolution_last_limit(Tile, sizeof(T) == 8) == 16) {
        middle_stage<16>(p, z, rows);
      }
    } else if (i != middle - 1) {
      inner(i);
    }
  }
}

template <class T>
struct BluesteinKernel {
  using Params = RowParams<T>;
  static constexpr const char* name = sizeof(T) == 8 ? "dct_bluestein_double" : "dct_bluestein";
  static constexpr int max_threads = block_threads_limit(sizeof(T) == 8), min_blocks = 1;
  SIMT_DEVICE static void run(const Params& p) {
    transform_rows(p, [&](const Rows<T>& z, int rows) {
      if (!p.fused) before_fft(p, z, rows);
      all_stages<false>(p, z, rows, [&](int i) { inner_stage(p.fft, i, z, rows, p.roots); });
      if (!p.fused) after_fft(p, z, rows);
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
