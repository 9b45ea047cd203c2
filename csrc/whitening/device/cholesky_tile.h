#pragma once
// Cholesky factors and triangular solves within a block: an upper triangle U in shared memory, U^T U = A, 16 rows at a
// time. One warp factors the 16 x 16 block on the diagonal in registers, each thread solves columns to the right of it,
// all of them subtract the product of the 16 rows from what is below.

#include "whitening/device/cholesky_layout.h"
#include "whitening/device/cholesky_views.h"

namespace freqrank::whitening::device {

template <class T>
SIMT_DEVICE T not_a_number() {
  if constexpr (sizeof(T) == 8)
    return simt::bits_as<double>(std::uint64_t{0x7ff8000000000000});
  else
    return simt::bits_as<float>(0x7fc00000u);
}

// A column of a factor: what is above its diagonal in `x`, the diagonal, and its inverse.
template <class T, int N>
struct FactorColumn {
  T x[N], diagonal, inverse;
  SIMT_DEVICE T at(int i, int column) const { return i == column ? diagonal : x[i]; }
};

// Each lane of a group of N has in x a column of an upper triangle, what is below the diagonal arbitrary; it becomes
// the factor's. Returns 0, or the order of the first leading minor that is not positive definite, negated where the
// pivot is NaN; all lanes of the group get it. The rows before it are right.
template <class T, int N>
SIMT_DEVICE int factor_columns(FactorColumn<T, N>& column) {
  T(&x)[N] = column.x;
  int minor = 0;
  column.diagonal = column.inverse = 0;
  SIMT_UNROLL
  for (int k = 0; k < N; ++k) {
    const T pivot = simt::shuffle(x[k], k, N);
    if (!(pivot > T(0)) && minor == 0) minor = pivot <= T(0) ? k + 1 : -(k + 1);
    const T factor = simt::rsqrt(pivot);  // the next columns wait for it
    const bool mine = simt::lane() % N == k;
    column.diagonal = mine ? pivot : column.diagonal;
    column.inverse = mine ? factor : column.inverse;
    x[k] *= factor;
    SIMT_UNROLL
    for (int i = k + 1; i < N; ++i) x[i] = simt::fma(-simt::shuffle(x[k], i, N), x[k], x[i]);
  }
  column.diagonal = simt::sqrt(column.diagonal);
  return minor;
}

// write(i, j, read(i, j)) for all elements of a tile, threads side by side along rows, or a sector down each column.
// Some are read before the first of them is written, for memory is far.
template <class T, class Read, class Write>
SIMT_DEVICE void move_elements(int rows, int columns, bool down_columns, Read read, Write write) {
  constexpr int height = 32 / static_cast<int>(sizeof(T)), width = simt::warp_size / height, some = 2 * height;
  const int warps = simt::threads() / simt::warp_size;
  const int first_row = down_columns ? simt::lane() % height : simt::warp(), row_step = down_columns ? height : warps;
  const int first_column = down_columns ? simt::warp() * width + simt::lane() / height : simt::lane();
  SIMT_NO_UNROLL
  for (int j = first_column; j < columns; j += down_columns ? warps * width : simt::warp_size) {
    SIMT_NO_UNROLL
    for (int first = first_row; first < rows; first += some * row_step) {
      T values[some] = {};
      SIMT_UNROLL
      for (int e = 0; e < some; ++e) {
        if (first + e * row_step < rows) values[e] = read(first + e * row_step, j);
      }
      SIMT_UNROLL
      for (int e = 0; e < some; ++e) {
        if (first + e * row_step < rows) write(first + e * row_step, j, values[e]);
      }
    }
  }
}

// An upper triangle in shared memory, `padded` rows and columns of which those from n on are the identity's.
template <class T>
struct Triangle {
  simt::shared<T> at, inverse;  // the diagonal's inverses
  int pitch, n, padded;

  SIMT_DEVICE Triangle(int byte_offset, int n) : pitch(triangle_pitch<T>(n)), n(n), padded(triangle_padded(n)) {
    at = simt::shared_array<T>(byte_offset, padded * pitch);
    inverse = simt::shared_array<T>(byte_offset + padded * pitch * static_cast<int>(sizeof(T)), padded);
  }
  // value(i, j) with i <= j < n.
  template <class Value>
  SIMT_DEVICE void fill(bool down_columns, Value value) const {
    move_elements<T>(
        padded, padded, down_columns, [&](int i, int j) { return i <= j && j < n ? value(i, j) : T(i == j); },
        [&](int i, int j, T x) { at.store(i * pitch + j, x); });
  }
};

// c[i, j] -= sum over k < 16 of p[k, i] q[k, j] for rows and columns of c from where they begin, multiples of 4 in
// number. `Upper`: c is symmetric and what is below the diagonal is not wanted.
template <bool Upper, class T>
SIMT_DEVICE void subtract_rows(simt::shared<T> c, int c_pitch, int row, int row_end, int column, int column_end,
                               simt::shared<T> p, int p_pitch, simt::shared<T> q, int q_pitch) {
  constexpr int V = 16 / static_cast<int>(sizeof(T)), packs = 4 / V, high = 16, wide = 32;  // of a warp's region
  const int across = (column_end - column + wide - 1) / wide, down = (row_end - row + high - 1) / high;
  SIMT_NO_UNROLL
  for (int region = simt::warp(); region < across * down; region += simt::threads() / simt::warp_size) {
    const int top = row + region / across * high, left = column + region % across * wide;
    const int i0 = top + simt::lane() / 8 * 4, j0 = left + simt::lane() % 8 * V;
    if ((Upper && left + wide <= top) || i0 >= row_end) continue;
    simt::pack<T, V> sum[4][packs];
    SIMT_UNROLL
    for (int r = 0; r < 4; ++r) {
      SIMT_UNROLL
      for (int s = 0; s < packs; ++s) {
        if (j0 + s * 8 * V < column_end) sum[r][s] = c.template load_vector<V>((i0 + r) * c_pitch + j0 + s * 8 * V);
      }
    }
    SIMT_NO_UNROLL  // all 16 at once take too many registers
        for (int first = 0; first < 16; first += V) {
      SIMT_UNROLL
      for (int k = first; k < first + V; ++k) {
        simt::pack<T, V> a[packs], b[packs];
        SIMT_UNROLL
        for (int s = 0; s < packs; ++s) {
          a[s] = p.template load_vector<V>(k * p_pitch + i0 + s * V);
          if (j0 + s * 8 * V < column_end) b[s] = q.template load_vector<V>(k * q_pitch + j0 + s * 8 * V);
        }
        SIMT_UNROLL
        for (int r = 0; r < 4; ++r) {
          SIMT_UNROLL
          for (int s = 0; s < packs; ++s) {
            SIMT_UNROLL
            for (int v = 0; v < V; ++v) sum[r][s][v] = simt::fma(-a[r / V][r % V], b[s][v], sum[r][s][v]);
          }
        }
      }
    }
    SIMT_UNROLL
    for (int r = 0; r < 4; ++r) {
      SIMT_UNROLL
      for (int s = 0; s < packs; ++s) {
        if (j0 + s * 8 * V < column_end) c.template store_vector<V>((i0 + r) * c_pitch + j0 + s * 8 * V, sum[r][s]);
      }
    }
  }
}

// Rows [k, k + 16) of x become u[k.., k..]^-T of them, for columns [column, column_end). `Up`: u[k.., k..]^-1 of them,
// from the last row to the first, of a u whose upper triangle is mirrored.
template <bool Up = false, class T>
SIMT_DEVICE void solve_rows(const Triangle<T>& u, int k, simt::shared<T> x, int pitch, int column, int column_end) {
  constexpr int some = Up || sizeof(T) == 8 ? 8 : 16;  // rows in registers at a time
  SIMT_NO_UNROLL
  for (int j = column + simt::thread(); j < column_end; j += simt::threads()) {
    SIMT_NO_UNROLL
    for (int first = 0; first < 16; first += some) {
      // the rows in the order in which they are solved
      const auto row = [&](int i) { return Up ? k + 15 - i : k + i; };
      T values[some];
      SIMT_UNROLL
      for (int i = 0; i < some; ++i) values[i] = x.load(row(first + i) * pitch + j);
      SIMT_NO_UNROLL
      for (int r = 0; r < first; ++r) {
        const T known = x.load(row(r) * pitch + j);
        SIMT_UNROLL
        for (int i = 0; i < some; ++i)
          values[i] = simt::fma(-u.at.load(row(r) * u.pitch + row(first + i)), known, values[i]);
      }
      SIMT_UNROLL
      for (int r = 0; r < some; ++r) {
        values[r] *= u.inverse.load(row(first + r));
        SIMT_UNROLL
        for (int i = r + 1; i < some; ++i)
          values[i] = simt::fma(-u.at.load(row(first + r) * u.pitch + row(first + i)), values[r], values[i]);
      }
      SIMT_UNROLL
      for (int i = 0; i < some; ++i) x.store(row(first + i) * pitch + j, values[i]);
    }
  }
}

// By the first warp: rows and columns [k, k + 16). Its result as that of factor_columns, to `minor`.
template <class T>
SIMT_DEVICE void factor_corner(const Triangle<T>& u, int k, simt::shared<int> minor) {
  FactorColumn<T, 16> column;
  const int j = simt::lane() % 16;
  SIMT_UNROLL
  for (int i = 0; i < 16; ++i) column.x[i] = u.at.load((k + i) * u.pitch + k + j);
  simt::warp_barrier();
  const int found = factor_columns(column);
  if (simt::lane() < 16) {
    SIMT_UNROLL
    for (int i = 0; i < 16; ++i) {
      if (i <= j) u.at.store((k + i) * u.pitch + k + j, column.at(i, j));
    }
    u.inverse.store(k + j, column.inverse);
    if (j == 0) minor.store(0, found > 0 ? k + found : found < 0 ? found - k : 0);
  }
}

// The triangle becomes its factor. Returns as factor_columns does, to all threads, which have met.
template <class T>
SIMT_DEVICE int factor_triangle(const Triangle<T>& u, simt::shared<int> minor) {
  SIMT_NO_UNROLL
  for (int k = 0; k < u.padded; k += 16) {
    simt::barrier();
    if (simt::warp() == 0) factor_corner(u, k, minor);
    simt::barrier();
    const int found = minor.load(0);
    if (found != 0) return found;
    solve_rows(u, k, u.at, u.pitch, k + 16, u.padded);
    simt::barrier();
    subtract_rows<true>(u.at, u.pitch, k + 16, u.padded, k + 16, u.padded, u.at + k * u.pitch, u.pitch,
                        u.at + k * u.pitch, u.pitch);
  }
  return 0;
}

// What is below the diagonal becomes what is above it.
template <class T>
SIMT_DEVICE void mirror_triangle(const Triangle<T>& u) {
  const int i0 = simt::lane() % 8, j0 = simt::lane() / 8, across = u.padded / 4, tiles = u.padded / 8 * across;
  SIMT_NO_UNROLL
  for (int tile = simt::warp(); tile < tiles; tile += simt::threads() / simt::warp_size) {
    const int i = tile / across * 8 + i0, j = tile % across * 4 + j0;
    if (i < j) u.at.store(j * u.pitch + i, u.at.load(i * u.pitch + j));
  }
}

// The upper triangle of `rows` rows and columns from `corner` on becomes its factor, by way of shared memory, from byte
// 0 on, that nobody uses any more. Thread 0 writes how it went to `word`, orders counted from `first`.
template <class T>
SIMT_DEVICE void factor_in_place(simt::global<T> corner, Index stride, int rows, Index first, simt::global<int> word) {
  const Triangle<T> u(0, rows);
  u.fill(false, [&](int i, int j) { return corner.load(i * stride + j); });
  const int minor = factor_triangle(u, simt::shared_array<int>(triangle_bytes<T>(rows), 1));
  move_elements<T>(
      rows, rows, false, [&](int i, int j) { return u.at.load(i * u.pitch + j); },
      [&](int i, int j, T x) {
        if (i <= j) corner.store(i * stride + j, x);
      });
  const int before = static_cast<int>(first);
  if (simt::thread() == 0) word.store(0, minor > 0 ? minor + before : minor < 0 ? minor - before : 0);
}

}  // namespace freqrank::whitening::device
