// Compiled once for each instruction set: the cosine transforms of W rows side by side, or of one row.
#include "dct/kernels.h"

#include <cstring>

#include "common/half.h"
#include "dct/fft.h"

namespace freqrank::dct::FREQRANK_ISA {

namespace {

// --- cosine transforms ----------------------------------------------------------------------------------------------
// Each type has three parts. place() puts the input where compute() wants it, get() finds the result: `Group` elements
// from i on, a multiple of Group, or element i alone. Along a row, v[g] is a vector of elements i + g, i + g + Group,
// .. `x` holds a row, `z` and `other` complex arrays.

template <class L>
struct Job {
  using T = typename L::T;
  const Row& row;
  const T* table;
  T* x;
  Split<T> z, other;
  T *scratch, *spare;
  Ahead& ahead;
};

template <class A, class T>
FREQRANK_INLINE void scale_ends(T* x, Index n, bool both, T factor) {
  using V = typename A::V;
  if (factor == T(1)) return;
  A::store(x, 0, A::load(x, 0) * spread<V>(factor));
  if (both) A::store(x, n - 1, A::load(x, n - 1) * spread<V>(factor));
}

template <class L>
struct Natural {  // both in order in x
  using T = typename L::T;
  using A = typename L::Tail;
  using V = typename A::V;
  static constexpr int place_group = 1, get_group = 1;
  Job<L>& job;

  FREQRANK_FORCED_INLINE void place(Index i, V v) const { A::store(job.x, i, v); }
  FREQRANK_FORCED_INLINE V get(Index i) const { return A::load(job.x, i); }
  template <class B>
  FREQRANK_FORCED_INLINE void place_all(Index i, const typename B::V* v) const {
    B::store(job.x, i, v[0]);
  }
  template <class B>
  FREQRANK_FORCED_INLINE void get_all(Index i, typename B::V* v) const {
    v[0] = B::load(job.x, i);
  }
};

// Type I: the symmetric extension of length 2L, L = n - 1, as L complex numbers z_j = s_2j + i s_2j+1; the real part of
// its spectrum.
template <class L>
struct Type1 : Natural<L> {
  using typename Natural<L>::T;
  using typename Natural<L>::A;
  using typename Natural<L>::V;
  using Natural<L>::job;

  void compute(T in_end, T out_end) const {
    const Index length = job.row.n - 1;
    const T *cosine = job.table + job.row.rotation, *sine = cosine + length / 2 + 1;
    const T half = static_cast<T>(0.5 * job.row.scale), scale = static_cast<T>(job.row.scale);
    Split<T>& z = job.z;
    T* x = job.x;
    scale_ends<A>(x, job.row.n, true, in_end + in_end);
    for (Index j = 0; j < length; ++j) {
      const Index a = 2 * j, b = 2 * j + 1;
      A::store(z.re, j, A::load(x, a <= length ? a : 2 * length - a));
      A::store(z.im, j, A::load(x, b <= length ? b : 2 * length - b));
    }
    forward<L>(job.row.fft, job.table, z, job.other, job.spare, job.ahead);
    const Complex<V> first = load<A>(z, 0);
    A::store(x, 0, (first.re + first.im) * spread<V>(scale));
    A::store(x, length, (first.re - first.im) * spread<V>(scale));
    each<L>(1, length / 2 + 1, [&](auto side, Index k) __attribute__((always_inline)) {
      using B = decltype(side);
      using W = typename B::V;
      const Index l = length - k;
      const Complex<W> a = load<B>(z, k), b{B::load_mirrored(z.re, l), B::load_mirrored(z.im, l)};
      const W even = (a.re + b.re) * spread<W>(half);
      const W odd = multiply_subtract(a.re - b.re, B::factor(sine, k), (a.im + b.im) * B::factor(cosine, k));
      B::store_mirrored(x, l, even - odd);
      B::store(x, k, even + odd);
    });
    scale_ends<A>(x, job.row.n, true, out_end);
  }
};

// Types II and III permute v_i = x_2i, v_n-1-i = x_2i+1 so that a real DFT of v is what remains. An even length packs
// v_2j + i v_2j+1.
FREQRANK_INLINE Index permuted(Index i, Index n) { return i & 1 ? n - 1 - (i >> 1) : i >> 1; }

template <class L>
struct Type2Even : Natural<L> {
  using typename Natural<L>::T;
  using typename Natural<L>::A;
  using typename Natural<L>::V;
  using Natural<L>::job;
  static constexpr int place_group = 4;

  FREQRANK_FORCED_INLINE void place(Index i, V v) const {
    const Index j = permuted(i, job.row.n);
    A::store(j & 1 ? job.z.im : job.z.re, j >> 1, v);
  }
  template <class B>
  FREQRANK_FORCED_INLINE void place_all(Index i, const typename B::V* v) const {
    const Index front = i >> 2, back = (job.row.n >> 1) - 1 - front;
    B::store(job.z.re, front, v[0]);
    B::store(job.z.im, front, v[2]);
    B::store_mirrored(job.z.im, back, v[1]);
    B::store_mirrored(job.z.re, back, v[3]);
  }

  void compute(T, T out_end) const {
    const Index n = job.row.n;
    const T *cosine = job.table + job.row.post, *sine = cosine + n / 2 + 1;
    Split<T>& z = job.z;
    T* x = job.x;
    const Index length = n / 2;
    const T *turn_cos = job.table + job.row.rotation, *turn_sin = turn_cos + length / 2 + 1;
    forward<L>(job.row.fft, job.table, z, job.other, job.spare, job.ahead);
    const T twice = static_cast<T>(2.0 * job.row.scale), root = static_cast<T>(1.41421356237309504880 * job.row.scale);
    const Complex<V> first = load<A>(z, 0);
    A::store(x, 0, (first.re + first.im) * spread<V>(twice));
    A::store(x, length, (first.re - first.im) * spread<V>(root));
    each<L>(1, length / 2 + 1, [&](auto side, Index k) __attribute__((always_inline)) {
      using B = decltype(side);
      using W = typename B::V;
      const Index l = length - k;
      const Complex<W> zk = load<B>(z, k), zl{B::load_mirrored(z.re, l), B::load_mirrored(z.im, l)};
      const Complex<W> even{zk.re + zl.re, zk.im - zl.im}, difference{zk.re - zl.re, zk.im + zl.im};
      // difference times -i exp(-2 pi i k / n)
      const W c = B::factor(turn_cos, k), s = B::factor(turn_sin, k);
      const Complex<W> odd{multiply_subtract(difference.re, s, difference.im * c),
                           multiply_add(difference.im, s, difference.re * c)};  // of the opposite imaginary part
      const Complex<W> a{even.re + odd.re, even.im - odd.im}, b{even.re - odd.re, even.im + odd.im};  // 2 V_k, 2 V_l*
      const W ck = B::factor(cosine, k), sk = B::factor(sine, k);
      const W cl = B::factor_mirrored(cosine, l), sl = B::factor_mirrored(sine, l);
      B::store_mirrored(x, l, multiply_subtract(b.im, sl, b.re * cl));
      B::store(x, n - l, multiply_add(b.im, cl, b.re * sl));
      B::store(x, k, multiply_add(a.im, sk, a.re * ck));
      B::store_mirrored(x, n - k, multiply_subtract(a.im, ck, a.re * sk));
    });
    scale_ends<A>(x, n, false, out_end);
  }
};

template <class L>
struct Type2Odd : Natural<L> {
  using typename Natural<L>::T;
  using typename Natural<L>::A;
  using typename Natural<L>::V;
  using Natural<L>::job;
  static constexpr int place_group = 2;

  FREQRANK_FORCED_INLINE void place(Index i, V v) const { A::store(job.other.re, permuted(i, job.row.n), v); }
  template <class B>
  FREQRANK_FORCED_INLINE void place_all(Index i, const typename B::V* v) const {
    B::store(job.other.re, i >> 1, v[0]);
    B::store_mirrored(job.other.re, job.row.n - 1 - (i >> 1), v[1]);
  }

  void compute(T, T out_end) const {
    const Index n = job.row.n;
    const T *cosine = job.table + job.row.post, *sine = cosine + n / 2 + 1;
    Split<T>& z = job.z;
    T* x = job.x;
    real_forward<L>(job.row.fft, job.table, job.other.re, z, job.scratch, job.spare, job.ahead);
    A::store(x, 0, A::load(z.re, 0) * A::factor(cosine, 0));
    each<L>(1, n / 2 + 1, [&](auto side, Index k) __attribute__((always_inline)) {
      using B = decltype(side);
      const auto a = load<B>(z, k);
      const auto c = B::factor(cosine, k), s = B::factor(sine, k);
      B::store(x, k, multiply_add(a.im, s, a.re * c));
      B::store_mirrored(x, n - k, multiply_subtract(a.im, c, a.re * s));
    });
    scale_ends<A>(x, n, false, out_end);
  }
};

template <class L>
struct Type3Even : Natural<L> {
  using typename Natural<L>::T;
  using typename Natural<L>::A;
  using typename Natural<L>::V;
  using Natural<L>::job;
  static constexpr int get_group = 4;

  void compute(T in_end, T) const {
    const Index n = job.row.n;
    const T *cosine = job.table + job.row.post, *sine = cosine + n / 2 + 1;
    const T twice = static_cast<T>(2.0 * job.row.scale), root = static_cast<T>(1.41421356237309504880 * job.row.scale);
    Split<T>& z = job.z;
    T* x = job.x;
    scale_ends<A>(x, n, false, in_end);
    // V_k = exp(i pi k / 2n) (x_k - i x_n-k) is the spectrum of v
    const Index length = n / 2;
    const T *turn_cos = job.table + job.row.rotation, *turn_sin = turn_cos + length / 2 + 1;
    const V first = A::load(x, 0) * spread<V>(twice), middle = A::load(x, length) * spread<V>(root);
    store<A>(z, 0, Complex<V>{first + middle, first - middle});
    each<L>(1, length / 2 + 1, [&](auto side, Index k) __attribute__((always_inline)) {
      using B = decltype(side);
      using W = typename B::V;
      const Index l = length - k;
      const W ck = B::factor(cosine, k), sk = B::factor(sine, k);
      const W cl = B::factor_mirrored(cosine, l), sl = B::factor_mirrored(sine, l);
      const W xk = B::load(x, k), xnk = B::load_mirrored(x, n - k), xl = B::load_mirrored(x, l),
              xnl = B::load(x, n - l);
      const Complex<W> a{multiply_add(xnk, sk, xk * ck), multiply_subtract(xnk, ck, xk * sk)};
      const Complex<W> b{multiply_add(xnl, sl, xl * cl), multiply_subtract(xnl, cl, xl * sl)};
      const Complex<W> even{a.re + b.re, a.im - b.im}, difference{a.re - b.re, a.im + b.im};
      // difference times i exp(2 pi i k / n)
      const W c = B::factor(turn_cos, k), s = B::factor(turn_sin, k);
      const Complex<W> odd{multiply_add(difference.re, s, difference.im * c),  // of the opposite real part
                           multiply_subtract(difference.im, s, difference.re * c)};
      B::store_mirrored(z.re, l, even.re + odd.re);
      B::store_mirrored(z.im, l, odd.im - even.im);
      store<B>(z, k, Complex<W>{even.re - odd.re, even.im + odd.im});
    });
    backward<L>(job.row.fft, job.table, z, job.other, job.spare, job.ahead);
  }

  FREQRANK_FORCED_INLINE V get(Index i) const {
    const Index j = permuted(i, job.row.n);
    return A::load(j & 1 ? job.z.im : job.z.re, j >> 1);
  }
  template <class B>
  FREQRANK_FORCED_INLINE void get_all(Index i, typename B::V* v) const {
    const Index front = i >> 2, back = (job.row.n >> 1) - 1 - front;
    v[0] = B::load(job.z.re, front);
    v[2] = B::load(job.z.im, front);
    v[1] = B::load_mirrored(job.z.im, back);
    v[3] = B::load_mirrored(job.z.re, back);
  }
};

template <class L>
struct Type3Odd : Natural<L> {
  using typename Natural<L>::T;
  using typename Natural<L>::A;
  using typename Natural<L>::V;
  using Natural<L>::job;
  static constexpr int get_group = 2;

  void compute(T in_end, T) const {
    const Index n = job.row.n;
    const T *cosine = job.table + job.row.post, *sine = cosine + n / 2 + 1;
    const T twice = static_cast<T>(2.0 * job.row.scale);
    Split<T>& z = job.z;
    T* x = job.x;
    scale_ends<A>(x, n, false, in_end);
    // V_k = exp(i pi k / 2n) (x_k - i x_n-k) is the spectrum of v
    // v is the Hartley transform of h_k = re V_k - im V_k, that is re - im of h's own spectrum
    T* h = job.other.re;
    A::store(h, 0, A::load(x, 0) * spread<V>(twice));
    each<L>(1, n / 2 + 1, [&](auto side, Index k) __attribute__((always_inline)) {
      using B = decltype(side);
      const auto a = B::load(x, k), b = B::load_mirrored(x, n - k);
      const auto c = B::factor(cosine, k), s = B::factor(sine, k);
      const auto re = multiply_add(b, s, a * c), im = multiply_subtract(b, c, a * s);
      B::store(h, k, re - im);
      B::store_mirrored(h, n - k, re + im);
    });
    real_forward<L>(job.row.fft, job.table, h, z, job.scratch, job.spare, job.ahead);
    A::store(x, 0, A::load(z.re, 0));
    each<L>(1, n / 2 + 1, [&](auto side, Index j) __attribute__((always_inline)) {
      using B = decltype(side);
      const auto a = load<B>(z, j);
      B::store(x, j, a.re - a.im);
      B::store_mirrored(x, n - j, a.re + a.im);
    });
  }

  FREQRANK_FORCED_INLINE V get(Index i) const { return A::load(job.x, permuted(i, job.row.n)); }
  template <class B>
  FREQRANK_FORCED_INLINE void get_all(Index i, typename B::V* v) const {
    v[0] = B::load(job.x, i >> 1);
    v[1] = B::load_mirrored(job.x, job.row.n - 1 - (i >> 1));
  }
};

template <class L>
struct Type4Even : Natural<L> {
  using typename Natural<L>::T;
  using typename Natural<L>::A;
  using typename Natural<L>::V;
  using Natural<L>::job;
  static constexpr int place_group = 2, get_group = 2;

  FREQRANK_FORCED_INLINE void place(Index i, V v) const {
    A::store(i & 1 ? job.z.im : job.z.re, (i & 1 ? job.row.n - 1 - i : i) >> 1, v);
  }
  template <class B>
  FREQRANK_FORCED_INLINE void place_all(Index i, const typename B::V* v) const {
    B::store(job.z.re, i >> 1, v[0]);
    B::store_mirrored(job.z.im, (job.row.n >> 1) - 1 - (i >> 1), v[1]);
  }

  void compute(T, T) const {
    const Index n = job.row.n;
    Split<T>& z = job.z;
    const Index length = n / 2;
    const T *pre_cos = job.table + job.row.pre, *pre_sin = pre_cos + length;
    const T *post_cos = job.table + job.row.post, *post_sin = post_cos + length;
    each<L>(0, length, [&](auto side, Index j) __attribute__((always_inline)) {
      using B = decltype(side);
      const auto a = load<B>(z, j);
      const auto c = B::factor(pre_cos, j), s = B::factor(pre_sin, j);
      B::store(z.re, j, multiply_add(a.im, s, a.re * c));
      B::store(z.im, j, multiply_subtract(a.re, s, a.im * c));
    });
    forward<L>(job.row.fft, job.table, z, job.other, job.spare, job.ahead);
    each<L>(0, length, [&](auto side, Index k) __attribute__((always_inline)) {
      using B = decltype(side);
      const auto a = load<B>(z, k);
      const auto c = B::factor(post_cos, k), s = B::factor(post_sin, k);
      B::store(z.re, k, multiply_add(a.im, s, a.re * c));
      B::store(z.im, k, multiply_subtract(a.im, c, a.re * s));
    });
  }

  FREQRANK_FORCED_INLINE V get(Index i) const {
    return A::load(i & 1 ? job.z.im : job.z.re, (i & 1 ? job.row.n - 1 - i : i) >> 1);
  }
  template <class B>
  FREQRANK_FORCED_INLINE void get_all(Index i, typename B::V* v) const {
    v[0] = B::load(job.z.re, i >> 1);
    v[1] = B::load_mirrored(job.z.im, (job.row.n >> 1) - 1 - (i >> 1));
  }
};

// Type IV of an odd length is a real DFT of that length up to order and signs: the odd residues a = 2k + 1 modulo 8n
// have four images under a -> -a, 4n - a, 4n + a, over which the cosine only changes its sign, one of them 1 modulo 8.
// This one, a = 8 i + 1, belongs to position a / 8 = i + 1/8 modulo n of the DFT's input, and to a modulo n of its
// output.
struct Image {
  Index index;
  bool negative;
};

FREQRANK_INLINE Image image(Index i, Index n) {
  const Index a = 8 * i + 1;
  if (a < 2 * n) return {(a - 1) / 2, false};
  if (a < 4 * n) return {(4 * n - a - 1) / 2, true};
  if (a < 6 * n) return {(a - 4 * n - 1) / 2, true};
  return {(8 * n - a - 1) / 2, false};
}

template <class L>
struct Type4Odd : Natural<L> {
  using typename Natural<L>::T;
  using typename Natural<L>::A;
  using typename Natural<L>::V;
  using Natural<L>::job;

  void compute(T, T) const {
    const Index n = job.row.n;
    Split<T>& z = job.z;
    Index eighth = 1;  // becomes 1/8 modulo n
    while (eighth % 8 != 0) eighth += n;
    T *x = job.x, *v = job.other.re;
    Index position = eighth / 8 % n;
    for (Index i = 0; i < n; ++i) {
      const Image from = image(i, n);
      const V value = A::load(x, from.index);
      A::store(v, position, from.negative ? -value : value);
      if (++position == n) position = 0;
    }
    real_forward<L>(job.row.fft, job.table, v, z, job.scratch, job.spare, job.ahead);
    const V c = A::factor(job.table + job.row.post, 0), s = A::factor(job.table + job.row.post, 1);
    position = 1 % n;
    for (Index i = 0; i < n; ++i) {
      const Image to = image(i, n);
      const bool upper = 2 * position > n;
      const Complex<V> a = load<A>(z, upper ? n - position : position);
      const V re = a.re * c, value = upper ? multiply_subtract(a.im, s, re) : multiply_add(a.im, s, re);
      A::store(x, to.index, to.negative ? -value : value);
      position = (position + 8) % n;
    }
  }
};

// --- rows in memory ------------------------------------------------------------------------------------------------

// The rows of one group: where lane l starts. Lanes beyond `count` repeat the first row and are not stored.
template <int W>
struct Lanes {
  Index in[W] = {}, out[W] = {};
  int count = 0;
  bool in_adjacent = false, out_adjacent = false;  // all lanes there, element by element beside each other
  Lanes(Index in_stride, Index out_stride, Index from, Index to, int rows) : count(rows) {
    in_adjacent = rows == W && in_stride == 1;
    out_adjacent = rows == W && out_stride == 1;
    for (int l = 0; l < W; ++l) {
      in[l] = l < rows ? from + l * in_stride : from;
      out[l] = to + l * out_stride;
    }
  }
};

// Whether the last `rest` of a row's elements go through a square that overlaps the one before. Few are faster one by
// one; more than a square of them are left where groups are wider than it.
template <int W>
FREQRANK_INLINE bool ends_in_square(Index filled, Index rest) {
  return filled >= W && rest <= W && 4 * rest > W;
}

template <class S, class L, class Type>
void read(const Work& work, const Lanes<L::unit>& lanes, const Type& type) {
  using B = typename L::Body;
  using V = typename L::Tail::V;
  constexpr int W = width<typename B::V>, G = Type::place_group, block = B::step > 1 || W < G ? G : W / G * G;
  const S* base = static_cast<const S*>(work.in);
  const Index stride = work.pass->in_stride, filled = work.pass->filled, n = work.row->n;
  const bool adjacent = L::unit > 1 && lanes.in_adjacent;
  Index i = 0;
  if (adjacent || stride == 1) {
    for (; i + block * B::step <= filled; i += block * B::step) {
      typename B::V v[block];
      if constexpr (B::step > 1) {
        FREQRANK_UNROLL
        for (int e = 0; e < block; ++e) v[e] = load_as<typename B::V>(base + lanes.in[0] + i + e * W);
        deal<G>(v);
      } else if (adjacent) {
        FREQRANK_UNROLL
        for (int e = 0; e < block; ++e) v[e] = load_as<V>(base + lanes.in[0] + (i + e) * stride);
      } else {
        FREQRANK_UNROLL
        for (int e = 0; e < block; e += W) {
          FREQRANK_UNROLL
          for (int l = 0; l < W; ++l) v[e + l] = load_as<V>(base + lanes.in[l] + i + e);
          transpose(v + e);
        }
      }
      FREQRANK_UNROLL
      for (int e = 0; e < block; e += G) type.template place_all<B>(i + e, v + e);
    }
  }
  if constexpr (L::unit > 1) {
    if (adjacent) {
      for (; i < filled; ++i) type.place(i, load_as<V>(base + lanes.in[0] + i * stride));
    } else if (stride == 1 && ends_in_square<W>(filled, filled - i)) {
      V v[W];
      FREQRANK_UNROLL
      for (int l = 0; l < W; ++l) v[l] = load_as<V>(base + lanes.in[l] + filled - W);
      transpose(v);
      for (; i < filled; ++i) type.place(i, v[i - (filled - W)]);
    }
  }
  for (; i < filled; ++i) {
    if constexpr (L::unit == 1) {
      type.place(i, load_as<V>(base + lanes.in[0] + i * stride));
    } else {
      V v;
      FREQRANK_UNROLL
      for (int l = 0; l < W; ++l) v[l] = load_as<Lane<V>>(base + lanes.in[l] + i * stride);
      type.place(i, v);
    }
  }
  for (; i < n; ++i) type.place(i, V{});
}

template <class S, class L, class Type>
void write(const Work& work, const Lanes<L::unit>& lanes, const Type& type) {
  using B = typename L::Body;
  using V = typename L::Tail::V;
  constexpr int W = width<typename B::V>, G = Type::get_group, block = B::step > 1 || W < G ? G : W / G * G;
  S* base = static_cast<S*>(work.out);
  const Index stride = work.pass->out_stride, size = work.pass->out_size, n = work.row->n;
  const Index filled = size < n ? size : n;
  const bool adjacent = L::unit > 1 && lanes.out_adjacent;
  Index i = 0;
  if constexpr (W > 1 && B::step == 1 && std::is_same_v<S, Lane<V>>) {
    // Whole cache lines past the caches: what is larger than they are need not be fetched before it is overwritten.
    constexpr int line = 64 / static_cast<int>(sizeof(S)), wide = line > W ? line : W, run = kStreamedLines * line;
    int streamed = adjacent || lanes.count < W ? 0 : work.pass->streamed_lines;
    for (int l = 0; l < W; ++l) {
      if (reinterpret_cast<std::uintptr_t>(base + lanes.out[l]) % 64 != 0) streamed = 0;
    }
    const auto squares = [&](Index at, V* v) __attribute__((always_inline)) {
      FREQRANK_UNROLL
      for (int e = 0; e < wide; e += G) type.template get_all<B>(at + e, v + e);
      FREQRANK_UNROLL
      for (int e = 0; e < wide; e += W) transpose(v + e);
    };
    for (; streamed == 1 && i + wide <= filled; i += wide) {
      V v[wide];
      squares(i, v);
      FREQRANK_UNROLL
      for (int l = 0; l < W; ++l) {
        FREQRANK_UNROLL
        for (int e = 0; e < wide; e += W) stream(base + lanes.out[l] + i + e, v[e + l]);
      }
    }
    for (; streamed > 1 && i + run <= filled; i += run) {
      alignas(64) S runs[W * run];
      for (int r = 0; r < run; r += wide) {
        V v[wide];
        squares(i + r, v);
        FREQRANK_UNROLL
        for (int l = 0; l < W; ++l) {
          FREQRANK_UNROLL
          for (int e = 0; e < wide; e += W) store_as(runs + l * run + r + e, v[e + l]);
        }
      }
      for (int l = 0; l < W; ++l) {
        FREQRANK_UNROLL
        for (int e = 0; e < run; e += W) stream(base + lanes.out[l] + i + e, load_as<V>(runs + l * run + e));
      }
    }
  }
  if (adjacent || stride == 1) {
    for (; i + block * B::step <= filled; i += block * B::step) {
      typename B::V v[block];
      FREQRANK_UNROLL
      for (int e = 0; e < block; e += G) type.template get_all<B>(i + e, v + e);
      if constexpr (B::step > 1) {
        riffle<G>(v);
        FREQRANK_UNROLL
        for (int e = 0; e < block; ++e) store_as(base + lanes.out[0] + i + e * W, v[e]);
      } else if (adjacent) {
        FREQRANK_UNROLL
        for (int e = 0; e < block; ++e) store_as(base + lanes.out[0] + (i + e) * stride, v[e]);
      } else {
        FREQRANK_UNROLL
        for (int e = 0; e < block; e += W) {
          transpose(v + e);
          FREQRANK_UNROLL
          for (int l = 0; l < W; ++l) {
            if (l < lanes.count) store_as(base + lanes.out[l] + i + e, v[e + l]);
          }
        }
      }
    }
  }
  if constexpr (L::unit > 1) {
    if (adjacent) {
      for (; i < filled; ++i) store_as(base + lanes.out[0] + i * stride, type.get(i));
    } else if (stride == 1 && ends_in_square<W>(filled, filled - i)) {
      V v[W];
      for (int e = 0; e < W; ++e) v[e] = type.get(filled - W + e);
      transpose(v);
      for (int l = 0; l < lanes.count; ++l) store_as(base + lanes.out[l] + filled - W, v[l]);
      i = filled;
    }
  }
  for (; i < filled; ++i) {
    const V v = type.get(i);
    if constexpr (L::unit == 1) {
      store_as(base + lanes.out[0] + i * stride, v);
    } else {
      FREQRANK_UNROLL
      for (int l = 0; l < W; ++l) {
        if (l < lanes.count) store_as(base + lanes.out[l] + i * stride, v[l]);
      }
    }
  }
  for (int l = 0; l < lanes.count; ++l) {
    for (i = filled; i < size; ++i) store_as(base + lanes.out[l] + i * stride, Lane<V>(0));
  }
}

template <class Type, class L>
void run_type(const Work& work, const Lanes<L::unit>& lanes, Job<L>& job) {
  using T = typename L::T;
  const Type type{{job}};
  if constexpr (sizeof(T) == 8) {
    read<double, L>(work, lanes, type);
  } else {
    switch (work.pass->from_dtype) {
      case Dtype::float16: read<float16, L>(work, lanes, type); break;
      case Dtype::bfloat16: read<bfloat16, L>(work, lanes, type); break;
      default: read<float, L>(work, lanes, type);
    }
  }
  type.compute(static_cast<T>(work.pass->in_end), static_cast<T>(work.pass->out_end));
  if constexpr (sizeof(T) == 8) {
    write<double, L>(work, lanes, type);
  } else {
    switch (work.pass->to_dtype) {
      case Dtype::float16: write<float16, L>(work, lanes, type); break;
      case Dtype::bfloat16: write<bfloat16, L>(work, lanes, type); break;
      default: write<float, L>(work, lanes, type);
    }
  }
}

template <class L>
void run_group(const Work& work, const Lanes<L::unit>& lanes, Ahead ahead, void* scratch) {
  using T = typename L::T;
  const Row& row = *work.row;
  // Arrays start at multiples of kArrayElements.
  const auto padded = [](Index count) {
    return (count + kArrayElements - 1) / kArrayElements * kArrayElements * L::unit;
  };
  const Index n = padded(row.n), complex = padded(row.even ? row.n / 2 : row.n);
  T* at = static_cast<T*>(scratch);
  const auto take = [&](Index count) {
    T* const taken = at;
    at += count + kArraySkew / static_cast<Index>(sizeof(T));
    return taken;
  };
  T* const x = take(n);
  const Split<T> z{take(complex), take(complex)}, other{take(complex), take(complex)};
  Job<L> job{row, static_cast<const T*>(work.table), x, z, other, nullptr, nullptr, ahead};
  job.spare = take(row.spare * (L::unit == 1 ? L::Body::step : L::unit));
  job.scratch = at;
  switch (row.type) {
    case 1: return run_type<Type1<L>>(work, lanes, job);
    case 2: return row.even ? run_type<Type2Even<L>>(work, lanes, job) : run_type<Type2Odd<L>>(work, lanes, job);
    case 3: return row.even ? run_type<Type3Even<L>>(work, lanes, job) : run_type<Type3Odd<L>>(work, lanes, job);
    default: return row.even ? run_type<Type4Even<L>>(work, lanes, job) : run_type<Type4Odd<L>>(work, lanes, job);
  }
}

// Steps through the rows of a pass in order, by runs of equal strides.
class Odometer {
 public:
  Odometer(const Pass& pass, Index row) : batch_(pass.batch.data()), dims_(static_cast<int>(pass.batch.size())) {
    for (int d = dims_ - 1; d >= 0; --d) {
      index_[d] = row % batch_[d].size;
      row /= batch_[d].size;
      in += index_[d] * batch_[d].in_stride;
      out += index_[d] * batch_[d].out_stride;
    }
  }

  Index in = 0, out = 0;
  Index in_stride() const { return dims_ > 0 ? batch_[dims_ - 1].in_stride : 0; }
  Index out_stride() const { return dims_ > 0 ? batch_[dims_ - 1].out_stride : 0; }
  Index run() const { return dims_ > 0 ? batch_[dims_ - 1].size - index_[dims_ - 1] : 1; }

  void advance(Index rows) {  // at most run()
    if (dims_ == 0) return;
    index_[dims_ - 1] += rows;
    in += rows * in_stride();
    out += rows * out_stride();
    for (int d = dims_ - 1; d >= 0 && index_[d] == batch_[d].size; --d) {
      in -= batch_[d].size * batch_[d].in_stride;
      out -= batch_[d].size * batch_[d].out_stride;
      index_[d] = 0;
      if (d == 0) return;
      ++index_[d - 1];
      in += batch_[d - 1].in_stride;
      out += batch_[d - 1].out_stride;
    }
  }

 private:
  const BatchDim* batch_;
  int dims_;
  Index index_[64];
};

template <class V, class T>
void one_row(const Stages& stages, const T* table, Split<T>& x, Split<T>& y) {
  Ahead nothing;
  smooth<OneRow<V>>(stages, table, x, y, nothing);
}

// V: for rows side by side; S: for one row.
template <class V, class S>
void run_rows(const Work& work, Index begin, Index end, void* scratch) {
  const Pass& pass = *work.pass;
  constexpr int W = width<V>;
  const int wanted = pass.lanes;
  Odometer at(pass, begin * wanted);
  for (Index group = begin; group < end; ++group) {
    const Index left = pass.rows - group * wanted;
    const int count = left < wanted ? static_cast<int>(left) : wanted;
    if (count < pass.fewest_lanes || wanted == 1) {
      for (int l = 0; l < count; ++l) {
        run_group<OneRow<S>>(work, Lanes<1>(0, 0, at.in, at.out, 1), Ahead{}, scratch);
        at.advance(1);
      }
      continue;
    }
    Lanes<W> lanes(at.in_stride(), at.out_stride(), at.in, at.out, count);
    if (at.run() >= count) {
      at.advance(count);
    } else {
      lanes.in_adjacent = lanes.out_adjacent = false;
      for (int l = 0; l < W; ++l) {
        lanes.in[l] = l < count ? at.in : lanes.in[0];
        lanes.out[l] = at.out;
        if (l < count) at.advance(1);
      }
    }
    Ahead ahead;
    if (pass.lines_ahead > 0 && group + 1 < end && at.run() >= wanted) {
      const Index element = bytes_of(pass.from_dtype);
      ahead.next = static_cast<const char*>(work.in) + at.in * element;
      ahead.rows = wanted;
      ahead.row_bytes = at.in_stride() * element;
      ahead.lines = (pass.filled * element + 63) / 64 * wanted;
      ahead.at_once = pass.lines_ahead;
    }
    run_group<SideBySide<V>>(work, lanes, ahead, scratch);
  }
}

}  // namespace

void run_groups(const Work& work, std::int64_t begin, std::int64_t end, void* scratch) {
  if (begin >= end) return;
  if (work.row->wide) {
    run_rows<Doubles, ShortDoubles>(work, begin, end, scratch);
  } else {
    run_rows<Floats, ShortFloats>(work, begin, end, scratch);
  }
  if (work.pass->streamed_lines > 0) finish_streaming();
}

void smooth_double(const Stages& stages, const double* table, double* re, double* im, double* other_re,
                   double* other_im) {
  Split<double> x{re, im}, y{other_re, other_im};
  one_row<ShortDoubles>(stages, table, x, y);
  if (x.re == re) return;
  std::memcpy(re, x.re, sizeof(double) * static_cast<std::size_t>(stages.n));
  std::memcpy(im, x.im, sizeof(double) * static_cast<std::size_t>(stages.n));
}

}  // namespace freqrank::dct::FREQRANK_ISA
