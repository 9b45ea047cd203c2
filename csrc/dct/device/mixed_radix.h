#pragma once
// Cosine transforms through complex FFTs in one block's shared memory, a few rows at once.
//
// Every stage of the FFT goes through registers: all threads of the block read what they need, meet, and write it where
// the next stage wants it (Stockham's order), so one copy of the rows is enough. What comes before and after the FFT is
// done in place. The radices, and everything about the transform, are run-time values; the plan sees to it that no
// thread needs more than kBlockPerThread complex numbers.
//
// With L the length of the FFT: an even length n of types II to IV is L = n / 2 complex numbers, an odd one L = n with
// imaginary part 0, type I the L = n - 1 pairs of its symmetric extension. The algebra is that of the CPU's
// kernels.cpp.

#include "dct/device/tile.h"

namespace freqrank::dct::device {

// The block FFT and its rows in shared memory.
struct BlockFft {
  int n, inner, inputs, outputs, stages, pitch;  // pitch: complex numbers from a row to the next
  bool padded;
  Divider by_n;
  struct Stage {
    int radix, span;  // span: the product of the radices before
    // Butterfly u < inner / radix is number p of the FFTs that are left, number q < span of those side by side. Threads
    // run along q, or, where that is short and odd, along p: either way over all banks.
    Divider by_count, by_run;  // run: span or, along p, inner / radix / span
    bool along_p;
  } stage[kBlockStages];  // of Bluestein's convolution those back follow, `stages` again
  SIMT_BOTH bool bluestein() const { return inner != n; }
};

inline BlockFft block_fft_of(const DeviceFft& fft, int pitch) {
  BlockFft f{};
  f.n = static_cast<int>(fft.n);
  f.inner = static_cast<int>(fft.inner);
  f.inputs = static_cast<int>(fft.inputs);
  f.outputs = static_cast<int>(fft.outputs);
  f.stages = fft.stages;
  f.pitch = pitch;
  f.padded = fft.padded;
  f.by_n = Divider(f.n);
  int span = 1;
  for (int i = 0; i < (f.bluestein() ? 2 : 1) * fft.stages; ++i) {
    if (i == fft.stages) span = 1;
    const int radix = fft.radix[i < fft.stages ? i : 2 * fft.stages - 1 - i], count = f.inner / radix;
    const int left = count / span;
    const bool along_p = span % 2 == 1 && radix % 2 == 1 && span > 1 && span < 16 && left >= 16;
    f.stage[i] = {radix, span, Divider(count), Divider(along_p ? left : span), along_p};
    span *= radix;
  }
  return f;
}

// A block's rows as complex numbers, and as the real numbers that these consist of.
template <class T>
class Rows {
 public:
  SIMT_DEVICE Rows(int rows, const BlockFft& f)
      : at_(simt::shared_array<T>(0, 2 * rows * f.pitch)),
        pitch_(f.pitch),
        shift_(block_pad_shift(f.padded, sizeof(T) == 8)) {}
  SIMT_DEVICE Complex<T> load(int row, int i) const {
    const auto z = at_.template load_vector<2>(2 * (row * pitch_ + pad(i)));
    return {z[0], z[1]};
  }
  SIMT_DEVICE void store(int row, int i, const Complex<T>& z) const {
    at_.template store_vector<2>(2 * (row * pitch_ + pad(i)), {{z.re, z.im}});
  }
  SIMT_DEVICE T real(int row, int i) const { return at_.load(slot(row, i)); }
  SIMT_DEVICE void set_real(int row, int i, T x) const { at_.store(slot(row, i), x); }

  // Two real numbers that belong together, and where, as real numbers, the first (0) and the second one (1) are: turned
  // round in every other 128 bytes, so that neighbouring threads that take the same one of neighbours use all banks.
  SIMT_DEVICE Complex<T> load_pair(int row, int k) const {
    const Complex<T> z = load(row, k);
    return turned(k) ? Complex<T>{z.im, z.re} : z;
  }
  SIMT_DEVICE void store_pair(int row, int k, const Complex<T>& z) const {
    store(row, k, turned(k) ? Complex<T>{z.im, z.re} : z);
  }
  SIMT_DEVICE static int place_in_pair(int k, int which) { return 2 * k + (turned(k) ? 1 - which : which); }

 private:
  SIMT_DEVICE static bool turned(int k) { return k >> block_pad_shift(true, sizeof(T) == 8) & 1; }
  SIMT_DEVICE int pad(int i) const { return i + (i >> shift_); }
  SIMT_DEVICE int slot(int row, int i) const { return 2 * (row * pitch_ + pad(i >> 1)) + (i & 1); }
  simt::shared<T> at_;
  int pitch_, shift_;
};

// A table of complex numbers.
template <class T>
SIMT_DEVICE Complex<T> table_at(simt::global<const T> table, Index i) {
  const auto w = table.template load_vector<2>(2 * i);
  return {w[0], w[1]};
}

template <class T>
SIMT_DEVICE Complex<T> conjugate(const Complex<T>& z) {
  return {z.re, -z.im};
}
template <class T>
SIMT_DEVICE Complex<T> swapped(const Complex<T>& z) {
  return {z.im, z.re};
}

// Reads K items a thread with read(row, j), j < count.divisor(), meets, and writes them with write(row, j, item).
template <int K, class Item, class Read, class Write>
SIMT_DEVICE void staged(int rows, const Divider& count, const Read& read, const Write& write) {
  const int total = rows * count.divisor(), me = simt::thread();
  Item items[K];
  SIMT_UNROLL
  for (int k = 0; k < K; ++k) {
    const int e = me + k * simt::threads();
    if (e < total) {
      const int row = count.quotient(e);
      items[k] = read(row, e - row * count.divisor());
    } else {
      items[k] = Item{};  // or nvcc would keep what a stage before left there
    }
  }
  simt::barrier();
  SIMT_UNROLL
  for (int k = 0; k < K; ++k) {
    const int e = me + k * simt::threads();
    if (e < total) {
      const int row = count.quotient(e);
      write(row, e - row * count.divisor(), items[k]);
    }
  }
  simt::barrier();
}

// change(row, j) for each j < count.divisor() of each row. It touches what no other j does.
template <class Change>
SIMT_DEVICE void each(int rows, const Divider& count, const Change& change) {
  const int total = rows * count.divisor();
  for (int e = simt::thread(); e < total; e += simt::threads()) {
    const int row = count.quotient(e);
    change(row, e - row * count.divisor());
  }
  simt::barrier();
}

template <int R, class T>
struct Butterfly {
  Complex<T> a[R];
};

// DFT of length A B, without common factors, by Good's and Thomas's index maps: no factors in between.
template <int A, int B, class T>
SIMT_DEVICE void coprime_butterfly(Complex<T>* a) {
  constexpr int R = A * B;
  Complex<T> b[R];
  SIMT_UNROLL
  for (int i = 0; i < A; ++i) {
    Complex<T> column[B];
    SIMT_UNROLL
    for (int j = 0; j < B; ++j) column[j] = a[(B * i + A * j) % R];
    butterfly<B>(column);
    SIMT_UNROLL
    for (int j = 0; j < B; ++j) b[B * i + j] = column[j];
  }
  SIMT_UNROLL
  for (int j = 0; j < B; ++j) {
    Complex<T> row[A];
    SIMT_UNROLL
    for (int i = 0; i < A; ++i) row[i] = b[B * i + j];
    butterfly<A>(row);
    // output k with k = i modulo A and k = j modulo B
    SIMT_UNROLL
    for (int i = 0; i < A; ++i) {
      int k = j;
      while (k % A != i) k += B;
      a[k] = row[i];
    }
  }
}

template <class T>
SIMT_DEVICE void butterfly_9(Complex<T>* a) {
  // exp(-2 pi i k / 9) for k = 1, 2, 4
  const Complex<T> w1{T(0.76604444311897803520), T(-0.64278760968653932632)};
  const Complex<T> w2{T(0.17364817766693034885), T(-0.98480775301220805937)};
  const Complex<T> w4{T(-0.93969262078590838405), T(-0.34202014332566873304)};
  Complex<T> b[3][3];
  SIMT_UNROLL
  for (int i = 0; i < 3; ++i) {
    SIMT_UNROLL
    for (int j = 0; j < 3; ++j) b[i][j] = a[i + 3 * j];
    butterfly<3>(b[i]);
  }
  b[1][1] = b[1][1] * w1;
  b[1][2] = b[1][2] * w2;
  b[2][1] = b[2][1] * w2;
  b[2][2] = b[2][2] * w4;
  SIMT_UNROLL
  for (int j = 0; j < 3; ++j) {
    Complex<T> row[3] = {b[0][j], b[1][j], b[2][j]};
    butterfly<3>(row);
    SIMT_UNROLL
    for (int i = 0; i < 3; ++i) a[j + 3 * i] = row[i];
  }
}

template <int R, class T>
SIMT_DEVICE void any_butterfly(Complex<T>* a) {
  if constexpr (R == 6) {
    coprime_butterfly<2, 3>(a);
  } else if constexpr (R == 9) {
    butterfly_9(a);
  } else if constexpr (R == 10) {
    coprime_butterfly<2, 5>(a);
  } else if constexpr (R == 12) {
    coprime_butterfly<4, 3>(a);
  } else if constexpr (R == 15) {
    coprime_butterfly<3, 5>(a);
  } else {
    butterfly<R>(a);
  }
}

// a[t] by the t-th power of `root`, made by products of few factors: a rounding or two more than tables of them all.
template <int R, class T>
SIMT_DEVICE void turn(Complex<T>* a, const Complex<T>& root) {
  Complex<T> w[R];
  w[1] = root;
  a[1] = a[1] * root;
  SIMT_UNROLL
  for (int t = 2; t < R; ++t) {
    w[t] = w[t / 2] * w[t - t / 2];
    a[t] = a[t] * w[t];
  }
}

template <int R, class T>
SIMT_DEVICE void stage(const BlockFft& f, const BlockFft::Stage& s, const Rows<T>& z, int rows,
                       simt::global<const T> roots) {
  const int count = s.by_count.divisor(), span = s.span, run = s.by_run.divisor();
  const bool last = span * R == f.inner;
  struct Place {
    int p, q;
  };
  const auto place = [&](int u) {
    const int slow = s.by_run.quotient(u), fast = u - slow * run;
    return s.along_p ? Place{fast, slow} : Place{slow, fast};
  };
  staged<kBlockPerThread / R, Butterfly<R, T>>(
      rows, s.by_count,
      [&](int row, int u) {
        const Place at = place(u);
        Butterfly<R, T> b;
        SIMT_UNROLL
        for (int t = 0; t < R; ++t) b.a[t] = z.load(row, at.q + span * at.p + t * count);
        any_butterfly<R>(b.a);
        if (!last) turn<R>(b.a, table_at(roots, at.p * span));
        return b;
      },
      [&](int row, int u, const Butterfly<R, T>& b) {
        const Place at = place(u);
        const int first = at.q + span * R * at.p;
        SIMT_UNROLL
        for (int t = 0; t < R; ++t) z.store(row, first + t * span, b.a[t]);
      });
}

// Stage i of an FFT of length f.inner of every row.
template <class T>
SIMT_DEVICE void fft_stage(const BlockFft& f, int i, const Rows<T>& z, int rows, simt::global<const T> roots) {
  const BlockFft::Stage& s = f.stage[i];
  switch (s.radix) {
    case 2: stage<2>(f, s, z, rows, roots); break;
    case 3: stage<3>(f, s, z, rows, roots); break;
    case 4: stage<4>(f, s, z, rows, roots); break;
    case 6: stage<6>(f, s, z, rows, roots); break;
    case 9: stage<9>(f, s, z, rows, roots); break;
    case 10: stage<10>(f, s, z, rows, roots); break;
    case 12: stage<12>(f, s, z, rows, roots); break;
    case 15: stage<15>(f, s, z, rows, roots); break;
    case 5: stage<5>(f, s, z, rows, roots); break;
    case 7: stage<7>(f, s, z, rows, roots); break;
    case 8: stage<8>(f, s, z, rows, roots); break;
    case 11: stage<11>(f, s, z, rows, roots); break;
    case 13: stage<13>(f, s, z, rows, roots); break;
    default: stage<16>(f, s, z, rows, roots); break;
  }
}

// --- the cosine transforms ----------------------------------------------------------------------------------------

template <class T>
struct RowParams {
  Tile tile;
  BlockFft fft;
  simt::global<const T> roots, twist, chirp_in, chirp_out, spectrum;
  int type;
  bool even, fused;
  bool spread;  // a real row as complex numbers
  T scale, in_end, out_end;
  Divider pairs;         // how many steps before and after the FFT: pairs k, l = L - k, or k of an odd n
  int eighth;            // type IV, n odd: 1 / 8 modulo n
  T turn_cos, turn_sin;  //   and 2 scale exp(2 pi i n / 8)
};

// Types II and III permute v_i = x_2i, v_n-1-i = x_2i+1; where element i of x is in v.
SIMT_DEVICE int permuted(int i, int n) { return i & 1 ? n - 1 - (i >> 1) : i >> 1; }

// Type IV of an even length pairs x_2j with x_n-1-2j.
SIMT_DEVICE int folded(int i, int n) { return i & 1 ? n - i : i; }

// Type IV of an odd length is a real DFT up to order and signs (csrc/dct/kernels.cpp): element i of x is element m of
// it, in units of the DFT's permuted positions, with `at` = 8 m + 1.
struct Image {
  int at;
  bool negative;
};
SIMT_DEVICE Image image(int i, int n) {
  const int b = 2 * i + 1;
  switch (b & 7) {
    case 1: return {b, false};
    case 3: return {4 * n - b, true};
    case 5: return {4 * n + b, true};
    default: return {8 * n - b, false};
  }
}

// A row that is half of a spectrum, type II's and IV's result and type III's input, is kept as pairs k of its elements
// k and n - k, those that have no partner together as pair 0; type I's result has its elements k first. Where element i
// is, as a real number.
template <class T>
SIMT_DEVICE int place_in_half(const RowParams<T>& p, int i) {
  const int n = p.tile.n, length = p.fft.n;
  if (p.type != 1 && !p.even) return Rows<T>::place_in_pair(2 * i < n ? i : n - i, 2 * i < n ? 0 : 1);
  if (i == length) return 1;
  return Rows<T>::place_in_pair(i < length ? i : n - i, i < length ? 0 : 1);
}

// Element i of a row on its way to before_fft.
template <class T>
SIMT_DEVICE void put(const RowParams<T>& p, const Rows<T>& z, int row, int i, T x) {
  const int n = p.tile.n;
  if (p.spread) {
    int j = permuted(i, n);
    if (p.type == 4) {
      const Image to = image(i, n);
      j = (to.at >> 3) + p.eighth;
      if (j >= n) j -= n;
      if (to.negative) x = -x;
    }
    z.store(row, j, {x, T(0)});
    return;
  }
  int slot = i;
  if (p.type == 1) {  // the symmetric extension
    const int last = p.fft.n;
    if (i == 0 || i == last) {
      x = (x + x) * p.in_end;
    } else {
      z.set_real(row, 2 * last - i, x);
    }
  } else if (p.type == 2) {
    slot = permuted(i, n);
  } else if (p.type == 4) {
    slot = folded(i, n);
  } else if (!p.fused) {
    slot = place_in_half(p, i);
  }
  z.set_real(row, slot, x);
}

// Element i of the result, from where after_fft leaves it. An inverse FFT is a forward one with real and imaginary
// parts exchanged.
template <class T>
SIMT_DEVICE T get(const RowParams<T>& p, const Rows<T>& z, int row, int i) {
  const int n = p.tile.n;
  int slot = i;
  bool negative = false;
  if (p.type == 3) {
    const int j = permuted(i, n);
    slot = p.fused ? j : p.even ? j ^ 1 : 2 * j + 1;
  } else if (p.type != 4) {
    if (!p.fused) slot = place_in_half(p, i);
  } else if (p.even) {
    slot = folded(i, n);
  } else {
    const Image from = image(i, n);
    negative = from.negative;
    slot = place_in_half(p, from.at - p.fft.by_n.quotient(from.at) * n);
  }
  const T x = z.real(row, slot);
  return negative ? -x : x;
}

// From the loaded row to the FFT's input, in place.
template <class T>
SIMT_DEVICE void before_fft(const RowParams<T>& p, const Rows<T>& z, int rows) {
  const int n = p.tile.n, length = p.fft.n;
  if (p.type == 4 && p.even) {
    each(rows, p.fft.by_n, [&](int row, int j) { z.store(row, j, z.load(row, j) * table_at(p.twist, j)); });
  } else if (p.type == 3) {
    // V_k = exp(i pi k / 2n) (x_k - i x_n-k), whose inverse real DFT is v
    each(rows, p.pairs, [&](int row, int k) {
      const T twice = p.scale + p.scale, first = twice * p.in_end;
      if (k == 0) {
        const T x0 = z.real(row, 0) * first;
        const T middle = p.even ? z.real(row, 1) * p.scale * T(1.41421356237309504880) : x0;
        z.store(row, 0, {p.even ? x0 - middle : T(0), p.even ? x0 + middle : x0});
        return;
      }
      const Complex<T> w = conjugate(table_at(p.twist, k)), x = z.load_pair(row, k);
      const Complex<T> a = w * Complex<T>{x.re * p.scale, -x.im * p.scale};
      if (!p.even) {
        z.store(row, k, swapped(a));
        z.store(row, n - k, swapped(conjugate(a)));
        return;
      }
      const int l = length - k;
      const T root = T(0.70710678118654752440);
      const Complex<T> wl{(w.re + w.im) * root, (w.re - w.im) * root};  // exp(i pi l / 2n)
      const Complex<T> y = z.load_pair(row, l), b = wl * Complex<T>{y.re * p.scale, -y.im * p.scale};
      const Complex<T> square = w * w, turn = square * square;  // exp(2 pi i k / n)
      const Complex<T> even{a.re + b.re, a.im - b.im};
      const Complex<T> odd = Complex<T>{a.re - b.re, a.im + b.im} * Complex<T>{-turn.im, turn.re};
      if (l != k) z.store(row, l, {odd.im - even.im, even.re - odd.re});
      z.store(row, k, {even.im + odd.im, even.re + odd.re});
    });
  }
}

// From the FFT's output to the result, in place.
template <class T>
SIMT_DEVICE void after_fft(const RowParams<T>& p, const Rows<T>& z, int rows) {
  const int length = p.fft.n;
  const T twice = p.scale + p.scale;
  if (p.type == 4 && p.even) {
    each(rows, p.fft.by_n, [&](int row, int k) {
      const Complex<T> a = z.load(row, k) * table_at(p.twist, k);
      z.store(row, k, {a.re * twice, -a.im * twice});
    });
  } else if (p.type == 4) {
    each(rows, p.pairs, [&](int row, int k) {
      const Complex<T> a = z.load(row, k);
      z.store_pair(row, k, {a.re * p.turn_cos + a.im * p.turn_sin, a.re * p.turn_cos - a.im * p.turn_sin});
    });
  } else if (p.type != 3) {
    each(rows, p.pairs, [&](int row, int k) {
      const Complex<T> w = table_at(p.twist, k), a = z.load(row, k);
      const T end = k == 0 ? p.scale * p.out_end : p.scale;
      if (p.type == 2 && !p.even) {
        const Complex<T> y = a * w;
        z.store_pair(row, k, {y.re * (end + end), -y.im * twice});
        return;
      }
      if (k == 0) {  // type I: y_0 and y_n-1; type II: y_0 and y_n/2
        const T last = p.type == 1 ? end : p.scale * T(1.41421356237309504880);
        z.store(row, 0, {(a.re + a.im) * (p.type == 1 ? end : end + end), (a.re - a.im) * last});
        return;
      }
      const int l = length - k;
      const Complex<T> b = z.load(row, l), even{a.re + b.re, a.im - b.im}, difference{a.re - b.re, a.im + b.im};
      if (p.type == 1) {
        const T half = p.scale * T(0.5), odd = difference.im * w.re + difference.re * w.im;
        if (l != k) z.store_pair(row, l, {(even.re - odd) * half, T(0)});
        z.store_pair(row, k, {(even.re + odd) * half, T(0)});
        return;
      }
      const T root = T(0.70710678118654752440);
      const Complex<T> wl{(w.re - w.im) * root, -(w.re + w.im) * root};  // exp(-i pi l / 2n)
      const Complex<T> square = w * w, turn = square * square;           // exp(-2 pi i k / n)
      const Complex<T> odd = difference * Complex<T>{turn.im, -turn.re};
      const Complex<T> y = (even + odd) * w, yl = Complex<T>{even.re - odd.re, odd.im - even.im} * wl;
      if (l != k) z.store_pair(row, l, {yl.re * p.scale, -yl.im * p.scale});
      z.store_pair(row, k, {y.re * p.scale, -y.im * p.scale});
    });
  }
}

// Rows from global memory to where before_fft wants them, and from where after_fft leaves them.
template <class T>
SIMT_DEVICE void load_rows(const RowParams<T>& p, const Rows<T>& z, const RowOffsets& offsets, Index first, int rows) {
  load_tile<T>(p.tile, offsets, first, rows, [&](int row, int i, T x) { put(p, z, row, i, x); });
}

template <class T>
SIMT_DEVICE void store_rows(const RowParams<T>& p, const Rows<T>& z, const RowOffsets& offsets, Index first, int rows) {
  store_tile<T>(p.tile, offsets, first, rows, [&](int row, int i) { return get(p, z, row, i); });
}

// All of a block's work; transform(z, rows) is what happens in shared memory.
template <class T, class Transform>
SIMT_DEVICE void transform_rows(const RowParams<T>& p, const Transform& transform) {
  const Tile& t = p.tile;
  const Rows<T> z(t.rows, p.fft);
  const RowOffsets offsets(t);
  // One tile a block, no loop over tiles: the compiler would keep every index of the steps below in a register.
  const Index first = simt::block() * t.rows;
  const int rows = static_cast<int>(first + t.rows <= t.batch.rows ? t.rows : t.batch.rows - first);
  if (t.load != Tiling::flat || t.store != Tiling::flat || t.padding > 0) {
    offsets.fill(t, first, rows);
    simt::barrier();
  }
  load_rows(p, z, offsets, first, rows);
  simt::barrier();
  transform(z, rows);
  store_rows(p, z, offsets, first, rows);
}

template <class T, class Queue>
RowParams<T> row_params(const Step& step, const StepPointers& pointers, const Queue& queue) {
  const Axis& axis = step.axis[0];
  RowParams<T> p{};
  p.tile = tile_of(step, pointers, queue);
  const int complex_bytes = 2 * static_cast<int>(sizeof(T));
  p.fft = block_fft_of(axis.fft, (step.shared_bytes / step.rows_per_block - kBlockRowBytes) / complex_bytes);
  const auto table = [&](Index at, Index count) {
    const T* base = static_cast<const T*>(pointers.tables);
    return at < 0 ? simt::global<const T>{} : queue.template view<const T>(base + 2 * at, 0, 2 * count);
  };
  p.type = step.type;
  p.even = axis.even(step.type);
  p.fused = axis.fused(step.type);
  p.spread = !p.even && !p.fused && (step.type == 2 || step.type == 4);
  const Index length = axis.fft.n, n = axis.n;
  const Index pairs = (step.type == 1 || p.even ? length / 2 : n / 2) + 1;
  p.roots = table(axis.roots, axis.fft.inner / 2 + 1);
  p.twist = table(axis.twist, step.type == 4 ? length : pairs);
  p.chirp_in = table(axis.chirp_in, axis.fft.inputs);
  p.chirp_out = table(axis.chirp_out, axis.fft.outputs);
  p.spectrum = table(axis.spectrum, axis.fft.inner);
  p.scale = static_cast<T>(axis.scale);
  p.in_end = static_cast<T>(axis.in_end);
  p.out_end = static_cast<T>(axis.out_end);
  p.pairs = Divider(pairs);
  if (step.type == 4 && !p.even) {
    Index eighth = 1;
    while (eighth % 8 != 0) eighth += n;
    p.eighth = static_cast<int>(eighth / 8 % n);
    const double root = n % 8 == 1 || n % 8 == 7 ? 0.70710678118654752440 : -0.70710678118654752440;
    p.turn_cos = static_cast<T>(2 * axis.scale * root);
    p.turn_sin = static_cast<T>(2 * axis.scale * (n % 8 < 4 ? 0.70710678118654752440 : -0.70710678118654752440));
  }
  return p;
}

template <class T>
struct MixedRadixKernel {
  using Params = RowParams<T>;
  static constexpr const char* name = sizeof(T) == 8 ? "dct_mixed_radix_double" : "dct_mixed_radix";
  static constexpr int max_threads = block_threads_limit(sizeof(T) == 8), min_blocks = 1;
  SIMT_DEVICE static void run(const Params& p) {
    transform_rows(p, [&](const Rows<T>& z, int rows) {
      before_fft(p, z, rows);
      for (int i = 0; i < p.fft.stages; ++i) fft_stage(p.fft, i, z, rows, p.roots);
      after_fft(p, z, rows);
    });
  }
};

template <class Queue>
void enqueue_mixed_radix(const Step& step, const StepPointers& pointers, Queue& queue) {
  const simt::Grid grid{step.blocks, step.threads, step.shared_bytes};
  if (step.wide) {
    queue.template launch<MixedRadixKernel<double>>(grid, row_params<double>(step, pointers, queue));
  } else {
    queue.template launch<MixedRadixKernel<float>>(grid, row_params<float>(step, pointers, queue));
  }
}

}  // namespace freqrank::dct::device
