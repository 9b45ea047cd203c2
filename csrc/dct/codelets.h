#pragma once
// Small complex DFTs in registers, the same for a GPU thread (V = float or double) and for the CPU (V a number or a GNU
// vector with one transform in each lane). Roots of unity are compile-time constants.

#include "dct/arithmetic.h"

namespace freqrank::dct {

// cos and sin of 2 pi k / R, R odd, 0 < k < R
template <int R>
FREQRANK_INLINE constexpr double root_cosine(int k) {
  k = 2 * k < R ? k : R - k;
  if constexpr (R == 3) {
    return -0.5;
  } else if constexpr (R == 5) {
    return k == 1 ? 0.3090169943749474241 : -0.8090169943749474241;
  } else if constexpr (R == 7) {
    constexpr double c[] = {0.62348980185873353053, -0.22252093395631440429, -0.90096886790241912624};
    return c[k - 1];
  } else if constexpr (R == 11) {
    constexpr double c[] = {0.84125353283118116886, 0.41541501300188642553, -0.14231483827328514044,
                            -0.65486073394528506406, -0.95949297361449738989};
    return c[k - 1];
  } else {
    static_assert(R == 13, "no such root");
    constexpr double c[] = {0.8854560256532098959,   0.56806474673115580251,  0.12053668025532305335,
                            -0.35460488704253562597, -0.74851074817110109863, -0.97094181742605202716};
    return c[k - 1];
  }
}

template <int R>
FREQRANK_INLINE constexpr double root_sine(int k) {
  const bool lower = 2 * k > R;
  k = lower ? R - k : k;
  double s = 0.86602540378443864676;
  if constexpr (R == 5) {
    s = k == 1 ? 0.95105651629515357212 : 0.58778525229247312917;
  } else if constexpr (R == 7) {
    constexpr double sines[] = {0.78183148246802980871, 0.97492791218182360702, 0.43388373911755812048};
    s = sines[k - 1];
  } else if constexpr (R == 11) {
    constexpr double sines[] = {0.54064081745559758211, 0.90963199535451837141, 0.98982144188093273238,
                                0.75574957435425828377, 0.28173255684142969771};
    s = sines[k - 1];
  } else if constexpr (R == 13) {
    constexpr double sines[] = {0.46472317204376854566, 0.82298386589365639458, 0.9927088740980539928,
                                0.93501624268541482344, 0.66312265824079520238, 0.23931566428755776715};
    s = sines[k - 1];
  } else {
    static_assert(R == 3, "no such root");
  }
  return lower ? -s : s;
}

// DFT with exp(-2 pi i jk / R), in place, natural order. R = 2, 3, 4, 5, 7, 8, 11, 13, 16.
template <int R, class V>
FREQRANK_INLINE void butterfly(Complex<V>* a) {
  using T = Lane<V>;
  if constexpr (R == 2) {
    const Complex<V> b = a[1];
    a[1] = a[0] - b;
    a[0] = a[0] + b;
  } else if constexpr (R == 4) {
    const Complex<V> s02 = a[0] + a[2], d02 = a[0] - a[2], s13 = a[1] + a[3], d13 = a[1] - a[3];
    a[0] = s02 + s13;
    a[1] = {d02.re + d13.im, d02.im - d13.re};
    a[2] = s02 - s13;
    a[3] = {d02.re - d13.im, d02.im + d13.re};
  } else if constexpr (R == 8) {
    const V half = spread<V>(static_cast<T>(0.70710678118654752440));
    Complex<V> even[4] = {a[0], a[2], a[4], a[6]}, odd[4] = {a[1], a[3], a[5], a[7]};
    butterfly<4>(even);
    butterfly<4>(odd);
    odd[1] = {(odd[1].re + odd[1].im) * half, (odd[1].im - odd[1].re) * half};
    odd[2] = {odd[2].im, -odd[2].re};
    odd[3] = {(odd[3].im - odd[3].re) * half, (odd[3].re + odd[3].im) * -half};
    FREQRANK_UNROLL
    for (int k = 0; k < 4; ++k) {
      a[k] = even[k] + odd[k];
      a[k + 4] = even[k] - odd[k];
    }
  } else if constexpr (R == 16) {
    constexpr double c = 0.92387953251128675613, s = 0.38268343236508977173, h = 0.70710678118654752440;
    // exp(-2 pi i jt / 16) for j, t = 1 .. 3
    constexpr double re[] = {c, h, s, h, 0, -h, s, -h, -c}, im[] = {-s, -h, -c, -h, -1, -h, -c, -h, s};
    Complex<V> b[16];  // b[4 t + j]: output j of the DFT over a[t], a[t + 4], a[t + 8], a[t + 12]
    FREQRANK_UNROLL
    for (int t = 0; t < 4; ++t) {
      Complex<V> column[4] = {a[t], a[t + 4], a[t + 8], a[t + 12]};
      butterfly<4>(column);
      FREQRANK_UNROLL
      for (int j = 0; j < 4; ++j) {
        const int at = 3 * (t - 1) + j - 1;
        if (t == 0 || j == 0) {
          b[4 * t + j] = column[j];
        } else if (t == 2 && j == 2) {
          b[4 * t + j] = {column[j].im, -column[j].re};
        } else {
          b[4 * t + j] = column[j] * Complex<V>{spread<V>(static_cast<T>(re[at])), spread<V>(static_cast<T>(im[at]))};
        }
      }
    }
    FREQRANK_UNROLL
    for (int j = 0; j < 4; ++j) {
      Complex<V> row[4] = {b[j], b[4 + j], b[8 + j], b[12 + j]};
      butterfly<4>(row);
      FREQRANK_UNROLL
      for (int k = 0; k < 4; ++k) a[j + 4 * k] = row[k];
    }
  } else {
    constexpr int half = (R - 1) / 2;
    Complex<V> sum[half], difference[half];
    const Complex<V> first = a[0];
    FREQRANK_UNROLL
    for (int t = 0; t < half; ++t) {
      sum[t] = a[t + 1] + a[R - 1 - t];
      difference[t] = a[t + 1] - a[R - 1 - t];
      a[0] = a[0] + sum[t];
    }
    FREQRANK_UNROLL
    for (int j = 1; j <= half; ++j) {
      Complex<V> even = first, odd{};
      FREQRANK_UNROLL
      for (int t = 1; t <= half; ++t) {
        const V c = spread<V>(static_cast<T>(root_cosine<R>(j * t % R)));
        const V s = spread<V>(static_cast<T>(root_sine<R>(j * t % R)));
        const Complex<V>&p = sum[t - 1], &q = difference[t - 1];
        even = {multiply_add(p.re, c, even.re), multiply_add(p.im, c, even.im)};
        odd = t == 1 ? Complex<V>{q.re * s, q.im * s}
                     : Complex<V>{multiply_add(q.re, s, odd.re), multiply_add(q.im, s, odd.im)};
      }
      a[j] = {even.re + odd.im, even.im - odd.re};
      a[R - j] = {even.re - odd.im, even.im + odd.re};
    }
  }
}

}  // namespace freqrank::dct
