// Twiddle tables, accurate to double.
#include <vector>

#include "dct/dct.h"
#include "dct/kernels.h"
#include "dct/unit_root.h"

namespace freqrank::dct {

namespace {

// Twiddles of a stage of radix r that splits a length n = r m: for j = 1 .. r-1 the m real parts, then the m imaginary
// parts, of exp(-2 pi i j p / n).
template <class T>
void fill_stages(const Fft& fft, T* table) {
  std::int64_t n = fft.inner;
  for (int stage = 0; stage < fft.stages; ++stage) {
    const std::int64_t radix = fft.radix[stage], m = n / radix;
    T* at = table + fft.twiddles[stage];
    for (std::int64_t j = 1; j < radix; ++j, at += 2 * m) {
      for (std::int64_t p = 0; p < m; ++p) {
        const UnitRoot w = unit_root(j * p, n);
        at[p] = static_cast<T>(w.cos);
        at[m + p] = static_cast<T>(-w.sin);
      }
    }
    n = m;
  }
}

template <class T>
void fill_fft(const Fft& fft, T* table) {
  fill_stages(fft, table);
  if (!fft.bluestein()) return;
  // chirp exp(-pi i k^2 / n); its conjugate, wrapped round, is what Bluestein's convolution filters with
  const auto length = static_cast<std::size_t>(fft.inner);
  std::vector<double> re(length), im(length), other_re(length), other_im(length);
  std::int64_t square = 0;  // k^2 mod 2n
  for (std::int64_t k = 0; k < fft.n; ++k) {
    const UnitRoot w = unit_root(square, 2 * fft.n);
    table[fft.chirp + k] = static_cast<T>(w.cos);
    table[fft.chirp + fft.n + k] = static_cast<T>(-w.sin);
    const auto mirrored = static_cast<std::size_t>(k == 0 ? 0 : fft.inner - k);
    re[static_cast<std::size_t>(k)] = re[mirrored] = w.cos;
    im[static_cast<std::size_t>(k)] = im[mirrored] = w.sin;
    square = (square + 2 * k + 1) % (2 * fft.n);
  }
  std::vector<double> twiddles(static_cast<std::size_t>(fft.chirp));
  fill_stages(fft, twiddles.data());
  baseline::fft_double(fft, twiddles.data(), re.data(), im.data(), other_re.data(), other_im.data());
  const double inverse = 1.0 / static_cast<double>(fft.inner);
  for (std::size_t k = 0; k < length; ++k) {
    table[fft.spectrum + static_cast<std::int64_t>(k)] = static_cast<T>(re[k] * inverse);
    table[fft.spectrum + fft.inner + static_cast<std::int64_t>(k)] = static_cast<T>(im[k] * inverse);
  }
}

// `count` values factor * exp(2 pi i (first + step k) / period): the cosines, then the sines
template <class T>
void fill_units(T* at, std::int64_t count, double factor, std::int64_t first, std::int64_t step, std::int64_t period) {
  for (std::int64_t k = 0; k < count; ++k) {
    const UnitRoot w = unit_root(first + step * k, period);
    at[k] = static_cast<T>(factor * w.cos);
    at[count + k] = static_cast<T>(factor * w.sin);
  }
}

template <class T>
void fill(const Row& row, T* table) {
  const std::int64_t n = row.n, length = row.fft.n;
  fill_fft(row.fft, table);
  switch (row.type) {
    case 1: fill_units(table + row.rotation, length / 2 + 1, 0.5 * row.scale, 0, 1, 2 * length); break;
    case 4:
      if (row.even) {
        fill_units(table + row.pre, length, 1.0, 0, 1, 2 * n);
        fill_units(table + row.post, length, 2.0 * row.scale, 1, 4, 8 * n);
      } else {
        fill_units(table + row.post, 1, 2.0 * row.scale, n, 0, 8);
      }
      break;
    default:
      if (row.even) {
        fill_units(table + row.rotation, length / 2 + 1, 1.0, 0, 1, n);
        fill_units(table + row.post, length + 1, row.scale, 0, 1, 4 * n);
      } else {
        fill_units(table + row.post, n / 2 + 1, row.type == 2 ? 2.0 * row.scale : row.scale, 0, 1, 4 * n);
      }
  }
}

}  // namespace

void fill_table(const Row& row, void* table) {
  if (row.wide) {
    fill(row, static_cast<double*>(table));
  } else {
    fill(row, static_cast<float*>(table));
  }
}

}  // namespace freqrank::dct
