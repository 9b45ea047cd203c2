#pragma once
// Cholesky factors of matrices that fit into a block's shared memory, one at a time, and what is solved with them.

#include "whitening/device/cholesky_solve.h"

namespace freqrank::whitening::device {

template <class T>
struct CholeskyBlockKernel {
  static constexpr const char* name = sizeof(T) == 8 ? "cholesky_block_double" : "cholesky_block";
  static constexpr int max_threads = simt::warp_size * block_warps, min_blocks = sizeof(T) == 8 ? 1 : 2;

  struct Params {
    CholeskySource source;
    CholeskyResult<T> result;
    RightHandSides<T> sides;
  };

  SIMT_DEVICE static void run(const Params& p) {
    const CholeskySource& source = p.source;
    const int n = source.n, after = triangle_bytes<T>(n);
    const Triangle<T> u(0, n);
    const auto sums = simt::shared_array<double>(after, block_warps);
    const auto minor_at = simt::shared_array<int>(after + 8 * block_warps, 1);
    SIMT_NO_UNROLL
    for (Index matrix = simt::block(); matrix < source.count; matrix += simt::blocks()) {
      const Index base = source.a.batch.at(matrix);
      const T factor = source.template factor<T>(matrix);
      double mean = 0;
      if (source.levels > 1) {
        source.a.with<T>([&](auto data) {
          for (int i = simt::thread(); i < n; i += simt::threads())
            mean +=
                static_cast<double>(static_cast<T>(data.load(base + i * (source.a.row + source.a.column))) * factor);
        });
        mean = simt::block_sum(mean, sums) / n;
      }
      int level = 0, minor = 0;
      SIMT_NO_UNROLL
      for (;; ++level) {
        source.a.with<T>([&](auto data) {
          u.fill(source.a.down_columns(), [&](int i, int j) {
            const T x = static_cast<T>(data.load(base + i * source.a.row + j * source.a.column)) * factor;
            return i == j ? x + source.damping_of(x, level, mean) : x;
          });
        });
        minor = factor_triangle(u, minor_at);
        if (minor <= 0 || level + 1 == source.levels) break;
        simt::barrier();
      }
      const bool spoilt = minor != 0 && p.result.spoil;
      move_elements<T>(
          n, n, false,
          [&](int i, int j) { return i > j    ? T(0)
                                     : spoilt ? not_a_number<T>()
                                              : u.at.load(i * u.pitch + j); },
          [&](int i, int j, T x) { p.result.factor.store((matrix * n + i) * n + j, x); });
      if (simt::thread() == 0) {
        p.result.info.store(matrix, minor < 0 ? -minor : minor);
        if (p.result.damping) p.result.damping.store(matrix, source.damping[level]);
      }
      simt::barrier();
      if (p.sides.columns > 0) {
        if (spoilt) {  // every row of X is multiplied by its inverse
          for (int i = simt::thread(); i < u.padded; i += simt::threads()) u.inverse.store(i, not_a_number<T>());
        }
        solve_in_block(u, block_bytes<T>(n), p.sides, matrix);
      }
    }
  }
};

template <class T, class Queue>
void enqueue_cholesky_block(const CholeskySource& source, const CholeskyResult<T>& result,
                            const RightHandSides<T>& sides, Index blocks, int threads, Queue& queue) {
  using Kernel = CholeskyBlockKernel<T>;
  queue.template launch<Kernel>({blocks, threads, block_bytes<T>(source.n, sides.width)}, {source, result, sides});
}

}  // namespace freqrank::whitening::device
