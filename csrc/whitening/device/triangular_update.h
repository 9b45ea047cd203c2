#pragma once
// C -= U^T X on tensor cores, of some rows of U and X: what solving those rows leaves to do. For a Cholesky factor X is
// U, and only the upper triangle of C is wanted; the block that has its first tile goes on to factor the next step's
// block on the diagonal, which lies in it, while others update the rest.
//
// double is multiplied as such. A float is the sum of two tf32 numbers, of whose four products the smallest is left
// away, which loses no more than rounding to float does.

#include <type_traits>

#include "whitening/device/cholesky_tile.h"
#include "whitening/device/triangular_params.h"

namespace freqrank::whitening::device {

template <class T>
struct TriangularUpdateKernel {
  static constexpr const char* name = sizeof(T) == 8 ? "triangular_update_double" : "triangular_update";
  static constexpr bool wide = sizeof(T) == 8;
  static constexpr int max_threads = wide ? 256 : 512, min_blocks = 1;
  using E = std::conditional_t<wide, double, simt::tf32>;
  using Shape = simt::MmaShape<E>;
  static constexpr int tile = update_tile, slice = update_slice<T>(), pitch = update_pitch<T>();
  static constexpr int warp_rows = wide ? 64 : 32, warp_columns = 32;  // of the tile
  // Doubles are multiplied by instructions that take two fragments' rows and two fragments' depth.
  static constexpr int tall = wide ? 2 : 1, deep = wide ? 2 : 1;
  static constexpr int down = warp_rows / (tall * Shape::m), across = warp_columns / Shape::n;
  static constexpr int V = 16 / static_cast<int>(sizeof(T));
  using Params = TriangularUpdateParams<T>;

  // A factor's slice: `slice` rows of `tile` columns, twice.
  struct Operand {
    simt::global<const T> data;
    Index row, column;  // strides
    int columns;        // that exist
    bool down;
    simt::shared<T> at;

    SIMT_DEVICE Operand(const Matrices<const T>& m, Index matrix, Index first_row, Index first_column, Index end,
                        int byte_offset)
        : data(m.data + m.at(matrix, first_row, first_column)),
          row(m.row),
          column(m.column),
          columns(end - first_column < tile ? static_cast<int>(end - first_column) : tile),
          down(m.down_columns()),
          at(simt::shared_array<T>(byte_offset, 2 * slice * pitch)) {}

    SIMT_DEVICE void copy(int stage, int first, int depth) const {
      const auto to = at + stage * slice * pitch;
      const int thread = simt::opaque(simt::thread());  // addresses take no registers between copies
      const auto address = reinterpret_cast<std::uintptr_t>(data.address());
      const bool pieces = column == 1 && row % V == 0 && address % 16 == 0;
      if (pieces) {
        SIMT_NO_UNROLL
        for (int e = thread; e < slice * tile / V; e += max_threads) {
          const int k = e / (tile / V), j = e % (tile / V) * V;
          if (j + V <= columns || j >= columns) {
            simt::copy_async<16>(to, k * pitch + j, data, (first + k) * row + j, first + k < depth && j < columns);
          } else {
            SIMT_NO_UNROLL
            for (int v = 0; v < V; ++v) {
              simt::copy_async<static_cast<int>(sizeof(T))>(to, k * pitch + j + v, data, (first + k) * row + j + v,
                                                            first + k < depth && j + v < columns);
            }
          }
        }
      } else {
        // along columns a warp copies a sector of each of a few
        constexpr int height = 32 / static_cast<int>(sizeof(T)), width = simt::warp_size / height;
        SIMT_NO_UNROLL
        for (int e = thread; e < slice * tile; e += max_threads) {
          const int warps = e / simt::warp_size, lane = e % simt::warp_size;
          const int k = down ? warps % (slice / height) * height + lane % height : e / tile;
          const int j = down ? warps / (slice / height) * width + lane / height : e % tile;
          simt::copy_async<static_cast<int>(sizeof(T))>(to, k * pitch + j, data, (first + k) * row + j * column,
                                                        first + k < depth && j < columns);
        }
      }
    }
  };

  // Element i of a fragment of a slice, of which (k, j) is its first.
  template <simt::Role R>
  SIMT_DEVICE static T element(const simt::Fragment<E, R>& fragment, int i, simt::shared<T> from, int k, int j) {
    const int row = fragment.row(i), column = fragment.col(i);
    return R == simt::Role::a ? from.load((k + column) * pitch + j + row) : from.load((k + row) * pitch + j + column);
  }

  // A float as the sum of two tf32 numbers.
  template <simt::Role R>
  struct Split {
    simt::Fragment<E, R> high, low;

    SIMT_DEVICE void load(simt::shared<T> from, int k, int j) {
      SIMT_UNROLL
      for (int i = 0; i < high.count; ++i) {
        const T x = element(high, i, from, k, j);
        const simt::tf32 rounded = simt::to_tf32(x);
        high.set(i, rounded);
        low.set(i, simt::to_tf32(x - simt::to_float(rounded)));
      }
    }
  };

  struct Place {
    Index matrix, down, across;  // the latter two of tiles
  };
  SIMT_DEVICE static Place place_of(const Params& p, Index task) {
    Place at{task / p.tiles, 0, 0};
    at.across = task - at.matrix * p.tiles;
    if (p.upper) {
      for (; at.across >= p.across - at.down; ++at.down) at.across -= p.across - at.down;
      at.across += at.down;
    } else {
      at.down = at.across / p.across, at.across -= at.down * p.across;
    }
    return at;
  }

  SIMT_DEVICE static void run(const Params& p) {
    {
      const Place at = place_of(p, simt::block());
      if (!p.progress.works(at.matrix)) {
        if (p.next_words && at.across == 0 && simt::thread() == 0)
          p.next_words.store(at.matrix, p.progress.now.load(at.matrix));
        return;
      }
      update(p, at.matrix, p.row + at.down * tile, p.column + at.across * tile);
    }
    if (!p.next_words) return;
    const Place at = place_of(p, simt::block() + simt::opaque(0));  // worked out again: it takes no registers before
    if (at.across != 0) return;
    simt::barrier();
    factor_in_place(p.to.data + p.to.at(at.matrix, p.row, p.column), p.to.row, p.next_rows, p.row,
                    p.next_words + at.matrix);
  }

  // A warp's part of the tile.
  SIMT_DEVICE static int top_of(int warp) { return warp / (tile / warp_columns) * warp_rows; }
  SIMT_DEVICE static int left_of(int warp) { return warp % (tile / warp_columns) * warp_columns; }

  SIMT_DEVICE static void update(const Params& p, Index matrix, Index row, Index column) {
    const Operand u(p.u, matrix, p.first_row, row, p.row_end, 0);
    const Operand x(p.x, matrix, p.first_row, column, p.column_end, update_bytes<T>() / 2);
    // warps that have nothing to do still meet the others
    const bool idle = top_of(simt::warp()) >= u.columns || left_of(simt::warp()) >= x.columns ||
                      (p.upper && row + top_of(simt::warp()) >= column + left_of(simt::warp()) + warp_columns);
    simt::Accumulator<E> sums[down][across][tall];
    SIMT_UNROLL
    for (int i = 0; i < down; ++i) {
      SIMT_UNROLL
      for (int j = 0; j < across; ++j) {
        SIMT_UNROLL
        for (int t = 0; t < tall; ++t) sums[i][j][t].fill(0);
      }
    }
    u.copy(0, 0, p.depth), x.copy(0, 0, p.depth);
    simt::copy_commit();
    SIMT_NO_UNROLL
    for (int first = 0, stage = 0; first < p.depth; first += slice, stage ^= 1) {
      simt::copy_wait<0>();
      simt::barrier();
      if (first + slice < p.depth) {
        u.copy(stage ^ 1, first + slice, p.depth), x.copy(stage ^ 1, first + slice, p.depth);
        simt::copy_commit();
      }
      if (!idle) {
        const int warp = simt::opaque(simt::warp());  // where it is takes no registers in between
        multiply(u.at + stage * slice * pitch, x.at + stage * slice * pitch, top_of(warp), left_of(warp), sums);
      }
    }
    if (!idle) subtract(p, matrix, row + top_of(simt::warp()), column + left_of(simt::warp()), sums);
  }

  SIMT_DEVICE static void multiply(simt::shared<T> u, simt::shared<T> x, int top, int left,
                                   simt::Accumulator<E> (&sums)[down][across][tall]) {
    SIMT_NO_UNROLL
    for (int k = 0; k < slice; k += deep * Shape::k) {
      if constexpr (wide) {
        simt::FragmentB<double> b[across][deep];
        SIMT_UNROLL
        for (int j = 0; j < across; ++j) {
          SIMT_UNROLL
          for (int d = 0; d < deep; ++d) {
            b[j][d].set(0, element(b[j][d], 0, x, k + d * Shape::k, left + j * Shape::n));
          }
        }
        SIMT_UNROLL
        for (int i = 0; i < down; ++i) {
          simt::FragmentA<double> a[deep][tall];
          SIMT_UNROLL
          for (int d = 0; d < deep; ++d) {
            SIMT_UNROLL
            for (int t = 0; t < tall; ++t) {
              a[d][t].set(0, element(a[d][t], 0, u, k + d * Shape::k, top + (i * tall + t) * Shape::m));
            }
          }
          SIMT_UNROLL
          for (int j = 0; j < across; ++j) simt::mma(sums[i][j], a, b[j]);
        }
      } else {
        Split<simt::Role::b> b[across];
        SIMT_UNROLL
        for (int j = 0; j < across; ++j) b[j].load(x, k, left + j * Shape::n);
        SIMT_UNROLL
        for (int i = 0; i < down; ++i) {
          Split<simt::Role::a> a;
          a.load(u, k, top + i * Shape::m);
          SIMT_UNROLL
          for (int j = 0; j < across; ++j) {
            // tensor cores cut sums off, so they get short ones only, the small products first
            simt::Accumulator<E> sum(0);
            simt::mma(sum, a.low, b[j].high);
            simt::mma(sum, a.high, b[j].low);
            simt::mma(sum, a.high, b[j].high);
            SIMT_UNROLL
            for (int e = 0; e < sum.count; ++e) sums[i][j][0].set(e, sums[i][j][0].get(e) + sum.get(e));
          }
        }
      }
    }
  }

  SIMT_DEVICE static void subtract(const Params& p, Index matrix, Index top, Index left,
                                   const simt::Accumulator<E> (&sums)[down][across][tall]) {
    const auto from = p.from.data + p.from.at(matrix, top, left);
    const auto to = p.to.data + p.to.at(matrix, top, left);
    const Index rows = p.row_end - top, columns = p.column_end - left, ahead = left - top;
    SIMT_UNROLL
    for (int i = 0; i < down; ++i) {
      SIMT_UNROLL
      for (int j = 0; j < across; ++j) {
        SIMT_UNROLL
        for (int part = 0; part < tall * sums[i][j][0].count; ++part) {
          const auto& sum = sums[i][j][part / sums[i][j][0].count];
          const int e = part % sum.count, t = part / sum.count;
          const int row = (i * tall + t) * Shape::m + sum.row(e), column = j * Shape::n + sum.col(e);
          if (row >= rows || column >= columns || (p.upper && row - column > ahead)) continue;
          const T old = from.load(row * p.from.row + column * p.from.column);
          to.store(row * p.to.row + column * p.to.column, old - sum.get(e));
        }
      }
    }
  }
};

template <class T, class Queue>
void enqueue_triangular_update(TriangularUpdateParams<T> p, Queue& queue) {
  using Kernel = TriangularUpdateKernel<T>;
  p.down = (p.row_end - p.row + Kernel::tile - 1) / Kernel::tile;
  p.across = (p.column_end - p.column + Kernel::tile - 1) / Kernel::tile;
  p.tiles = p.upper ? p.down * (p.down + 1) / 2 : p.down * p.across;
  const int corner = p.next_words ? corner_bytes<T>(p.next_rows) : 0;
  const int shared_bytes = corner > update_bytes<T>() ? corner : update_bytes<T>();
  queue.template launch<Kernel>({p.count * p.tiles, Kernel::max_threads, shared_bytes}, p);
}

}  // namespace freqrank::whitening::device
