#pragma once
// Tiles of X^T diag(w) Y by exact sums of integers, for GPUs that are slow in double.
//
// Of a chunk of kGramFlushTokens tokens, each column has an exponent e with |x| < 2^e. Its numbers become integers
// Q = round(x 2^(54 - e)) of seven digits to the base 256, each from -128 to 127, and
//
//   sum over t of Q_i Q_j = sum over digits k, l of 256^(k + l) sum over t of d_ik d_jl.
//
// The inner sums are products of int8 matrices, exact in int32 since 7 * 4096 * 2^14 < 2^31. Pairs of k + l < 5 are
// left out: they are at most 4096 * 5.1 * 2^(14 + 32 - 106) = 2^-45.6 of |Q_i| |Q_j|, since the largest of a column is
// at least 2^53. Rounding Q adds at most 2^-47 of it, and |Q_i| |Q_j| over the chunks is at most that of all tokens.
// Digits that are 0 in 16 tokens of a warp's columns are passed over: numbers of 8 bits that lie within 2^22 of their
// chunk's largest have four, and all of their products are kept.
//
// With weights both factors are multiplied by sqrt |w|, rounded to double, one of them by its sign too. A column's
// exponent is then found from the exponents of both, and its largest Q is at least 2^52.

#include <type_traits>

#include "whitening/device/gram_layout.h"
#include "whitening/device/gram_params.h"

namespace freqrank::whitening::device {

struct GramIntegers {
  static constexpr int digits = 7, bits = 54, least_pair = 5, levels = 2 * digits - 1 - least_pair;
  static constexpr int chunk = kGramFlushTokens;
  // In place of exponents: of a column that is summed as it stands, since a number is not finite or all are too small
  // to be rounded with accuracy; of zero.
  static constexpr int as_it_stands = 1 << 20, none = -(1 << 20);
  static constexpr int least = -1000, most = 1024;

  // An integer of `digits` balanced digits, one in each byte.
  SIMT_DEVICE static std::uint64_t balanced(std::uint64_t magnitude, bool negative) {
    constexpr std::uint64_t half = 0x0080808080808080u;
    const std::uint64_t q = negative ? ~magnitude + 1 : magnitude;
    return (q + half) ^ half;  // each byte d + 128, and then d: byte k carries into byte k + 1 where d is negative
  }
  // round(mantissa 2^shift); shift is at most `spare`.
  template <int spare>
  SIMT_DEVICE static std::uint64_t shifted(std::uint64_t mantissa, int shift) {
    int right = spare + 1 - shift;
    right = right > 63 ? 63 : right;
    return ((mantissa << (spare + 1)) + (std::uint64_t{1} << (right - 1))) >> right;
  }

  SIMT_DEVICE static std::uint64_t digits_of(float x, int e) {
    const auto b = simt::bits_as<std::uint32_t>(x);
    const int field = static_cast<int>(b >> 23 & 0xffu);
    const std::uint32_t mantissa = (b & 0x7fffffu) | (field ? 0x800000u : 0u);
    return balanced(shifted<bits - 24>(mantissa, (field ? field : 1) - 150 + bits - e), b >> 31 != 0);
  }
  SIMT_DEVICE static std::uint64_t digits_of(double x, int e) {
    const auto b = simt::bits_as<std::uint64_t>(x);
    const int field = static_cast<int>(b >> 52 & 0x7ffu);
    const std::uint64_t mantissa = (b & 0xfffffffffffffu) | (field ? std::uint64_t{1} << 52 : 0);
    return balanced(shifted<bits - 53>(mantissa, (field ? field : 1) - 1075 + bits - e), b >> 63 != 0);
  }

  // The least e with |x| < 2^e for normal numbers, none or as_it_stands.
  SIMT_DEVICE static int exponent_of(float x) {
    const auto b = simt::bits_as<std::uint32_t>(x) & 0x7fffffffu;
    const int field = static_cast<int>(b >> 23);
    return b == 0 ? none : field == 0xff ? as_it_stands : (field ? field : 1) - 126;
  }
  SIMT_DEVICE static int exponent_of(double x) {
    const auto b = simt::bits_as<std::uint64_t>(x) & 0x7fffffffffffffffu;
    const int field = static_cast<int>(b >> 52);
    return b == 0 ? none : field == 0x7ff ? as_it_stands : (field ? field : 1) - 1022;
  }

  // x 2^e, whatever e.
  SIMT_DEVICE static double scaled(double x, int e) {
    const int third = e / 3, rest = e - 2 * third;
    return x * power(third) * power(third) * power(rest);
  }
  SIMT_DEVICE static double power(int e) {  // within the range of normal numbers
    return simt::bits_as<double>(static_cast<std::uint64_t>(e + 1023) << 52);
  }

  // The same of x sqrt |w|, from the exponents of x and w alone: roots are slow.
  SIMT_DEVICE static int with_weight(int e, double weight) {
    const int of_weight = exponent_of(weight);
    if (e == none || of_weight == none) return e == as_it_stands || of_weight == as_it_stands ? as_it_stands : none;
    const bool plain = e == as_it_stands || of_weight == as_it_stands || of_weight < least;
    return plain ? as_it_stands : e + ((of_weight + 1) >> 1);
  }
};

// Loads elements of an operand stored as E; E = double stands for any dtype, and for weighted ones.
template <class E>
struct GramLoader {
  using Number = std::conditional_t<std::is_same_v<E, double>, double, float>;

  SIMT_DEVICE static Number load(const GramOperand& m, Index i) {
    if constexpr (!std::is_same_v<E, double>) {
      return simt::to_float(m.data.template as<E>().load(i));
    } else {
      switch (m.dtype) {
        case Dtype::float16: return simt::to_float(m.data.template as<float16>().load(i));
        case Dtype::bfloat16: return simt::to_float(m.data.template as<bfloat16>().load(i));
        case Dtype::float32: return m.data.template as<float>().load(i);
        case Dtype::float64: return m.data.template as<double>().load(i);
      }
      return 0;
    }
  }
};

// The exponents of a chunk's columns, 32 columns a block.
template <class E>
struct GramExponents {
  using Params = GramParams;
  static constexpr int type = std::is_same_v<E, float16> ? 0 : std::is_same_v<E, bfloat16> ? 1 : sizeof(E) == 4 ? 2 : 3;
  static constexpr const char* names[] = {"gram_exponents_float16", "gram_exponents_bfloat16", "gram_exponents_float32",
                                          "gram_exponents_float64"};
  static constexpr const char* name = names[type];
  static constexpr int max_threads = 512, min_blocks = 2, warps = max_threads / 32;

  SIMT_DEVICE static void run(const Params& p) {
    const Index groups_x = (p.x.columns + 31) / 32, groups = groups_x + (p.symmetric ? 0 : (p.y.columns + 31) / 32);
    const Index group = simt::block() % groups, chunk = simt::block() / groups % p.chunks;
    const Index batch = simt::block() / groups / p.chunks;
    if (group < groups_x) {
      find(p, p.x, p.x_exponents, batch, chunk, group);
    } else {
      find(p, p.y, p.y_exponents, batch, chunk, group - groups_x);
    }
  }

  SIMT_DEVICE static void find(const Params& p, const GramOperand& m, simt::global<int> exponents, Index batch,
                               Index chunk, Index group) {
    using I = GramIntegers;
    const auto found = simt::shared_array<int>(0, max_threads);
    const Index column = group * 32 + simt::lane(), first = chunk * I::chunk, left = p.tokens - first;
    const int count = left < I::chunk ? static_cast<int>(left) : I::chunk;
    const Index begin = gram_offset(p, batch, m.batch_strides) + first * m.token_stride + column * m.column_stride;
    const Index weights = gram_offset(p, batch, p.weight_batch_strides) + first * p.weight_stride;
    int most = I::none;
    if (column < m.columns) {
      constexpr int together = 4;
      SIMT_NO_UNROLL
      for (int t = simt::warp(); t < count; t += together * warps) {
        typename GramLoader<E>::Number x[together];
        SIMT_UNROLL
        for (int k = 0; k < together; ++k) {
          const int at = t + k * warps;
          x[k] = at < count ? GramLoader<E>::load(m, begin + at * m.token_stride) : 0;
        }
        SIMT_UNROLL
        for (int k = 0; k < together; ++k) {
          const int at = t + k * warps;
          if (at >= count) break;
          int e = I::exponent_of(x[k]);
          if (p.weight) e = I::with_weight(e, p.weight.load(weights + at * p.weight_stride));
          most = e > most ? e : most;
        }
      }
    }
    found.store(simt::thread(), most);
    simt::barrier();
    if (simt::warp() != 0 || column >= m.columns) return;
    SIMT_UNROLL
    for (int w = 1; w < warps; ++w) {
      const int other = found.load(w * 32 + simt::lane());
      most = other > most ? other : most;
    }
    if (most == I::none) most = 0;
    if (most < I::least || most > I::most) most = I::as_it_stands;
    exponents.store((batch * p.chunks + chunk) * m.columns + column, most);
  }
};

// A block's tile: eight warps, four by two, have 16 x 16 of it each.
struct GramIntegerTile {
  static constexpr int rows = kGramIntegerShape.rows, columns = kGramIntegerShape.columns, ratio = rows / columns;
  static constexpr int threads = kGramIntegerThreads, warps = threads / 32;
  static_assert(rows == 64 && columns == 32);

  // An element of the result, and where Y is X what mirrors it; `add` to what is there.
  SIMT_DEVICE static void put(const GramParams& p, const GramPlace& at, simt::global<double> out, int row, int column,
                              double value, bool add) {
    const Index i = Index{at.down} * rows + row, j = Index{at.across} * columns + column;
    if (i >= p.x.columns || j >= p.y.columns || (p.symmetric && j > i)) return;
    put_one(out, i * p.out_row_stride + j * p.out_column_stride, value, add);
    if (p.symmetric && j < i) put_one(out, j * p.out_row_stride + i * p.out_column_stride, value, add);
  }
  SIMT_DEVICE static void put_one(simt::global<double> out, Index k, double value, bool add) {
    if (add) value += out.load(k);
    out.store(k, value);
  }
};

template <class E>
struct GramIntegerKernel {
  using Params = GramParams;
  using I = GramIntegers;
  using Tile = GramIntegerTile;
  using Loader = GramLoader<E>;
  using Number = typename Loader::Number;
  static constexpr int type = GramExponents<E>::type;
  static constexpr const char* names[] = {"gram_integers_float16", "gram_integers_bfloat16", "gram_integers_float32",
                                          "gram_integers_float64"};
  static constexpr const char* name = names[type];
  static constexpr int max_threads = Tile::threads, min_blocks = type == 3 ? 1 : 2;

  // Digits in shared memory: [digit, column of X or Y, 32 tokens], 48 bytes from one column to the next, so that eight
  // columns' 16 bytes lie in different banks. A mask of the digits that are not 0 for each 8 columns and 16 tokens.
  static constexpr int depth = 32, pitch = 48, columns = Tile::rows + Tile::columns;
  static constexpr int digit_bytes = columns * pitch, masks_at = I::digits * digit_bytes;
  static constexpr int units = columns / 8 * 2, shares = units / Tile::warps, of_x = Tile::rows / 4 / Tile::warps;
  static constexpr int exponents_at = masks_at + units * 4, roots_at = exponents_at + columns * 4;
  static constexpr int matrices_at = roots_at + 2 * depth * 8;
  static_assert(units % Tile::warps == 0 && Tile::rows / 4 % Tile::warps == 0 && Tile::warps % 2 == 0);
  static_assert(roots_at % 8 == 0 && matrices_at + 4 * 8 == kGramIntegerSharedBytes);

  SIMT_DEVICE static simt::shared<std::int8_t> digits(int k) {
    return simt::shared_array<std::int8_t>(k * digit_bytes, digit_bytes);
  }
  SIMT_DEVICE static simt::shared<unsigned> masks() { return simt::shared_array<unsigned>(masks_at, units); }
  SIMT_DEVICE static simt::shared<int> exponents() { return simt::shared_array<int>(exponents_at, columns); }
  // Where X's and Y's matrices begin, and which tile a block has: registers are few.
  SIMT_DEVICE static simt::shared<Index> matrices() { return simt::shared_array<Index>(matrices_at, 2); }
  SIMT_DEVICE static simt::shared<int> places() { return simt::shared_array<int>(matrices_at + 16, 3); }
  SIMT_DEVICE static GramPlace place() { return {places().load(0), places().load(1), places().load(2)}; }
  // sqrt |w| of this step's tokens, or of the next one's.
  SIMT_DEVICE static simt::shared<double> roots(int step) {
    return simt::shared_array<double>(roots_at + step % 2 * depth * 8, depth);
  }

  struct Work {
    int chunk, count;  // which one, and its tokens
    SIMT_DEVICE Index token(int t) const { return Index{chunk} * I::chunk + t; }
  };
  using Sum = simt::Accumulator<std::int8_t>;
  using Sums = Sum[I::levels][2];

  // A thread has four tokens, of one column of each of its warp's units of 8 columns and 16 tokens; the first `of_x` of
  // them are X's.
  struct Share {
    int thread = simt::opaque(simt::thread());  // what follows from it is cheap to find again, and registers are few
    SIMT_DEVICE int unit(int k) const { return thread / 32 + Tile::warps * k; }
    SIMT_DEVICE int column(int k) const { return unit(k) / 2 * 8 + thread % 8; }
    SIMT_DEVICE int token() const { return thread / 32 % 2 * 16 + thread % 32 / 8 * 4; }
  };

  SIMT_DEVICE static void run(const Params& p) {
    Index task = simt::block();
    const Index part = task / p.tiles;
    const int split = static_cast<int>(part % p.splits);
    task = part / p.splits * p.tiles + task % p.tiles;
    Work w;
    if (simt::thread() == 0) {  // seen after the next barrier
      const GramPlace at = gram_place<Tile::ratio>(p, task);
      places().store(0, at.batch), places().store(1, at.down), places().store(2, at.across);
      matrices().store(0, gram_offset(p, at.batch, p.x.batch_strides));
      matrices().store(1, gram_offset(p, at.batch, p.y.batch_strides));
    }
    const int each = p.chunks == 0 ? 1 : static_cast<int>((p.split_tokens + I::chunk - 1) / I::chunk);
    w.chunk = split * each;
    do {
      const Index left = p.tokens - w.token(0);
      w.count = left < I::chunk ? static_cast<int>(left) : I::chunk;
      Sums sums;
      SIMT_UNROLL
      for (int l = 0; l < I::levels; ++l) sums[l][0].fill(0), sums[l][1].fill(0);
      simt::barrier();  // what lies in shared memory has been used
      if (simt::thread() < columns) exponents().store(simt::thread(), w.count > 0 ? exponent(p, w, simt::thread()) : 0);
      simt::barrier();
      SIMT_NO_UNROLL
      for (int t = 0; t < w.count; t += depth) {
        Number numbers[shares][4];
        SIMT_UNROLL
        for (int k = 0; k < of_x; ++k) load(p, w, k, t, numbers[k]);
        if constexpr (std::is_same_v<E, double>) {
          if (p.weight && simt::thread() < depth) {
            const int token = t + simt::thread();
            const double weight = token < w.count ? p.weight.load(at_weight(p, w, token)) : 0.0;
            const double root = simt::sqrt(weight < 0 ? -weight : weight);
            roots(t / depth).store(simt::thread(), weight < 0 ? -root : root);
          }
        }
        simt::barrier();  // the digits that lie there have been multiplied
        SIMT_UNROLL
        for (int k = of_x; k < shares; ++k) load(p, w, k, t, numbers[k]);
        if constexpr (std::is_same_v<E, double>) {
          if (p.weight) apply(roots(t / depth), numbers);
        }
        SIMT_UNROLL
        for (int k = 0; k < shares; ++k) store_digits(k, numbers[k]);
        simt::barrier();
        multiply(sums);
      }
      simt::barrier();
      write(p, w, sums, w.chunk % each != 0);
    } while (++w.chunk < p.chunks && w.chunk % each != 0);
  }

  SIMT_DEVICE static Index at_weight(const Params& p, const Work& w, int token) {
    return gram_offset(p, place().batch, p.weight_batch_strides) + w.token(token) * p.weight_stride;
  }

  SIMT_DEVICE static int exponent(const Params& p, const Work& w, int column) {
    const bool of_x = column < Tile::rows;
    const Index total = of_x ? p.x.columns : p.y.columns;
    const Index at = of_x ? Index{places().load(1)} * Tile::rows + column
                          : Index{places().load(2)} * Tile::columns + column - Tile::rows;
    if (at >= total) return 0;
    const Index i = (Index{places().load(0)} * p.chunks + w.chunk) * total + at;
    return of_x ? p.x_exponents.load(i) : p.y_exponents.load(i);
  }

  // --- From global memory to digits ---
  SIMT_DEVICE static void load(const Params& p, const Work& w, int k, int token, Number (&numbers)[4]) {
    const Share share;
    const GramOperand& m = k < of_x ? p.x : p.y;
    const Index column = k < of_x ? Index{places().load(1)} * Tile::rows + share.column(k)
                                  : Index{places().load(2)} * Tile::columns + share.column(k) - Tile::rows;
    const int first = token + share.token(), left = column < m.columns ? w.count - first : 0;
    Index i = matrices().load(k < of_x ? 0 : 1) + w.token(first) * m.token_stride + column * m.column_stride;
    SIMT_UNROLL
    for (int e = 0; e < 4; ++e) {
      numbers[e] = e < left ? Loader::load(m, i) : Number(0);
      i += m.token_stride;
    }
  }

  SIMT_DEVICE static void apply(const simt::shared<double>& roots, Number (&numbers)[shares][4]) {
    const Share share;
    SIMT_UNROLL
    for (int e = 0; e < 4; ++e) {
      const double root = roots.load(share.token() + e);
      SIMT_UNROLL
      for (int k = 0; k < shares; ++k) numbers[k][e] *= k >= of_x && root < 0 ? -root : root;
    }
  }

  SIMT_DEVICE static void store_digits(int k, const Number (&numbers)[4]) {
    const Share share;
    const int exponent = exponents().load(share.column(k));
    std::uint64_t q[4], any = 0;
    SIMT_UNROLL
    for (int e = 0; e < 4; ++e) {
      q[e] = I::digits_of(numbers[e], exponent);
      any |= q[e];
    }
    const int to = share.column(k) * pitch + share.token();
    unsigned mask = 0;
    SIMT_UNROLL
    for (int d = 0; d < I::digits; ++d) {
      simt::pack<std::int8_t, 4> four;
      SIMT_UNROLL
      for (int e = 0; e < 4; ++e) four[e] = static_cast<std::int8_t>(q[e] >> 8 * d & 0xffu);
      digits(d).template store_vector<4>(to, four);
      if (simt::any((any >> 8 * d & 0xffu) != 0)) mask |= 1u << d;
    }
    if (simt::lane() == 0) masks().store(share.unit(k), mask);
  }

  // --- From digits to sums ---
  SIMT_DEVICE static void multiply(Sums& sums) {
    const int warp = simt::opaque(simt::thread()) / 32, row = warp / 2 * 16, column = Tile::rows + warp % 2 * 16;
    unsigned of_x = 0, of_y = 0;
    SIMT_UNROLL
    for (int u = 0; u < 4; ++u) {
      of_x |= masks().load(row / 4 + u);
      of_y |= masks().load(column / 4 + u);
    }
    SIMT_UNROLL
    for (int n = 0; n < 2; ++n) {  // X's digits are loaded again, for registers are few
      simt::FragmentB<std::int8_t> b[I::digits];
      SIMT_UNROLL
      for (int d = 0; d < I::digits; ++d) {
        if (of_y >> d & 1u)
          simt::load_matrix_columns(b[d], digits(d), [&](int i, int c) { return (column + n * 8 + c) * pitch + i; });
      }
      SIMT_UNROLL
      for (int d = 0; d < I::digits; ++d) {
        if (!(of_x >> d & 1u)) continue;
        simt::FragmentA<std::int8_t> a;
        simt::load_matrix_rows(a, digits(d), [&](int i, int c) { return (row + i) * pitch + c; });
        SIMT_UNROLL
        for (int other = 0; other < I::digits; ++other) {
          const int level = d + other - I::least_pair;
          if (level >= 0 && (of_y >> other & 1u)) simt::mma(sums[level][n], a, b[other]);
        }
      }
    }
  }

  // --- From sums to memory ---
  // By way of the shared memory where digits were, for neighbours to be written together and registers to be free.
  SIMT_DEVICE static void write(const Params& p, const Work& w, const Sums& sums, bool flushed) {
    constexpr int pitch = 40;  // of pairs, so that they are written without bank conflicts
    static_assert(Tile::rows * pitch * 8 <= masks_at);
    const auto values = simt::shared_array<double>(0, Tile::rows * pitch);
    SIMT_UNROLL
    for (int n = 0; n < 2; ++n) {
      SIMT_UNROLL
      for (int h = 0; h < 2; ++h) {
        simt::pack<double, 2> pair;
        SIMT_UNROLL
        for (int e = 0; e < 2; ++e) {
          // the upper four levels and the lower four, exactly
          std::int64_t high = 0, low = 0;
          SIMT_UNROLL
          for (int l = I::levels - 1; l >= 4; --l) high = high * 256 + sums[l][n].get(2 * h + e);
          SIMT_UNROLL
          for (int l = 3; l >= 0; --l) low = low * 256 + sums[l][n].get(2 * h + e);
          pair[e] = static_cast<double>(high) * 4294967296.0 + static_cast<double>(low);
        }
        const int row = simt::warp() / 2 * 16 + Sum::row(2 * h), column = simt::warp() % 2 * 16 + n * 8 + Sum::col(0);
        values.template store_vector<2>(row * pitch + column, pair);
      }
    }
    simt::barrier();
    const GramPlace at = place();
    const auto out = p.out + gram_offset(p, at.batch, p.out_batch_strides);
    const auto part = p.splits > 1 ? p.parts + simt::block() * (Tile::rows * Tile::columns) : p.parts;
    SIMT_NO_UNROLL
    for (int i = simt::thread(); i < Tile::rows * Tile::columns; i += max_threads) {
      const int row = i / Tile::columns, column = i % Tile::columns;
      const int of_row = exponents().load(row), of_column = exponents().load(Tile::rows + column);
      double value = values.load(row * pitch + column);
      if (of_row == I::as_it_stands || of_column == I::as_it_stands) {
        value = plain(p, w, row, column);
      } else {
        value = I::scaled(value, of_row + of_column + 8 * I::least_pair - 2 * I::bits);
      }
      if (p.splits == 1) {
        Tile::put(p, at, out, row, column, value, p.accumulate || flushed);
      } else {
        part.store(i, flushed ? part.load(i) + value : value);
      }
    }
  }

  // An element of columns that are summed as they stand.
  SIMT_DEVICE static double plain(const Params& p, const Work& w, int row, int column) {
    const Index i = Index{places().load(1)} * Tile::rows + row, j = Index{places().load(2)} * Tile::columns + column;
    double sum = 0;
    if (i >= p.x.columns || j >= p.y.columns) return sum;
    SIMT_NO_UNROLL
    for (int t = 0; t < w.count; ++t) {
      const double x = Loader::load(p.x, matrices().load(0) + w.token(t) * p.x.token_stride + i * p.x.column_stride);
      double y = Loader::load(p.y, matrices().load(1) + w.token(t) * p.y.token_stride + j * p.y.column_stride);
      if (p.weight) y *= p.weight.load(at_weight(p, w, t));
      sum = simt::fma(x, y, sum);
    }
    return sum;
  }
};

// Adds up the parts of a split sum, one after another, a tile a block.
struct GramSumIntegerParts {
  using Params = GramParams;
  using Tile = GramIntegerTile;
  static constexpr const char* name = "gram_sum_integer_parts";
  static constexpr int max_threads = Tile::threads, min_blocks = 4;

  SIMT_DEVICE static void run(const Params& p) {
    const auto at = gram_place<Tile::ratio>(p, simt::block());
    const auto out = p.out + gram_offset(p, at.batch, p.out_batch_strides);
    const Index tile = Index{at.batch} * p.splits * p.tiles + simt::block() % p.tiles;
    constexpr int size = Tile::rows * Tile::columns;
    SIMT_NO_UNROLL
    for (int i = simt::thread(); i < size; i += max_threads) {
      double sum = 0;
      SIMT_NO_UNROLL
      for (int k = 0; k < p.splits; ++k) sum += p.parts.load((tile + k * p.tiles) * size + i);
      Tile::put(p, at, out, i / Tile::columns, i % Tile::columns, sum, p.accumulate);
    }
  }
};

template <class E, class Queue>
void enqueue_gram_integers_as(const GramDevicePlan& plan, const GramParams& p, Queue& queue) {
  const Index groups = (p.x.columns + 31) / 32 + (p.symmetric ? 0 : (p.y.columns + 31) / 32);
  constexpr int threads = GramExponents<E>::max_threads;
  queue.template launch<GramExponents<E>>({plan.problem.batch.count() * p.chunks * groups, threads, threads * 4}, p);
  queue.template launch<GramIntegerKernel<E>>({plan.blocks, plan.threads, plan.shared_bytes}, p);
}

template <class Queue>
void enqueue_gram_integers(const GramDevicePlan& plan, const GramParams& p, Queue& queue) {
  switch (plan.element) {
    case Dtype::float16: enqueue_gram_integers_as<float16>(plan, p, queue); break;
    case Dtype::bfloat16: enqueue_gram_integers_as<bfloat16>(plan, p, queue); break;
    case Dtype::float32: enqueue_gram_integers_as<float>(plan, p, queue); break;
    case Dtype::float64: enqueue_gram_integers_as<double>(plan, p, queue); break;
  }
  if (plan.splits > 1) queue.template launch<GramSumIntegerParts>({plan.blocks / plan.splits, plan.threads, 0}, p);
}

}  // namespace freqrank::whitening::device
