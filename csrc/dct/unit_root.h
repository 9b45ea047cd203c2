#pragma once
// Roots of unity, accurate to a unit in the last place of double, for tables made on the host and on the device alike:
// the angle is reduced in integers, the division keeps its remainder, sine and cosine are Taylor sums on [0, pi/4].

#include <cmath>
#include <cstdint>

#include "common/half.h"

namespace freqrank::dct {

struct UnitRoot {
  double cos, sin;
};

// exp(2 pi i k / n) for 0 <= k < 2^61, 0 < n < 2^51
FREQRANK_INLINE UnitRoot unit_root(std::int64_t k, std::int64_t n) {
  const std::int64_t quarters = 4 * k / n;
  std::int64_t rest = 4 * k - quarters * n;  // within the quadrant the angle is pi/2 rest / n
  const bool upper = 2 * rest > n;
  if (upper) rest = n - rest;

  // The angle as x + x_low. The fused multiply-adds are there for their exact products.
  constexpr double half_pi = 1.57079632679489655800, half_pi_low = 6.12323399573676603587e-17;
  const double numerator = static_cast<double>(rest), denominator = static_cast<double>(n);
  const double ratio = numerator / denominator;
  const double ratio_low = fma(-ratio, denominator, numerator) / denominator;
  const double x = half_pi * ratio;
  const double x_low = fma(half_pi, ratio, -x) + (half_pi_low * ratio + half_pi * ratio_low);
  const double square = x * x, square_low = fma(x, x, -square);

  double s = 1.0 / 355687428096000;  // 1 / 17!
  s = s * square - 1.0 / 1307674368000;
  s = s * square + 1.0 / 6227020800;
  s = s * square - 1.0 / 39916800;
  s = s * square + 1.0 / 362880;
  s = s * square - 1.0 / 5040;
  s = s * square + 1.0 / 120;
  s = s * square - 1.0 / 6;
  const double half_square = 0.5 * square;
  double sine = x + (square * x * s + (x_low - half_square * x_low));

  double c = 1.0 / 20922789888000;  // 1 / 16!
  c = c * square - 1.0 / 87178291200;
  c = c * square + 1.0 / 479001600;
  c = c * square - 1.0 / 3628800;
  c = c * square + 1.0 / 40320;
  c = c * square - 1.0 / 720;
  c = c * square + 1.0 / 24;
  const double near_one = 1.0 - half_square, lost = (1.0 - near_one) - half_square;
  double cosine = near_one + (square * square * c + (lost - (x * x_low + 0.5 * square_low)));

  if (upper) {
    const double swapped = sine;
    sine = cosine;
    cosine = swapped;
  }
  switch (quarters & 3) {
    case 0: return {cosine, sine};
    case 1: return {-sine, cosine};
    case 2: return {-cosine, -sine};
    default: return {sine, -cosine};
  }
}

}  // namespace freqrank::dct
