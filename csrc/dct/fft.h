#pragma once
// Complex and real-input DFTs of any length, for W rows side by side or for one row (see dct/vectors.h).
// Stockham's self-sorting stages, decimated in frequency; a prime factor beyond the codelets by Rader's convolution.

#include "dct/codelets.h"
#include "dct/dct.h"
#include "dct/vectors.h"

namespace freqrank::dct::FREQRANK_ISA {

namespace {

template <class T>
struct Split {  // a complex array
  T *re, *im;
};

template <class T>
FREQRANK_INLINE void exchange(T& a, T& b) {
  const T c = a;
  a = b;
  b = c;
}

template <class A>
FREQRANK_INLINE Complex<typename A::V> load(const Split<typename A::T>& a, Index i) {
  return {A::load(a.re, i), A::load(a.im, i)};
}

template <class A>
FREQRANK_INLINE void store(const Split<typename A::T>& a, Index i, const Complex<typename A::V>& v) {
  A::store(a.re, i, v.re);
  A::store(a.im, i, v.im);
}

// The factor exp(-2 pi i jp / R m), j >= 1, of a stage: j by j its m real, then its m imaginary parts.
template <class A, class T>
FREQRANK_INLINE Complex<typename A::V> twiddle(const T* table, Index m, Index j, Index p) {
  const T* at = table + 2 * (j - 1) * m;
  return {A::factor(at, p), A::factor(at + m, p)};
}

// --- stages -------------------------------------------------------------------------------------------------------

// The rows that the next group reads, fetched a few cache lines at a time while this one computes: the memory has
// something to do throughout, and never more at once than it can take. A line of each row in turn: rows lie in
// different pages, which memory serves faster than one page after the other.
struct Ahead {
  const char* next = nullptr;
  Index lines = 0, at_once = 0;
  Index rows = 0, row_bytes = 0, row = 0;
};

FREQRANK_INLINE void fetch(Ahead& ahead) {
  if (__builtin_expect(ahead.lines <= 0, 1)) return;
  for (Index count = ahead.at_once; count > 0; --count) {
    __builtin_prefetch(ahead.next, 0, 2);  // into the second-level cache
    ahead.next += ahead.row_bytes;
    if (++ahead.row == ahead.rows) {
      ahead.row = 0;
      ahead.next += 64 - ahead.rows * ahead.row_bytes;
    }
  }
  ahead.lines -= ahead.at_once;
}

// Elements i + j gap of x, their DFT times factor(j), to elements o + j pitch of y.
template <int R, class A, class F>
FREQRANK_INLINE void step(const Split<typename A::T>& x, Index i, Index gap, const Split<typename A::T>& y, Index o,
                          Index pitch, const F& factor) {
  Complex<typename A::V> a[R];
  FREQRANK_UNROLL
  for (int j = 0; j < R; ++j) a[j] = load<A>(x, i + j * gap);
  butterfly<R>(a);
  store<A>(y, o, a[0]);
  FREQRANK_UNROLL
  for (int j = 1; j < R; ++j) store<A>(y, o + j * pitch, factor(a[j], j));
}

// Stores v[j] of lane l at element R l + j.
template <int R, class V>
FREQRANK_INLINE void store_interleaved(Lane<V>* to, V* v) {
  constexpr int W = width<V>;
  if constexpr (R % W == 0) {
    FREQRANK_UNROLL
    for (int block = 0; block < R; block += W) {
      transpose(v + block);
      FREQRANK_UNROLL
      for (int l = 0; l < W; ++l) store_as(to + R * l + block, v[block + l]);
    }
  } else {
    FREQRANK_UNROLL
    for (int l = 0; l < W; ++l) {
      FREQRANK_UNROLL
      for (int j = 0; j < R; ++j) to[R * l + j] = v[j][l];
    }
  }
}

// A stage of radix R on `s` interleaved transforms of length R m.
template <int R, class L, class T = typename L::T>
void stage(Index m, Index s, Split<T> x, Split<T> y, const T* table, Ahead& ahead) {
  using Body = typename L::Body;
  using Tail = typename L::Tail;
  const auto as_it_is = [](const auto& a, int) __attribute__((always_inline)) { return a; };
  if (m == 1) {
    each<L>(0, s, [&](auto side, Index q) __attribute__((always_inline)) {
      if constexpr (L::unit > 1) fetch(ahead);
      step<R, decltype(side)>(x, q, s, y, q, s, as_it_is);
    });
    return;
  }
  if (s > 1 && s >= Body::step) {
    for (Index p = 0; p < m; ++p) {
      Complex<T> factors[R];
      FREQRANK_UNROLL
      for (int j = 1; j < R; ++j) factors[j] = twiddle<Side<T>>(table, m, j, p);
      each<L>(0, s, [&](auto side, Index q) __attribute__((always_inline)) {
        using V = typename decltype(side)::V;
        if constexpr (L::unit > 1) fetch(ahead);
        step<R, decltype(side)>(x, s * p + q, s * m, y, s * R * p + q, s,
                                [&](const Complex<V>& a, int j) __attribute__((always_inline)) {
                                  return a * Complex<V>{spread<V>(factors[j].re), spread<V>(factors[j].im)};
                                });
      });
    }
    return;
  }
  Index p = 0;
  if constexpr (Body::step > 1) {
    using V = typename Body::V;
    if (s == 1) {
      for (; p + Body::step <= m; p += Body::step) {
        Complex<V> a[R];
        FREQRANK_UNROLL
        for (int j = 0; j < R; ++j) a[j] = load<Body>(x, p + j * m);
        butterfly<R>(a);
        V re[R] = {a[0].re}, im[R] = {a[0].im};
        FREQRANK_UNROLL
        for (int j = 1; j < R; ++j) {
          const Complex<V> b = a[j] * twiddle<Body>(table, m, j, p);
          re[j] = b.re;
          im[j] = b.im;
        }
        store_interleaved<R>(y.re + R * p, re);
        store_interleaved<R>(y.im + R * p, im);
      }
    }
  }
  for (; p < m; ++p) {
    for (Index q = 0; q < s; ++q) {
      using V = typename Tail::V;
      if constexpr (L::unit > 1) fetch(ahead);
      step<R, Tail>(x, s * p + q, s * m, y, s * R * p + q, s,
                    [&](const Complex<V>& a, int j)
                        __attribute__((always_inline)) { return a * twiddle<Tail>(table, m, j, p); });
    }
  }
}

template <class L, class T>
void smooth_stage(int radix, Index m, Index s, const Split<T>& x, const Split<T>& y, const T* table, Ahead& ahead) {
  switch (radix) {
    case 2: return stage<2, L>(m, s, x, y, table, ahead);
    case 3: return stage<3, L>(m, s, x, y, table, ahead);
    case 4: return stage<4, L>(m, s, x, y, table, ahead);
    case 5: return stage<5, L>(m, s, x, y, table, ahead);
    case 7: return stage<7, L>(m, s, x, y, table, ahead);
    case 8: return stage<8, L>(m, s, x, y, table, ahead);
    case 11: return stage<11, L>(m, s, x, y, table, ahead);
    default: return stage<13, L>(m, s, x, y, table, ahead);
  }
}

// The DFT of a length without large primes. The result is in x; x and y may change places.
template <class L, class T>
void smooth(const Stages& stages, const T* table, Split<T>& x, Split<T>& y, Ahead& ahead) {
  Index n = stages.n, s = 1;
  for (int i = 0; i < stages.count; ++i) {
    const int radix = static_cast<int>(stages.radix[i]);
    n /= radix;
    smooth_stage<L>(radix, n, s, x, y, table + stages.twiddles[i], ahead);
    exchange(x, y);
    s *= radix;
  }
}

// The inverse is the forward transform with real and imaginary parts exchanged.
template <class T>
FREQRANK_INLINE void exchange_parts(Split<T>& x, Split<T>& y) {
  exchange(x.re, x.im);
  exchange(y.re, y.im);
}

// --- prime factors beyond the codelets ------------------------------------------------------------------------------

// Rader: with g a generator of the multiplicative group, output g^b less element 0 is the convolution of the elements
// g^-a with exp(-2 pi i g^d / prime). Elements come from get(i), results go to put(i, v); `spare` holds 4 arrays.
template <class L, class T, class Get, class Put>
FREQRANK_INLINE void rader(const Convolution& c, const T* table, T* spare, Ahead& ahead, const Get& get,
                           const Put& put) {
  using A = typename L::Tail;
  const Index count = c.prime - 1, size = c.stages.n * L::unit;
  const std::uint32_t* from = reinterpret_cast<const std::uint32_t*>(table + c.gather);
  const std::uint32_t* to = reinterpret_cast<const std::uint32_t*>(table + c.scatter);
  const T* spectrum = table + c.spectrum;
  Split<T> x{spare, spare + size}, y{spare + 2 * size, spare + 3 * size};
  for (Index a = 0; a < count; ++a) store<A>(x, a, get(from[a]));
  for (Index i = count * L::unit; i < size; ++i) x.re[i] = x.im[i] = T(0);
  smooth<L>(c.stages, table, x, y, ahead);
  const auto first = get(0);
  put(0, first + load<A>(x, 0));
  each<L>(0, c.stages.n, [&](auto side, Index k) __attribute__((always_inline)) {
    using B = decltype(side);
    store<B>(x, k, load<B>(x, k) * Complex<typename B::V>{B::factor(spectrum, k), B::factor(spectrum + c.stages.n, k)});
  });
  store<A>(x, 0, load<A>(x, 0) + first);  // element 0 reaches every output
  exchange_parts(x, y);
  smooth<L>(c.stages, table, x, y, ahead);
  exchange_parts(x, y);
  for (Index b = 0; b < count; ++b) put(to[b], load<A>(x, b));
}

// The same for real elements, as a convolution of real numbers with cos + sin, Hartley's transform: half the length.
// Results 0 .. prime / 2 go to put.
template <class L, class T, class Get, class Put>
FREQRANK_INLINE void real_rader(const Convolution& c, const T* table, T* spare, Ahead& ahead, const Get& get,
                                const Put& put) {
  using A = typename L::Tail;
  using V = typename A::V;
  const Index half = (c.prime - 1) / 2, n = c.stages.n, size = n * L::unit;
  const std::uint32_t* from = reinterpret_cast<const std::uint32_t*>(table + c.gather);
  const std::uint32_t* to = reinterpret_cast<const std::uint32_t*>(table + c.scatter);
  const T *own = table + c.spectrum, *other = own + 2 * n;
  Split<T> x{spare, spare + size}, y{spare + 2 * size, spare + 3 * size};
  for (Index a = 0; a < half; ++a) store<A>(x, a, Complex<V>{get(from[2 * a]), get(from[2 * a + 1])});
  for (Index i = half * L::unit; i < size; ++i) x.re[i] = x.im[i] = T(0);
  smooth<L>(c.stages, table, x, y, ahead);
  const V first = get(0), half_first = first * spread<V>(T(0.5));
  const Complex<V> z = load<A>(x, 0);
  put(0, Complex<V>{first + (z.re + z.im), V{}});
  // the spectrum's product in terms of that of the complex numbers that hold two elements each
  const auto product = [&](const auto& a, const auto& b, const auto& f, const auto& g) __attribute__((always_inline)) {
    const std::decay_t<decltype(a)> mirrored{b.re, -b.im};
    return a * f + mirrored * g;
  };
  const auto pair = [&](auto side, Index k) __attribute__((always_inline)) {
    using B = decltype(side);
    using W = typename B::V;
    const Index l = n - k;
    const Complex<W> a = load<B>(x, k), b{B::load_mirrored(x.re, l), B::load_mirrored(x.im, l)};
    const Complex<W> fk{B::factor(own, k), B::factor(own + n, k)}, gk{B::factor(other, k), B::factor(other + n, k)};
    const Complex<W> fl{B::factor_mirrored(own, l), B::factor_mirrored(own + n, l)};
    const Complex<W> gl{B::factor_mirrored(other, l), B::factor_mirrored(other + n, l)};
    const Complex<W> u = product(a, b, fk, gk), v = product(b, a, fl, gl);
    B::store_mirrored(x.re, l, v.re);
    B::store_mirrored(x.im, l, v.im);
    store<B>(x, k, u);
  };
  const Complex<V> f{A::factor(own, 0), A::factor(own + n, 0)}, g{A::factor(other, 0), A::factor(other + n, 0)};
  store<A>(x, 0, product(z, z, f, g) + Complex<V>{half_first, half_first});
  each<L>(1, (n + 1) / 2, pair);
  if (n % 2 == 0) pair(A{}, n / 2);
  exchange_parts(x, y);
  smooth<L>(c.stages, table, x, y, ahead);
  exchange_parts(x, y);
  const auto hartley = [&](Index b) { return A::load(b % 2 ? x.im : x.re, b / 2); };
  for (Index b = 0; b < half; ++b) {
    const V plus = hartley(b), minus = hartley(b + half);
    const Index k = to[b];
    if (k <= half) {
      put(k, Complex<V>{plus + minus, minus - plus});
    } else {
      put(c.prime - k, Complex<V>{plus + minus, plus - minus});
    }
  }
}

template <class L, class T>
void rader_stage(const Convolution& c, Index m, Index s, const Split<T>& x, const Split<T>& y, const T* twiddles,
                 const T* table, T* spare, Ahead& ahead) {
  for (Index p = 0; p < m; ++p) {
    each<L>(0, s, [&](auto side, Index q) {
      using A = decltype(side);
      using V = typename A::V;
      using Inner = std::conditional_t<A::step == 1 && L::Body::step != 1, L, SideBySide<V>>;
      rader<Inner>(
          c, table, spare, ahead, [&](Index t) { return load<A>(x, s * p + q + t * s * m); },
          [&](Index j, const Complex<V>& v) {
            const Index o = s * c.prime * p + q + j * s;
            if (j == 0 || m == 1) {
              store<A>(y, o, v);
            } else {
              const Complex<Lane<V>> f = twiddle<Side<T>>(twiddles, m, j, p);
              store<A>(y, o, v * Complex<V>{spread<V>(f.re), spread<V>(f.im)});
            }
          });
    });
  }
}

// --- any length -----------------------------------------------------------------------------------------------------

// The DFT of length n that the stages from `first` on make. The result is in x; x and y may change places.
template <class L, class T>
void transform(const Fft& fft, int first, Index n, const T* table, Split<T>& x, Split<T>& y, T* spare, Ahead& ahead) {
  Index s = 1;
  for (int i = first; i < fft.stages.count; ++i) {
    const Index radix = fft.stages.radix[i];
    const T* twiddles = table + fft.stages.twiddles[i];
    n /= radix;
    if (fft.convolution[i] < 0) {
      smooth_stage<L>(static_cast<int>(radix), n, s, x, y, twiddles, ahead);
    } else {
      const Convolution& c = fft.convolutions[static_cast<std::size_t>(fft.convolution[i])];
      rader_stage<L>(c, n, s, x, y, twiddles, table, spare, ahead);
    }
    exchange(x, y);
    s *= radix;
  }
}

template <class L, class T>
void forward(const Fft& fft, const T* table, Split<T>& x, Split<T>& y, T* spare, Ahead& ahead) {
  transform<L>(fft, 0, fft.stages.n, table, x, y, spare, ahead);
}

template <class L, class T>
void backward(const Fft& fft, const T* table, Split<T>& x, Split<T>& y, T* spare, Ahead& ahead) {
  exchange_parts(x, y);
  forward<L>(fft, table, x, y, spare, ahead);
  exchange_parts(x, y);
}

// A stage of odd radix R on real x: the sums to `sums`, and for j = 1 .. R / 2 a complex array of length m each.
template <int R, class L, class T>
void real_stage(Index m, const T* x, T* sums, const Split<T>& y, const T* table) {
  constexpr int half = R / 2;
  each<L>(0, m, [&](auto side, Index p) __attribute__((always_inline)) {
    using A = decltype(side);
    using V = typename A::V;
    V sum[half], difference[half];
    const V first = A::load(x, p);
    V total = first;
    FREQRANK_UNROLL
    for (int t = 1; t <= half; ++t) {
      const V a = A::load(x, p + t * m), b = A::load(x, p + (R - t) * m);
      sum[t - 1] = a + b;
      difference[t - 1] = b - a;
      total = total + sum[t - 1];
    }
    A::store(sums, p, total);
    FREQRANK_UNROLL
    for (int j = 1; j <= half; ++j) {
      Complex<V> a{first, V{}};
      FREQRANK_UNROLL
      for (int t = 1; t <= half; ++t) {
        a.re = multiply_add(sum[t - 1], spread<V>(static_cast<T>(root_cosine<R>(j * t % R))), a.re);
        a.im = multiply_add(difference[t - 1], spread<V>(static_cast<T>(root_sine<R>(j * t % R))), a.im);
      }
      if (m > 1) a = a * twiddle<A>(table, m, j, p);
      store<A>(y, (j - 1) * m + p, a);
    }
  });
}

// The DFT's elements 0 .. n / 2 of n real ones, n odd, to `spectrum`. x is overwritten; `scratch` holds
// real_scratch(n) elements.
template <class L, class T>
void real_forward(const Fft& fft, const T* table, T* x, const Split<T>& spectrum, T* scratch, T* spare, Ahead& ahead) {
  constexpr int unit = L::unit;
  using A = typename L::Tail;
  using V = typename A::V;
  const Index length = fft.stages.n, half = length / 2;
  T* sums = scratch;
  const Split<T> parts{scratch + unit * half, scratch + unit * 2 * half};
  T* const more = scratch + unit * 3 * half;
  Index n = length, product = 1;
  for (int i = 0; i < fft.stages.count; ++i) {
    const Index radix = fft.stages.radix[i], m = n / radix;
    const T* twiddles = table + fft.stages.twiddles[i];
    if (fft.real_convolution[i] < 0) {
      switch (radix) {
        case 3: real_stage<3, L>(m, x, sums, parts, twiddles); break;
        case 5: real_stage<5, L>(m, x, sums, parts, twiddles); break;
        case 7: real_stage<7, L>(m, x, sums, parts, twiddles); break;
        case 11: real_stage<11, L>(m, x, sums, parts, twiddles); break;
        default: real_stage<13, L>(m, x, sums, parts, twiddles); break;
      }
    } else {
      const Convolution& c = fft.convolutions[static_cast<std::size_t>(fft.real_convolution[i])];
      for (Index p = 0; p < m; ++p) {
        real_rader<L>(
            c, table, spare, ahead, [&](Index t) { return A::load(x, p + t * m); },
            [&](Index j, const Complex<V>& v) {
              if (j == 0) {
                A::store(sums, p, v.re);
              } else if (m == 1) {
                store<A>(spectrum, product * j, v);
              } else {
                store<A>(parts, (j - 1) * m + p, v * twiddle<A>(twiddles, m, j, p));
              }
            });
      }
    }
    for (Index j = 1; j <= radix / 2 && (m > 1 || fft.real_convolution[i] < 0); ++j) {
      Split<T> a{parts.re + unit * (j - 1) * m, parts.im + unit * (j - 1) * m}, b{more, more + unit * m};
      if (m > 1) transform<L>(fft, i + 1, m, table, a, b, spare, ahead);
      // element k of it is element radix k + j of length n, product times that of the whole
      for (Index k = 0; k < m; ++k) {
        const Index f = product * (radix * k + j);
        const Complex<V> v = load<A>(a, k);
        if (f <= half) {
          store<A>(spectrum, f, v);
        } else {
          store<A>(spectrum, length - f, Complex<V>{v.re, -v.im});
        }
      }
    }
    exchange(x, sums);
    product *= radix;
    n = m;
  }
  store<A>(spectrum, 0, Complex<V>{A::load(x, 0), V{}});
}

}  // namespace

}  // namespace freqrank::dct::FREQRANK_ISA
