// The chunked scan, compiled once for each instruction set. Everything here has internal linkage or lives in the
// instruction set's namespace, so that no variant's code can be linked into another.
#include "linear_attention/kernels.h"

#include <algorithm>
#include <cmath>
#include <cstring>
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

// ---- products of scratch tiles ------------------------------------------------------------------------------------

// Which part of a product with a lower triangular C x C tile is not known to be zero.
enum class Band {
  full,
  lower,         // the left factor is lower triangular: row i ends at column i
  upper,         // the left factor is upper triangular (a lower one read transposed): row i starts at column i
  lower_result,  // only the lower triangle of the result is wanted
};

template <class A, int Rows, int Vectors>
inline __attribute__((always_inline)) void tile_product(i64 begin, i64 end, const A* a, i64 row_step, i64 column_step,
                                                        const A* b, i64 ldb, A* c, i64 ldc, bool add) {
  using V = typename Vector<A>::type;
  constexpr int lanes = Vector<A>::lanes;
  V sum[Rows][Vectors];
#pragma GCC unroll 8
  for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 4
    for (int n = 0; n < Vectors; ++n) {
      sum[i][n] = add ? *reinterpret_cast<const V*>(c + i * ldc + n * lanes) : V{};
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
}

// c [rows, columns] (+)= a [rows, depth] b [depth, columns]; element (i, k) of a is a[i * row_step + k * column_step].
// rows is a multiple of row_pad and columns one of pad.
template <class A>
void product(i64 rows, i64 columns, i64 depth, const A* a, i64 row_step, i64 column_step, const A* b, i64 ldb, A* c,
             i64 ldc, bool add, Band band = Band::full) {
  constexpr i64 wide = 2 * Vector<A>::lanes;
  constexpr i64 narrow = Vector<A>::lanes;
  for (i64 j = 0; j < columns;) {
    const bool two = j + wide <= columns;
    for (i64 i = 0; i < rows; i += tile_rows) {
      if (band == Band::lower_result && j >= i + tile_rows) continue;
      const i64 begin = band == Band::upper ? i : 0;
      const i64 end = band == Band::lower ? std::min(depth, i + tile_rows) : depth;
      const A* left = a + i * row_step;
      A* result = c + i * ldc + j;
      if (two) {
        tile_product<A, tile_rows, 2>(begin, end, left, row_step, column_step, b + j, ldb, result, ldc, add);
      } else {
        tile_product<A, tile_rows, 1>(begin, end, left, row_step, column_step, b + j, ldb, result, ldc, add);
      }
    }
    j += two ? wide : narrow;
  }
}

template <class A>
void transpose(i64 rows, i64 columns, const A* x, i64 ldx, A* y, i64 ldy) {
  constexpr i64 block = 8;
  for (i64 i = 0; i < rows; i += block) {
    const i64 i_end = std::min(rows, i + block);
    for (i64 j = 0; j < columns; ++j) {
      for (i64 ii = i; ii < i_end; ++ii) y[j * ldy + ii] = x[ii * ldx + j];
    }
  }
}

template <class A>
inline A dot(i64 n, const A* x, const A* y) {  // n a multiple of pad
  using V = typename Vector<A>::type;
  constexpr int lanes = Vector<A>::lanes;
  V sum{};
  for (i64 i = 0; i < n; i += lanes) {
    sum += *reinterpret_cast<const V*>(x + i) * *reinterpret_cast<const V*>(y + i);
  }
  A out = 0;
  for (int i = 0; i < lanes; ++i) out += sum[i];
  return out;
}

template <class A>
inline A total(i64 n, const A* x) {  // n a multiple of pad
  using V = typename Vector<A>::type;
  constexpr int lanes = Vector<A>::lanes;
  V sum{};
  for (i64 i = 0; i < n; i += lanes) sum += *reinterpret_cast<const V*>(x + i);
  A out = 0;
  for (int i = 0; i < lanes; ++i) out += sum[i];
  return out;
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
  const unsigned char* mask = nullptr;  // of token 0 of this batch row
  i64 mask_step = 0;
  bool live(i64 i) const { return mask == nullptr || mask[(first + i) * mask_step] != 0; }
  bool all_live() const {
    if (mask == nullptr) return true;
    for (i64 i = 0; i < count; ++i) {
      if (!live(i)) return false;
    }
    return true;
  }
};

// Rows of the chunk, columns [column, column + n) of head h, into to [padded, ld]; a masked token, padding rows and
// columns become 0 and are never read.
template <class A>
void load_rows(const View& x, const Tokens& tokens, i64 head, i64 column, i64 n, A* to, i64 ld) {
  with_dtype<A>(x.dtype, x.data, [&](auto* data) {
    const auto* base =
        data + tokens.batch * x.stride[0] + tokens.first * x.stride[1] + head * x.stride[2] + column * x.stride[3];
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

// The decay inside a chunk, for one state: products of exp(g) <= 1 only, so nothing overflows, and -inf is 0.
template <class A>
struct ChunkDecay {
  A* between = nullptr;     // [C, C]: from token j to token i >= j; 1 on the diagonal
  A* from_start = nullptr;  // [C]: from the state before the chunk to token i
  A* to_end = nullptr;      // [C]: from token j to the state after the chunk
  A* each = nullptr;        // [C]: exp(g)
  double* row = nullptr;    // [C]
  A whole = 1;              // from the state before to the state after
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
    // what is this small adds nothing to a float, and arithmetic on denormals is slow
    constexpr double tiny = sizeof(A) == sizeof(float) ? 1e-34 : 1e-290;
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
      if (before < tiny) before = 0;
      each[i] = static_cast<A>(e);
      from_start[i] = static_cast<A>(before);
      A* out = between + i * chunk;
      for (i64 j = 0; j < i; ++j) {
        const double x = row[j] * e;
        row[j] = x < tiny ? 0 : x;
        out[j] = static_cast<A>(row[j]);
      }
      row[i] = 1;
      out[i] = 1;
    }
    for (i64 j = 0; j < tokens.count; ++j) to_end[j] = static_cast<A>(row[j]);
    for (i64 j = tokens.count; j < chunk; ++j) from_start[j] = to_end[j] = each[j] = 0;
    whole = static_cast<A>(before);
  }

  // The causal mask, and the decay if there is one, on scores [padded, ld]; the rest of each diagonal block becomes 0.
  void apply(const Sizes& sizes, const Tokens& tokens, i64 chunk, A* scores) const {
    for (i64 i = 0; i < tokens.padded; ++i) {
      A* line = scores + i * chunk;
      if (sizes.decay != Decay::none && i < tokens.count) {
        const A* factors = between + i * chunk;
        for (i64 j = 0; j <= i; ++j) line[j] *= factors[j];
      }
      const i64 block_end = round_up(i + 1, row_pad);
      for (i64 j = i + 1; j < block_end; ++j) line[j] = 0;
    }
  }
};

// ---- what the three passes share ----------------------------------------------------------------------------------

struct Sequence {
  i64 index = 0, batch = 0, first = 0, length = 0;
};

inline Sequence sequence_of(const Sizes& sizes, const Inputs& in, i64 n) {
  if (in.cu_seqlens == nullptr) return {n, n, 0, sizes.time};
  return {n, 0, in.cu_seqlens[n], in.cu_seqlens[n + 1] - in.cu_seqlens[n]};
}

inline Tokens tokens_of(const Inputs& in, const Sequence& sequence, i64 begin, i64 chunk) {
  Tokens tokens;
  tokens.batch = sequence.batch;
  tokens.first = sequence.first + begin;
  tokens.count = std::min(chunk, sequence.length - begin);
  tokens.padded = round_up(tokens.count, row_pad);
  if (in.mask) {
    tokens.mask = static_cast<const unsigned char*>(in.mask.data) + sequence.batch * in.mask.stride[0];
    tokens.mask_step = in.mask.stride[1];
  }
  return tokens;
}

// How query heads, states and key heads of one key head's group belong together.
struct Group {
  i64 heads = 1, states = 1;
  Group(const Sizes& sizes) : heads(sizes.heads / sizes.key_heads), states(sizes.state_heads / sizes.key_heads) {}
  i64 state_of(i64 r) const { return states == 1 ? 0 : r; }
};

// Where the state before the chunk that starts at `begin` > 0 is kept.
inline i64 state_slot(const Plan& plan, const Inputs& in, const Sequence& sequence, i64 begin) {
  const i64 before =
      in.cu_seqlens == nullptr ? sequence.index * (plan.sizes.time / plan.chunk) : sequence.first / plan.chunk;
  return before + sequence.index + begin / plan.chunk - 1;
}

// ---- forward ------------------------------------------------------------------------------------------------------

template <class A>
struct Forward {
  i64 chunk, ldk, ldv;
  A *q, *k, *k_transposed, *k_scaled, *v, *scores, *o, *states, *z;
  ChunkDecay<A>* decays;

  Forward(const Plan& plan, Arena& arena) {
    const Sizes& s = plan.sizes;
    const Group group(s);
    chunk = plan.chunk;
    ldk = round_up(s.key_dim, pad);
    ldv = round_up(plan.value_tile, pad);
    q = arena.take<A>(chunk * ldk);
    k = arena.take<A>(chunk * ldk);
    k_transposed = arena.take<A>(chunk * ldk);
    k_scaled = arena.take<A>(chunk * ldk);
    v = arena.take<A>(chunk * ldv);
    scores = arena.take<A>(chunk * chunk);
    o = arena.take<A>(chunk * ldv);
    states = arena.take<A>(group.states * ldk * ldv);
    z = arena.take<A>(group.states * ldk);
    decays = arena.take<ChunkDecay<A>>(group.states);
    for (i64 i = 0; i < group.states; ++i) {
      ChunkDecay<A> decay;
      decay.lay_out(arena, chunk);
      if (decays != nullptr) decays[i] = decay;
    }
  }

  void run(const Plan& plan, const Inputs& in, const ForwardOutputs& out, i64 task) {
    const Sizes& s = plan.sizes;
    const Group group(s);
    const i64 tiles = plan.value_tile == 0 ? 1 : (s.value_dim + plan.value_tile - 1) / plan.value_tile;
    const i64 tile = task % tiles, key_head = task / tiles % s.key_heads;
    const Sequence sequence = sequence_of(s, in, task / tiles / s.key_heads);
    const i64 column = tile * plan.value_tile, columns = std::min(plan.value_tile, s.value_dim - column);
    const bool with_z = s.normalize || static_cast<bool>(out.final_z);
    const A scale = static_cast<A>(in.scale), eps = static_cast<A>(in.eps);

    fill_zero(group.states * ldk * ldv, states);
    fill_zero(group.states * ldk, z);
    for (i64 i = 0; i < group.states; ++i) {
      const i64 head = key_head * group.states + i;
      if (in.initial_kv) {
        load_state(in.initial_kv, sequence.index, head, s.key_dim, column, columns, states + i * ldk * ldv, ldv);
      }
      if (in.initial_z) {
        for (i64 d = 0; d < s.key_dim; ++d) z[i * ldk + d] = element<A>(in.initial_z, sequence.index, head, d);
      }
    }

    for (i64 begin = 0; begin < sequence.length; begin += chunk) {
      const Tokens tokens = tokens_of(in, sequence, begin, chunk);
      const bool all_live = tokens.all_live();
      load_rows(in.k, tokens, key_head, 0, s.key_dim, k, ldk);
      load_rows(in.v, tokens, key_head, column, columns, v, ldv);
      transpose(tokens.padded, ldk, k, ldk, k_transposed, chunk);
      const i64 score_columns = round_up(tokens.count, pad);
      for (i64 i = 0; i < ldk; ++i) {
        for (i64 j = tokens.padded; j < score_columns; ++j) k_transposed[i * chunk + j] = 0;
      }
      for (i64 i = 0; i < group.states; ++i) {
        decays[i].compute(s, in.log_decay, tokens, key_head * group.states + i, chunk, all_live);
      }
      for (i64 r = 0; r < group.heads; ++r) {
        const i64 head = key_head * group.heads + r, i = group.state_of(r);
        const ChunkDecay<A>& decay = decays[i];
        const A* state = states + i * ldk * ldv;
        load_rows(in.q, tokens, head, 0, s.key_dim, q, ldk);
        scale_row(tokens.padded * ldk, scale, q);
        product(tokens.padded, score_columns, ldk, q, ldk, 1, k_transposed, chunk, scores, chunk, false,
                Band::lower_result);
        decay.apply(s, tokens, chunk, scores);
        product(tokens.padded, ldv, ldk, q, ldk, 1, state, ldv, o, ldv, false);
        if (s.decay != Decay::none) {
          for (i64 t = 0; t < tokens.count; ++t) scale_row(ldv, decay.from_start[t], o + t * ldv);
        }
        product(tokens.padded, ldv, tokens.padded, scores, chunk, 1, v, ldv, o, ldv, true, Band::lower);
        if (s.normalize) {
          for (i64 t = 0; t < tokens.count; ++t) {
            A denominator = decay.from_start[t] * dot(ldk, q + t * ldk, z + i * ldk);
            for (i64 j = 0; j <= t; ++j) denominator += scores[t * chunk + j];
            const A reciprocal = 1 / (denominator + eps);
            scale_row(ldv, reciprocal, o + t * ldv);
          }
        }
        store_rows(out.o, tokens, head, column, columns, o, ldv);
      }
      for (i64 i = 0; i < group.states; ++i) {
        const ChunkDecay<A>& decay = decays[i];
        const A* keys = k;
        if (s.decay != Decay::none) {
          for (i64 t = 0; t < tokens.padded; ++t) {
            const A factor = decay.to_end[t];
            for (i64 d = 0; d < ldk; ++d) k_scaled[t * ldk + d] = k[t * ldk + d] * factor;
          }
          keys = k_scaled;
          scale_row(ldk * ldv, decay.whole, states + i * ldk * ldv);
          scale_row(ldk, decay.whole, z + i * ldk);
        }
        product(ldk, ldv, tokens.padded, keys, 1, ldk, v, ldv, states + i * ldk * ldv, ldv, true);
        if (with_z) add_key_sum(tokens, keys, z + i * ldk);
      }
    }

    for (i64 i = 0; i < group.states; ++i) {
      const i64 head = key_head * group.states + i;
      if (out.final_kv) {
        store_state(out.final_kv, sequence.index, head, s.key_dim, column, columns, states + i * ldk * ldv, ldv);
      }
      if (out.final_z && tile == 0) {
        for (i64 d = 0; d < s.key_dim; ++d) element<A>(out.final_z, sequence.index, head, d) = z[i * ldk + d];
      }
    }
  }

  // z += the sum of the chunk's keys, added up on its own first so that a long z loses nothing
  void add_key_sum(const Tokens& tokens, const A* keys, A* to) {
    A* sum = q;  // free by now
    fill_zero(ldk, sum);
    for (i64 t = 0; t < tokens.count; ++t) add_scaled(ldk, A(1), keys + t * ldk, sum);
    add_scaled(ldk, A(1), sum, to);
  }
};

// ---- backward -----------------------------------------------------------------------------------------------------

// dq, forward in time. The state is kept transposed, [V, K]: dq takes do S^T, and a right factor must have rows.
template <class A>
struct BackwardQuery {
  i64 chunk, ldk, ldv;
  A *q, *k, *k_scaled, *v, *v_transposed, *grad_o, *scores, *dq, *inter, *states, *z, *z_running, *z_sum;
  ChunkDecay<A>* decays;

  BackwardQuery(const Plan& plan, Arena& arena) {
    const Sizes& s = plan.sizes;
    const Group group(s);
    chunk = plan.chunk;
    ldk = round_up(s.key_dim, pad);
    ldv = round_up(s.value_dim, pad);
    q = arena.take<A>(chunk * ldk);
    k = arena.take<A>(chunk * ldk);
    k_scaled = arena.take<A>(chunk * ldk);
    v = arena.take<A>(chunk * ldv);
    v_transposed = arena.take<A>(chunk * ldv);
    grad_o = arena.take<A>(chunk * ldv);
    scores = arena.take<A>(chunk * chunk);
    dq = arena.take<A>(chunk * ldk);
    inter = arena.take<A>(chunk * ldk);
    states = arena.take<A>(group.states * ldk * ldv);
    z = arena.take<A>(group.states * ldk);
    z_running = arena.take<A>(group.states * chunk * ldk);
    z_sum = arena.take<A>(ldk);
    decays = arena.take<ChunkDecay<A>>(group.states);
    for (i64 i = 0; i < group.states; ++i) {
      ChunkDecay<A> decay;
      decay.lay_out(arena, chunk);
      if (decays != nullptr) decays[i] = decay;
    }
  }

  void run(const Plan& plan, const Inputs& in, const BackwardArguments& args, const Shared& shared, i64 task) {
    const Sizes& s = plan.sizes;
    const Group group(s);
    const i64 key_head = task % s.key_heads;
    const Sequence sequence = sequence_of(s, in, task / s.key_heads);
    const bool with_z = s.normalize || static_cast<bool>(args.grad_z);
    const A scale = static_cast<A>(in.scale), eps = static_cast<A>(in.eps);
    A* reciprocals = static_cast<A*>(shared.reciprocal);
    A* ddenominators = static_cast<A*>(shared.ddenominator);

    fill_zero(group.states * ldk * ldv, states);
    fill_zero(group.states * ldk, z);
    for (i64 i = 0; i < group.states; ++i) {
      const i64 head = key_head * group.states + i;
      if (in.initial_kv) {
        for (i64 d = 0; d < s.key_dim; ++d) {
          const A* row = &element<A>(in.initial_kv, sequence.index, head, d);
          for (i64 e = 0; e < s.value_dim; ++e) states[(i * ldv + e) * ldk + d] = row[e * in.initial_kv.stride[3]];
        }
      }
      if (in.initial_z) {
        for (i64 d = 0; d < s.key_dim; ++d) z[i * ldk + d] = element<A>(in.initial_z, sequence.index, head, d);
      }
    }

    for (i64 begin = 0; begin < sequence.length; begin += chunk) {
      const Tokens tokens = tokens_of(in, sequence, begin, chunk);
      const bool all_live = tokens.all_live();
      if (s.decay_gradient && begin > 0) {
        const i64 slot = state_slot(plan, in, sequence, begin);
        for (i64 i = 0; i < group.states; ++i) save_state(s, shared, slot, key_head * group.states + i, i);
      }
      load_rows(in.k, tokens, key_head, 0, s.key_dim, k, ldk);
      load_rows(in.v, tokens, key_head, 0, s.value_dim, v, ldv);
      transpose(tokens.padded, ldv, v, ldv, v_transposed, chunk);
      const i64 score_columns = round_up(tokens.count, pad);
      for (i64 i = 0; i < ldv; ++i) {
        for (i64 j = tokens.padded; j < score_columns; ++j) v_transposed[i * chunk + j] = 0;
      }
      for (i64 i = 0; i < group.states; ++i) {
        decays[i].compute(s, in.log_decay, tokens, key_head * group.states + i, chunk, all_live);
        if (s.normalize) {  // sum of the decayed keys of this chunk up to each token
          A* running = z_running + i * chunk * ldk;
          for (i64 t = 0; t < tokens.count; ++t) {
            const A each = decays[i].each[t];
            for (i64 d = 0; d < ldk; ++d) {
              running[t * ldk + d] = k[t * ldk + d] + (t == 0 ? 0 : each * running[(t - 1) * ldk + d]);
            }
          }
        }
      }
      if (s.decay_gradient) {
        for (i64 i = 0; i < group.states; ++i) {
          for (i64 t = 0; t < tokens.count; ++t) q_dq(s, shared, tokens, t, key_head * group.states + i) = 0;
        }
      }
      for (i64 r = 0; r < group.heads; ++r) {
        const i64 head = key_head * group.heads + r, i = group.state_of(r);
        const ChunkDecay<A>& decay = decays[i];
        load_rows(args.grad_o, tokens, head, 0, s.value_dim, grad_o, ldv);
        product(tokens.padded, score_columns, ldv, grad_o, ldv, 1, v_transposed, chunk, scores, chunk, false,
                Band::lower_result);
        decay.apply(s, tokens, chunk, scores);
        product(tokens.padded, ldk, tokens.padded, scores, chunk, 1, k, ldk, dq, ldk, false, Band::lower);
        product(tokens.padded, ldk, ldv, grad_o, ldv, 1, states + i * ldk * ldv, ldk, inter, ldk, false);
        if (s.normalize || s.decay_gradient) load_rows(in.q, tokens, head, 0, s.key_dim, q, ldk);
        for (i64 t = 0; t < tokens.count; ++t) {
          A* row = dq + t * ldk;
          const A* query = q + t * ldk;
          const A start = decay.from_start[t];
          for (i64 d = 0; d < ldk; ++d) row[d] = scale * (row[d] + start * inter[t * ldk + d]);
          A reciprocal = 1, ddenominator = 0;
          if (s.normalize) {
            const i64 at = (tokens.batch * s.time + tokens.first + t) * s.heads + head;
            const A* running = z_running + (i * chunk + t) * ldk;
            const A* before = z + i * ldk;
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
              sum += static_cast<double>(ddenominator) * static_cast<double>(dot(ldk, query, z + i * ldk));
            }
            q_dq(s, shared, tokens, t, key_head * group.states + i) += static_cast<double>(scale * start) * sum;
          }
        }
        store_rows(args.dq, tokens, head, 0, s.key_dim, dq, ldk);
      }
      for (i64 i = 0; i < group.states; ++i) {
        const ChunkDecay<A>& decay = decays[i];
        const A* keys = k;
        if (s.decay != Decay::none) {
          for (i64 t = 0; t < tokens.padded; ++t) {
            const A factor = decay.to_end[t];
            for (i64 d = 0; d < ldk; ++d) k_scaled[t * ldk + d] = k[t * ldk + d] * factor;
          }
          keys = k_scaled;
          scale_row(ldk * ldv, decay.whole, states + i * ldk * ldv);
          scale_row(ldk, decay.whole, z + i * ldk);
        }
        product(ldv, ldk, tokens.padded, v, 1, ldv, keys, ldk, states + i * ldk * ldv, ldk, true);
        if (with_z) {
          fill_zero(ldk, z_sum);
          for (i64 t = 0; t < tokens.count; ++t) add_scaled(ldk, A(1), keys + t * ldk, z_sum);
          add_scaled(ldk, A(1), z_sum, z + i * ldk);
        }
      }
    }
  }

  static double& q_dq(const Sizes& s, const Shared& shared, const Tokens& tokens, i64 t, i64 state_head) {
    return shared.q_dq[(tokens.batch * s.time + tokens.first + t) * s.state_heads + state_head];
  }

  void save_state(const Sizes& s, const Shared& shared, i64 slot, i64 state_head, i64 i) {
    A* to = static_cast<A*>(shared.states) + (slot * s.state_heads + state_head) * ldk * (s.value_dim + 1);
    std::memcpy(to, states + i * ldv * ldk, static_cast<std::size_t>(s.value_dim * ldk) * sizeof(A));
    std::memcpy(to + s.value_dim * ldk, z + i * ldk, static_cast<std::size_t>(ldk) * sizeof(A));
  }
};

// dk, dv, the decay's gradient and that of the initial state, backward in time.
template <class A>
struct BackwardKey {
  i64 chunk, ldk, ldv;
  A *q, *k, *k_transposed, *v, *v_transposed, *grad_o, *scores, *dscores, *dk, *dv, *inter_k, *inter_v, *states,
      *states_transposed, *z, *columns;
  double *dlog, *k_dk, *across;
  ChunkDecay<A>* decays;

  BackwardKey(const Plan& plan, Arena& arena) {
    const Sizes& s = plan.sizes;
    const Group group(s);
    chunk = plan.chunk;
    ldk = round_up(s.key_dim, pad);
    ldv = round_up(s.value_dim, pad);
    q = arena.take<A>(chunk * ldk);
    k = arena.take<A>(chunk * ldk);
    k_transposed = arena.take<A>(chunk * ldk);
    v = arena.take<A>(chunk * ldv);
    v_transposed = arena.take<A>(chunk * ldv);
    grad_o = arena.take<A>(chunk * ldv);
    scores = arena.take<A>(chunk * chunk);
    dscores = arena.take<A>(chunk * chunk);
    dk = arena.take<A>(chunk * ldk);
    dv = arena.take<A>(chunk * ldv);
    inter_k = arena.take<A>(chunk * ldk);
    inter_v = arena.take<A>(chunk * ldv);
    states = arena.take<A>(group.states * ldk * ldv);
    states_transposed = arena.take<A>(ldk * ldv);
    z = arena.take<A>(group.states * ldk);
    columns = arena.take<A>(chunk);
    dlog = arena.take<double>(group.states * chunk);
    k_dk = arena.take<double>(group.states * chunk);
    across = arena.take<double>(group.states);
    decays = arena.take<ChunkDecay<A>>(group.states);
    for (i64 i = 0; i < group.states; ++i) {
      ChunkDecay<A> decay;
      decay.lay_out(arena, chunk);
      if (decays != nullptr) decays[i] = decay;
    }
  }

  void run(const Plan& plan, const Inputs& in, const BackwardArguments& args, const Shared& shared, i64 task) {
    const Sizes& s = plan.sizes;
    const Group group(s);
    const i64 key_head = task % s.key_heads;
    const Sequence sequence = sequence_of(s, in, task / s.key_heads);
    const A scale = static_cast<A>(in.scale);
    const A* reciprocals = static_cast<const A*>(shared.reciprocal);
    const A* ddenominators = static_cast<const A*>(shared.ddenominator);

    fill_zero(group.states * ldk * ldv, states);
    fill_zero(group.states * ldk, z);
    for (i64 i = 0; i < group.states; ++i) {
      const i64 head = key_head * group.states + i;
      if (args.grad_kv) {
        load_state(args.grad_kv, sequence.index, head, s.key_dim, 0, s.value_dim, states + i * ldk * ldv, ldv);
      }
      if (args.grad_z) {
        for (i64 d = 0; d < s.key_dim; ++d) z[i * ldk + d] = element<A>(args.grad_z, sequence.index, head, d);
      }
      if (s.decay_gradient) shared.head_sums[sequence.index * s.state_heads + head] = 0;
    }

    const i64 last = sequence.length <= 0 ? -1 : (sequence.length - 1) / chunk;
    for (i64 c = last; c >= 0; --c) {
      const i64 begin = c * chunk;
      const Tokens tokens = tokens_of(in, sequence, begin, chunk);
      const bool all_live = tokens.all_live();
      load_rows(in.k, tokens, key_head, 0, s.key_dim, k, ldk);
      load_rows(in.v, tokens, key_head, 0, s.value_dim, v, ldv);
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
        decays[i].compute(s, in.log_decay, tokens, key_head * group.states + i, chunk, all_live);
        const ChunkDecay<A>& decay = decays[i];
        A* state = states + i * ldk * ldv;
        transpose(ldk, ldv, state, ldv, states_transposed, ldk);
        product(tokens.padded, ldk, ldv, v, ldv, 1, states_transposed, ldk, inter_k, ldk, false);
        product(tokens.padded, ldv, ldk, k, ldk, 1, state, ldv, inter_v, ldv, false);
        for (i64 t = 0; t < tokens.count; ++t) {
          const A end = decay.to_end[t];
          add_scaled(ldk, A(1), z + i * ldk, inter_k + t * ldk);
          add_scaled(ldk, end, inter_k + t * ldk, dk + t * ldk);
          add_scaled(ldv, end, inter_v + t * ldv, dv + t * ldv);
          if (s.decay_gradient) {
            k_dk[i * chunk + t] =
                static_cast<double>(end) * static_cast<double>(dot(ldk, k + t * ldk, inter_k + t * ldk));
          }
        }
        if (s.decay_gradient) {
          across[i] = static_cast<double>(decay.whole) *
                      dot_with_state_before(plan, in, shared, sequence, begin, key_head * group.states + i, i);
        }
        if (s.decay != Decay::none) {
          scale_row(ldk * ldv, decay.whole, state);
          scale_row(ldk, decay.whole, z + i * ldk);
        }
      }

      for (i64 r = 0; r < group.heads; ++r) {
        const i64 head = key_head * group.heads + r, i = group.state_of(r);
        const ChunkDecay<A>& decay = decays[i];
        load_rows(in.q, tokens, head, 0, s.key_dim, q, ldk);
        scale_row(tokens.padded * ldk, scale, q);
        load_rows(args.grad_o, tokens, head, 0, s.value_dim, grad_o, ldv);
        const i64 at = (tokens.batch * s.time + tokens.first) * s.heads + head;
        if (s.normalize) {
          for (i64 t = 0; t < tokens.count; ++t) scale_row(ldv, reciprocals[at + t * s.heads], grad_o + t * ldv);
        }
        product(tokens.padded, score_columns, ldk, q, ldk, 1, k_transposed, chunk, scores, chunk, false,
                Band::lower_result);
        product(tokens.padded, score_columns, ldv, grad_o, ldv, 1, v_transposed, chunk, dscores, chunk, false,
                Band::lower_result);
        if (s.normalize) {
          for (i64 t = 0; t < tokens.count; ++t) {
            const A ddenominator = ddenominators[at + t * s.heads];
            for (i64 j = 0; j <= t; ++j) dscores[t * chunk + j] += ddenominator;
          }
        }
        decay.apply(s, tokens, chunk, scores);
        if (s.decay_gradient) add_decay_gradient(tokens, dlog + i * chunk);
        decay.apply(s, tokens, chunk, dscores);
        // both factors are lower triangular and read transposed
        product(tokens.padded, ldv, tokens.padded, scores, 1, chunk, grad_o, ldv, dv, ldv, true, Band::upper);
        product(tokens.padded, ldk, tokens.padded, dscores, 1, chunk, q, ldk, dk, ldk, true, Band::upper);
        if (s.decay != Decay::none) {
          for (i64 t = 0; t < tokens.count; ++t) scale_row(ldk, decay.from_start[t], q + t * ldk);
        }
        product(ldk, ldv, tokens.padded, q, 1, ldk, grad_o, ldv, states + i * ldk * ldv, ldv, true);
        if (s.normalize) {
          A* sum = inter_k;  // free by now
          fill_zero(ldk, sum);
          for (i64 t = 0; t < tokens.count; ++t) add_scaled(ldk, ddenominators[at + t * s.heads], q + t * ldk, sum);
          add_scaled(ldk, A(1), sum, z + i * ldk);
        }
      }
      store_rows(args.dk, tokens, key_head, 0, s.key_dim, dk, ldk);
      store_rows(args.dv, tokens, key_head, 0, s.value_dim, dv, ldv);
      if (s.decay_gradient) {
        for (i64 i = 0; i < group.states; ++i) {
          finish_decay_gradient(plan, args, shared, sequence, tokens, key_head * group.states + i, i);
        }
      }
    }

    for (i64 i = 0; i < group.states; ++i) {
      const i64 head = key_head * group.states + i;
      if (args.dinitial_kv) {
        store_state(args.dinitial_kv, sequence.index, head, s.key_dim, 0, s.value_dim, states + i * ldk * ldv, ldv);
      }
      if (args.dinitial_z) {
        for (i64 d = 0; d < s.key_dim; ++d) element<A>(args.dinitial_z, sequence.index, head, d) = z[i * ldk + d];
      }
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

  // <state before the chunk, gradient of the state after it>; states_transposed holds the latter.
  double dot_with_state_before(const Plan& plan, const Inputs& in, const Shared& shared, const Sequence& sequence,
                               i64 begin, i64 state_head, i64 i) {
    const Sizes& s = plan.sizes;
    double sum = 0;
    if (begin > 0) {
      const A* saved = static_cast<const A*>(shared.states) +
                       (state_slot(plan, in, sequence, begin) * s.state_heads + state_head) * ldk * (s.value_dim + 1);
      for (i64 e = 0; e < s.value_dim; ++e) {
        sum += static_cast<double>(dot(ldk, saved + e * ldk, states_transposed + e * ldk));
      }
      return sum + static_cast<double>(dot(ldk, saved + s.value_dim * ldk, z + i * ldk));
    }
    for (i64 d = 0; d < s.key_dim; ++d) {
      if (in.initial_kv) {
        const A* row = &element<A>(in.initial_kv, sequence.index, state_head, d);
        for (i64 e = 0; e < s.value_dim; ++e) {
          sum += static_cast<double>(row[e * in.initial_kv.stride[3]]) *
                 static_cast<double>(states_transposed[e * ldk + d]);
        }
      }
      if (in.initial_z) {
        sum += static_cast<double>(element<A>(in.initial_z, sequence.index, state_head, d)) *
               static_cast<double>(z[i * ldk + d]);
      }
    }
    return sum;
  }

  // The other pairs: i here and j before, j here and i after, and those on both sides of the chunk. Every one is added
  // up from products that carry its decay: a running difference over the chunks would save the memory of the states,
  // but leaves an error that a strong decay's small gradient drowns in.
  void finish_decay_gradient(const Plan& plan, const BackwardArguments& args, const Shared& shared,
                             const Sequence& sequence, const Tokens& tokens, i64 state_head, i64 i) {
    const Sizes& s = plan.sizes;
    const double* from_before = shared.q_dq + (tokens.batch * s.time + tokens.first) * s.state_heads + state_head;
    double* gradient = dlog + i * chunk;
    double later = 0;
    for (i64 t = tokens.count - 1; t >= 0; --t) {
      later += from_before[t * s.state_heads];
      gradient[t] += across[i] + later;
    }
    double earlier = 0, head_sum = 0;
    for (i64 t = 0; t < tokens.count; ++t) {
      gradient[t] += earlier;
      earlier += k_dk[i * chunk + t];
      if (!tokens.live(t)) gradient[t] = 0;
      head_sum += gradient[t];
      if (s.decay == Decay::per_token) {
        element<A>(args.dlog_decay, tokens.batch, tokens.first + t, state_head) = static_cast<A>(gradient[t]);
      }
    }
    shared.head_sums[sequence.index * s.state_heads + state_head] += head_sum;
  }
};

// ---- one token ----------------------------------------------------------------------------------------------------

template <class A>
void step(const Sizes& s, const StepArguments& args, i64 task) {
  const Group group(s);
  const i64 state_head = task % s.state_heads, batch = task / s.state_heads;
  const i64 key_head = state_head / group.states;
  const i64 first_head = group.states == 1 ? key_head * group.heads : state_head;
  const i64 heads = group.states == 1 ? group.heads : 1;
  Tokens tokens;
  tokens.batch = batch;
  tokens.count = tokens.padded = 1;
  A q[max_dim], k[max_dim], v[max_dim], o[max_dim], row[max_dim];
  const bool live = !args.mask || static_cast<const unsigned char*>(args.mask.data)[batch * args.mask.stride[0]] != 0;
  if (!live) {
    fill_zero(s.value_dim, o);
    for (i64 r = 0; r < heads; ++r) store_rows(args.o, tokens, first_head + r, 0, s.value_dim, o, s.value_dim);
    return;
  }
  load_rows(args.k, tokens, key_head, 0, s.key_dim, k, s.key_dim);
  load_rows(args.v, tokens, key_head, 0, s.value_dim, v, s.value_dim);
  const A decay = s.decay == Decay::none
                      ? A(1)
                      : static_cast<A>(std::exp(static_cast<double>(element<A>(args.log_decay, batch, 0, state_head))));
  A* state = static_cast<A*>(args.kv.data) + batch * args.kv.stride[0] + state_head * args.kv.stride[1];
  const i64 down = args.kv.stride[2], across = args.kv.stride[3];
  for (i64 r = 0; r < heads; ++r) {
    load_rows(args.q, tokens, first_head + r, 0, s.key_dim, q, s.key_dim);
    scale_row(s.key_dim, static_cast<A>(args.scale), q);
    fill_zero(s.value_dim, o);
    A denominator = 0;
    for (i64 d = 0; d < s.key_dim; ++d) {
      A* line = state + d * down;
      if (across == 1) {
        if (r == 0) {
          for (i64 e = 0; e < s.value_dim; ++e) line[e] = decay * line[e] + k[d] * v[e];
        }
        add_scaled(s.value_dim, q[d], line, o);
      } else {
        if (r == 0) {
          for (i64 e = 0; e < s.value_dim; ++e) line[e * across] = decay * line[e * across] + k[d] * v[e];
        }
        load_row(row, line, across, s.value_dim);
        add_scaled(s.value_dim, q[d], row, o);
      }
      if (args.z) {
        A& z = element<A>(args.z, batch, state_head, d);
        if (r == 0) z = decay * z + k[d];
        denominator += q[d] * z;
      }
    }
    if (s.normalize) scale_row(s.value_dim, 1 / (denominator + static_cast<A>(args.eps)), o);
    store_rows(args.o, tokens, first_head + r, 0, s.value_dim, o, s.value_dim);
  }
}

template <class Pass>
Pass pass_in(const Plan& plan, void* lane) {
  Arena arena{static_cast<char*>(lane)};
  return Pass(plan, arena);
}

template <class Pass>
std::size_t bytes_of(const Plan& plan) {
  Arena arena{nullptr};
  Pass pass(plan, arena);
  return arena.used;
}

}  // namespace

std::size_t forward_lane_bytes(const Plan& plan) {
  return plan.sizes.double_precision ? bytes_of<Forward<double>>(plan) : bytes_of<Forward<float>>(plan);
}

std::size_t backward_lane_bytes(const Plan& plan) {
  return plan.sizes.double_precision
             ? std::max(bytes_of<BackwardQuery<double>>(plan), bytes_of<BackwardKey<double>>(plan))
             : std::max(bytes_of<BackwardQuery<float>>(plan), bytes_of<BackwardKey<float>>(plan));
}

void forward_task(const Plan& plan, const Inputs& in, const ForwardOutputs& out, std::int64_t task, void* lane) {
  if (plan.sizes.double_precision) {
    pass_in<Forward<double>>(plan, lane).run(plan, in, out, task);
  } else {
    pass_in<Forward<float>>(plan, lane).run(plan, in, out, task);
  }
}

void backward_query_task(const Plan& plan, const Inputs& in, const BackwardArguments& args, const Shared& shared,
                         std::int64_t task, void* lane) {
  if (plan.sizes.double_precision) {
    pass_in<BackwardQuery<double>>(plan, lane).run(plan, in, args, shared, task);
  } else {
    pass_in<BackwardQuery<float>>(plan, lane).run(plan, in, args, shared, task);
  }
}

void backward_key_task(const Plan& plan, const Inputs& in, const BackwardArguments& args, const Shared& shared,
                       std::int64_t task, void* lane) {
  if (plan.sizes.double_precision) {
    pass_in<BackwardKey<double>>(plan, lane).run(plan, in, args, shared, task);
  } else {
    pass_in<BackwardKey<float>>(plan, lane).run(plan, in, args, shared, task);
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
