// Compiled once for each instruction set. Cholesky factors of matrices that fit the caches: several side by side, one
// in each lane of a vector, or one alone, with its columns in the lanes. Both are one algorithm on other elements, and
// make an element of the factor by the same chain of operations: they give the same bits.
#include "whitening/panels.h"

#include "common/isa.h"
#include "common/transpose.h"
#include "whitening/simd.h"

namespace freqrank::whitening::FREQRANK_ISA {

namespace {

// The upper triangle lies in panels of a few columns. A panel holds its rows from 0 to its last diagonal element, one
// after the other, each `vectors` vectors long. An element takes `step` numbers: one of each matrix, or just one. The
// register file has room for rows x vectors sums, a row of a panel and an element.
template <class T>
struct Lanes {
  using Number = T;
  using Element = Vector<T>;
  using Flags = typename IntegersOf<Element>::type;
  static constexpr int rows = kVectorBytes == 64 ? 4 : 3, vectors = rows, step = kWidth<T>;
};
template <class T>
struct Columns {
  using Number = T;
  using Element = T;
  using Flags = typename IntegersOf<Vector<T>>::Integer;
  static constexpr int rows = kVectorBytes == 64 ? 8 : 4, vectors = kVectorBytes == 16 ? 2 : 3, step = 1;
};

template <class L>
constexpr int kRowLength = L::vectors * kWidth<typename L::Number>;  // numbers in a row of a panel
template <class L>
constexpr int kPanelColumns = kRowLength<L> / L::step;

template <class L>
constexpr std::int64_t panel_begin(std::int64_t panel) {
  return std::int64_t{kPanelColumns<L>} * kRowLength<L> * (panel * (panel + 1) / 2);
}

template <class L>
std::int64_t place(std::int64_t i, std::int64_t j) {
  return panel_begin<L>(j / kPanelColumns<L>) + i * kRowLength<L> + j % kPanelColumns<L> * L::step;
}

template <class L>
typename L::Element element(const typename L::Number* p) {
  typename L::Element e;
  __builtin_memcpy(&e, p, sizeof e);
  return e;
}

template <class L>
typename L::Element root_of(typename L::Element x) {
  typename L::Number each[sizeof x / sizeof(typename L::Number)];
  __builtin_memcpy(each, &x, sizeof x);
  for (auto& one : each) one = root(one);
  return element<L>(each);
}

// All bits set where x > 0, where x is NaN.
template <class F, class E>
F positive(E x) {
  if constexpr (sizeof(E) > sizeof(double)) {
    return (F)(x > 0);
  } else {
    return -static_cast<F>(x > 0);
  }
}
template <class F, class E>
F not_a_number(E x) {
  if constexpr (sizeof(E) > sizeof(double)) {
    return (F)(x != x);
  } else {
    return -static_cast<F>(x != x);
  }
}

// How far each matrix has come.
template <class L>
struct Progress {
  using Flags = typename L::Flags;
  using Integer = typename IntegersOf<Vector<typename L::Number>>::Integer;
  static constexpr int lanes = sizeof(Flags) / sizeof(Integer);

  Flags sound = Flags{} - 1;  // all pivots so far were positive
  Flags order = Flags{};      // how many were, before one was not
  Flags nan = Flags{};        // the one that was not positive was NaN

  void pivot(typename L::Element x) {
    const Flags good = positive<Flags>(x);
    nan |= sound & ~good & not_a_number<Flags>(x);
    sound &= good;
    order -= sound;
  }
  bool any_sound() const {
    Integer each[lanes], any = 0;
    __builtin_memcpy(each, &sound, sizeof sound);
    for (const auto one : each) any |= one;
    return any != 0;
  }
  Outcome outcome(int lane, std::int64_t n) const {
    Integer orders[lanes], nans[lanes];
    __builtin_memcpy(orders, &order, sizeof order);
    __builtin_memcpy(nans, &nan, sizeof nan);
    return {orders[lane] == n ? 0 : orders[lane] + 1, nans[lane] != 0};
  }
};

// A block on the diagonal, factored: its upper triangle, and the inverse of its diagonal.
template <class L>
struct Triangle {
  typename L::Element u[L::rows][L::rows], inverse[L::rows];
};

template <class L>
void factor_triangle(const typename L::Number* from, std::int64_t rows, Triangle<L>& t, Progress<L>& progress) {
  using Element = typename L::Element;
  for (int r = 0; r < L::rows; ++r) {
    for (int c = r; c < L::rows; ++c) t.u[r][c] = element<L>(from + r * kRowLength<L> + c * L::step);
    t.inverse[r] = Element{} + 1;
  }
  for (int r = 0; r < rows; ++r) {
    progress.pivot(t.u[r][r]);
    t.u[r][r] = root_of<L>(t.u[r][r]);
    t.inverse[r] = 1 / t.u[r][r];
    for (int c = r + 1; c < L::rows; ++c) t.u[r][c] *= t.inverse[r];
    for (int q = r + 1; q < L::rows; ++q) {
      for (int c = q; c < L::rows; ++c) t.u[q][c] -= t.u[r][q] * t.u[r][c];
    }
  }
}

// A tile of C vectors: sum[r][c] -= sum over p < depth of x[p, r] y[p, c], in the order of p.
template <class L, int C, class T>
FREQRANK_INLINE void subtract_product(const T* x, const T* y, std::int64_t depth, Vector<T> (&sum)[L::rows][C]) {
  for (std::int64_t p = 0; p < depth; ++p, x += kRowLength<L>, y += kRowLength<L>) {
    Vector<T> column[C];
    FREQRANK_UNROLL
    for (int c = 0; c < C; ++c) column[c] = load(y + c * kWidth<T>);
    FREQRANK_UNROLL
    for (int r = 0; r < L::rows; ++r) {
      const auto left = element<L>(x + r * L::step);
      FREQRANK_UNROLL
      for (int c = 0; c < C; ++c) sum[r][c] -= left * column[c];
    }
  }
}

// sum becomes u^-T sum.
template <class L, int C>
FREQRANK_INLINE void solve_triangle(const Triangle<L>& t, Vector<typename L::Number> (&sum)[L::rows][C]) {
  FREQRANK_UNROLL
  for (int r = 0; r < L::rows; ++r) {
    FREQRANK_UNROLL
    for (int s = 0; s < r; ++s) {
      FREQRANK_UNROLL
      for (int c = 0; c < C; ++c) sum[r][c] -= t.u[s][r] * sum[s][c];
    }
    FREQRANK_UNROLL
    for (int c = 0; c < C; ++c) sum[r][c] *= t.inverse[r];
  }
}

template <class L, int C, class T>
FREQRANK_INLINE void load_tile(const T* from, Vector<T> (&sum)[L::rows][C]) {
  FREQRANK_UNROLL
  for (int r = 0; r < L::rows; ++r) {
    FREQRANK_UNROLL
    for (int c = 0; c < C; ++c) sum[r][c] = load(from + r * kRowLength<L> + c * kWidth<T>);
  }
}

template <class L, int C, class T>
FREQRANK_INLINE void store_tile(const Vector<T> (&sum)[L::rows][C], T* to) {
  FREQRANK_UNROLL
  for (int r = 0; r < L::rows; ++r) {
    FREQRANK_UNROLL
    for (int c = 0; c < C; ++c) store(to + r * kRowLength<L> + c * kWidth<T>, sum[r][c]);
  }
}

// Rows i, i + 1, ... of the C vectors of columns that start at y, whose rows before are done. x: the columns i, i + 1,
// ... from row 0 on. If these columns hold the block on the diagonal, at `diagonal`, it is factored first.
template <class L, int C, class T>
void finish_tile(const T* x, T* y, std::int64_t i, T* diagonal, std::int64_t rows, Triangle<L>& t,
                 Progress<L>& progress) {
  Vector<T> sum[L::rows][C];
  T* const to = y + i * kRowLength<L>;
  load_tile<L, C>(to, sum);
  subtract_product<L, C>(x, y, i, sum);
  if (diagonal) {
    store_tile<L, C>(sum, to);
    factor_triangle(diagonal, rows, t, progress);
    load_tile<L, C>(to, sum);
  }
  solve_triangle<L, C>(t, sum);
  store_tile<L, C>(sum, to);
  if (diagonal) {
    for (int r = 0; r < L::rows; ++r) {
      __builtin_memcpy(diagonal + r * (kRowLength<L> + L::step), &t.u[r][r], sizeof t.u[r][r]);
    }
  }
}

template <class L, int C, class T>
void finish_tile_of(std::int64_t vectors, const T* x, T* y, std::int64_t i, T* diagonal, std::int64_t rows,
                    Triangle<L>& t, Progress<L>& progress) {
  if constexpr (C > 1) {
    if (vectors < C) return finish_tile_of<L, C - 1>(vectors, x, y, i, diagonal, rows, t, progress);
  }
  finish_tile<L, C>(x, y, i, diagonal, rows, t, progress);
}

template <class L, class T>
Progress<L> factor_panels(T* panels, std::int64_t n) {
  constexpr int columns = kPanelColumns<L>;
  static_assert(columns % L::rows == 0, "a block on the diagonal must lie in one panel");
  Progress<L> progress;
  Triangle<L> t;
  for (std::int64_t i = 0; i < n && progress.any_sound(); i += L::rows) {
    T* const x = panels + place<L>(0, i);
    T* diagonal = x + i * kRowLength<L>;
    std::int64_t first = i % columns * L::step / kWidth<T>;  // the vector that the diagonal begins in
    for (std::int64_t j = i / columns * columns; j < n; j += columns, first = 0, diagonal = nullptr) {
      const std::int64_t numbers = (n - j < columns ? n - j : columns) * L::step;
      T* const y = panels + place<L>(0, j) + first * kWidth<T>;
      finish_tile_of<L, L::vectors>(ceil_div(numbers, kWidth<T>) - first, x, y, i, diagonal,
                                    n - i < L::rows ? n - i : L::rows, t, progress);
    }
  }
  return progress;
}

// --- in and out ------------------------------------------------------------------------------------------------------

template <class T, class In>
Vector<T> widened(const In* from) {
  if constexpr (sizeof(T) == sizeof(In)) {
    return load(from);
  } else {
    Vector<T> v;
    for (int l = 0; l < kWidth<T>; ++l) v[l] = static_cast<T>(from[l]);
    return v;
  }
}

// put(f, the numbers at f of all sequences) for begin <= f < end, of sequences of `length` numbers `stride` apart.
template <class T, class In, class Put>
void gather(const In* const* sequences, std::int64_t stride, std::int64_t length, std::int64_t begin, std::int64_t end,
            const Put& put) {
  constexpr int W = kWidth<T>;
  if (stride != 1 || length < W) {
    for (std::int64_t f = begin; f < end; ++f) {
      T each[W];
      for (int l = 0; l < W; ++l) each[l] = static_cast<T>(sequences[l][f * stride]);
      put(f, load(each));
    }
    return;
  }
  for (std::int64_t f = begin; f < end; f += W) {
    const std::int64_t start = f + W <= length ? f : length - W;
    Vector<T> square[W];
    FREQRANK_UNROLL
    for (int l = 0; l < W; ++l) square[l] = widened<T>(sequences[l] + start);
    transpose(square);
    if (start == f && f + W <= end) {
      FREQRANK_UNROLL
      for (int k = 0; k < W; ++k) put(f + k, square[k]);
    } else {
      T each[W][W];
      FREQRANK_UNROLL
      for (int k = 0; k < W; ++k) store<T>(each[k], square[k]);
      for (std::int64_t k = f - start; k < W && start + k < end; ++k) put(start + k, load<T>(each[k]));
    }
  }
}

// Beyond the last column there are zeros.
template <class L, class T>
void clear_last_panel(T* panels, std::int64_t n) {
  constexpr int columns = kPanelColumns<L>;
  if (n % columns == 0) return;
  __builtin_memset(panels + panel_begin<L>(n / columns), 0,
                   static_cast<std::size_t>(round_up(n, L::rows)) * kRowLength<L> * sizeof(T));
}

template <class T>
T damped(T x, double damping, double mean) {
  return damping == 0 ? x : x + static_cast<T>(damping * (x != 0 ? static_cast<double>(x) : mean));
}

// place() of matrices side by side, from a table: they are read and written in so many pieces that it would be felt.
template <class L>
struct Places {
  std::int64_t columns[kLanesFit];
  explicit Places(std::int64_t n) {
    for (std::int64_t j = 0; j < n; ++j) columns[j] = place<L>(0, j);
  }
  std::int64_t operator()(std::int64_t i, std::int64_t j) const { return columns[j] + i * kRowLength<L>; }
};

template <class T, class In>
void read_lanes(const Source<In>* a, std::int64_t count, std::int64_t n, const Places<Lanes<T>>& place_of, T* panels) {
  using L = Lanes<T>;
  constexpr int W = kWidth<T>;
  const Source<In>* source[W];
  const In* sequences[W];
  T scales[W];
  for (int l = 0; l < W; ++l) {  // lanes without a matrix repeat the first
    source[l] = a + (l < count ? l : 0);
    scales[l] = static_cast<T>(source[l]->scale);
  }
  const Vector<T> scale = load(scales);
  clear_last_panel<L>(panels, n);
  const std::int64_t row_stride = a->row_stride, column_stride = a->column_stride;
  if (row_stride == 1 && column_stride != 1) {
    for (std::int64_t j = 0; j < n; ++j) {
      for (int l = 0; l < W; ++l) sequences[l] = source[l]->data + j * column_stride;
      T* const to = panels + place_of(0, j);
      gather<T>(sequences, 1, n, 0, j + 1,
                [&](std::int64_t i, Vector<T> x) { store(to + i * kRowLength<L>, x * scale); });
    }
  } else {
    for (std::int64_t i = 0; i < n; ++i) {
      for (int l = 0; l < W; ++l) sequences[l] = source[l]->data + i * row_stride;
      gather<T>(sequences, column_stride, n, i, n,
                [&](std::int64_t j, Vector<T> x) { store(panels + place_of(i, j), x * scale); });
    }
  }
  for (std::int64_t l = 0; l < count; ++l) {
    if (a[l].damping == 0) continue;
    for (std::int64_t i = 0; i < n; ++i) {
      T& x = panels[place_of(i, i) + l];
      x = damped(x, a[l].damping, a[l].mean);
    }
  }
}

// Rows of the factors, zeros before the diagonal.
template <class T>
void write_lanes(const T* panels, std::int64_t count, std::int64_t n, const Places<Lanes<T>>& place_of,
                 T* const* factors) {
  constexpr int W = kWidth<T>;
  for (std::int64_t i = 0; i < n; ++i) {
    if (n < W) {
      for (std::int64_t j = 0; j < n; ++j) {
        for (std::int64_t l = 0; l < count; ++l) factors[l][i * n + j] = j < i ? T(0) : panels[place_of(i, j) + l];
      }
      continue;
    }
    for (std::int64_t j = 0; j < n; j += W) {
      const std::int64_t start = j + W <= n ? j : n - W;
      if (start + W <= i) {
        for (std::int64_t l = 0; l < count; ++l) store(factors[l] + i * n + start, Vector<T>{});
        continue;
      }
      Vector<T> square[W];
      FREQRANK_UNROLL
      for (int k = 0; k < W; ++k) {
        square[k] = start + k < i ? Vector<T>{} : load(panels + place_of(i, start + k));
      }
      transpose(square);
      if (count == W) {
        FREQRANK_UNROLL
        for (int l = 0; l < W; ++l) store(factors[l] + i * n + start, square[l]);
      } else {
        for (std::int64_t l = 0; l < count; ++l) store(factors[l] + i * n + start, square[l]);
      }
    }
  }
}

template <class T, class In>
void read_columns(const Source<In>& a, std::int64_t n, T* panels) {
  using L = Columns<T>;
  constexpr int W = kWidth<T>;
  const T scale = static_cast<T>(a.scale);
  clear_last_panel<L>(panels, n);
  for (std::int64_t j = 0; j < n; j += W) {
    const std::int64_t rows = j + W < n ? j + W : n;
    T* const to = panels + place<L>(0, j);
    const auto put = [&](std::int64_t i, Vector<T> x) { store(to + i * kRowLength<L>, x * scale); };
    if (a.column_stride == 1 && j + W <= n) {
      for (std::int64_t i = 0; i < rows; ++i) put(i, widened<T>(a.data + i * a.row_stride + j));
    } else {
      const In* sequences[W];
      for (int l = 0; l < W; ++l) sequences[l] = a.data + (j + l < n ? j + l : n - 1) * a.column_stride;
      gather<T>(sequences, a.row_stride, n, 0, rows, put);
    }
  }
  for (std::int64_t i = 0; i < n && a.damping != 0; ++i) {
    T& x = panels[place<L>(i, i)];
    x = damped(x, a.damping, a.mean);
  }
}

template <class T>
void write_columns(const T* panels, std::int64_t n, T* factor) {
  using L = Columns<T>;
  constexpr int columns = kPanelColumns<L>;
  for (std::int64_t i = 0; i < n; ++i) {
    T* const row = factor + i * n;
    __builtin_memset(row, 0, static_cast<std::size_t>(i) * sizeof(T));
    for (std::int64_t j = i; j < n;) {
      const std::int64_t next = j / columns * columns + columns, end = next < n ? next : n;
      __builtin_memcpy(row + j, panels + place<L>(i, j), static_cast<std::size_t>(end - j) * sizeof(T));
      j = end;
    }
  }
}

// --- right-hand sides ------------------------------------------------------------------------------------------------

// Panels of right-hand sides have the rows of the factor's, all of them, and lie behind the inverses of its diagonal.
template <class L>
struct Sides {
  using T = typename L::Number;
  static constexpr int panels = (kWidth<T> + kPanelColumns<L> - 1) / kPanelColumns<L>;  // at a time
  static constexpr std::int64_t columns = (L::step > 1 ? panels : 1) * kPanelColumns<L>;
  std::int64_t rows;
  T *inverse, *at;

  Sides(std::int64_t n, T* space) : rows(round_up(n, L::rows)), inverse(space), at(space + rows * L::step) {}
  T* panel(std::int64_t column) const { return at + column / kPanelColumns<L> * rows * kRowLength<L>; }
  T* place(std::int64_t i, std::int64_t column) const {
    return panel(column) + i * kRowLength<L> + column % kPanelColumns<L> * L::step;
  }
};

template <class L, class T>
void invert_diagonal(const T* panels, std::int64_t n, const Sides<L>& sides) {
  for (std::int64_t i = 0; i < sides.rows; ++i) {
    const typename L::Element one = typename L::Element{} + 1;
    const auto inverse = i < n ? one / element<L>(panels + place<L>(i, i)) : one;
    __builtin_memcpy(sides.inverse + i * L::step, &inverse, sizeof inverse);
  }
}

// Beyond the last column, where panels hold anything, the identity.
template <class L, class T>
FREQRANK_INLINE Triangle<L> load_triangle(const T* panels, std::int64_t n, std::int64_t i, const T* inverse) {
  Triangle<L> t;
  const T* const from = panels + place<L>(i, i);
  for (int r = 0; r < L::rows; ++r) {
    for (int c = r + 1; c < L::rows; ++c) {
      t.u[r][c] = i + c < n ? element<L>(from + r * kRowLength<L> + c * L::step) : typename L::Element{};
    }
    t.inverse[r] = element<L>(inverse + (i + r) * L::step);
  }
  return t;
}

// Rows i, i + 1, ... of U^T Y = B, those before being Y's. x: the columns i, i + 1, ... of U from row 0 on.
template <class L, int C, class T>
void solve_down(const T* x, T* y, std::int64_t i, const Triangle<L>& t) {
  Vector<T> sum[L::rows][C];
  T* const to = y + i * kRowLength<L>;
  load_tile<L, C>(to, sum);
  subtract_product<L, C>(x, y, i, sum);
  solve_triangle<L, C>(t, sum);
  store_tile<L, C>(sum, to);
}

// Rows i, i + 1, ... of U X = Y, those after being X's.
template <class L, int C, class T>
void solve_up(const T* panels, std::int64_t n, T* y, std::int64_t i, const Triangle<L>& t) {
  constexpr int columns = kPanelColumns<L>;
  Vector<T> sum[L::rows][C];
  T* const to = y + i * kRowLength<L>;
  load_tile<L, C>(to, sum);
  for (std::int64_t end = n; end > i + L::rows;) {  // from the last on: the same chain for blocks of any size
    const std::int64_t begin = (end - 1) / columns * columns, first = begin > i + L::rows ? begin : i + L::rows;
    const T* u = panels + place<L>(i, end - 1);
    for (std::int64_t j = end - 1; j >= first; --j, u -= L::step) {
      Vector<T> row[C];
      FREQRANK_UNROLL
      for (int c = 0; c < C; ++c) row[c] = load(y + j * kRowLength<L> + c * kWidth<T>);
      FREQRANK_UNROLL
      for (int r = 0; r < L::rows; ++r) {
        const auto left = element<L>(u + r * kRowLength<L>);
        FREQRANK_UNROLL
        for (int c = 0; c < C; ++c) sum[r][c] -= left * row[c];
      }
    }
    end = first;
  }
  FREQRANK_UNROLL
  for (int r = L::rows - 1; r >= 0; --r) {
    FREQRANK_UNROLL
    for (int s = L::rows - 1; s > r; --s) {
      FREQRANK_UNROLL
      for (int c = 0; c < C; ++c) sum[r][c] -= t.u[r][s] * sum[s][c];
    }
    FREQRANK_UNROLL
    for (int c = 0; c < C; ++c) sum[r][c] *= t.inverse[r];
  }
  store_tile<L, C>(sum, to);
}

// The C vectors that a panel's columns take.
template <class L, int C, class T>
void solve_panel(std::int64_t vectors, const T* panels, std::int64_t n, T* y, const T* inverse) {
  if constexpr (C > 1) {
    if (vectors < C) return solve_panel<L, C - 1>(vectors, panels, n, y, inverse);
  }
  for (std::int64_t i = 0; i < n; i += L::rows) {
    solve_down<L, C>(panels + place<L>(0, i), y, i, load_triangle<L>(panels, n, i, inverse));
  }
  for (std::int64_t i = round_up(n, L::rows) - L::rows; i >= 0; i -= L::rows) {
    solve_up<L, C>(panels, n, y, i, load_triangle<L>(panels, n, i, inverse));
  }
}

// Read and write some columns, from `first` on.
template <class T>
void read_sides(const RightSides<T>& from, std::int64_t count, std::int64_t n, std::int64_t first, std::int64_t columns,
                const Sides<Lanes<T>>& to) {
  constexpr int W = kWidth<T>;
  const T* sequences[W];
  if (from.b_row == 1 || columns == 1) {
    for (std::int64_t j = 0; j < columns; ++j) {
      for (int l = 0; l < W; ++l) sequences[l] = from.b[l < count ? l : 0] + (first + j) * from.b_column;
      gather<T>(sequences, from.b_row, n, 0, n, [&](std::int64_t i, Vector<T> x) { store(to.place(i, j), x); });
    }
    return;
  }
  for (std::int64_t i = 0; i < n; ++i) {
    for (int l = 0; l < W; ++l) sequences[l] = from.b[l < count ? l : 0] + i * from.b_row;
    gather<T>(sequences, from.b_column, from.columns, first, first + columns,
              [&](std::int64_t j, Vector<T> x) { store(to.place(i, j - first), x); });
  }
}

// The reverse of gather() for the first `count` sequences: get(f) are the numbers at f.
template <class T, class Get>
void scatter(T* const* sequences, std::int64_t count, std::int64_t stride, std::int64_t begin, std::int64_t end,
             const Get& get) {
  constexpr int W = kWidth<T>;
  std::int64_t f = begin;
  for (; stride == 1 && f + W <= end; f += W) {
    Vector<T> square[W];
    FREQRANK_UNROLL
    for (int k = 0; k < W; ++k) square[k] = get(f + k);
    transpose(square);
    T each[W][W];
    FREQRANK_UNROLL
    for (int l = 0; l < W; ++l) store<T>(each[l], square[l]);
    for (std::int64_t l = 0; l < count; ++l) store(sequences[l] + f, load<T>(each[l]));
  }
  for (; f < end; ++f) {
    T each[W];
    store<T>(each, get(f));
    for (std::int64_t l = 0; l < count; ++l) sequences[l][f * stride] = each[l];
  }
}

template <class T>
void write_sides(const Sides<Lanes<T>>& from, std::int64_t count, std::int64_t n, std::int64_t first,
                 std::int64_t columns, const RightSides<T>& to) {
  T* sequences[kWidth<T>];
  if (to.x_row == 1 || columns == 1) {
    for (std::int64_t j = 0; j < columns; ++j) {
      for (std::int64_t l = 0; l < count; ++l) sequences[l] = to.x[l] + (first + j) * to.x_column;
      scatter<T>(sequences, count, to.x_row, 0, n, [&](std::int64_t i) { return load<T>(from.place(i, j)); });
    }
    return;
  }
  for (std::int64_t i = 0; i < n; ++i) {
    for (std::int64_t l = 0; l < count; ++l) sequences[l] = to.x[l] + i * to.x_row + first * to.x_column;
    scatter<T>(sequences, count, to.x_column, 0, columns, [&](std::int64_t j) { return load<T>(from.place(i, j)); });
  }
}

template <class T>
void read_sides(const RightSides<T>& from, std::int64_t, std::int64_t n, std::int64_t first, std::int64_t columns,
                const Sides<Columns<T>>& to) {
  for (std::int64_t i = 0; i < n; ++i) {
    const T* const row = *from.b + i * from.b_row + first * from.b_column;
    T* const into = to.place(i, 0);
    for (std::int64_t j = 0; j < columns; ++j) into[j] = row[j * from.b_column];
    for (std::int64_t j = columns; j < round_up(columns, kWidth<T>); ++j) into[j] = 0;
  }
}

template <class T>
void write_sides(const Sides<Columns<T>>& from, std::int64_t, std::int64_t n, std::int64_t first, std::int64_t columns,
                 const RightSides<T>& to) {
  for (std::int64_t i = 0; i < n; ++i) {
    T* const row = *to.x + i * to.x_row + first * to.x_column;
    const T* const out = from.place(i, 0);
    for (std::int64_t j = 0; j < columns; ++j) row[j * to.x_column] = out[j];
  }
}

template <class L, class T>
void solve_sides(const T* panels, std::int64_t count, std::int64_t n, const RightSides<T>& right, T* space) {
  constexpr int width = kPanelColumns<L>;
  if (right.columns == 0) return;
  const Sides<L> sides(n, space);
  invert_diagonal<L>(panels, n, sides);
  for (std::int64_t first = 0; first < right.columns; first += sides.columns) {
    const std::int64_t columns = right.columns - first < sides.columns ? right.columns - first : sides.columns;
    for (std::int64_t j = 0; j < columns; j += width) {  // below the last row there are zeros
      __builtin_memset(sides.place(n, j), 0, static_cast<std::size_t>(sides.rows - n) * kRowLength<L> * sizeof(T));
    }
    read_sides(right, count, n, first, columns, sides);
    for (std::int64_t j = 0; j < columns; j += width) {
      const std::int64_t numbers = (columns - j < width ? columns - j : width) * L::step;
      solve_panel<L, L::vectors>(ceil_div(numbers, kWidth<T>), panels, n, sides.panel(j), sides.inverse);
    }
    write_sides(sides, count, n, first, columns, right);
  }
}

template <class T, class In>
void factor_lanes_of(const Source<In>* a, std::int64_t count, std::int64_t n, T* const* factors, Outcome* outcomes,
                     const RightSides<T>& sides, T* panels) {
  constexpr int W = kWidth<T>;
  const Places<Lanes<T>> place_of(n);
  for (std::int64_t l = 0; l < count; l += W) {
    const std::int64_t some = count - l < W ? count - l : W;
    read_lanes(a + l, some, n, place_of, panels);
    const auto progress = factor_panels<Lanes<T>>(panels, n);
    write_lanes(panels, some, n, place_of, factors + l);
    RightSides<T> mine = sides;
    if (mine.columns > 0) mine.b += l, mine.x += l;
    solve_sides<Lanes<T>>(panels, some, n, mine, panels + lanes_bytes(n) / static_cast<std::int64_t>(sizeof(T)));
    for (int k = 0; k < some; ++k) outcomes[l + k] = progress.outcome(k, n);
  }
}

template <class T, class In>
Outcome factor_columns_of(const Source<In>& a, std::int64_t n, T* factor, const RightSides<T>& sides, T* panels) {
  constexpr Dtype dtype = sizeof(T) == 4 ? Dtype::float32 : Dtype::float64;
  read_columns(a, n, panels);
  const auto progress = factor_panels<Columns<T>>(panels, n);
  write_columns(panels, n, factor);
  solve_sides<Columns<T>>(panels, 1, n, sides, panels + columns_bytes(n, dtype) / bytes_of(dtype));
  return progress.outcome(0, n);
}

}  // namespace

#define FREQRANK_DEFINE(In, T)                                                                                     \
  void factor_lanes(const Source<In>* a, std::int64_t count, std::int64_t n, T* const* factors, Outcome* outcomes, \
                    const RightSides<T>& sides, T* panels) {                                                       \
    factor_lanes_of(a, count, n, factors, outcomes, sides, panels);                                                \
  }                                                                                                                \
  Outcome factor_columns(const Source<In>& a, std::int64_t n, T* factor, const RightSides<T>& sides, T* panels) {  \
    return factor_columns_of(a, n, factor, sides, panels);                                                         \
  }
FREQRANK_DEFINE(float, float)
FREQRANK_DEFINE(double, double)
FREQRANK_DEFINE(float, double)

}  // namespace freqrank::whitening::FREQRANK_ISA
