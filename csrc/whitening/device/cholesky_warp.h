#pragma once
// Cholesky factors of matrices of up to 8, 16 or 32 rows, 4, 2 or 1 of them in the registers of a warp: a lane has a
// column. And what is solved with them.

#include "whitening/device/cholesky_solve.h"

namespace freqrank::whitening::device {

template <class T, int N>
struct CholeskyWarpKernel {
  static constexpr const char* name = sizeof(T) == 8 ? "cholesky_warp_double" : "cholesky_warp";
  static constexpr int max_threads = warp_kernel_threads, min_blocks = N == 32 && sizeof(T) == 8 ? 3 : 4;
  static constexpr int groups = max_threads / N;  // matrices of a block at a time
  static constexpr int pitch = warp_pitch(N);
  static constexpr int some = N < 16 || sizeof(T) == 8 ? 8 : 16;  // rows that are read before the first is written

  struct Params {
    CholeskySource source;
    CholeskyResult<T> result;
    RightHandSides<T> sides;
  };

  SIMT_DEVICE static void run(const Params& p) {
    const int j = simt::thread() % N;
    const int tiles = p.sides.columns > 0 ? 2 * groups : groups;
    const auto tile = simt::shared_array<T>(0, tiles * N * pitch) + simt::thread() / N * N * pitch;
    SIMT_NO_UNROLL
    for (Index first = simt::block() * groups; first < p.source.count; first += simt::blocks() * groups) {
      const Index matrix = first + simt::thread() / N;
      const bool mine = matrix < p.source.count;
      load(p, tile, mine ? matrix : 0, j, mine ? p.source.n : 0);
      simt::warp_barrier();
      const T diagonal = tile.load(j * pitch + j);
      double mean = 0;
      if (p.source.levels > 1) {
        mean = j < p.source.n ? static_cast<double>(diagonal) : 0.0;
        SIMT_UNROLL
        for (int step = N / 2; step > 0; step /= 2) mean += simt::shuffle_xor(mean, step, N);
        mean /= p.source.n;
      }
      bool working = mine;
      SIMT_NO_UNROLL
      for (int level = 0; simt::any(working); ++level) {
        const T more = p.source.damping_of(diagonal, level, mean);
        FactorColumn<T, N> column;
        SIMT_UNROLL
        for (int i = 0; i < N; ++i) column.x[i] = tile.load(i * pitch + j) + (i == j ? more : T(0));
        const int minor = factor_columns(column);
        if (working && (minor <= 0 || level + 1 == p.source.levels)) {
          store(p, column, matrix, j, minor, level);
          working = false;
        }
        if (p.sides.columns > 0) {  // without a ladder, so nobody needs the matrix any more
          simt::warp_barrier();
          SIMT_UNROLL
          for (int i = 0; i < N; ++i) {
            const T value = i != j ? column.x[i] : minor != 0 ? not_a_number<T>() : column.inverse;
            tile.store(i * N + j, i <= j ? value : T(0));
          }
        }
      }
      simt::warp_barrier();
      if (p.sides.columns > 0) {
        if (mine) solve_in_group<N>(tile, tile + groups * N * pitch, p.sides, matrix, p.source.n);
        simt::warp_barrier();
      }
    }
  }

  // To the group's tile, from n on the identity's rows and columns.
  SIMT_DEVICE static void load(const Params& p, simt::shared<T> tile, Index matrix, int lane, int n) {
    const AnyMatrices& a = p.source.a;
    const T factor = p.source.template factor<T>(matrix);
    const bool down = a.down_columns();
    const Index step = down ? a.column : a.row;
    Index from = a.batch.at(matrix) + lane * (down ? a.row : a.column);
    a.with<T>([&](auto data) {
      SIMT_NO_UNROLL  // all addresses at once take too many registers
          for (int first = 0; first < N; first += some) {
        T values[some];
        SIMT_UNROLL
        for (int r = 0; r < some; ++r, from += step) {
          const int i = down ? lane : first + r, j = down ? first + r : lane;
          values[r] = i <= j && j < n ? static_cast<T>(data.load(from)) * factor : T(i == j);
        }
        SIMT_UNROLL
        for (int r = 0; r < some; ++r) {
          tile.store(down ? lane * pitch + first + r : (first + r) * pitch + lane, values[r]);
        }
      }
    });
  }

  SIMT_DEVICE static void store(const Params& p, const FactorColumn<T, N>& column, Index matrix, int j, int minor,
                                int level) {
    const int n = p.source.n;
    const bool spoilt = minor != 0 && p.result.spoil;
    if (j == 0) {
      p.result.info.store(matrix, minor < 0 ? -minor : minor);
      if (p.result.damping) p.result.damping.store(matrix, p.source.damping[level]);
    }
    if (j >= n) return;
    const auto to = p.result.factor + (matrix * n * n + j);
    SIMT_UNROLL
    for (int i = 0; i < N; ++i) {
      if (i < n) to.store(i * n, i > j ? T(0) : spoilt ? not_a_number<T>() : column.at(i, j));
    }
  }
};

template <class T, int N, class Queue>
void enqueue_cholesky_warp(const CholeskySource& source, const CholeskyResult<T>& result,
                           const RightHandSides<T>& sides, Index blocks, Queue& queue) {
  using Kernel = CholeskyWarpKernel<T, N>;
  queue.template launch<Kernel>({blocks, Kernel::max_threads, warp_bytes(N, sizeof(T), sides.columns > 0)},
                                {source, result, sides});
}

}  // namespace freqrank::whitening::device
