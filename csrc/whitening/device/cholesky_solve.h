#pragma once
// X of A X = B where the factor U of A, U^T U = A, has just been made: U^T Y = B, then U X = Y.

#include "whitening/device/cholesky_params.h"
#include "whitening/device/cholesky_tile.h"

namespace freqrank::whitening::device {

// By a group of N lanes of a warp, each of which has a column of X at a time, 8 rows of it in registers. `u`: rows of
// U, N columns each, the inverse of the diagonal in its place; from n on the identity's. `x`: room for the group's
// columns.
template <int N, class T>
SIMT_DEVICE void solve_in_group(simt::shared<T> u, simt::shared<T> x, const RightHandSides<T>& sides, Index matrix,
                                int n) {
  constexpr int V = 16 / static_cast<int>(sizeof(T)), rows = 8, packs = rows / V;
  const int lane = simt::thread() % N;
  const Index from = sides.b.at(matrix, 0, 0), to = sides.x.at(matrix, 0, 0);
  const auto row_of = [&](int i, int first, simt::pack<T, V>(&row)[packs]) {
    SIMT_UNROLL
    for (int s = 0; s < packs; ++s) row[s] = u.template load_vector<V>(i * N + first + s * V);
  };
  SIMT_NO_UNROLL
  for (Index j = lane; j < sides.columns; j += N) {
    T values[rows];
    simt::pack<T, V> row[packs];
    SIMT_NO_UNROLL
    for (int first = 0; first < N; first += rows) {
      SIMT_UNROLL
      for (int i = 0; i < rows; ++i) {
        const Index at = from + (first + i) * sides.b.row + j * sides.b.column;
        values[i] = first + i < n ? sides.b.data.load(at) : T(0);
      }
      SIMT_NO_UNROLL
      for (int r = 0; r < first; ++r) {
        const T known = x.load(r * N + lane);
        row_of(r, first, row);
        SIMT_UNROLL
        for (int i = 0; i < rows; ++i) values[i] = simt::fma(-row[i / V][i % V], known, values[i]);
      }
      SIMT_UNROLL
      for (int r = 0; r < rows; ++r) {
        row_of(first + r, first, row);
        values[r] *= row[r / V][r % V];
        SIMT_UNROLL
        for (int i = r + 1; i < rows; ++i) values[i] = simt::fma(-row[i / V][i % V], values[r], values[i]);
      }
      SIMT_UNROLL
      for (int i = 0; i < rows; ++i) x.store((first + i) * N + lane, values[i]);
    }
    SIMT_NO_UNROLL
    for (int first = N - rows; first >= 0; first -= rows) {
      SIMT_UNROLL
      for (int i = 0; i < rows; ++i) values[i] = x.load((first + i) * N + lane);
      SIMT_NO_UNROLL
      for (int r = first + rows; r < N; r += V) {
        T known[V];
        SIMT_UNROLL
        for (int v = 0; v < V; ++v) known[v] = x.load((r + v) * N + lane);
        SIMT_UNROLL
        for (int i = 0; i < rows; ++i) {
          const auto part = u.template load_vector<V>((first + i) * N + r);
          SIMT_UNROLL
          for (int v = 0; v < V; ++v) values[i] = simt::fma(-part[v], known[v], values[i]);
        }
      }
      SIMT_UNROLL
      for (int r = rows - 1; r >= 0; --r) {
        row_of(first + r, first, row);
        SIMT_UNROLL
        for (int i = rows - 1; i > r; --i) values[r] = simt::fma(-row[i / V][i % V], values[i], values[r]);
        values[r] *= row[r / V][r % V];
      }
      SIMT_UNROLL
      for (int i = 0; i < rows; ++i) {
        x.store((first + i) * N + lane, values[i]);
        if (first + i < n) sides.x.data.store(to + (first + i) * sides.x.row + j * sides.x.column, values[i]);
      }
    }
  }
}

// By a block, some columns at a time in shared memory from byte `at` on. `u` is mirrored on the way.
template <class T>
SIMT_DEVICE void solve_in_block(const Triangle<T>& u, int at, const RightHandSides<T>& sides, Index matrix) {
  const int pitch = tile_pitch<T>(sides.width);
  const auto x = simt::shared_array<T>(at, u.padded * pitch);
  mirror_triangle(u);
  SIMT_NO_UNROLL
  for (Index column = 0; column < sides.columns; column += sides.width) {
    const int columns = sides.columns - column < sides.width ? static_cast<int>(sides.columns - column) : sides.width;
    const int wide = (columns + 3) / 4 * 4;
    const Index from = sides.b.at(matrix, 0, column), to = sides.x.at(matrix, 0, column);
    move_elements<T>(
        u.padded, wide, sides.b.down_columns(),
        [&](int i, int j) {
          return i < u.n && j < columns ? sides.b.data.load(from + i * sides.b.row + j * sides.b.column) : T(0);
        },
        [&](int i, int j, T value) { x.store(i * pitch + j, value); });
    SIMT_NO_UNROLL
    for (int k = 0; k < u.padded; k += 16) {
      simt::barrier();
      solve_rows(u, k, x, pitch, 0, columns);
      simt::barrier();
      subtract_rows<false>(x, pitch, k + 16, u.padded, 0, wide, u.at + k * u.pitch, u.pitch, x + k * pitch, pitch);
    }
    SIMT_NO_UNROLL
    for (int k = u.padded - 16; k >= 0; k -= 16) {
      simt::barrier();
      solve_rows<true>(u, k, x, pitch, 0, columns);
      simt::barrier();
      subtract_rows<false>(x, pitch, 0, k, 0, wide, u.at + k * u.pitch, u.pitch, x + k * pitch, pitch);
    }
    move_elements<T>(
        u.n, columns, sides.x.down_columns(), [&](int i, int j) { return x.load(i * pitch + j); },
        [&](int i, int j, T value) { sides.x.data.store(to + i * sides.x.row + j * sides.x.column, value); });
    simt::barrier();
  }
}

}  // namespace freqrank::whitening::device
