// Compiled once for each instruction set. Only what has internal linkage may be used here besides the three entry
// points: an inline function shared with other files could otherwise reach a machine without these instructions.
#include "whitening/kernels.h"

#include "common/half.h"
#include "whitening/simd.h"

namespace freqrank::whitening::FREQRANK_ISA {

namespace {

#if FREQRANK_ISA_avx512
constexpr int kRows = 8;
#else
constexpr int kRows = 4;
#endif
constexpr int kVectors = 3;  // kRows * kVectors accumulators, kVectors columns and a row value fill the register file

template <class T>
constexpr int kColumns = kVectors * kWidth<T>;

static_assert(kRowPadding % kRows == 0 && kColumnPadding % kColumns<float> == 0 &&
                  kColumnPadding % kColumns<double> == 0 && kTile % kRowPadding == 0 && kTile % kColumnPadding == 0,
              "tiles must be whole numbers of micro tiles");

// --- packing ---------------------------------------------------------------------------------------------------------

template <class In, class T>
void convert(const In* from, std::int64_t stride, std::int64_t count, T* to) {
  std::int64_t i = 0;
  if (stride == 1) {
#if FREQRANK_ISA_avx2 || FREQRANK_ISA_avx512
    if constexpr (__is_same(In, float16)) {
      for (; i + 8 <= count; i += 8) {
        float wide[8];
        _mm256_storeu_ps(wide, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i))));
        for (int l = 0; l < 8; ++l) to[i + l] = static_cast<T>(wide[l]);
      }
    }
#endif
    for (; i < count; ++i) to[i] = static_cast<T>(to_float(from[i]));
  } else {
    for (; i < count; ++i) to[i] = static_cast<T>(to_float(from[i * stride]));
  }
}

// packed[panel][t][lane]: `Lanes` lanes to a panel, zero beyond `lanes`.
template <int Lanes, class In, class T>
void pack(const Operand& operand, const double* weight, std::int64_t weight_stride, T sign, std::int64_t begin,
          std::int64_t depth, std::int64_t lanes, T* packed) {
  const In* from = static_cast<const In*>(operand.data) + begin * operand.depth_stride;
  const std::int64_t padded = round_up(lanes, Lanes);
  T row[kTile];
  if (operand.depth_stride == 1 && operand.lane_stride != 1) {
    T factors[kDepth];
    for (std::int64_t t = 0; t < depth; ++t)
      factors[t] = weight ? sign * static_cast<T>(weight[(begin + t) * weight_stride]) : sign;
    for (std::int64_t l = 0; l < padded; ++l) {
      T* to = packed + l / Lanes * Lanes * depth + l % Lanes;
      if (l < lanes) {
        convert(from + l * operand.lane_stride, 1, depth, row);
        for (std::int64_t t = 0; t < depth; ++t) to[t * Lanes] = factors[t] * row[t];
      } else {
        for (std::int64_t t = 0; t < depth; ++t) to[t * Lanes] = 0;
      }
    }
    return;
  }
  for (std::int64_t l = lanes; l < padded; ++l) row[l] = 0;
  for (std::int64_t t = 0; t < depth; ++t) {
    const T factor = weight ? sign * static_cast<T>(weight[(begin + t) * weight_stride]) : sign;
    convert(from + t * operand.depth_stride, operand.lane_stride, lanes, row);
    for (std::int64_t l = 0; l < padded; l += Lanes) {
      T* to = packed + l * depth + t * Lanes;
      for (int i = 0; i < Lanes; ++i) to[i] = factor * row[l + i];
    }
  }
}

template <int Lanes, class T>
void pack_any(const Operand& operand, const double* weight, std::int64_t weight_stride, T sign, std::int64_t begin,
              std::int64_t depth, std::int64_t lanes, T* packed) {
  const auto from = [&](auto type) {
    pack<Lanes, decltype(type)>(operand, weight, weight_stride, sign, begin, depth, lanes, packed);
  };
  if constexpr (sizeof(T) == 4) {
    from(float());  // in single precision there are only factorisations, which do not convert
  } else {
    switch (operand.dtype) {
      case Dtype::float16: return from(float16());
      case Dtype::bfloat16: return from(bfloat16());
      case Dtype::float32: return from(float());
      case Dtype::float64: return from(double());
    }
  }
}

// --- product ---------------------------------------------------------------------------------------------------------

// V vectors of columns, from packed rows of kVectors.
template <int V, class T>
void micro_tile(const T* x, const T* y, std::int64_t depth, T* tile, std::int64_t ld) {
  Vector<T> sum[kRows][V] = {};
  for (std::int64_t t = 0; t < depth; ++t, x += kRows, y += kColumns<T>) {
    Vector<T> column[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) column[v] = load(y + v * kWidth<T>);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) sum[r][v] += x[r] * column[v];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      T* to = tile + r * ld + v * kWidth<T>;
      store(to, load(to) + sum[r][v]);
    }
  }
}

template <int V, class T>
void micro_tile_of(std::int64_t vectors, const T* x, const T* y, std::int64_t depth, T* tile, std::int64_t ld) {
  if constexpr (V > 1) {
    if (vectors < V) return micro_tile_of<V - 1>(vectors, x, y, depth, tile, ld);
  }
  micro_tile<V>(x, y, depth, tile, ld);
}

template <class T>
void product_of(const Product& p, T sign, T* tile, std::int64_t ld, T* packed) {
  T* packed_y = packed + kDepth * round_up(p.rows, kRowPadding);
  for (std::int64_t begin = 0; begin < p.depth; begin += kDepth) {
    const std::int64_t depth = p.depth - begin < kDepth ? p.depth - begin : kDepth;
    pack_any<kRows>(p.x, p.weight, p.weight_stride, sign, begin, depth, p.rows, packed);
    pack_any<kColumns<T>>(p.y, nullptr, 0, T(1), begin, depth, p.columns, packed_y);
    for (std::int64_t j = 0; j < p.columns; j += kColumns<T>) {
      const std::int64_t columns = p.columns - j < kColumns<T> ? p.columns - j : kColumns<T>;
      for (std::int64_t i = 0; i < p.rows; i += kRows) {
        const std::int64_t below = p.upper_only && i > j ? (i - j) / kWidth<T> * kWidth<T> : 0;
        if (below >= columns) break;
        micro_tile_of<kVectors>(ceil_div(columns - below, kWidth<T>), packed + i * depth, packed_y + j * depth + below,
                                depth, tile + i * ld + j + below, ld);
      }
    }
  }
}

// --- triangles -------------------------------------------------------------------------------------------------------

// x[c..] -= sum over p < count of u[p * ldu] * rows[p * ld + c..], for V vectors of columns.
template <int V, class T>
inline void subtract_rows(T* x, const T* u, std::int64_t ldu, const T* rows, std::int64_t ld, std::int64_t count) {
  Vector<T> sum[V];
#pragma GCC unroll 8
  for (int v = 0; v < V; ++v) sum[v] = load(x + v * kWidth<T>);
  for (std::int64_t p = 0; p < count; ++p) {
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) sum[v] -= u[p * ldu] * load(rows + p * ld + v * kWidth<T>);
  }
#pragma GCC unroll 8
  for (int v = 0; v < V; ++v) store(x + v * kWidth<T>, sum[v]);
}

template <class T>
std::int64_t factor_of(T* u, std::int64_t rows, std::int64_t ld) {
  constexpr int group = kColumns<T>;
  const std::int64_t padded = round_up(rows, group);
  for (std::int64_t j = 0; j < rows; ++j) {
    T* row = u + j * ld;
    std::int64_t c = j / group * group;
    for (; c + 2 * group <= padded; c += 2 * group) subtract_rows<2 * kVectors>(row + c, u + j, ld, u + c, ld, j);
    if (c < padded) subtract_rows<kVectors>(row + c, u + j, ld, u + c, ld, j);
    const T pivot = row[j];
    if (!(pivot > 0)) return j + 1;
    const T diagonal = root(pivot);
    row[j] = diagonal;
    for (c = j + 1; c < rows; ++c) row[c] /= diagonal;
  }
  return 0;
}

template <int V, class T>
inline void solve_columns(const T* u, std::int64_t ldu, T* x, std::int64_t rows, std::int64_t ldx) {
  for (std::int64_t i = 0; i < rows; ++i) {
    T* row = x + i * ldx;
    subtract_rows<V>(row, u + i, ldu, x, ldx, i);
    const T diagonal = u[i * ldu + i];
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) store(row + v * kWidth<T>, load(row + v * kWidth<T>) / diagonal);
  }
}

template <class T>
void solve_of(const T* u, std::int64_t ldu, T* x, std::int64_t rows, std::int64_t columns, std::int64_t ldx) {
  constexpr int group = kColumns<T>;
  const std::int64_t padded = round_up(columns, group);
  std::int64_t c = 0;
  for (; c + 2 * group <= padded; c += 2 * group) solve_columns<2 * kVectors>(u, ldu, x + c, rows, ldx);
  if (c < padded) solve_columns<kVectors>(u, ldu, x + c, rows, ldx);
}

}  // namespace

void product(const Product& p, double sign, double* tile, std::int64_t ld, double* packed) {
  product_of(p, sign, tile, ld, packed);
}
void product(const Product& p, float sign, float* tile, std::int64_t ld, float* packed) {
  product_of(p, sign, tile, ld, packed);
}
std::int64_t factor(double* u, std::int64_t rows, std::int64_t ld) { return factor_of(u, rows, ld); }
std::int64_t factor(float* u, std::int64_t rows, std::int64_t ld) { return factor_of(u, rows, ld); }
void solve(const double* u, std::int64_t ldu, double* x, std::int64_t rows, std::int64_t columns, std::int64_t ldx) {
  solve_of(u, ldu, x, rows, columns, ldx);
}
void solve(const float* u, std::int64_t ldu, float* x, std::int64_t rows, std::int64_t columns, std::int64_t ldx) {
  solve_of(u, ldu, x, rows, columns, ldx);
}

}  // namespace freqrank::whitening::FREQRANK_ISA
