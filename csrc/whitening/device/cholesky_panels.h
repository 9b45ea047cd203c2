#pragma once
// Cholesky factors of matrices that do not fit into a block's shared memory, right-looking, in the place of the result:
// A is copied there and the first block on the diagonal factored (here); then each step solves the rows to the right of
// its block against it (triangular_solve.h), subtracts their product from what is below and factors the next block
// meanwhile (triangular_update.h), by launches over all matrices. A ladder enqueues all of it for every level; matrices
// that are done leave at once.

#include "whitening/device/cholesky_params.h"
#include "whitening/device/cholesky_progress.h"
#include "whitening/device/cholesky_tile.h"

namespace freqrank::whitening::device {

// The mean of each diagonal.
struct CholeskyMeanKernel {
  static constexpr const char* name = "cholesky_mean";
  static constexpr int max_threads = 256, min_blocks = 4;
  static constexpr int shared_bytes = 8 * max_threads / simt::warp_size;

  struct Params {
    CholeskySource source;
    simt::global<double> means;
  };

  SIMT_DEVICE static void run(const Params& p) {
    const CholeskySource& source = p.source;
    const Index matrix = simt::block(), base = source.a.batch.at(matrix);
    const double factor = source.factor<double>(matrix);
    double sum = 0;
    source.a.with<double>([&](auto data) {
      for (int i = simt::thread(); i < source.n; i += simt::threads())
        sum += static_cast<double>(data.load(base + i * (source.a.row + source.a.column))) * factor;
    });
    sum = simt::block_sum(sum, simt::shared_array<double>(0, max_threads / simt::warp_size));
    if (simt::thread() == 0) p.means.store(matrix, sum / source.n);
  }
};

// A with its damping to where the factor will be, a square tile a block; zeros below the diagonal once.
template <class T>
struct CholeskyCopyKernel {
  static constexpr const char* name = sizeof(T) == 8 ? "cholesky_copy_double" : "cholesky_copy";
  static constexpr int max_threads = 256, min_blocks = 3;
  static constexpr int tile = 64, pitch = tile_pitch<T>(tile);
  static constexpr int shared_bytes = tile * pitch * static_cast<int>(sizeof(T));

  struct Params {
    CholeskySource source;
    simt::global<const double> means;  // with a ladder
    simt::global<T> factor;
    CholeskyProgress progress;
    int level;
    int tiles;  // in each direction
  };

  SIMT_DEVICE static void run(const Params& p) {
    const CholeskySource& source = p.source;
    const int n = source.n;
    const Index matrix = simt::block() / (p.tiles * p.tiles);
    const int index = static_cast<int>(simt::block() - matrix * (p.tiles * p.tiles));
    const int row = index / p.tiles * tile, column = index % p.tiles * tile;
    const bool below = row > column;
    if (!p.progress.begins(matrix) || (below && p.level > 0)) return;
    const auto piece = simt::shared_array<T>(0, tile * pitch);
    const int rows = n - row < tile ? n - row : tile, columns = n - column < tile ? n - column : tile;
    if (!below) {
      const AnyMatrices& a = source.a;
      const Index base = a.at(matrix, row, column);
      const T factor = source.template factor<T>(matrix);
      const double mean = p.means ? p.means.load(matrix) : 0.0;
      a.with<T>([&](auto data) {
        move_elements<T>(
            rows, columns, a.down_columns(),
            [&](int i, int j) {
              if (row + i > column + j) return T(0);
              const T x = static_cast<T>(data.load(base + i * a.row + j * a.column)) * factor;
              return row + i < column + j ? x : x + source.damping_of(x, p.level, mean);
            },
            [&](int i, int j, T x) { piece.store(i * pitch + j, x); });
      });
      simt::barrier();
    }
    const auto out = p.factor + (matrix * n + row) * n + column;
    move_elements<T>(
        rows, columns, false, [&](int i, int j) { return below ? T(0) : piece.load(i * pitch + j); },
        [&](int i, int j, T x) { out.store(static_cast<Index>(i) * n + j, x); });
  }
};

// The first rows and columns of every matrix.
template <class T>
struct CholeskyCornerKernel {
  static constexpr const char* name = sizeof(T) == 8 ? "cholesky_corner_double" : "cholesky_corner";
  static constexpr int max_threads = 256, min_blocks = 1;

  struct Params {
    simt::global<T> factor;
    int n, rows;
    CholeskyProgress progress;  // of which `now` is not looked at
    simt::global<int> words;    // of the first step
  };

  SIMT_DEVICE static void run(const Params& p) {
    const Index matrix = simt::block();
    if (p.progress.begins(matrix)) {
      factor_in_place(p.factor + matrix * p.n * p.n, p.n, p.rows, 0, p.words + matrix);
    } else if (simt::thread() == 0) {
      p.words.store(matrix, p.progress.before.load(matrix));
    }
  }
};

// What became of each matrix; NaN in place of what failed at every level, where that is wanted.
template <class T>
struct CholeskyFinishKernel {
  static constexpr const char* name = sizeof(T) == 8 ? "cholesky_finish_double" : "cholesky_finish";
  static constexpr int max_threads = 256, min_blocks = 4;
  static constexpr int rows = 64;  // of a block

  struct Params {
    CholeskySource source;
    CholeskyResult<T> result;
    simt::global<const int> words;  // [levels, count], of each level's last step
    int tiles;                      // blocks of a matrix
  };

  SIMT_DEVICE static void run(const Params& p) {
    const Index matrix = simt::block() / p.tiles;
    const int n = p.source.n, first = static_cast<int>(simt::block() - matrix * p.tiles) * rows;
    int level = 0, minor = p.words.load(matrix);
    while (minor > 0 && level + 1 < p.source.levels) minor = p.words.load(++level * p.source.count + matrix);
    if (first == 0 && simt::thread() == 0) {
      p.result.info.store(matrix, minor < 0 ? -minor : minor);
      if (p.result.damping) p.result.damping.store(matrix, p.source.damping[level]);
    }
    if (minor == 0 || !p.result.spoil) return;
    const auto out = p.result.factor + (matrix * n + first) * n;
    move_elements<T>(
        n - first < rows ? n - first : rows, n, false, [](int, int) { return not_a_number<T>(); },
        [&](int i, int j, T x) {
          if (first + i <= j) out.store(static_cast<Index>(i) * n + j, x);
        });
  }
};

template <class Queue>
void enqueue_cholesky_means(const CholeskySource& source, simt::global<double> means, Queue& queue) {
  using Kernel = CholeskyMeanKernel;
  queue.template launch<Kernel>({source.count, Kernel::max_threads, Kernel::shared_bytes}, {source, means});
}

template <class T, class Queue>
void enqueue_cholesky_copy(const CholeskySource& source, simt::global<const double> means, simt::global<T> factor,
                           const CholeskyProgress& progress, int level, Queue& queue) {
  using Kernel = CholeskyCopyKernel<T>;
  const int tiles = (source.n + Kernel::tile - 1) / Kernel::tile;
  queue.template launch<Kernel>({source.count * tiles * tiles, Kernel::max_threads, Kernel::shared_bytes},
                                {source, means, factor, progress, level, tiles});
}

template <class T, class Queue>
void enqueue_cholesky_corner(simt::global<T> factor, Index count, int n, int rows, const CholeskyProgress& progress,
                             simt::global<int> words, Queue& queue) {
  using Kernel = CholeskyCornerKernel<T>;
  queue.template launch<Kernel>({count, Kernel::max_threads, corner_bytes<T>(rows)},
                                {factor, n, rows, progress, words});
}

template <class T, class Queue>
void enqueue_cholesky_finish(const CholeskySource& source, const CholeskyResult<T>& result,
                             simt::global<const int> words, Queue& queue) {
  using Kernel = CholeskyFinishKernel<T>;
  const int tiles = (source.n + Kernel::rows - 1) / Kernel::rows;
  queue.template launch<Kernel>({source.count * tiles, Kernel::max_threads, 0}, {source, result, words, tiles});
}

}  // namespace freqrank::whitening::device
