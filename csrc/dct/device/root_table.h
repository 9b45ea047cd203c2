#pragma once
// Roots of unity for all powers of two up to 2^16, 8 KB in the binary: exp(-2 pi i k / 2^16) is the product, in double,
// of an entry for the high and an entry for the low byte of k.

#include "dct/arithmetic.h"
#include "simt/simt.h"

namespace freqrank::dct::device {

struct RootTable {
  static constexpr int period = 1 << 16;
  double entry[512][2] = {};  // cos and -sin for k = 256 h, then for k = l

  constexpr RootTable() {
    for (int i = 0; i < 256; ++i) {
      set(i, 256 * i);
      set(256 + i, i);
    }
  }

 private:
  // The angle is reduced to an eighth of the circle in integers; the Taylor sums end below 2^-60.
  constexpr void set(int at, int k) {
    const int quadrant = k / (period / 4), rest = k % (period / 4);
    const bool upper = rest > period / 8;
    const double x = 2 * 3.14159265358979323846 / period * (upper ? period / 4 - rest : rest), square = x * x;
    double sine = 0, cosine = 0;
    for (int i = 18; i >= 2; i -= 2) {
      sine = (1 - sine) * square / (i * (i + 1));
      cosine = (1 - cosine) * square / (i * (i - 1));
    }
    sine = x - x * sine;
    cosine = 1 - cosine;
    if (upper) {
      const double swapped = sine;
      sine = cosine;
      cosine = swapped;
    }
    const double c = quadrant == 0 ? cosine : quadrant == 1 ? -sine : quadrant == 2 ? -cosine : sine;
    const double s = quadrant == 0 ? sine : quadrant == 1 ? cosine : quadrant == 2 ? -sine : -cosine;
    entry[at][0] = c;
    entry[at][1] = -s;
  }
};

SIMT_CONSTANT RootTable root_table;

// exp(-2 pi i k / 2^16), k of any sign and size
SIMT_DEVICE Complex<double> binary_root(int k) {
  const double* high = root_table.entry[(k >> 8) & 255];
  const double* low = root_table.entry[256 + (k & 255)];
  return {high[0] * low[0] - high[1] * low[1], high[0] * low[1] + high[1] * low[0]};
}

}  // namespace freqrank::dct::device
