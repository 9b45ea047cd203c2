#pragma once
// Some rows of X in U^T X = B, U upper triangular: a block has a few columns of X and the rows' diagonal block of U.

#include "whitening/device/cholesky_tile.h"
#include "whitening/device/triangular_params.h"

namespace freqrank::whitening::device {

template <class T>
struct TriangularSolveKernel {
  static constexpr const char* name = sizeof(T) == 8 ? "triangular_solve_double" : "triangular_solve";
  static constexpr int max_threads = 256, min_blocks = sizeof(T) == 8 ? 1 : 2;
  static constexpr int width = solve_columns, pitch = tile_pitch<T>(width);
  using Params = TriangularSolveParams<T>;

  SIMT_DEVICE static void run(const Params& p) {
    const Triangle<T> u(0, p.rows);
    const auto x = simt::shared_array<T>(triangle_bytes<T>(p.rows), u.padded * pitch);
    SIMT_NO_UNROLL
    for (Index task = simt::block(); task < p.count * p.tiles; task += simt::blocks()) {
      const Index matrix = task / p.tiles, column = p.first_column + (task - matrix * p.tiles) * width;
      if (!p.progress.works(matrix)) continue;
      const int columns = p.columns - column < width ? static_cast<int>(p.columns - column) : width;
      const Index from = p.u.at(matrix, p.first_row, p.first_row), b = p.b.at(matrix, p.first_row, column);
      const Index to = p.x.at(matrix, p.first_row, column);
      u.fill(p.u.down_columns(), [&](int i, int j) {
        return i == j && p.unit_diagonal ? T(1) : p.u.data.load(from + i * p.u.row + j * p.u.column);
      });
      move_elements<T>(
          u.padded, width, p.b.down_columns(),
          [&](int i, int j) {
            return i < p.rows && j < columns ? p.b.data.load(b + i * p.b.row + j * p.b.column) : T(0);
          },
          [&](int i, int j, T value) { x.store(i * pitch + j, value); });
      simt::barrier();
      for (int i = simt::thread(); i < u.padded; i += simt::threads()) {
        u.inverse.store(i, T(1) / u.at.load(i * u.pitch + i));
      }
      SIMT_NO_UNROLL
      for (int k = 0; k < u.padded; k += 16) {
        simt::barrier();
        solve_rows(u, k, x, pitch, 0, columns);
        simt::barrier();
        subtract_rows<false>(x, pitch, k + 16, u.padded, 0, width, u.at + k * u.pitch, u.pitch, x + k * pitch, pitch);
      }
      move_elements<T>(
          p.rows, columns, p.x.down_columns(), [&](int i, int j) { return x.load(i * pitch + j); },
          [&](int i, int j, T value) { p.x.data.store(to + i * p.x.row + j * p.x.column, value); });
      simt::barrier();
    }
  }
};

template <class T, class Queue>
void enqueue_triangular_solve(TriangularSolveParams<T> p, Index most_blocks, Queue& queue) {
  using Kernel = TriangularSolveKernel<T>;
  p.tiles = (p.columns - p.first_column + Kernel::width - 1) / Kernel::width;
  const Index tasks = p.count * p.tiles;
  queue.template launch<Kernel>(
      {tasks < most_blocks ? tasks : most_blocks, Kernel::max_threads, solve_bytes<T>(p.rows)}, p);
}

}  // namespace freqrank::whitening::device
