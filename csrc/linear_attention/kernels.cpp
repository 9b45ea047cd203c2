// The chunked scan, compiled once for each instruction set. Everything here has internal linkage or lives in the
// instruction set's namespace, so that no variant's code can be linked into another.
#include "linear_attention/kernels.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>

#include "common/half.h"
#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace freqrank::linear_attention::FREQRANK_ISA {

namespace {

using i64 = std::int64_t;

#if defined(__AVX512F__)
constexpr int vector_bytes = 64, tile_rows = 8;
#elif defined(__AVX__)
constexpr int vector_bytes = 32, tile_rows = 4;
#else
constexpr int vector_bytes = 16, tile_rows = 4;
#endif
constexpr i64 row_pad = 8;  // rows of scratch tiles come in multiples of this, columns of `pad`

template <class A>
struct Vector {
  typedef A type __attribute__((vector_size(vector_bytes), aligned(sizeof(A)), may_alias));
  static constexpr int lanes = vector_bytes / static_cast<int>(sizeof(A));
};

// ---- scratch ------------------------------------------------------------------------------------------------------

struct Arena {
  char* base;
  std::size_t used = 0;
  template <class A>
  A* take(i64 count) {
    char* part = base == nullptr ? nullptr : base + used;
    used += (static_cast<std::size_t>(count) * sizeof(A) + 63) / 64 * 64;
    return reinterpret_cast<A*>(part);
  }
};

// ---- rows that the next chunk needs -------------------------------------------------------------------------------

// Rows lie far apart in memory, further than the processor looks ahead, and asking for many of them at once makes it
// wait: they are asked for a few lines at a time, between the tiles of products.
struct Ahead {
  static constexpr int at_once = 16;  // lines: as many as see all rows of a chunk through
  static constexpr int most = 16;     // entries; beyond them nothing is asked for
  static constexpr i64 line = 64;
  struct Rows {
    std::uintptr_t at;
    i64 step, bytes, count;
  };
  Rows queue[most];
  int first = 0, last = 0;
  i64 offset = 0;  // in the first row

  void clear() { first = last = 0, offset = 0; }

  template <class S>
  void add(const S* row, i64 step, i64 n, i64 count) {
    if (last == most || count <= 0) return;
    const auto at = reinterpret_cast<std::uintptr_t>(row);
    const i64 before = static_cast<i64>(at % line), size = static_cast<i64>(sizeof(S));
    queue[last++] = {at - static_cast<std::uintptr_t>(before), step * size, before + n * size, count};
  }

  void fetch() {
    for (int i = 0; i < at_once && first < last; ++i) {
      Rows& rows = queue[first];
      __builtin_prefetch(reinterpret_cast<const void*>(rows.at + static_cast<std::uintptr_t>(offset)), 0, 2);
      offset += line;
      if (offset < rows.bytes) continue;
      offset = 0;
      rows.at += static_cast<std::uintptr_t>(rows.step);
      if (--rows.count == 0) ++first;
    }
  }
};

// ---- products of scratch tiles ------------------------------------------------------------------------------------

// Which part of a product with a lower triangular C x C tile is not known to be zero.
enum class Band {
  full,
  lower,         // the left factor is lower triangular: row i ends at column i
  upper,         // the left factor is upper triangular (a lower one read transposed): row i starts at column i
  lower_result,  // only the lower triangle of the result is wanted
};

// What becomes of a product: c = a b, or keep * c + a b; and then, if there is a `now`, now = decay * start + c, for
// tiles laid out like c.
template <class A>
struct Onto {
  bool add;
  A keep = 1, decay = 1;
  const A* start = nullptr;
  A* now = nullptr;
  Onto(bool add) : add(add) {}
};

template <class A, int Rows, int Vectors>
inline __attribute__((always_inline)) void tile_product(i64 begin, i64 end, const A* a, i64 row_step, i64 column_step,
                                                        const A* b, i64 ldb, A* c, i64 ldc, i64 at,
                                                        const Onto<A>& onto) {
  using V = typename Vector<A>::type;
  constexpr int lanes = Vector<A>::lanes;
  c += at;
  V sum[Rows][Vectors];
#pragma GCC unroll 8
  for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 4
    for (int n = 0; n < Vectors; ++n) {
      sum[i][n] = onto.add ? onto.keep * *reinterpret_cast<const V*>(c + i * ldc + n * lanes) : V{};
    }
  }
  for (i64 k = begin; k < end; ++k) {
    V row[Vectors];
#pragma GCC unroll 4
    for (int n = 0; n < Vectors; ++n) row[n] = *reinterpret_cast<const V*>(b + k * ldb + n * lanes);
#pragma GCC unroll 8
    for (int i = 0; i < Rows; ++i) {
      const A x = a[i * row_step + k * column_step];
#pragma GCC unroll 4
      for (int n = 0; n < Vectors; ++n) sum[i][n] += x * row[n];
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 4
    for (int n = 0; n < Vectors; ++n) *reinterpret_cast<V*>(c + i * ldc + n * lanes) = sum[i][n];
  }
  if (onto.now == nullptr) return;
  const A* start = onto.start + at;
  A* now = onto.now + at;
#pragma GCC unroll 8
  for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 4
    for (int n = 0; n < Vectors; ++n) {
      *reinterpret_cast<V*>(now + i * ldc + n * lanes) =
          onto.decay * *reinterpret_cast<const V*>(start + i * ldc + n * lanes) + sum[i][n];
    }
  }
}

// The product of a [rows, depth] and b [depth, columns] onto c [rows, columns]; element (i, k) of a is a[i * row_step +
// k * column_step]. rows is a multiple of row_pad and columns one of pad.
template <class A>
void product(Ahead& ahead, i64 rows, i64 columns, i64 depth, const A* a, i64 row_step, i64 column_step, const A* b,
             i64 ldb, A* c, i64 ldc, const std::common_type_t<Onto<A>>& onto, Band band = Band::full) {
  constexpr i64 lanes = Vector<A>::lanes;
  for (i64 j = 0; j < columns; j += 2 * lanes) {
    for (i64 i = 0; i < rows; i += tile_rows) {
      const i64 wanted = band == Band::lower_result ? std::min(columns, i + tile_rows) : columns;
      if (j >= wanted) continue;
      const i64 begin = band == Band::upper ? i : 0;
      const i64 end = band == Band::lower ? std::min(depth, i + tile_rows) : depth;
      const A* left = a + i * row_step;
      if (j + lanes < wanted) {
        tile_product<A, tile_rows, 2>(begin, end, left, row_step, column_step, b + j, ldb, c, ldc, i * ldc + j, onto);
      } else {
        tile_product<A, tile_rows, 1>(begin, end, left, row_step, column_step, b + j, ldb, c, ldc, i * ldc + j, onto);
      }
      ahead.fetch();
    }
  }
}

// y [columns, rows] = x^T, by blocks of 8 x 8: three rounds in which rows i and i + 4 are interleaved. rows and columns
// are multiples of row_pad.
template <class A>
void transpose(i64 rows, i64 columns, const A* x, i64 ldx, A* y, i64 ldy) {
  using Index = std::conditional_t<sizeof(A) == 8, std::int64_t, std::int32_t>;
  typedef A Row __attribute__((vector_size(8 * sizeof(A)), aligned(sizeof(A)), may_alias));
  for (i64 i = 0; i < rows; i += 8) {
    for (i64 j = 0; j < columns; j += 8) {
      Row a[8], b[8];
      for (int n = 0; n < 8; ++n) a[n] = *reinterpret_cast<const Row*>(x + (i + n) * ldx + j);
      for (int round = 0; round < 3; ++round) {
        for (int n = 0; n < 4; ++n) {
#ifdef __clang__
          b[2 * n] = __builtin_shufflevector(a[n], a[n + 4], 0, 8, 1, 9, 2, 10, 3, 11);
          b[2 * n + 1] = __builtin_shufflevector(a[n], a[n + 4], 4, 12, 5, 13, 6, 14, 7, 15);
#else
          typedef Index Order __attribute__((vector_size(8 * sizeof(A))));
          b[2 * n] = __builtin_shuffle(a[n], a[n + 4], Order{0, 8, 1, 9, 2, 10, 3, 11});
          b[2 * n + 1] = __builtin_shuffle(a[n], a[n + 4], Order{4, 12, 5, 13, 6, 14, 7, 15});
#endif
        }
        for (int n = 0; n < 8; ++n) a[n] = b[n];
      }
      for (int n = 0; n < 8; ++n) *reinterpret_cast<Row*>(y + (j + n) * ldy + i) = a[n];
    }
  }
}

// All lanes of a vector into one, halving: a chain from lane to lane would take longer than the loop before it.
template <class A, class F>
inline A fold(typename Vector<A>::type x, F f) {
  A lanes[Vector<A>::lanes];
  std::memcpy(lanes, &x, sizeof(x));
  for (int half = Vector<A>::lanes / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) lanes[i] = f(lanes[i], lanes[i + half]);
  }
  return lanes[0];
}

template <class A>
inline A dot(i64 n, const A* x, const A* y) {  // n a multiple of pad
  using V = typename Vector<A>::type;
  constexpr int lanes = Vector<A>::lanes;
  V sum{};
  for (i64 i = 0; i < n; i += lanes) {
    sum += *reinterpret_cast<const V*>(x + i) * *reinterpret_cast<const V*>(y + i);
  }
  return fold<A>(sum, [](A a, A b) { return a + b; });
}

template <class A>
inline A total(i64 n, const A* x) {  // n a multiple of pad
  using V = typename Vector<A>::type;
  constexpr int lanes = Vector<A>::lanes;
  V sum{};
  for (i64 i = 0; i < n; i += lanes) sum += *reinterpret_cast<const V*>(x + i);
  return fold<A>(sum, [](A a, A b) { return a + b; });
}

template <class A>
inline A largest(i64 n, const A* x) {  // n a multiple of pad
  using V = typename Vector<A>::type;
  constexpr int lanes = Vector<A>::lanes;
  V most = *reinterpret_cast<const V*>(x);
  for (i64 i = lanes; i < n; i += lanes) {
    const V next = *reinterpret_cast<const V*>(x + i);
    most = next > most ? next : most;
  }
  return fold<A>(most, [](A a, A b) { return b > a ? b : a; });
}

// y += x * a
template <class A>
inline void add_scaled(i64 n, A a, const A* x, A* y) {
  for (i64 i = 0; i < n; ++i) y[i] += a * x[i];
}

template <class A>
inline void scale_row(i64 n, A a, A* x) {
  for (i64 i = 0; i < n; ++i) x[i] *= a;
}

template <class A>
inline void fill_zero(i64 n, A* x) {
  std::memset(static_cast<void*>(x), 0, static_cast<std::size_t>(n) * sizeof(A));
}

// ---- loading and storing rows -------------------------------------------------------------------------------------

template <class S, class A>
inline void load_row(A* to, const S* from, i64 step, i64 n) {
  if (step == 1) {
    i64 i = 0;
#if defined(__F16C__)
    if constexpr (std::is_same_v<S, float16>) {
      for (; i + 8 <= n; i += 8) {
        _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i))));
      }
    }
#endif
    for (; i < n; ++i) to[i] = static_cast<A>(to_float(from[i]));
  } else {
    for (i64 i = 0; i < n; ++i) to[i] = static_cast<A>(to_float(from[i * step]));
  }
}

template <class S, class A>
inline void store_row(S* to, i64 step, const A* from, i64 n) {
  if constexpr (std::is_same_v<S, A>) {
    for (i64 i = 0; i < n; ++i) to[i * step] = from[i];
  } else {
    i64 i = 0;
#if defined(__F16C__)
    if constexpr (std::is_same_v<S, float16>) {
      if (step == 1) {
        for (; i + 8 <= n; i += 8) {
          _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i),
                           _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT));
        }
      }
    }
#endif
    for (; i < n; ++i) to[i * step] = from_float<S>(static_cast<float>(from[i]));
  }
}

// f(pointer of the tensor's element type) for the dtypes that arithmetic in A works on.
template <class A, class F>
inline void with_dtype(Dtype dtype, void* data, F f) {
  if constexpr (std::is_same_v<A, double>) {
    f(static_cast<double*>(data));
  } else if (dtype == Dtype::float32) {
    f(static_cast<float*>(data));
  } else if (dtype == Dtype::bfloat16) {
    f(static_cast<bfloat16*>(data));
  } else {
    f(static_cast<float16*>(data));
  }
}

// Where a chunk's tokens lie, and which of them are masked.
struct Tokens {
  i64 batch = 0, first = 0, count = 0, padded = 0;
  Ahead* ahead = nullptr;
  i64 next = 0, next_count = 0;         // the chunk that comes after this one: so many tokens further on, or back
  const unsigned char* mask = nullptr;  // of token 0 of this batch row
  i64 mask_step = 0;
  bool holds(i64 i) const { return i < count && live(i); }
  bool live(i64 i) const { return mask == nullptr || mask[(first + i) * mask_step] != 0; }
  bool all_live() const {
    if (mask == nullptr) return true;
    for (i64 i = 0; i < count; ++i) {
      if (!live(i)) return false;
    }
    return true;
  }
};

// Asks for the rows of the next chunk that follow `base`, the first of this one.
template <class S>
inline void ask_ahead(const View& x, const Tokens& tokens, const S* base, i64 n) {
  if (tokens.next_count <= 0 || x.stride[3] != 1) return;
  tokens.ahead->add(base + tokens.next * x.stride[1], x.stride[1], n, std::min(tokens.count, tokens.next_count));
}

// Rows of the chunk, columns [column, column + n) of head h, into to [padded, ld]; a masked token, padding rows and
// columns become 0 and are never read.
template <class A>
void load_rows(const View& x, const Tokens& tokens, i64 head, i64 column, i64 n, A* to, i64 ld) {
  with_dtype<A>(x.dtype, x.data, [&](auto* data) {
    const auto* base =
        data + tokens.batch * x.stride[0] + tokens.first * x.stride[1] + head * x.stride[2] + column * x.stride[3];
    ask_ahead(x, tokens, base, n);
    for (i64 i = 0; i < tokens.count; ++i) {
      if (tokens.live(i)) {
        load_row(to + i * ld, base + i * x.stride[1], x.stride[3], n);
        if (ld > n) fill_zero(ld - n, to + i * ld + n);
      } else {
        fill_zero(ld, to + i * ld);
      }
    }
  });
  fill_zero((tokens.padded - tokens.count) * ld, to + tokens.count * ld);
}

template <class A>
void store_rows(const View& x, const Tokens& tokens, i64 head, i64 column, i64 n, A* from, i64 ld) {
  with_dtype<A>(x.dtype, x.data, [&](auto* data) {
    auto* base =
        data + tokens.batch * x.stride[0] + tokens.first * x.stride[1] + head * x.stride[2] + column * x.stride[3];
    ask_ahead(x, tokens, base, n);
    for (i64 i = 0; i < tokens.count; ++i) {
      if (!tokens.live(i)) fill_zero(n, from + i * ld);
      store_row(base + i * x.stride[1], x.stride[3], from + i * ld, n);
    }
  });
}

template <class A>
A& element(const View& x, i64 i0, i64 i1, i64 i2) {
  return static_cast<A*>(x.data)[i0 * x.stride[0] + i1 * x.stride[1] + i2 * x.stride[2]];
}

// state [K, ld >= V] <-> x [N,Hs,K,V], columns [column, column + n)
template <class A>
void load_state(const View& x, i64 sequence, i64 head, i64 rows, i64 column, i64 n, A* to, i64 ld) {
  const A* base = static_cast<const A*>(x.data) + sequence * x.stride[0] + head * x.stride[1] + column * x.stride[3];
  for (i64 i = 0; i < rows; ++i) load_row(to + i * ld, base + i * x.stride[2], x.stride[3], n);
}

template <class A>
void store_state(const View& x, i64 sequence, i64 head, i64 rows, i64 column, i64 n, const A* from, i64 ld) {
  A* base = static_cast<A*>(x.data) + sequence * x.stride[0] + head * x.stride[1] + column * x.stride[3];
  for (i64 i = 0; i < rows; ++i) store_row(base + i * x.stride[2], x.stride[3], from + i * ld, n);
}

// ---- decay --------------------------------------------------------------------------------------------------------

// A decay this small leaves nothing of a number, and arithmetic on denormals is slow.
template <class A>
constexpr double tiny = sizeof(A) == sizeof(float) ? 1e-34 : 1e-290;

// The decay inside a chunk, for one state: products of exp(g) <= 1 only, so nothing overflows, and -inf is 0.
template <class A>
struct ChunkDecay {
  A* between = nullptr;     // [C, C]: from token j to token i >= j; 1 on the diagonal
  A* from_start = nullptr;  // [C]: from the state before the chunk to token i
  A* to_end = nullptr;      // [C]: from token j to the state after the chunk
  A* each = nullptr;        // [C]: exp(g)
  double* row = nullptr;    // [C]
  double whole = 1;         // from the state before to the state after
  i64 reusable = -1;        // this many tokens of a decay that is the same in every chunk

  void lay_out(Arena& arena, i64 chunk) {
    between = arena.take<A>(chunk * chunk);
    from_start = arena.take<A>(chunk);
    to_end = arena.take<A>(chunk);
    each = arena.take<A>(chunk);
    row = arena.take<double>(chunk);
  }

  void compute(const Sizes& sizes, const View& log_decay, const Tokens& tokens, i64 head, i64 chunk, bool all_live) {
    if (sizes.decay == Decay::none) {
      if (reusable < 0) {
        for (i64 i = 0; i < chunk; ++i) from_start[i] = to_end[i] = each[i] = 1;
        reusable = chunk;
      }
      return;
    }
    const bool same = sizes.decay == Decay::per_head && all_live;
    if (same && reusable == tokens.count) return;
    reusable = same ? tokens.count : -1;
    const double per_head =
        sizes.decay == Decay::per_head ? std::exp(static_cast<double>(element<A>(log_decay, 0, 0, head))) : 0;
    double before = 1;
    for (i64 i = 0; i < tokens.count; ++i) {
      double e = 1;
      if (tokens.live(i)) {
        e = sizes.decay == Decay::per_head
                ? per_head
                : std::exp(static_cast<double>(element<A>(log_decay, tokens.batch, tokens.first + i, head)));
      }
      before *= e;
      if (before < tiny<A>) before = 0;
      each[i] = static_cast<A>(e);
      from_start[i] = static_cast<A>(before);
      A* out = between + i * chunk;
      for (i64 j = 0; j < i; ++j) {
        const double x = row[j] * e;
        row[j] = x < tiny<A> ? 0 : x;
        out[j] = static_cast<A>(row[j]);
      }
      row[i] = 1;
      out[i] = 1;
    }
    for (i64 j = 0; j < tokens.count; ++j) to_end[j] = static_cast<A>(row[j]);
    for (i64 j = tokens.count; j < chunk; ++j) from_start[j] = to_end[j] = each[j] = 0;
    whole = before;
  }

  // The causal mask, and the decay if there is one, on scores [padded, ld]; the rest of each diagonal block becomes 0.
  void apply(const Sizes& sizes, const Tokens& tokens, i64 chunk, A* scores) const {
    for (i64 i = 0; i < tokens.padded; ++i) {
      A* line = scores + i * chunk;
      if (sizes.decay != Decay::none && i < tokens.count) {
        const A* factors = between + i * chunk;
        for (i64 j = 0; j <= i; ++j) line[j] *= factors[j];
      }
      const i64 block_end = round_up(i + 1, pad);
      for (i64 j = i + 1; j < block_end; ++j) line[j] = 0;
    }
  }
};

// ---- feature maps -------------------------------------------------------------------------------------------------

// exp of each; n a multiple of pad. Floats below e^-87 become 0 rather than lose digits.
inline void exp_row(i64 n, double* x) {
  for (i64 i = 0; i < n; ++i) x[i] = std::exp(x[i]);
}
inline void exp_row(i64 n, float* x) {
  using V = Vector<float>::type;
  constexpr int lanes = Vector<float>::lanes;
  typedef std::int32_t Int __attribute__((vector_size(vector_bytes)));
  typedef std::uint32_t Unsigned __attribute__((vector_size(vector_bytes)));
  const V low = V{} - 87.0f, high = V{} + 88.722839f;
  for (i64 i = 0; i < n; i += lanes) {
    const V given = *reinterpret_cast<const V*>(x + i);
    V a = given < low ? low : given;
    a = a > high ? high : a;                                        // NaN stays NaN
    const V turns = (a * 1.44269504f + 12582912.0f) - 12582912.0f;  // to the nearest integer
    const V r = (a - turns * 0.693359375f) + turns * 2.12194440e-4f;
    V y = r * 1.9875691500e-4f + 1.3981999507e-3f;
    y = y * r + 8.3334519073e-3f;
    y = y * r + 4.1665795894e-2f;
    y = y * r + 1.6666665459e-1f;
    y = y * r + 5.0000001201e-1f;
    y = y * (r * r) + r + 1.0f;
    // times 2^turns, in two steps since 2^128 is not a float
    const Int exponent = __builtin_convertvector(turns, Int);
    const Int half = exponent >> 1, rest = exponent - half;
    const Unsigned first = (Unsigned)(half + 127) << 23, second = (Unsigned)(rest + 127) << 23;
    y = y * (V)first * (V)second;
    y = given > high ? V{} + std::numeric_limits<float>::infinity() : y;
    *reinterpret_cast<V*>(x + i) = given < low ? V{} : y;
  }
}

// Turns a row's products with the projection into its features, which are not weighted yet; what pads them becomes 0.
template <class A>
void make_features(Feature feature, i64 columns, i64 features, A* row) {
  const i64 padded = round_up(features, pad);
  if (feature == Feature::softmax_pm) {
    for (i64 j = 0; j < columns; ++j) row[columns + j] = -row[j];
  }
  std::fill(row + features, row + padded, -std::numeric_limits<A>::infinity());
  if (feature != Feature::exp) {
    const A most = largest(padded, row);
    for (i64 j = 0; j < padded; ++j) row[j] -= most;
  }
  exp_row(padded, row);
  if (feature != Feature::exp) scale_row(padded, 1 / total(padded, row), row);
}

// A feature map of one key head, a chunk at a time: features exist in scratch only, and its backward pass makes them
// again.
template <class A>
struct FeatureMap {
  // a chunk's channels, and its features before they are weighted
  struct Rows {
    A *x = nullptr, *plain = nullptr;
  };

  Feature feature;
  i64 channels = 0, columns = 0, features = 0, ldx = 0, ldm = 0, ldf = 0;
  bool weighted = false, map_gradient;
  A *projection = nullptr, *projection_transposed = nullptr, *weights = nullptr, *products = nullptr;
  A *dx = nullptr, *gradient = nullptr;

  FeatureMap(const Plan& plan, Arena& arena) : feature(plan.sizes.feature), map_gradient(plan.sizes.map_gradient) {
    if (feature == Feature::none) return;
    const Sizes& s = plan.sizes;
    channels = s.channels, columns = map_columns(s), features = s.key_dim;
    ldx = round_up(channels, pad), ldm = round_up(columns, pad), ldf = round_up(features, pad);
    projection = arena.take<A>(ldx * ldm);
    projection_transposed = arena.take<A>(ldx * ldm);
    weights = arena.take<A>(ldf);
    products = arena.take<A>(plan.chunk * ldm);
    dx = arena.take<A>(plan.chunk * ldx);
    gradient = arena.take<A>(ldx * ldm + ldf);
  }

  explicit operator bool() const { return feature != Feature::none; }

  Rows take_rows(const Plan& plan, Arena& arena) const {
    if (feature == Feature::none) return {};
    A* x = arena.take<A>(plan.chunk * ldx);
    return {x, arena.take<A>(plan.chunk * ldf)};
  }

  void load(const Inputs& in, i64 head) {
    if (feature == Feature::none) return;
    fill_zero(ldx * ldm, projection);
    const A* base = static_cast<const A*>(in.projection.data) + head * in.projection.stride[0];
    for (i64 i = 0; i < channels; ++i) {
      load_row(projection + i * ldm, base + i * in.projection.stride[1], in.projection.stride[2], columns);
    }
    transpose(ldx, ldm, projection, ldm, projection_transposed, ldx);
    weighted = static_cast<bool>(in.weights);
    if (weighted) {
      fill_zero(ldf, weights);
      load_row(weights, static_cast<const A*>(in.weights.data) + head * in.weights.stride[0], in.weights.stride[1],
               features);
    }
    fill_zero(ldx * ldm + ldf, gradient);
  }

  // rows.x -> rows.plain -> to; those of masked tokens and padding become 0
  void apply(const Tokens& tokens, const Rows& rows, A* to) {
    product(*tokens.ahead, tokens.padded, ldm, channels, rows.x, ldx, 1, projection, ldm, products, ldm, false);
    for (i64 t = 0; t < tokens.padded; ++t) {
      A* row = rows.plain + t * ldf;
      if (!tokens.holds(t)) {
        fill_zero(ldf, row);
        fill_zero(ldf, to + t * ldf);
        continue;
      }
      std::copy_n(products + t * ldm, columns, row);
      make_features(feature, columns, features, row);
      if (weighted) {
        for (i64 j = 0; j < ldf; ++j) to[t * ldf + j] = row[j] * weights[j];
      } else {
        std::copy_n(row, ldf, to + t * ldf);
      }
    }
  }

  // Gradient of the features, overwritten, -> that of the channels, in dx; that of the map is added up.
  void backward(const Tokens& tokens, const Rows& rows, A* dfeatures) {
    for (i64 t = 0; t < tokens.padded; ++t) {
      A* p = products + t * ldm;
      if (!tokens.holds(t)) {
        fill_zero(ldm, p);
        continue;
      }
      A* d = dfeatures + t * ldf;
      const A* row = rows.plain + t * ldf;
      if (weighted) {
        A* dweights = gradient + ldx * ldm;
        for (i64 j = 0; j < ldf; ++j) dweights[j] += d[j] * row[j];
        for (i64 j = 0; j < ldf; ++j) d[j] *= weights[j];
      }
      const A mean = feature == Feature::exp ? 0 : dot(ldf, d, row);
      for (i64 j = 0; j < ldf; ++j) d[j] = row[j] * (d[j] - mean);
      std::copy_n(d, columns, p);
      fill_zero(ldm - columns, p + columns);
      if (feature == Feature::softmax_pm) {
        for (i64 j = 0; j < columns; ++j) p[j] -= d[columns + j];
      }
    }
    product(*tokens.ahead, tokens.padded, ldx, columns, products, ldm, 1, projection_transposed, ldx, dx, ldx, false);
    if (!map_gradient) return;
    product(*tokens.ahead, ldx, ldm, tokens.padded, rows.x, 1, ldx, products, ldm, gradient, ldm, true);
  }

  // Hands the gradient that was added up since the last call to f(place in [C,M] and weights, value).
  template <class F>
  void take_gradient(F f) {
    for (i64 i = 0; i < channels; ++i) {
      for (i64 j = 0; j < columns; ++j) f(i * columns + j, gradient[i * ldm + j]);
    }
    for (i64 j = 0; j < features; ++j) f(channels * columns + j, gradient[ldx * ldm + j]);
    fill_zero(ldx * ldm + ldf, gradient);
  }
};

// ---- what the three passes share ----------------------------------------------------------------------------------

struct Sequence {
  i64 index = 0, batch = 0, first = 0, length = 0;
  i64 segments(const Plan& plan) const { return std::max<i64>(1, (length + plan.segment - 1) / plan.segment); }
};

inline Sequence sequence_of(const Sizes& sizes, const Inputs& in, i64 n) {
  if (in.cu_seqlens == nullptr) return {n, n, 0, sizes.time};
  return {n, 0, in.cu_seqlens[n], in.cu_seqlens[n + 1] - in.cu_seqlens[n]};
}

inline Tokens tokens_of(const Inputs& in, const Sequence& sequence, i64 begin, i64 chunk, bool reverse) {
  Tokens tokens;
  tokens.batch = sequence.batch;
  tokens.first = sequence.first + begin;
  tokens.count = std::min(chunk, sequence.length - begin);
  tokens.padded = round_up(tokens.count, row_pad);
  tokens.next = reverse ? -chunk : chunk;
  tokens.next_count = reverse ? begin : std::max<i64>(0, sequence.length - begin - chunk);
  if (in.mask) {
    tokens.mask = static_cast<const unsigned char*>(in.mask.data) + sequence.batch * in.mask.stride[0];
    tokens.mask_step = in.mask.stride[1];
  }
  return tokens;
}

// The sequence that a segment's slot belongs to: the last one whose first slot is not beyond it.
inline i64 sequence_of_slot(const Plan& plan, const Inputs& in, i64 slot) {
  i64 low = 0, high = plan.sizes.sequences - 1;
  while (low < high) {
    const i64 middle = (low + high + 1) / 2;
    if (first_slot(plan.sizes, in.cu_seqlens, middle, plan.segment) <= slot) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

// How query heads, states and key heads of one key head's group belong together.
struct Group {
  i64 heads = 1, states = 1;
  Group(const Sizes& sizes) : heads(sizes.heads / sizes.key_heads), states(sizes.state_heads / sizes.key_heads) {}
  i64 state_of(i64 r) const { return states == 1 ? 0 : r; }
};

// to = decay * start + sum. Never inlined: whatever calls it gets the same bits.
template <class A>
__attribute__((noinline)) void carry(i64 n, A decay, const A* start, const A* sum, A* to) {
  for (i64 i = 0; i < n; ++i) to[i] = decay * start[i] + sum[i];
}

// The states of a key head on their way through a segment, each with its z behind it. What the segment adds is summed
// up on its own and put on top of what the segment started from: so a result does not depend on whether segments run
// one after another or at the same time.
template <class A>
struct States {
  i64 count, size, z_at;
  A *start, *sum, *whole;  // [count, size]
  double* decay;           // [count]: since the start of the segment
  bool started = false;    // else `start` is 0
  bool entered = false;    // and nothing was added since

  States(const Sizes& s, Arena& arena)
      : count(Group(s).states), size(state_elements(s)), z_at(size - round_up(s.key_dim, pad)) {
    start = arena.take<A>(count * size);
    sum = arena.take<A>(count * size);
    whole = arena.take<A>(count * size);
    decay = arena.take<double>(count);
  }

  void enter_segment() {
    fill_zero(count * size, sum);
    std::fill_n(decay, count, 1.0);
    entered = true;
  }
  void leave_segment() {
    if (started) {
      for (i64 i = 0; i < count; ++i) carry(size, factor(i), start + i * size, sum + i * size, start + i * size);
    } else {
      std::swap(start, sum);
    }
    started = true;
  }
  // Decays a state; what is added to S next is to be added with what this returns, `last` if nothing follows it before
  // the state is asked for.
  Onto<A> forget(i64 i, double factor, bool last = true) {
    Onto<A> onto(true);
    onto.keep = static_cast<A>(factor);
    scale_row(size - z_at, onto.keep, sum + i * size + z_at);
    decay[i] *= factor;
    if (decay[i] < tiny<A>) decay[i] = 0;
    if (started && last) {
      onto.decay = this->factor(i);
      onto.start = start + i * size;
      onto.now = whole + i * size;
    }
    return onto;
  }
  // After the last addition to a state and its z.
  void added(i64 i) {
    entered = false;
    if (!started) return;
    carry(size - z_at, factor(i), start + i * size + z_at, sum + i * size + z_at, whole + i * size + z_at);
  }
  A factor(i64 i) const { return static_cast<A>(decay[i]); }
  const A* now(i64 i) const { return (!started ? sum : entered ? start : whole) + i * size; }
};

// What each pass derives from.
template <class A>
struct Pass {
  using Map = FeatureMap<A>;

  const Plan& plan;
  const Sizes& s;
  const Inputs& in;
  const Shared& shared;
  Group group;
  Ahead ahead;
  i64 chunk, ldk, ldv, z_at;
  States<A> states;
  Map map;
  typename Map::Rows query_rows, key_rows;
  A *k, *k_scaled, *v, *row;
  ChunkDecay<A>* decays;

  Pass(const Plan& plan, const Inputs& in, const Shared& shared, Arena& arena)
      : plan(plan), s(plan.sizes), in(in), shared(shared), group(s), states(s, arena), map(plan, arena) {
    chunk = plan.chunk;
    ldk = round_up(s.key_dim, pad);
    ldv = round_up(s.value_dim, pad);
    z_at = ldk * ldv;
    query_rows = map.take_rows(plan, arena);
    key_rows = map.take_rows(plan, arena);
    k = arena.take<A>(chunk * ldk);
    k_scaled = arena.take<A>(chunk * ldk);
    v = arena.take<A>(chunk * ldv);
    row = arena.take<A>(ldk);
    decays = arena.take<ChunkDecay<A>>(group.states);
    for (i64 i = 0; i < group.states; ++i) {
      ChunkDecay<A> decay;
      decay.lay_out(arena, chunk);
      if (decays != nullptr) decays[i] = decay;
    }
  }

  // rows of q or k, as the scan sees them
  void load_features(const View& x, const Tokens& tokens, i64 head, const typename Map::Rows& rows, A* to) {
    if (map) {
      load_rows(x, tokens, head, 0, s.channels, rows.x, map.ldx);
      map.apply(tokens, rows, to);
    } else {
      load_rows(x, tokens, head, 0, s.key_dim, to, ldk);
    }
  }

  // the gradient of rows of q or k, from that of what the scan saw
  void store_gradient(const View& to, const Tokens& tokens, i64 head, const typename Map::Rows& rows, A* dfeatures) {
    if (map) {
      map.backward(tokens, rows, dfeatures);
      store_rows(to, tokens, head, 0, s.channels, map.dx, map.ldx);
    } else {
      store_rows(to, tokens, head, 0, s.key_dim, dfeatures, ldk);
    }
  }

  // f(tokens of a chunk, its place in the sequence)
  template <class F>
  void for_each_chunk(const Sequence& sequence, i64 segment, bool reverse, F f) {
    const i64 first = segment * plan.segment, length = std::min(plan.segment, sequence.length - first);
    const i64 chunks = (length + chunk - 1) / chunk;
    for (i64 c = 0; c < chunks; ++c) {
      const i64 begin = first + (reverse ? chunks - 1 - c : c) * chunk;
      Tokens tokens = tokens_of(in, sequence, begin, chunk, reverse);
      ahead.clear();
      tokens.ahead = &ahead;
      f(tokens, begin);
    }
  }

  void load_keys(const Tokens& tokens, i64 key_head) {
    load_features(in.k, tokens, key_head, key_rows, k);
    load_rows(in.v, tokens, key_head, 0, s.value_dim, v, ldv);
    compute_decays(tokens, key_head);
  }

  void compute_decays(const Tokens& tokens, i64 key_head) {
    const bool all_live = tokens.all_live();
    for (i64 i = 0; i < group.states; ++i) {
      decays[i].compute(s, in.log_decay, tokens, key_head * group.states + i, chunk, all_live);
    }
  }

  // the chunk's keys, decayed to its end
  const A* decayed_keys(const Tokens& tokens, i64 i) {
    if (s.decay == Decay::none) return k;
    const ChunkDecay<A>& decay = decays[i];
    for (i64 t = 0; t < tokens.padded; ++t) {
      const A factor = decay.to_end[t];
      for (i64 d = 0; d < ldk; ++d) k_scaled[t * ldk + d] = k[t * ldk + d] * factor;
    }
    return k_scaled;
  }

  // z += the sum of the chunk's keys, added up on its own first so that a long z loses nothing
  void add_key_sum(const Tokens& tokens, const A* keys, A* z) {
    fill_zero(ldk, row);
    for (i64 t = 0; t < tokens.count; ++t) add_scaled(ldk, A(1), keys + t * ldk, row);
    add_scaled(ldk, A(1), row, z);
  }

  void load_z(const View& x, i64 sequence, i64 head, A* z) {
    for (i64 d = 0; d < s.key_dim; ++d) z[d] = element<A>(x, sequence, head, d);
  }
  void store_z(const View& x, i64 sequence, i64 head, const A* z) {
    for (i64 d = 0; d < s.key_dim; ++d) element<A>(x, sequence, head, d) = z[d];
  }

  // where the state before the chunk that starts at `begin` > 0 is kept
  i64 chunk_slot(const Sequence& sequence, i64 begin) const {
    return first_slot(s, in.cu_seqlens, sequence.index, chunk) + begin / chunk - 1;
  }
  A* sums_of(i64 slot, i64 key_head, i64 i) const {
    return static_cast<A*>(shared.sums) + (slot * s.state_heads + key_head * group.states + i) * sum_elements(s);
  }
};

// A task of a pass. P has: reverse, whether it goes backward in time; load_start and finish of a sequence; sum, what a
// segment adds to the states; run, all that there is to do in a segment.
template <class P>
void run_stage(P& pass, Stage stage, i64 task) {
  const Plan& plan = pass.plan;
  const Sizes& s = plan.sizes;
  auto& states = pass.states;
  using A = std::remove_pointer_t<decltype(states.start)>;
  const i64 key_head = task % s.key_heads, n = task / s.key_heads;
  const auto slot_of = [&](const Sequence& sequence, i64 segment) {
    return first_slot(s, pass.in.cu_seqlens, sequence.index, plan.segment) + segment;
  };

  if (stage == Stage::whole) {
    const i64 begin = n * s.sequences / plan.parts, end = (n + 1) * s.sequences / plan.parts;
    pass.map.load(pass.in, key_head);
    for (i64 i = 0; i < end - begin; ++i) {
      const Sequence sequence = sequence_of(s, pass.in, P::reverse ? end - 1 - i : begin + i);
      const i64 segments = sequence.segments(plan);
      pass.load_start(sequence, key_head);
      for (i64 j = 0; j < segments; ++j) {
        const i64 segment = P::reverse ? segments - 1 - j : j;
        states.enter_segment();
        pass.run(sequence, segment, slot_of(sequence, segment), key_head);
        states.leave_segment();
        if (s.map_gradient) {
          double* totals = pass.shared.map_totals + task * map_elements(s);
          pass.map.take_gradient([&](i64 at, A x) { totals[at] += static_cast<double>(x); });
        }
      }
      pass.finish(sequence, key_head);
    }
    return;
  }

  if (stage == Stage::starts) {
    const Sequence sequence = sequence_of(s, pass.in, n);
    const i64 segments = sequence.segments(plan);
    pass.load_start(sequence, key_head);
    for (i64 j = 0; j < segments; ++j) {
      for (i64 i = 0; i < states.count; ++i) {
        A* kept = pass.sums_of(slot_of(sequence, P::reverse ? segments - 1 - j : j), key_head, i);
        A* start = states.start + i * states.size;
        A* next = states.whole + i * states.size;
        if (j + 1 < segments) carry(states.size, kept[states.size], start, kept, next);
        std::copy_n(start, states.size, kept);
        if (j + 1 < segments) std::copy_n(next, states.size, start);
      }
    }
    return;
  }

  const Sequence sequence = sequence_of(s, pass.in, sequence_of_slot(plan, pass.in, n));
  const i64 segment = n - slot_of(sequence, 0), segments = sequence.segments(plan);
  if (segment >= segments) return;
  const bool last = segment == (P::reverse ? 0 : segments - 1);
  if (stage == Stage::sums && last) return;
  pass.map.load(pass.in, key_head);
  states.enter_segment();
  if (stage == Stage::sums) {
    pass.sum(sequence, segment, key_head);
    for (i64 i = 0; i < states.count; ++i) {
      A* kept = pass.sums_of(n, key_head, i);
      std::copy_n(states.sum + i * states.size, states.size, kept);
      kept[states.size] = states.factor(i);
    }
    return;
  }
  for (i64 i = 0; i < states.count; ++i) {
    std::copy_n(pass.sums_of(n, key_head, i), states.size, states.start + i * states.size);
  }
  states.started = true;
  pass.run(sequence, segment, n, key_head);
  if (s.map_gradient) {
    A* sums = static_cast<A*>(pass.shared.map_sums) + task * map_elements(s);
    pass.map.take_gradient([&](i64 at, A x) { sums[at] = x; });
  }
  if (last) {
    states.leave_segment();
    pass.finish(sequence, key_head);
  }
}

// ---- forward ------------------------------------------------------------------------------------------------------

template <class A>
struct Forward : Pass<A> {
  using Base = Pass<A>;
  using Base::chunk, Base::ldk, Base::ldv, Base::z_at, Base::s, Base::in, Base::plan, Base::group, Base::states;
  using Base::k, Base::v, Base::decays;
  static constexpr bool reverse = false;

  const ForwardOutputs& out;
  A *q, *k_transposed, *scores, *o;

  Forward(const Plan& plan, const Inputs& in, const Shared& shared, const ForwardOutputs& out, Arena& arena)
      : Base(plan, in, shared, arena), out(out) {
    q = arena.take<A>(chunk * ldk);
    k_transposed = arena.take<A>(chunk * ldk);
    scores = arena.take<A>(chunk * chunk);
    o = arena.take<A>(chunk * ldv);
  }

  void load_start(const Sequence& sequence, i64 key_head) {
    fill_zero(states.count * states.size, states.start);
    states.started = in.initial_kv || in.initial_z;
    for (i64 i = 0; i < group.states; ++i) {
      const i64 head = key_head * group.states + i;
      A* state = states.start + i * states.size;
      if (in.initial_kv) load_state(in.initial_kv, sequence.index, head, s.key_dim, 0, s.value_dim, state, ldv);
      if (in.initial_z) this->load_z(in.initial_z, sequence.index, head, state + z_at);
    }
  }

  void finish(const Sequence& sequence, i64 key_head) {
    for (i64 i = 0; i < group.states; ++i) {
      const i64 head = key_head * group.states + i;
      const A* state = states.start + i * states.size;
      if (out.final_kv) store_state(out.final_kv, sequence.index, head, s.key_dim, 0, s.value_dim, state, ldv);
      if (out.final_z) this->store_z(out.final_z, sequence.index, head, state + z_at);
    }
  }

  void add_keys(const Tokens& tokens) {
    for (i64 i = 0; i < group.states; ++i) {
      const A* keys = this->decayed_keys(tokens, i);
      A* state = states.sum + i * states.size;
      product(*tokens.ahead, ldk, ldv, tokens.padded, keys, 1, ldk, v, ldv, state, ldv,
              states.forget(i, decays[i].whole));
      if (s.normalize || out.final_z) this->add_key_sum(tokens, keys, state + z_at);
      states.added(i);
    }
  }

  void sum(const Sequence& sequence, i64 segment, i64 key_head) {
    this->for_each_chunk(sequence, segment, reverse, [&](const Tokens& tokens, i64) {
      this->load_keys(tokens, key_head);
      add_keys(tokens);
    });
  }

  void run(const Sequence& sequence, i64 segment, i64, i64 key_head) {
    const A scale = static_cast<A>(in.scale), eps = static_cast<A>(in.eps);
    this->for_each_chunk(sequence, segment, reverse, [&](const Tokens& tokens, i64) {
      this->load_keys(tokens, key_head);
      transpose(tokens.padded, ldk, k, ldk, k_transposed, chunk);
      const i64 score_columns = round_up(tokens.count, pad);
      for (i64 i = 0; i < ldk; ++i) {
        for (i64 j = tokens.padded; j < score_columns; ++j) k_transposed[i * chunk + j] = 0;
      }
      const A* state = nullptr;
      for (i64 r = 0; r < group.heads; ++r) {
        const i64 head = key_head * group.heads + r, i = group.state_of(r);
        const ChunkDecay<A>& decay = decays[i];
        if (r == 0 || group.states > 1) state = states.now(i);
        this->load_features(in.q, tokens, head, this->query_rows, q);
        scale_row(tokens.padded * ldk, scale, q);
        product(*tokens.ahead, tokens.padded, score_columns, ldk, q, ldk, 1, k_transposed, chunk, scores, chunk, false,
                Band::lower_result);
        decay.apply(s, tokens, chunk, scores);
        product(*tokens.ahead, tokens.padded, ldv, ldk, q, ldk, 1, state, ldv, o, ldv, false);
        if (s.decay != Decay::none) {
          for (i64 t = 0; t < tokens.count; ++t) scale_row(ldv, decay.from_start[t], o + t * ldv);
        }
        product(*tokens.ahead, tokens.padded, ldv, tokens.padded, scores, chunk, 1, v, ldv, o, ldv, true, Band::lower);
        if (s.normalize) {
          for (i64 t = 0; t < tokens.count; ++t) {
            const A denominator = decay.from_start[t] * dot(ldk, q + t * ldk, state + z_at) +
                                  total(round_up(t + 1, pad), scores + t * chunk);
            scale_row(ldv, 1 / (denominator + eps), o + t * ldv);
          }
        }
        store_rows(out.o, tokens, head, 0, s.value_dim, o, ldv);
      }
      add_keys(tokens);
    });
  }
};

// ---- backward -----------------------------------------------------------------------------------------------------

// dq, forward in time. The state is kept transposed, [V, K]: dq takes do S^T, and a right factor must have rows.
template <class A>
struct BackwardQuery : Pass<A> {
  using Base = Pass<A>;
  using Base::chunk, Base::ldk, Base::ldv, Base::z_at, Base::s, Base::in, Base::plan, Base::group, Base::states;
  using Base::k, Base::v, Base::decays, Base::shared;
  static constexpr bool reverse = false;

  const BackwardArguments& args;
  A *q, *v_transposed, *grad_o, *scores, *dq, *inter, *z_running;

  BackwardQuery(const Plan& plan, const Inputs& in, const Shared& shared, const BackwardArguments& args, Arena& arena)
      : Base(plan, in, shared, arena), args(args) {
    q = arena.take<A>(chunk * ldk);
    v_transposed = arena.take<A>(chunk * ldv);
    grad_o = arena.take<A>(chunk * ldv);
    scores = arena.take<A>(chunk * chunk);
    dq = arena.take<A>(chunk * ldk);
    inter = arena.take<A>(chunk * ldk);
    z_running = arena.take<A>(group.states * chunk * ldk);
  }

  void load_start(const Sequence& sequence, i64 key_head) {
    fill_zero(states.count * states.size, states.start);
    states.started = in.initial_kv || in.initial_z;
    for (i64 i = 0; i < group.states; ++i) {
      const i64 head = key_head * group.states + i;
      A* state = states.start + i * states.size;
      if (in.initial_kv) {
        for (i64 d = 0; d < s.key_dim; ++d) {
          const A* row = &element<A>(in.initial_kv, sequence.index, head, d);
          for (i64 e = 0; e < s.value_dim; ++e) state[e * ldk + d] = row[e * in.initial_kv.stride[3]];
        }
      }
      if (in.initial_z) this->load_z(in.initial_z, sequence.index, head, state + z_at);
    }
  }

  void finish(const Sequence&, i64) {}

  void add_keys(const Tokens& tokens) {
    for (i64 i = 0; i < group.states; ++i) {
      const A* keys = this->decayed_keys(tokens, i);
      A* state = states.sum + i * states.size;
      product(*tokens.ahead, ldv, ldk, tokens.padded, v, 1, ldv, keys, ldk, state, ldk,
              states.forget(i, decays[i].whole));
      if (s.normalize || args.grad_z) this->add_key_sum(tokens, keys, state + z_at);
      states.added(i);
    }
  }

  void sum(const Sequence& sequence, i64 segment, i64 key_head) {
    this->for_each_chunk(sequence, segment, reverse, [&](const Tokens& tokens, i64) {
      this->load_keys(tokens, key_head);
      add_keys(tokens);
    });
  }

  void run(const Sequence& sequence, i64 segment, i64, i64 key_head) {
    const A scale = static_cast<A>(in.scale), eps = static_cast<A>(in.eps);
    A* reciprocals = static_cast<A*>(shared.reciprocal);
    A* ddenominators = static_cast<A*>(shared.ddenominator);
    this->for_each_chunk(sequence, segment, reverse, [&](const Tokens& tokens, i64 begin) {
      this->load_keys(tokens, key_head);
      transpose(tokens.padded, ldv, v, ldv, v_transposed, chunk);
      const i64 score_columns = round_up(tokens.count, pad);
      for (i64 i = 0; i < ldv; ++i) {
        for (i64 j = tokens.padded; j < score_columns; ++j) v_transposed[i * chunk + j] = 0;
      }
      for (i64 i = 0; i < group.states; ++i) {
        if (s.normalize) {  // sum of the decayed keys of this chunk up to each token
          A* running = z_running + i * chunk * ldk;
          for (i64 t = 0; t < tokens.count; ++t) {
            const A each = decays[i].each[t];
            for (i64 d = 0; d < ldk; ++d) {
              running[t * ldk + d] = k[t * ldk + d] + (t == 0 ? 0 : each * running[(t - 1) * ldk + d]);
            }
          }
        }
        if (s.decay_gradient) {
          for (i64 t = 0; t < tokens.count; ++t) q_dq(tokens, t, key_head * group.states + i) = 0;
        }
      }
      const A* state = nullptr;
      for (i64 r = 0; r < group.heads; ++r) {
        const i64 head = key_head * group.heads + r, i = group.state_of(r);
        const ChunkDecay<A>& decay = decays[i];
        if (r == 0 || group.states > 1) {
          state = states.now(i);
          if (s.decay_gradient && begin > 0) save_state(sequence, begin, key_head * group.states + i, state);
        }
        load_rows(args.grad_o, tokens, head, 0, s.value_dim, grad_o, ldv);
        product(*tokens.ahead, tokens.padded, score_columns, ldv, grad_o, ldv, 1, v_transposed, chunk, scores, chunk,
                false, Band::lower_result);
        decay.apply(s, tokens, chunk, scores);
        product(*tokens.ahead, tokens.padded, ldk, tokens.padded, scores, chunk, 1, k, ldk, dq, ldk, false,
                Band::lower);
        product(*tokens.ahead, tokens.padded, ldk, ldv, grad_o, ldv, 1, state, ldk, inter, ldk, false);
        if (s.normalize || s.decay_gradient || this->map) {
          this->load_features(in.q, tokens, head, this->query_rows, q);
        }
        for (i64 t = 0; t < tokens.count; ++t) {
          A* row = dq + t * ldk;
          const A* query = q + t * ldk;
          const A start = decay.from_start[t];
          for (i64 d = 0; d < ldk; ++d) row[d] = scale * (row[d] + start * inter[t * ldk + d]);
          A reciprocal = 1, ddenominator = 0;
          if (s.normalize) {
            const i64 at = (tokens.batch * s.time + tokens.first + t) * s.heads + head;
            const A* running = z_running + (i * chunk + t) * ldk;
            const A* before = state + z_at;
            if (tokens.live(t)) {
              const A denominator = scale * (dot(ldk, query, running) + start * dot(ldk, query, before)) + eps;
              reciprocal = 1 / denominator;
              ddenominator = -(dot(ldk, query, row) * reciprocal) * reciprocal;
            } else {
              reciprocal = 0;
            }
            reciprocals[at] = reciprocal;
            ddenominators[at] = ddenominator;
            for (i64 d = 0; d < ldk; ++d) {
              row[d] = reciprocal * row[d] + scale * ddenominator * (running[d] + start * before[d]);
            }
          }
          if (s.decay_gradient && tokens.live(t)) {
            double sum = static_cast<double>(reciprocal) * static_cast<double>(dot(ldk, query, inter + t * ldk));
            if (s.normalize) {
              sum += static_cast<double>(ddenominator) * static_cast<double>(dot(ldk, query, state + z_at));
            }
            q_dq(tokens, t, key_head * group.states + i) += static_cast<double>(scale * start) * sum;
          }
        }
        this->store_gradient(args.dq, tokens, head, this->query_rows, dq);
      }
      add_keys(tokens);
    });
  }

  double& q_dq(const Tokens& tokens, i64 t, i64 state_head) const {
    return shared.q_dq[(tokens.batch * s.time + tokens.first + t) * s.state_heads + state_head];
  }

  void save_state(const Sequence& sequence, i64 begin, i64 state_head, const A* state) {
    A* to =
        static_cast<A*>(shared.states) + (this->chunk_slot(sequence, begin) * s.state_heads + state_head) * states.size;
    transpose(ldv, ldk, state, ldk, to, ldv);
    std::copy_n(state + z_at, ldk, to + z_at);
  }
};

// dk, dv, the decay's gradient and that of the initial state, backward in time. The states are gradients of states.
template <class A>
struct BackwardKey : Pass<A> {
  using Base = Pass<A>;
  using Base::chunk, Base::ldk, Base::ldv, Base::z_at, Base::s, Base::in, Base::plan, Base::group, Base::states;
  using Base::k, Base::v, Base::decays, Base::shared;
  static constexpr bool reverse = true;

  const BackwardArguments& args;
  A *q, *k_transposed, *v_transposed, *grad_o, *scores, *dscores, *dk, *dv, *inter_k, *inter_k_transposed, *inter_v,
      *columns;
  double *dlog, *k_dk, *across, *decay_sums;

  BackwardKey(const Plan& plan, const Inputs& in, const Shared& shared, const BackwardArguments& args, Arena& arena)
      : Base(plan, in, shared, arena), args(args) {
    q = arena.take<A>(chunk * ldk);
    k_transposed = arena.take<A>(chunk * ldk);
    v_transposed = arena.take<A>(chunk * ldv);
    grad_o = arena.take<A>(chunk * ldv);
    scores = arena.take<A>(chunk * chunk);
    dscores = arena.take<A>(chunk * chunk);
    dk = arena.take<A>(chunk * ldk);
    dv = arena.take<A>(chunk * ldv);
    inter_k = arena.take<A>(chunk * ldk);
    inter_k_transposed = arena.take<A>(chunk * ldk);
    inter_v = arena.take<A>(chunk * ldv);
    columns = arena.take<A>(chunk);
    dlog = arena.take<double>(group.states * chunk);
    k_dk = arena.take<double>(group.states * chunk);
    across = arena.take<double>(group.states);
    decay_sums = arena.take<double>(group.states);
  }

  void load_start(const Sequence& sequence, i64 key_head) {
    fill_zero(states.count * states.size, states.start);
    states.started = args.grad_kv || args.grad_z;
    for (i64 i = 0; i < group.states; ++i) {
      const i64 head = key_head * group.states + i;
      A* state = states.start + i * states.size;
      if (args.grad_kv) load_state(args.grad_kv, sequence.index, head, s.key_dim, 0, s.value_dim, state, ldv);
      if (args.grad_z) this->load_z(args.grad_z, sequence.index, head, state + z_at);
    }
  }

  void finish(const Sequence& sequence, i64 key_head) {
    for (i64 i = 0; i < group.states; ++i) {
      const i64 head = key_head * group.states + i;
      const A* state = states.start + i * states.size;
      if (args.dinitial_kv) store_state(args.dinitial_kv, sequence.index, head, s.key_dim, 0, s.value_dim, state, ldv);
      if (args.dinitial_z) this->store_z(args.dinitial_z, sequence.index, head, state + z_at);
    }
  }

  // q, scaled, and grad_o, divided by the denominator
  void load_queries(const Tokens& tokens, i64 head) {
    this->load_features(in.q, tokens, head, this->query_rows, q);
    scale_row(tokens.padded * ldk, static_cast<A>(in.scale), q);
    load_rows(args.grad_o, tokens, head, 0, s.value_dim, grad_o, ldv);
    if (!s.normalize) return;
    const A* reciprocals = static_cast<const A*>(shared.reciprocal) + place(tokens, head);
    for (i64 t = 0; t < tokens.count; ++t) scale_row(ldv, reciprocals[t * s.heads], grad_o + t * ldv);
  }

  const A* ddenominators(const Tokens& tokens, i64 head) const {
    return static_cast<const A*>(shared.ddenominator) + place(tokens, head);
  }
  i64 place(const Tokens& tokens, i64 head) const { return (tokens.batch * s.time + tokens.first) * s.heads + head; }

  // what the chunk's queries of head r of the group add to the gradient of the state before it; overwrites them
  void add_queries(const Tokens& tokens, i64 head, i64 r) {
    const i64 i = group.state_of(r);
    const bool first = group.states > 1 || r == 0, last = group.states > 1 || r == group.heads - 1;
    A* state = states.sum + i * states.size;
    if (s.decay != Decay::none) {
      for (i64 t = 0; t < tokens.count; ++t) scale_row(ldk, decays[i].from_start[t], q + t * ldk);
    }
    product(*tokens.ahead, ldk, ldv, tokens.padded, q, 1, ldk, grad_o, ldv, state, ldv,
            states.forget(i, first ? decays[i].whole : 1, last));
    if (s.normalize) {
      const A* factors = ddenominators(tokens, head);
      fill_zero(ldk, this->row);
      for (i64 t = 0; t < tokens.count; ++t) add_scaled(ldk, factors[t * s.heads], q + t * ldk, this->row);
      add_scaled(ldk, A(1), this->row, state + z_at);
    }
    if (last) states.added(i);
  }

  void sum(const Sequence& sequence, i64 segment, i64 key_head) {
    this->for_each_chunk(sequence, segment, reverse, [&](const Tokens& tokens, i64) {
      this->compute_decays(tokens, key_head);
      for (i64 r = 0; r < group.heads; ++r) {
        load_queries(tokens, key_head * group.heads + r);
        add_queries(tokens, key_head * group.heads + r, r);
      }
    });
  }

  void run(const Sequence& sequence, i64 segment, i64 slot, i64 key_head) {
    std::fill_n(decay_sums, group.states, 0.0);
    this->for_each_chunk(sequence, segment, reverse, [&](const Tokens& tokens, i64 begin) {
      this->load_keys(tokens, key_head);
      transpose(tokens.padded, ldk, k, ldk, k_transposed, chunk);
      transpose(tokens.padded, ldv, v, ldv, v_transposed, chunk);
      const i64 score_columns = round_up(tokens.count, pad);
      for (i64 j = tokens.padded; j < score_columns; ++j) {
        for (i64 i = 0; i < ldk; ++i) k_transposed[i * chunk + j] = 0;
        for (i64 i = 0; i < ldv; ++i) v_transposed[i * chunk + j] = 0;
      }
      fill_zero(tokens.padded * ldk, dk);
      fill_zero(tokens.padded * ldv, dv);
      fill_zero(group.states * chunk, dlog);

      // what reaches the chunk's keys and values from later chunks, through the state after it
      for (i64 i = 0; i < group.states; ++i) {
        const ChunkDecay<A>& decay = decays[i];
        const A* after = states.now(i);
        product(*tokens.ahead, ldk, score_columns, ldv, after, ldv, 1, v_transposed, chunk, inter_k_transposed, chunk,
                false);
        transpose(ldk, tokens.padded, inter_k_transposed, chunk, inter_k, ldk);
        product(*tokens.ahead, tokens.padded, ldv, ldk, k, ldk, 1, after, ldv, inter_v, ldv, false);
        for (i64 t = 0; t < tokens.count; ++t) {
          const A end = decay.to_end[t];
          add_scaled(ldk, A(1), after + z_at, inter_k + t * ldk);
          add_scaled(ldk, end, inter_k + t * ldk, dk + t * ldk);
          add_scaled(ldv, end, inter_v + t * ldv, dv + t * ldv);
          if (s.decay_gradient) {
            k_dk[i * chunk + t] =
                static_cast<double>(end) * static_cast<double>(dot(ldk, k + t * ldk, inter_k + t * ldk));
          }
        }
        if (s.decay_gradient) {
          across[i] = decay.whole * dot_with_state_before(sequence, begin, key_head * group.states + i, after);
        }
      }

      for (i64 r = 0; r < group.heads; ++r) {
        const i64 head = key_head * group.heads + r, i = group.state_of(r);
        const ChunkDecay<A>& decay = decays[i];
        load_queries(tokens, head);
        product(*tokens.ahead, tokens.padded, score_columns, ldk, q, ldk, 1, k_transposed, chunk, scores, chunk, false,
                Band::lower_result);
        product(*tokens.ahead, tokens.padded, score_columns, ldv, grad_o, ldv, 1, v_transposed, chunk, dscores, chunk,
                false, Band::lower_result);
        if (s.normalize) {
          const A* factors = ddenominators(tokens, head);
          for (i64 t = 0; t < tokens.count; ++t) {
            const A factor = factors[t * s.heads];
            for (i64 j = 0; j <= t; ++j) dscores[t * chunk + j] += factor;
          }
        }
        decay.apply(s, tokens, chunk, scores);
        if (s.decay_gradient) add_decay_gradient(tokens, dlog + i * chunk);
        decay.apply(s, tokens, chunk, dscores);
        // both factors are lower triangular and read transposed
        product(*tokens.ahead, tokens.padded, ldv, tokens.padded, scores, 1, chunk, grad_o, ldv, dv, ldv, true,
                Band::upper);
        product(*tokens.ahead, tokens.padded, ldk, tokens.padded, dscores, 1, chunk, q, ldk, dk, ldk, true,
                Band::upper);
        add_queries(tokens, head, r);
      }
      this->store_gradient(args.dk, tokens, key_head, this->key_rows, dk);
      store_rows(args.dv, tokens, key_head, 0, s.value_dim, dv, ldv);
      if (s.decay_gradient) {
        for (i64 i = 0; i < group.states; ++i) finish_decay_gradient(tokens, key_head * group.states + i, i);
      }
    });
    if (s.decay_gradient) {
      std::copy_n(decay_sums, group.states, shared.decay_sums + slot * s.state_heads + key_head * group.states);
    }
  }

  // The gradient of g_t is the sum of score x dscore over all pairs (i, j) with j < t <= i: the decay they share. Here
  // those within the chunk, added up without a difference of large sums: scores carry the decay, dscores not yet.
  void add_decay_gradient(const Tokens& tokens, double* gradient) {
    fill_zero(chunk, columns);
    for (i64 t = tokens.count - 1; t > 0; --t) {
      const A* score = scores + t * chunk;
      const A* dscore = dscores + t * chunk;
      for (i64 j = 0; j < t; ++j) columns[j] += score[j] * dscore[j];
      for (i64 j = t; j < round_up(t, pad); ++j) columns[j] = 0;
      gradient[t] += static_cast<double>(total(round_up(t, pad), columns));
    }
  }

  // <state before the chunk, gradient of the state after it>
  double dot_with_state_before(const Sequence& sequence, i64 begin, i64 state_head, const A* after) const {
    double sum = 0;
    if (begin > 0) {
      const A* before = static_cast<const A*>(shared.states) +
                        (this->chunk_slot(sequence, begin) * s.state_heads + state_head) * states.size;
      for (i64 d = 0; d < s.key_dim; ++d) {
        sum += static_cast<double>(dot(ldv, before + d * ldv, after + d * ldv));
      }
      return sum + static_cast<double>(dot(ldk, before + z_at, after + z_at));
    }
    for (i64 d = 0; d < s.key_dim; ++d) {
      if (in.initial_kv) {
        const A* row = &element<A>(in.initial_kv, sequence.index, state_head, d);
        for (i64 e = 0; e < s.value_dim; ++e) {
          sum += static_cast<double>(row[e * in.initial_kv.stride[3]]) * static_cast<double>(after[d * ldv + e]);
        }
      }
      if (in.initial_z) {
        sum += static_cast<double>(element<A>(in.initial_z, sequence.index, state_head, d)) *
               static_cast<double>(after[z_at + d]);
      }
    }
    return sum;
  }

  // The other pairs: i here and j before, j here and i after, and those on both sides of the chunk. Every one is added
  // up from products that carry its decay: a running difference over the chunks would save the memory of the states,
  // but leaves an error that a strong decay's small gradient drowns in.
  void finish_decay_gradient(const Tokens& tokens, i64 state_head, i64 i) {
    const double* from_before = shared.q_dq + (tokens.batch * s.time + tokens.first) * s.state_heads + state_head;
    double* gradient = dlog + i * chunk;
    double later = 0;
    for (i64 t = tokens.count - 1; t >= 0; --t) {
      later += from_before[t * s.state_heads];
      gradient[t] += across[i] + later;
    }
    double earlier = 0;
    for (i64 t = 0; t < tokens.count; ++t) {
      gradient[t] += earlier;
      earlier += k_dk[i * chunk + t];
      if (!tokens.live(t)) gradient[t] = 0;
      decay_sums[i] += gradient[t];
      if (s.decay == Decay::per_token) {
        element<A>(args.dlog_decay, tokens.batch, tokens.first + t, state_head) = static_cast<A>(gradient[t]);
      }
    }
  }
};

// ---- one token ----------------------------------------------------------------------------------------------------

// A token's key and queries as the state meets them, a few at a time: they share what is read of a projection.
template <class A>
struct StepRows {
  static constexpr i64 most = 4;
  const Sizes& sizes;
  const StepArguments& args;
  const Tokens& tokens;
  const i64 key_head, first_head, heads;  // of the queries: [first_head, first_head + heads)
  i64 begin = 0, end = 0;                 // the rows that are there; row 0 is the key, row 1 + r the r-th query
  A features[most * max_dim], x[most * max_dim];

  StepRows(const Sizes& sizes, const StepArguments& args, const Tokens& tokens, i64 key_head, i64 first_head, i64 heads)
      : sizes(sizes), args(args), tokens(tokens), key_head(key_head), first_head(first_head), heads(heads) {}

  // Until a row is asked for that is not there; row 0 and row 1 are there together.
  const A* row(i64 n) {
    if (n >= end) load(n);
    return features + (n - begin) * max_dim;
  }

  void load(i64 first) {
    const bool mapped = sizes.feature != Feature::none;
    begin = first, end = std::min(1 + heads, first + most);
    for (i64 n = begin; n < end; ++n) {
      const i64 i = n - begin, width = mapped ? sizes.channels : sizes.key_dim;
      A* to = (mapped ? x : features) + i * max_dim;
      load_rows(n == 0 ? args.k : args.q, tokens, n == 0 ? key_head : first_head + n - 1, 0, width, to, width);
    }
    if (mapped) end - begin > 2 ? map<4>() : map<2>();
    for (i64 n = std::max<i64>(begin, 1); n < end; ++n) {
      scale_row(sizes.key_dim, static_cast<A>(args.scale), features + (n - begin) * max_dim);
    }
  }

  template <int Rows>
  void map() {
    const i64 columns = map_columns(sizes), count = end - begin;
    for (i64 i = count; i < Rows; ++i) fill_zero(sizes.channels, x + i * max_dim);
    multiply<Rows>(columns);
    for (i64 i = 0; i < count; ++i) {
      A* row = features + i * max_dim;
      make_features(sizes.feature, columns, sizes.key_dim, row);
      if (!args.weights) continue;
      const A* weights = static_cast<const A*>(args.weights.data) + key_head * args.weights.stride[0];
      for (i64 j = 0; j < sizes.key_dim; ++j) row[j] *= weights[j * args.weights.stride[1]];
    }
  }

  // features [Rows, columns] = x [Rows, channels] times the projection, which is read where it lies.
  template <int Rows>
  void multiply(i64 columns) {
    constexpr i64 lanes = Vector<A>::lanes;
    constexpr int wide = 8 / Rows;  // vectors; with as many rows, sums enough to wait for none
    const i64 down = args.projection.stride[1], across = args.projection.stride[2], depth = sizes.channels;
    const A* base = static_cast<const A*>(args.projection.data) + key_head * args.projection.stride[0];
    for (i64 j = 0; j < columns;) {
      if (across == 1 && j + wide * lanes <= columns) {
        tile_product<A, Rows, wide>(0, depth, x, max_dim, 1, base + j, down, features, max_dim, j, false);
        j += wide * lanes;
      } else if (across == 1 && j + lanes <= columns) {
        tile_product<A, Rows, 1>(0, depth, x, max_dim, 1, base + j, down, features, max_dim, j, false);
        j += lanes;
      } else {
        A part[max_dim * lanes];
        const i64 n = std::min(lanes, columns - j);
        for (i64 i = 0; i < depth; ++i) {
          load_row(part + i * lanes, base + i * down + j * across, across, n);
          fill_zero(lanes - n, part + i * lanes + n);
        }
        tile_product<A, Rows, 1>(0, depth, x, max_dim, 1, part, lanes, features, max_dim, j, false);
        j += n;
      }
    }
  }
};

template <class A>
void step(const Sizes& s, const StepArguments& args, i64 task) {
  const Group group(s);
  const i64 state_head = task % s.state_heads, batch = task / s.state_heads;
  const i64 key_head = state_head / group.states;
  const i64 first_head = group.states == 1 ? key_head * group.heads : state_head;
  const i64 heads = group.states == 1 ? group.heads : 1;
  // out of memory, which every store into the state might change
  const i64 depth = s.key_dim, width = s.value_dim;
  const bool with_z = static_cast<bool>(args.z);
  Tokens tokens;
  tokens.batch = batch;
  tokens.count = tokens.padded = 1;
  A v[max_dim], o[max_dim], row[max_dim];
  const bool live = !args.mask || static_cast<const unsigned char*>(args.mask.data)[batch * args.mask.stride[0]] != 0;
  if (!live) {
    fill_zero(width, o);
    for (i64 r = 0; r < heads; ++r) store_rows(args.o, tokens, first_head + r, 0, width, o, width);
    return;
  }
  StepRows<A> rows(s, args, tokens, key_head, first_head, heads);
  const A* k = rows.row(0);  // for the first query
  load_rows(args.v, tokens, key_head, 0, width, v, width);
  const A decay = s.decay == Decay::none
                      ? A(1)
                      : static_cast<A>(std::exp(static_cast<double>(element<A>(args.log_decay, batch, 0, state_head))));
  A* state = static_cast<A*>(args.kv.data) + batch * args.kv.stride[0] + state_head * args.kv.stride[1];
  const i64 down = args.kv.stride[2], across = args.kv.stride[3];
  for (i64 r = 0; r < heads; ++r) {
    const A* q = rows.row(1 + r);
    fill_zero(width, o);
    A denominator = 0;
    for (i64 d = 0; d < depth; ++d) {
      A* line = state + d * down;
      const A query = q[d];
      if (across == 1) {
        if (r == 0) {
          const A key = k[d];
          for (i64 e = 0; e < width; ++e) line[e] = decay * line[e] + key * v[e];
        }
        add_scaled(width, query, line, o);
      } else {
        if (r == 0) {
          const A key = k[d];
          for (i64 e = 0; e < width; ++e) line[e * across] = decay * line[e * across] + key * v[e];
        }
        load_row(row, line, across, width);
        add_scaled(width, query, row, o);
      }
      if (with_z) {
        A& z = element<A>(args.z, batch, state_head, d);
        if (r == 0) z = decay * z + k[d];
        denominator += query * z;
      }
    }
    if (s.normalize) scale_row(width, 1 / (denominator + static_cast<A>(args.eps)), o);
    store_rows(args.o, tokens, first_head + r, 0, width, o, width);
  }
}

template <class P, class... Arguments>
void run_in(void* lane, Stage stage, std::int64_t task, const Arguments&... arguments) {
  Arena arena{static_cast<char*>(lane)};
  P pass(arguments..., arena);
  run_stage(pass, stage, task);
}

template <class P, class Arguments>
std::size_t bytes_of(const Plan& plan) {
  Arena arena{nullptr};
  static const Inputs in;
  static const Shared shared;
  static const Arguments arguments;
  P pass(plan, in, shared, arguments, arena);
  return arena.used;
}

}  // namespace

std::size_t forward_lane_bytes(const Plan& plan) {
  return plan.sizes.double_precision ? bytes_of<Forward<double>, ForwardOutputs>(plan)
                                     : bytes_of<Forward<float>, ForwardOutputs>(plan);
}

std::size_t backward_lane_bytes(const Plan& plan) {
  return plan.sizes.double_precision ? std::max(bytes_of<BackwardQuery<double>, BackwardArguments>(plan),
                                                bytes_of<BackwardKey<double>, BackwardArguments>(plan))
                                     : std::max(bytes_of<BackwardQuery<float>, BackwardArguments>(plan),
                                                bytes_of<BackwardKey<float>, BackwardArguments>(plan));
}

void forward_task(const Plan& plan, const Inputs& in, const ForwardOutputs& out, const Shared& shared, Stage stage,
                  std::int64_t task, void* lane) {
  if (plan.sizes.double_precision) {
    run_in<Forward<double>>(lane, stage, task, plan, in, shared, out);
  } else {
    run_in<Forward<float>>(lane, stage, task, plan, in, shared, out);
  }
}

void backward_query_task(const Plan& plan, const Inputs& in, const BackwardArguments& args, const Shared& shared,
                         Stage stage, std::int64_t task, void* lane) {
  if (plan.sizes.double_precision) {
    run_in<BackwardQuery<double>>(lane, stage, task, plan, in, shared, args);
  } else {
    run_in<BackwardQuery<float>>(lane, stage, task, plan, in, shared, args);
  }
}

void backward_key_task(const Plan& plan, const Inputs& in, const BackwardArguments& args, const Shared& shared,
                       Stage stage, std::int64_t task, void* lane) {
  if (plan.sizes.double_precision) {
    run_in<BackwardKey<double>>(lane, stage, task, plan, in, shared, args);
  } else {
    run_in<BackwardKey<float>>(lane, stage, task, plan, in, shared, args);
  }
}

void step_task(const Sizes& sizes, const StepArguments& args, std::int64_t task) {
  if (sizes.double_precision) {
    step<double>(sizes, args, task);
  } else {
    step<float>(sizes, args, task);
  }
}

}  // namespace freqrank::linear_attention::FREQRANK_ISA
