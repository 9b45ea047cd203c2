#pragma once
// Transforms along two dimensions at once: a block keeps whole tiles in shared memory, transforms their rows on the way
// in and their columns on the way out. Each element is read once and written once; both sides are those of
// mixed_radix.h and bluestein.h, some rows or columns at a time.

#include "dct/device/bluestein.h"

namespace freqrank::dct::device {

template <class T>
struct Tile2dKernel {
  static constexpr const char* name = sizeof(T) == 8 ? "dct_tile_2d_double" : "dct_tile_2d";
  static constexpr int max_threads = kTile2dThreads, min_blocks = 2;
  struct Params {
    // The rows of all tiles one after another, of which the loads are used, and the columns, of which the stores are.
    RowParams<T> side[2];
    int count[2];  // rows and columns of a tile
    int tiles;     // of a block, the last block may have fewer
    Divider by_columns;
    int at, pitch;  // of the tiles in shared memory: a byte, real numbers from a row to the next
  };

  SIMT_DEVICE static void run(const Params& params) {
    const auto tiles = simt::shared_array<T>(params.at, params.tiles * params.count[0] * params.pitch);
    for (int s = 0; s < 2; ++s) {
      const RowParams<T>& p = params.side[s];
      const Tile& t = p.tile;
      const Rows<T> z(t.rows, p.fft);
      const RowOffsets offsets(t);
      const Index first = simt::block() * params.tiles * params.count[s];
      const Index left = t.batch.rows - first;
      const int total = params.tiles * params.count[s];
      const int end = left < total ? static_cast<int>(left) : total;
      for (int begin = 0; begin < end; begin += t.rows) {
        const int rows = end - begin < t.rows ? end - begin : t.rows;
        offsets.fill(t, first + begin, rows);
        simt::barrier();
        if (s == 0) {
          load_rows(p, z, offsets, first + begin, rows);
        } else {
          load_columns(params, tiles, z, begin, rows);
        }
        simt::barrier();
        if (!p.fused) before_fft(p, z, rows);
        all_stages<true>(p, z, rows, [&](int i) { fft_stage(p.fft, i, z, rows, p.roots); });
        if (!p.fused) after_fft(p, z, rows);
        if (s == 0) {
          const int count = rows * t.stored;
          for (int e = simt::thread(); e < count; e += simt::threads()) {
            const int row = t.by_stored.quotient(e), i = e - row * t.stored;
            tiles.store((begin + row) * params.pitch + i, get(p, z, row, i));
          }
        } else {
          store_rows(p, z, offsets, first + begin, rows);
        }
        simt::barrier();
      }
    }
  }

  // Columns [begin, begin + columns) of a block's tiles as rows. Those beyond the row transform's result are zero.
  SIMT_DEVICE static void load_columns(const Params& params, simt::shared<T> tiles, const Rows<T>& z, int begin,
                                       int columns) {
    const RowParams<T>& p = params.side[1];
    const Tile& t = p.tile;
    const int stored = params.side[0].tile.stored;
    for (int e = simt::thread(); e < columns * t.filled; e += simt::threads()) {
      const int column = t.by_filled.quotient(e), i = e - column * t.filled;
      const int tile = params.by_columns.quotient(begin + column), j = begin + column - tile * params.count[1];
      const T x = j < stored ? tiles.load((tile * t.filled + i) * params.pitch + j) : T(0);
      put(p, z, column, i, x);
    }
    const int missing = t.n - t.filled;
    for (int column = 0; missing > 0 && column < columns; ++column) {
      for (int i = t.filled + simt::thread(); i < t.n; i += simt::threads()) {
        put(p, z, column, i, T(0));
      }
    }
  }
};

template <class T, class Queue>
void enqueue_tile_2d_as(const Step& step, const StepPointers& pointers, Queue& queue) {
  typename Tile2dKernel<T>::Params p{};
  for (int s = 0; s < 2; ++s) p.side[s] = row_params<T>(step.sides[static_cast<std::size_t>(s)], pointers, queue);
  p.count[0] = static_cast<int>(step.axis[0].filled);
  p.count[1] = static_cast<int>(step.axis[1].out_size);
  p.tiles = step.rows_per_block;
  p.by_columns = Divider(p.count[1]);
  p.at = step.tile_at;
  p.pitch = step.tile_pitch;
  queue.template launch<Tile2dKernel<T>>({step.blocks, step.threads, step.shared_bytes}, p);
}

template <class Queue>
void enqueue_tile_2d(const Step& step, const StepPointers& pointers, Queue& queue) {
  if (step.wide) {
    enqueue_tile_2d_as<double>(step, pointers, queue);
  } else {
    enqueue_tile_2d_as<float>(step, pointers, queue);
  }
}

}  // namespace freqrank::dct::device
