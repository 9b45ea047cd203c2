#pragma once
// Rows beyond one block's shared memory. Their complex FFT of length L = R_1 R_2 .. R_P takes a pass over a workspace
// for each factor, decimation in frequency: pass p sees the workspace as [Q][R_p][A], Q the product of the factors
// before it and A of those after, transforms along R_p in shared memory and multiplies by exp(-2 pi i k a / (R_p A)),
// in place. After the last pass, k_P varies fastest and k_1 slowest in Q; output k_1 + R_1 k_2 + R_1 R_2 k_3 + ..
//
// A tile is some columns of that middle dimension. What a cosine transform does before its FFT is part of the first
// pass, what it does after it is part of the last one: these tiles hold column i and its mirror image L / R - i, so
// that elements k and L - k, which belong together there, meet in one block.
//
// Bluestein's convolution takes two FFTs of its inner length, with passes of their own over the elements before (times
// the chirp) and after them; the chirp's spectrum is one more such FFT, once a run.

#include <algorithm>

#include "dct/device/mixed_radix.h"

namespace freqrank::dct::device {

template <class T>
SIMT_DEVICE Complex<T> load_complex(simt::global<const T> from, Index at) {
  const simt::pack<T, 2> v = from.template load_vector<2>(2 * at);
  return {v[0], v[1]};
}

template <class T>
SIMT_DEVICE void store_complex(simt::global<T> to, Index at, const Complex<T>& z) {
  to.template store_vector<2>(2 * at, {{z.re, z.im}});
}

// exp(2 pi i k / period), 0 <= k < period, as a product of two entries.
template <class T>
struct Roots {
  simt::global<const T> low, high;  // exp(-2 pi i k / period), k < 2^bits; every 2^bits-th of them
  int bits;
  Index period;

  SIMT_DEVICE Complex<T> operator()(Index k) const {
    return conjugate(table_at(low, k & ((Index{1} << bits) - 1)) * table_at(high, k >> bits));
  }
};

// One long row's transform but for the FFT: H = `length` is the FFT's length. A type III row takes an inverse FFT,
// which is a forward one of numbers with real and imaginary parts exchanged: that is how they leave `input` and come to
// `output`.
template <class T>
struct LongRow {
  int type;
  bool even;  // types II to IV of even length: H = n / 2; otherwise H = n, in type I n - 1
  Index n, length, filled, out_size, in_stride, out_stride;
  T scale, in_end, out_end;
  Dtype from_dtype, to_dtype;
  simt::const_global_bytes in;
  simt::global_bytes out;
  Roots<T> roots;  // of period 2H (type I), 4n (II and III), 8n (IV)
  Index eighth;    // 1/8 modulo n, for type IV of odd length
  Batch batch;

  // `pairs`: elements k and H - k of the FFT's input, or output, are made together.
  SIMT_DEVICE bool input_pairs() const { return type == 3; }
  SIMT_DEVICE bool output_pairs() const { return type == 1 || (type == 2 && even); }

  SIMT_DEVICE T read(Index at, Index i) const {
    if (i >= filled) return T(0);
    at += i * in_stride;
    T x{};
    with_dtype<T>(from_dtype, [&](auto example) {
      x = static_cast<T>(simt::to_float(in.template as<decltype(example)>().load(at)));
    });
    return i == 0 || (type == 1 && i == n - 1) ? x * in_end : x;
  }

  SIMT_DEVICE void write(Index at, Index i, T y) const {
    if (i >= out_size) return;
    at += i * out_stride;
    if (i == 0 || (type == 1 && i == n - 1)) y = y * out_end;
    with_dtype<T>(to_dtype, [&](auto example) {
      using S = decltype(example);
      out.template as<S>().store(at, simt::from_float<S>(y));
    });
  }

  // Types II and III permute v_i = x_2i, v_n-1-i = x_2i+1 so that a real DFT of v is what remains.
  SIMT_DEVICE Index permuted(Index i) const { return 2 * i < n ? 2 * i : 2 * n - 1 - 2 * i; }

  // Type IV of odd length: which element goes with a = 8 i + 1, and whether negated.
  SIMT_DEVICE Index image(Index i, bool& negative) const {
    const Index a = 8 * i + 1;
    negative = a >= 2 * n && a < 6 * n;
    return (a < 2 * n ? a - 1 : a < 4 * n ? 4 * n - a - 1 : a < 6 * n ? a - 4 * n - 1 : 8 * n - a - 1) / 2;
  }

  // Types I, II, IV
  SIMT_DEVICE Complex<T> input(Index at, Index j) const {
    if (type == 1) {
      const Index a = 2 * j, b = 2 * j + 1;
      const T x = read(at, a <= length ? a : 2 * length - a), y = read(at, b <= length ? b : 2 * length - b);
      return {a == 0 || a == length ? x + x : x, b == length ? y + y : y};
    }
    if (type == 2) {
      if (even) return {read(at, permuted(2 * j)), read(at, permuted(2 * j + 1))};
      return {read(at, permuted(j)), T(0)};
    }
    if (even) return Complex<T>{read(at, 2 * j), read(at, n - 1 - 2 * j)} * conjugate(roots(4 * j));
    bool negative;
    const Index from = image((j + n - eighth) % n, negative);
    const T x = read(at, from);
    return {negative ? -x : x, T(0)};
  }

  // V_k = exp(i pi k / 2n) (x_k - i x_n-k), whose inverse real DFT is v; w = exp(i pi k / 2n)
  SIMT_DEVICE Complex<T> spectrum(T x, T y, const Complex<T>& w) const { return w * Complex<T>{x * scale, -y * scale}; }

  // Type III: elements k and H - k, 0 <= k <= H / 2
  SIMT_DEVICE void input_pair(Index at, Index k, Complex<T>& z, Complex<T>& mirrored) const {
    const Index l = length - k;
    const T x = read(at, k), twice = T(2) * scale;
    if (!even) {
      const Complex<T> a = k == 0 ? Complex<T>{x * twice, T(0)} : spectrum(x, read(at, n - k), roots(k));
      z = swapped(a);
      mirrored = swapped(conjugate(a));
      return;
    }
    const T y = l == k ? x : read(at, l);
    if (k == 0) {
      const T first = x * twice, middle = y * (T(1.41421356237309504880) * scale);
      z = mirrored = {first - middle, first + middle};
      return;
    }
    const Complex<T> a = spectrum(x, read(at, n - k), roots(k));
    const Complex<T> b = l == k ? a : spectrum(y, read(at, n - l), roots(l));
    const Complex<T> turn = roots(4 * k), sum{a.re + b.re, a.im - b.im};
    const Complex<T> odd = Complex<T>{a.re - b.re, a.im + b.im} * Complex<T>{-turn.im, turn.re};
    z = swapped(sum + odd);
    mirrored = swapped(conjugate(sum - odd));
  }

  // Types II of odd length, III, IV
  SIMT_DEVICE void output(Index at, Index k, Complex<T> z) const {
    if (type == 2) {
      if (2 * k > n) return;
      const Complex<T> w = roots(k);
      const T twice = T(2) * scale;
      write(at, k, (z.re * w.re + z.im * w.im) * twice);
      if (k > 0) write(at, n - k, (z.re * w.im - z.im * w.re) * twice);
    } else if (type == 3) {
      if (even) {
        write(at, permuted(2 * k), z.im);
        write(at, permuted(2 * k + 1), z.re);
      } else {
        write(at, permuted(k), z.im);
      }
    } else if (even) {
      const Complex<T> w = roots(4 * k + 1);
      const T twice = T(2) * scale;
      write(at, 2 * k, (z.re * w.re + z.im * w.im) * twice);
      write(at, n - 1 - 2 * k, (z.re * w.im - z.im * w.re) * twice);
    } else {
      const Complex<T> w = roots(n * n % roots.period);
      bool negative;
      const Index to = image((k + n - 1) % n * eighth % n, negative);
      const T y = (z.re * w.re + z.im * w.im) * (T(2) * scale);
      write(at, to, negative ? -y : y);
    }
  }

  // Types I and, of even length, II: from elements k and H - k, 0 <= k <= H / 2
  SIMT_DEVICE void output_pair(Index at, Index k, Complex<T> z, Complex<T> mirrored) const {
    const Index l = length - k;
    const Complex<T> sum{z.re + mirrored.re, z.im - mirrored.im};
    const Complex<T> difference{z.re - mirrored.re, z.im + mirrored.im};
    if (k == 0) {
      write(at, 0, (z.re + z.im) * (type == 1 ? scale : T(2) * scale));
      write(at, length, (z.re - z.im) * (type == 1 ? scale : T(1.41421356237309504880) * scale));
      return;
    }
    if (type == 1) {
      const Complex<T> w = roots(k);
      const T half = T(0.5) * scale;
      const T odd = difference.im * w.re - difference.re * w.im;
      write(at, k, (sum.re + odd) * half);
      if (l != k) write(at, l, (sum.re - odd) * half);
      return;
    }
    const Complex<T> turn = roots(4 * k), odd = difference * Complex<T>{-turn.im, -turn.re};
    const auto put = [&](Index to, Complex<T> a) {  // a: twice the spectrum of v at `to`
      const Complex<T> w = roots(to);
      write(at, to, (a.re * w.re + a.im * w.im) * scale);
      write(at, n - to, (a.re * w.im - a.im * w.re) * scale);
    };
    put(k, sum + odd);
    if (l != k) put(l, {sum.re - odd.re, odd.im - sum.im});
  }

  // exp(-i pi k^2 / H)
  SIMT_DEVICE Complex<T> chirp(Index k) const {
    return conjugate(roots(k * k % (2 * length) * (roots.period / (2 * length))));
  }
};

// The columns of a tile: neighbours, or the first half with their mirror images.
struct Columns {
  Index count, start;
  int half;  // 0: neighbours

  // -1: no such column, or one that is its own image and has been met
  SIMT_DEVICE Index operator[](int slot) const {
    Index i = start + slot;
    if (half == 0) return i < count ? i : -1;
    if (slot >= half) i -= half;
    if (2 * i > count) return -1;
    if (slot < half) return i;
    return i == 0 || 2 * i == count ? -1 : count - i;
  }
  SIMT_DEVICE bool own_image(Index i) const { return i == 0 || 2 * i == count; }
  // Element `at` of column i and this element of its image belong together.
  SIMT_DEVICE static int image_of(int at, Index i, int rows) { return i > 0 ? rows - 1 - at : at > 0 ? rows - at : 0; }
};

template <class T>
struct LongPass {
  static constexpr const char* name = sizeof(T) == 8 ? "dct_long_pass_double" : "dct_long_pass";
  static constexpr int max_threads = kLongThreads, min_blocks = 1;
  struct Params {
    LongRow<T> row;  // for a pass from or to the tensor
    bool first, last, from_tensor, to_tensor;
    Index first_row;             // of this launch
    simt::global<T> from, to;    // workspaces, rows of `length` complex numbers
    Index length, filled;        // `from` holds `filled` elements of a row, the others are zero
    Index before, after, tiles;  // Q, A; tiles a row
    int column_bits;             // 2^column_bits columns a tile
    BlockFft fft;
    simt::global<const T> fft_roots;
    int passes;  // before this one, and their factors
    int factors[MultiPass::max_passes];
    Roots<T> roots;                  // of period `length`
    simt::global<const T> spectrum;  // null, or what the last pass multiplies by; it then swaps
    T factor;                        // of what the last pass stores in a workspace
  };

  SIMT_DEVICE static void load(const Params& p, const Columns& columns, const Rows<T>& z, Index row, Index base) {
    const int count = p.fft.inner, slots = 1 << p.column_bits, threads = simt::threads();
    const simt::global<const T> from = simt::global<const T>(p.from) + 2 * (row * p.length + base);
    if (p.last) {  // columns lie in the order of their digits turned round, each in one run
      for (int slot = simt::warp(); slot < slots; slot += threads / simt::warp_size) {
        const Index column = columns[slot];
        Index rest = column, position = 0;
        for (int i = 0; i < p.passes; ++i) {
          position = position * p.factors[i] + rest % p.factors[i];
          rest /= p.factors[i];
        }
        for (int i = simt::lane(); i < count; i += simt::warp_size) {
          z.store(slot, i, column < 0 ? Complex<T>{} : load_complex(from, position * count + i));
        }
      }
      return;
    }
    const Index at = p.from_tensor ? offsets_of(p.row.batch, p.first_row + row).in : 0;
    if (p.from_tensor && p.row.input_pairs()) {
      const int bits = p.column_bits - 1, slot = simt::thread() & (columns.half - 1);
      const Index column = columns[slot];
      const bool own = column >= 0 && columns.own_image(column);
      for (int i = simt::thread() >> bits; i < count; i += threads >> bits) {
        const int image = column < 0 ? i : Columns::image_of(i, column, count);
        if (own) z.store(slot + columns.half, i, {});
        if (own && i > image) continue;
        Complex<T> a{}, mirrored{};
        if (column >= 0) p.row.input_pair(at, column + columns.count * i, a, mirrored);
        z.store(slot, i, a);
        if (!own || image != i) z.store(own ? slot : slot + columns.half, image, mirrored);
      }
      return;
    }
    const int slot = simt::thread() & (slots - 1);
    const Index column = columns[slot];
    for (int i = simt::thread() >> p.column_bits; i < count; i += threads >> p.column_bits) {
      const Index j = column + columns.count * i;
      z.store(slot, i,
              column < 0      ? Complex<T>{}
              : p.from_tensor ? p.row.input(at, j)
              : j < p.filled  ? load_complex(from, j)
                              : Complex<T>{});
    }
  }

  SIMT_DEVICE static void store(const Params& p, const Columns& columns, const Rows<T>& z, Index row, Index base,
                                Index tile) {
    const int count = p.fft.inner, slots = 1 << p.column_bits, threads = simt::threads();
    Index at = 0;
    if (p.to_tensor) {
      at = offsets_of(p.row.batch, p.first_row + row).out;
      for (Index i = p.row.n + tile * threads + simt::thread(); i < p.row.out_size; i += p.tiles * threads) {
        p.row.write(at, i, T(0));
      }
    }
    if (p.to_tensor && p.row.output_pairs()) {
      const int bits = p.column_bits - 1, slot = simt::thread() & (columns.half - 1);
      const Index column = columns[slot];
      if (column < 0) return;
      const bool own = columns.own_image(column);
      for (int i = simt::thread() >> bits; i < count; i += threads >> bits) {
        const int image = Columns::image_of(i, column, count);
        if (own && i > image) continue;
        p.row.output_pair(at, column + columns.count * i, z.load(slot, i),
                          z.load(own ? slot : slot + columns.half, image));
      }
      return;
    }
    const int slot = simt::thread() & (slots - 1);
    const Index column = columns[slot];
    if (column < 0) return;
    const simt::global<T> to = p.to + 2 * (row * p.length + base);
    for (int i = simt::thread() >> p.column_bits; i < count; i += threads >> p.column_bits) {
      const Complex<T> a = z.load(slot, i);
      const Index j = column + columns.count * i;
      if (p.to_tensor) {
        p.row.output(at, j, a);
      } else if (!p.last) {
        store_complex(to, j, a * conjugate(p.roots(column * i * p.before)));
      } else if (p.spectrum) {
        store_complex(to, j, swapped(a * load_complex(p.spectrum, j)));
      } else {
        store_complex(to, j, Complex<T>{a.re * p.factor, a.im * p.factor});
      }
    }
  }

  SIMT_DEVICE static void run(const Params& p) {
    const int slots = 1 << p.column_bits;
    const Index row = simt::block() / p.tiles, tile = simt::block() % p.tiles;
    const Rows<T> z(slots, p.fft);
    Columns columns{p.length / p.fft.inner, tile * (slots / 2), slots / 2};
    Index base = 0;
    if (!p.first && !p.last) {
      const Index tiles = (p.after + slots - 1) / slots;  // of each of Q parts
      columns = {p.after, tile % tiles * slots, 0};
      base = tile / tiles * p.fft.inner * p.after;
    }
    load(p, columns, z, row, base);
    simt::barrier();
    for (int i = 0; i < p.fft.stages; ++i) fft_stage(p.fft, i, z, slots, p.fft_roots);
    store(p, columns, z, row, base, tile);
  }
};

// What Bluestein's convolution does element by element.
template <class T>
struct LongChirp {
  static constexpr const char* name = sizeof(T) == 8 ? "dct_long_chirp_double" : "dct_long_chirp";
  static constexpr int max_threads = 256, min_blocks = 2;
  enum Work { filter, before, after };
  struct Params {
    LongRow<T> row;
    Work work;
    Index first_row, tiles;  // blocks a row
    Index inner;
    simt::global<T> buffer;  // rows of `inner` complex numbers
  };

  SIMT_DEVICE static void run(const Params& p) {
    const Index row = simt::block() / p.tiles, tile = simt::block() % p.tiles;
    const Index length = p.row.length, k = tile * simt::threads() + simt::thread();
    const simt::global<T> z = p.buffer + 2 * row * p.inner;
    if (p.work == filter) {  // the conjugate chirp, wrapped round
      if (k >= p.inner) return;
      const Index at = k < length ? k : p.inner - k;
      store_complex(z, k, at < length ? conjugate(p.row.chirp(at)) : Complex<T>{});
      return;
    }
    const Offsets at = offsets_of(p.row.batch, p.first_row + row);
    if (p.work == after) {
      for (Index i = p.row.n + k; i < p.row.out_size; i += p.tiles * simt::threads()) p.row.write(at.out, i, T(0));
    }
    if (2 * k > length) return;
    const Index l = k == 0 ? 0 : length - k;
    if (p.work == before) {
      Complex<T> a, b;
      if (p.row.input_pairs()) {
        p.row.input_pair(at.in, k, a, b);
      } else {
        a = p.row.input(at.in, k);
        if (l != k) b = p.row.input(at.in, l);
      }
      store_complex(z, k, a * p.row.chirp(k));
      if (l != k) store_complex(z, l, b * p.row.chirp(l));
    } else {
      const simt::global<const T> from = z;
      const Complex<T> a = swapped(load_complex(from, k)) * p.row.chirp(k);
      const Complex<T> b = l == k ? a : swapped(load_complex(from, l)) * p.row.chirp(l);
      if (p.row.output_pairs()) {
        p.row.output_pair(at.out, k, a, b);
      } else {
        p.row.output(at.out, k, a);
        if (l != k) p.row.output(at.out, l, b);
      }
    }
  }
};

template <class T, class Queue>
class LongTransform {
 public:
  LongTransform(const Step& step, const StepPointers& pointers, Queue& queue)
      : step_(step), plan_(step.multi_pass), pointers_(pointers), queue_(queue), inner_(step.axis[0].fft.inner) {
    const Axis& axis = step.axis[0];
    row_.type = step.type;
    row_.even = axis.even(step.type);
    row_.n = axis.n;
    row_.length = axis.fft.n;
    row_.filled = axis.filled;
    row_.out_size = axis.out_size;
    row_.in_stride = axis.in_stride;
    row_.out_stride = axis.out_stride;
    row_.scale = static_cast<T>(axis.scale);
    row_.in_end = static_cast<T>(axis.in_end);
    row_.out_end = static_cast<T>(axis.out_end);
    row_.from_dtype = step.from_dtype;
    row_.to_dtype = step.to_dtype;
    row_.in = input_of(step, pointers, queue);
    row_.out = output_of(step, pointers, queue);
    row_.roots = roots(plan_.row);
    row_.batch = batch_of(step);
    Index eighth = 1;
    while (axis.n % 2 == 1 && eighth % 8 != 0) eighth += axis.n;
    row_.eighth = eighth / 8 % axis.n;
  }

  void run() {
    const Axis& axis = step_.axis[0];
    T* const work = static_cast<T*>(pointers_.scratch);
    T* const other = work + 2 * plan_.rows_per_launch * inner_;
    T* const filter = other + 2 * plan_.rows_per_launch * inner_;
    const bool bluestein = axis.fft.bluestein();
    if (bluestein) {
      chirp(LongChirp<T>::filter, work, 0, 1);
      fft(work, filter, nullptr, 0, 1, inner_, false, false, 1.0 / static_cast<double>(inner_));
    }
    for (Index first = 0; first < step_.rows; first += plan_.rows_per_launch) {
      const Index rows = std::min(plan_.rows_per_launch, step_.rows - first);
      if (!bluestein) {
        fft(work, nullptr, nullptr, first, rows, inner_, true, true, 1.0);
        continue;
      }
      chirp(LongChirp<T>::before, work, first, rows);
      fft(work, other, filter, first, rows, axis.fft.n, false, false, 1.0);
      fft(other, work, nullptr, first, rows, inner_, false, false, 1.0);
      chirp(LongChirp<T>::after, work, first, rows);
    }
  }

 private:
  simt::global<const T> table(Index at, Index count) const {
    return queue_.template view<const T>(static_cast<const T*>(pointers_.tables) + 2 * at, 0, 2 * count);
  }

  Roots<T> roots(const MultiPass::Roots& plan) const {
    return {table(plan.low, plan.low_count()), table(plan.high, plan.high_count()), plan.bits, plan.period};
  }

  void chirp(typename LongChirp<T>::Work work, T* buffer, Index first, Index rows) {
    typename LongChirp<T>::Params p{};
    p.row = row_;
    p.work = work;
    p.first_row = first;
    p.inner = inner_;
    p.buffer = queue_.template view<T>(buffer, 0, 2 * rows * inner_);
    const Index items = work == LongChirp<T>::filter ? inner_ : row_.length / 2 + 1;
    p.tiles = (items + 255) / 256;
    queue_.template launch<LongChirp<T>>({rows * p.tiles, 256, 0}, p);
  }

  // Rows of `from`, in which this is done in place up to the last pass, or of the tensor; to `to` or the tensor.
  void fft(T* from, T* to, const T* spectrum, Index first, Index rows, Index filled, bool from_tensor, bool to_tensor,
           double factor) {
    typename LongPass<T>::Params p{};
    p.row = row_;
    p.first_row = first;
    p.length = inner_;
    p.filled = filled;
    p.roots = roots(plan_.fft);
    p.factor = static_cast<T>(factor);
    p.before = 1;
    p.after = inner_;
    for (int i = 0; i < plan_.passes; ++i) {
      const MultiPass::Pass& pass = plan_.pass[i];
      p.first = i == 0;
      p.last = i + 1 == plan_.passes;
      p.from_tensor = p.first && from_tensor;
      p.to_tensor = p.last && to_tensor;
      const Index numbers = 2 * rows * inner_;
      p.from = queue_.template view<T>(from, 0, numbers);
      p.to = p.to_tensor ? simt::global<T>{} : queue_.template view<T>(p.last ? to : from, 0, numbers);
      if (p.last && spectrum) p.spectrum = queue_.template view<const T>(spectrum, 0, 2 * inner_);
      p.after /= pass.fft.inner;
      p.passes = i;
      p.factors[i] = static_cast<int>(pass.fft.inner);
      p.column_bits = pass.column_bits;
      const int slots = 1 << pass.column_bits;
      p.fft = block_fft_of(pass.fft, pass.shared_bytes / slots / (2 * static_cast<int>(sizeof(T))));
      p.fft_roots = table(pass.roots, pass.fft.inner / 2 + 1);
      p.tiles = plan_.tiles(i);
      queue_.template launch<LongPass<T>>({rows * p.tiles, pass.threads, pass.shared_bytes}, p);
      p.before *= pass.fft.inner;
    }
  }

  const Step& step_;
  const MultiPass& plan_;
  const StepPointers& pointers_;
  Queue& queue_;
  Index inner_;
  LongRow<T> row_{};
};

template <class Queue>
void enqueue_multi_pass(const Step& step, const StepPointers& pointers, Queue& queue) {
  if (step.wide) {
    LongTransform<double, Queue>(step, pointers, queue).run();
  } else {
    LongTransform<float, Queue>(step, pointers, queue).run();
  }
}

}  // namespace freqrank::dct::device
