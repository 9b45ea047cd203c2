// Twiddle tables, accurate to double.
#include <vector>

#include "common/isa.h"
#include "dct/dct.h"
#include "dct/kernels.h"
#include "dct/unit_root.h"

namespace freqrank::dct {

namespace {

// Twiddles of a stage of radix r that splits a length n = r m: for j = 1 .. r-1 the m real parts, then the m imaginary
// parts, of exp(-2 pi i j p / n).
template <class T>
void fill_stages(const Stages& stages, T* table) {
  std::int64_t n = stages.n;
  for (int stage = 0; stage < stages.count; ++stage) {
    const std::int64_t radix = stages.radix[stage], m = n / radix;
    T* at = table + stages.twiddles[stage];
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

std::uint64_t power(std::uint64_t base, std::uint64_t exponent, std::uint64_t modulus) {
  std::uint64_t result = 1;
  for (; exponent > 0; exponent /= 2) {
    if (exponent % 2) result = result * base % modulus;
    base = base * base % modulus;
  }
  return result;
}

// The smallest generator of the multiplicative group modulo a prime below 2^32.
std::uint64_t generator(std::uint64_t prime) {
  std::vector<std::uint64_t> factors;
  std::uint64_t rest = prime - 1;
  for (std::uint64_t p = 2; p * p <= rest; ++p) {
    if (rest % p == 0) factors.push_back(p);
    while (rest % p == 0) rest /= p;
  }
  if (rest > 1) factors.push_back(rest);
  for (std::uint64_t g = 2;; ++g) {
    bool generates = true;
    for (const std::uint64_t p : factors) generates = generates && power(g, (prime - 1) / p, prime) != 1;
    if (generates) return g;
  }
}

template <class T>
void fill_convolution(const Convolution& c, T* table) {
  fill_stages(c.stages, table);
  const auto prime = static_cast<std::uint64_t>(c.prime), g = generator(prime), inverse = power(g, prime - 2, prime);
  auto* gather = reinterpret_cast<std::uint32_t*>(table + c.gather);
  auto* scatter = reinterpret_cast<std::uint32_t*>(table + c.scatter);
  const std::int64_t count = c.prime - 1, n = c.stages.n, length = c.real ? 2 * n : n;
  std::vector<double> re(static_cast<std::size_t>(length)), im(re.size()), other_re(re.size()), other_im(re.size());
  std::uint64_t up = 1, down = 1;
  for (std::int64_t d = 0; d < count; ++d) {
    gather[d] = static_cast<std::uint32_t>(down);
    scatter[d] = static_cast<std::uint32_t>(up);
    const UnitRoot w = unit_root(static_cast<std::int64_t>(up), c.prime);
    for (const std::int64_t at : {d, d == 0 ? d : length - count + d}) {  // the second for the wrapped half
      const auto i = static_cast<std::size_t>(c.real ? at / 2 : at);
      if (c.real) {
        (at % 2 ? im : re)[i] = w.cos + w.sin;
      } else {
        re[i] = w.cos;
        im[i] = -w.sin;
      }
    }
    up = up * g % prime;
    down = down * inverse % prime;
  }
  Stages stages = c.stages;  // with tables of their own
  for (int i = 0; i < stages.count; ++i) stages.twiddles[i] -= c.stages.twiddles[0];
  std::vector<double> twiddles(static_cast<std::size_t>(c.gather - c.stages.twiddles[0]));
  fill_stages(stages, twiddles.data());
  FREQRANK_DISPATCH(smooth_double, stages, twiddles.data(), re.data(), im.data(), other_re.data(), other_im.data());
  T* at = table + c.spectrum;
  for (std::int64_t k = 0; k < n; ++k) {
    const auto i = static_cast<std::size_t>(k), mirrored = static_cast<std::size_t>((n - k) % n);
    if (!c.real) {
      at[k] = static_cast<T>(re[i] / static_cast<double>(n));
      at[n + k] = static_cast<T>(im[i] / static_cast<double>(n));
      continue;
    }
    // With E and O the spectra of the filter's even and odd elements and w = exp(-pi i k / n), the packed spectrum Z of
    // the input becomes Z_k (E - w O sin(pi k / n)) + conj(Z_n-k) i w O cos(pi k / n).
    const double scale = 0.25 / static_cast<double>(n);
    const double even_re = (re[i] + re[mirrored]) * scale, even_im = (im[i] - im[mirrored]) * scale;
    const double odd_re = (im[i] + im[mirrored]) * scale, odd_im = (re[mirrored] - re[i]) * scale;
    const UnitRoot w = unit_root(k, 2 * n);
    const double turned_re = odd_re * w.cos + odd_im * w.sin, turned_im = odd_im * w.cos - odd_re * w.sin;
    at[k] = static_cast<T>(even_re - turned_re * w.sin);
    at[n + k] = static_cast<T>(even_im - turned_im * w.sin);
    at[2 * n + k] = static_cast<T>(-turned_im * w.cos);
    at[3 * n + k] = static_cast<T>(turned_re * w.cos);
  }
}

template <class T>
void fill_fft(const Fft& fft, T* table) {
  fill_stages(fft.stages, table);
  for (const Convolution& c : fft.convolutions) fill_convolution(c, table);
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
  const std::int64_t n = row.n, length = row.fft.stages.n;
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
