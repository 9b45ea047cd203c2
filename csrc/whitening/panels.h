#pragma once
// Cholesky factors of matrices that fit the caches, compiled once for each instruction set.

#include <cstdint>

#include "whitening/matrix.h"

namespace freqrank::whitening {

// One matrix as a factorisation reads it: its upper triangle, scaled and with its diagonal raised.
template <class In>
struct Source {
  const In* data;
  std::int64_t row_stride, column_stride;
  double scale = 1, damping = 0, mean = 0;
};

struct Outcome {
  std::int64_t minor = 0;     // the order of the leading minor that failed, or 0
  bool not_a_number = false;  // its pivot was NaN, which no damping cures
};

// What is solved with the factors while they lie in their panels, x of A x = b: an entry of `b` and `x` for each
// matrix, and their strides. No columns: nothing.
template <class T>
struct RightSides {
  const T* const* b;
  T* const* x;
  std::int64_t columns = 0;
  std::int64_t b_row = 0, b_column = 0, x_row = 0, x_column = 0;
};

// Larger matrices than these, side by side, are too many for the caches.
constexpr std::int64_t kLanesFit = 64;

// At most this many numbers of one kind make a vector, on any instruction set.
static constexpr std::int64_t lanes_of(Dtype dtype) { return 64 / bytes_of(dtype); }

// Bytes of the panels of factor_lanes and of factor_columns: columns in panels of at most `width` whose rows reach to
// the last diagonal element.
static constexpr std::int64_t panel_elements(std::int64_t n, std::int64_t width) {
  return (n + width - 1) * (n + 2 * width - 1) / 2;
}
static constexpr std::int64_t lanes_bytes(std::int64_t n) { return 64 * panel_elements(n, 4); }
static constexpr std::int64_t columns_bytes(std::int64_t n, Dtype dtype) {
  return round_up(panel_elements(n, 3 * lanes_of(dtype)) * bytes_of(dtype), 64);
}
// What either needs besides for right-hand sides: rows of as many columns as a vector has lanes, or of three vectors,
// and the inverses of the diagonal.
static constexpr std::int64_t sides_bytes(std::int64_t n, Dtype dtype, bool lanes) {
  return round_up(n, 8) * 64 * (lanes ? lanes_of(dtype) + 1 : 4);
}

// factor_lanes: factors of `count` matrices with the strides of the first, at most lanes_of() of them.
// factor_columns: of one. Both give the same bits. A factor is row-major and upper triangular with zeros below; where
// the minor of order m fails, its leading m - 1 rows and columns are those of the leading minor's factor, and the rest
// of its upper triangle is arbitrary, as is its x. `panels` is aligned to 64 bytes; right-hand sides have their room
// after them.
#define FREQRANK_WHITENING_PANELS(In, T)                                                                           \
  void factor_lanes(const Source<In>* a, std::int64_t count, std::int64_t n, T* const* factors, Outcome* outcomes, \
                    const RightSides<T>& sides, T* panels);                                                        \
  Outcome factor_columns(const Source<In>& a, std::int64_t n, T* factor, const RightSides<T>& sides, T* panels);
#define FREQRANK_WHITENING_ALL_PANELS       \
  FREQRANK_WHITENING_PANELS(float, float)   \
  FREQRANK_WHITENING_PANELS(double, double) \
  FREQRANK_WHITENING_PANELS(float, double)

namespace baseline {
FREQRANK_WHITENING_ALL_PANELS
}
namespace avx2 {
FREQRANK_WHITENING_ALL_PANELS
}
namespace avx512 {
FREQRANK_WHITENING_ALL_PANELS
}

}  // namespace freqrank::whitening
