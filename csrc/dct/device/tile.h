#pragma once
// A block's rows between global and shared memory: converting, cropping, padding with zeros, in whole vectors where
// rows lie without a gap, coalesced along rows or across them elsewhere.

#include "dct/device/params.h"

namespace freqrank::dct::device {

struct Tile {
  Batch batch;
  simt::const_global_bytes in;
  simt::global_bytes out;
  Dtype from_dtype, to_dtype;
  Tiling load, store;
  bool load_vectors, store_vectors;
  int rows;               // of a block, the last block may have fewer
  int n, filled, stored;  // elements of a row, those read, those written
  Index padding;          // zeros written behind them
  Index in_stride, out_stride;
  Divider by_rows, by_filled, by_stored;
  int offsets_at;  // byte of shared memory where kBlockRowBytes for each row begin
};

template <class Queue>
Tile tile_of(const Step& step, const StepPointers& pointers, const Queue& queue) {
  const Axis& axis = step.axis[0];
  Tile t{};
  t.batch = batch_of(step);
  t.in = input_of(step, pointers, queue);
  t.out = output_of(step, pointers, queue);
  t.from_dtype = step.from_dtype;
  t.to_dtype = step.to_dtype;
  t.load = step.load;
  t.store = step.store;
  // Every tile of a flat tensor starts with a whole vector if the first one does and a tile is whole vectors long.
  const auto vectors = [&](const void* base, Index elements, Dtype dtype) {
    const Index bytes = step.rows_per_block * elements * bytes_of(dtype);
    return reinterpret_cast<std::uintptr_t>(base) % 16 == 0 && (bytes % 16 == 0 || step.blocks == 1);
  };
  t.load_vectors = vectors(pointers.in, axis.filled, step.from_dtype);
  t.store_vectors = vectors(pointers.out, axis.out_size, step.to_dtype);
  t.rows = step.rows_per_block;
  t.n = static_cast<int>(axis.n);
  t.filled = static_cast<int>(axis.filled);
  t.stored = static_cast<int>(axis.out_size < axis.n ? axis.out_size : axis.n);
  t.padding = axis.out_size - t.stored;
  t.in_stride = axis.in_stride;
  t.out_stride = axis.out_stride;
  t.by_rows = Divider(t.rows);
  t.by_filled = Divider(t.filled == 0 ? 1 : t.filled);
  t.by_stored = Divider(t.stored);
  t.offsets_at = step.shared_bytes - step.rows_per_block * kBlockRowBytes;
  return t;
}

// Loads and stores that are in flight at once in each thread.
constexpr int kTileVectors = 4, kTileElements = 4;

// Where the rows of a tile start: filled and read by the whole block, a barrier between.
class RowOffsets {
 public:
  SIMT_DEVICE explicit RowOffsets(const Tile& t) : at_(simt::shared_array<Index>(t.offsets_at, 2 * t.rows)) {}
  SIMT_DEVICE void fill(const Tile& t, Index first, int rows) const {
    for (int r = simt::thread(); r < rows; r += simt::threads()) {
      const Offsets at = offsets_of(t.batch, first + r);
      at_.store(2 * r, at.in);
      at_.store(2 * r + 1, at.out);
    }
  }
  SIMT_DEVICE Index in(int row) const { return at_.load(2 * row); }
  SIMT_DEVICE Index out(int row) const { return at_.load(2 * row + 1); }

 private:
  simt::shared<Index> at_;
};

struct Place {
  int row, element;
};

// The e-th element of a tile of rows of `count` elements, neighbours beside each other in memory.
SIMT_DEVICE Place place_of(int e, Tiling tiling, const Tile& t, const Divider& count) {
  if (tiling == Tiling::by_row) {
    const int element = t.by_rows.quotient(e);
    return {e - element * t.rows, element};
  }
  const int row = count.quotient(e);
  return {row, e - row * count.divisor()};
}

// Calls take(row, element, value) for every element that is read, and with 0 for those up to n that are not, for `rows`
// rows from `first` on. The caller has filled `offsets` unless the tile is flat, and puts barriers around.
template <class T, class Take>
SIMT_DEVICE void load_tile(const Tile& t, const RowOffsets& offsets, Index first, int rows, const Take& take) {
  const int me = simt::thread(), step = simt::threads();
  with_dtype<T>(t.from_dtype, [&](auto example) {
    using S = decltype(example);
    const auto in = t.in.template as<S>();
    int scalars = 0;  // elements that vectors have taken
    if (t.load == Tiling::flat && t.load_vectors) {
      constexpr int V = 16 / static_cast<int>(sizeof(S));
      const auto tile = in + first * t.filled;
      const int vectors = rows * t.filled / V;
      scalars = vectors * V;
      for (int v = me; v < vectors; v += kTileVectors * step) {
        simt::pack<S, V> x[kTileVectors] = {};
        SIMT_UNROLL
        for (int k = 0; k < kTileVectors; ++k) {
          if (v + k * step < vectors) x[k] = tile.template load_vector<V>(static_cast<Index>(v + k * step) * V);
        }
        SIMT_UNROLL
        for (int k = 0; k < kTileVectors; ++k) {
          if (v + k * step >= vectors) continue;
          const int e = (v + k * step) * V;
          int row = t.by_filled.quotient(e), i = e - row * t.filled;
          SIMT_UNROLL
          for (int j = 0; j < V; ++j) {
            take(row, i, static_cast<T>(simt::to_float(x[k][j])));
            if (++i == t.filled) {
              i = 0;
              ++row;
            }
          }
        }
      }
    }
    const bool flat = t.load == Tiling::flat;
    const int total = t.load == Tiling::by_row ? t.rows * t.filled : rows * t.filled;
    for (int e = scalars + me; e < total; e += kTileElements * step) {
      S x[kTileElements] = {};
      SIMT_UNROLL
      for (int k = 0; k < kTileElements; ++k) {
        if (e + k * step >= total) continue;
        const Place at = place_of(e + k * step, t.load, t, t.by_filled);
        if (at.row >= rows) continue;
        x[k] = in.load(flat ? first * t.filled + e + k * step : offsets.in(at.row) + at.element * t.in_stride);
      }
      SIMT_UNROLL
      for (int k = 0; k < kTileElements; ++k) {
        if (e + k * step >= total) continue;
        const Place at = place_of(e + k * step, t.load, t, t.by_filled);
        if (at.row < rows) take(at.row, at.element, static_cast<T>(simt::to_float(x[k])));
      }
    }
  });
  const int missing = t.n - t.filled;
  for (int row = 0; missing > 0 && row < rows; ++row) {
    for (int i = t.filled + me; i < t.n; i += step) take(row, i, T(0));
  }
}

// Writes give(row, element), an element of the result, for all that is stored of `rows` rows from `first` on.
template <class T, class Give>
SIMT_DEVICE void store_tile(const Tile& t, const RowOffsets& offsets, Index first, int rows, const Give& give) {
  const int me = simt::thread(), step = simt::threads();
  with_dtype<T>(t.to_dtype, [&](auto example) {
    using S = decltype(example);
    const auto out = t.out.template as<S>();
    int scalars = 0;
    if (t.store == Tiling::flat && t.store_vectors) {
      constexpr int V = 16 / static_cast<int>(sizeof(S));
      const auto tile = out + first * t.stored;
      const int vectors = rows * t.stored / V;
      scalars = vectors * V;
      for (int v = me; v < vectors; v += step) {
        int row = t.by_stored.quotient(v * V), i = v * V - row * t.stored;
        simt::pack<S, V> x;
        SIMT_UNROLL
        for (int j = 0; j < V; ++j) {
          x[j] = simt::from_float<S>(give(row, i));
          if (++i == t.stored) {
            i = 0;
            ++row;
          }
        }
        tile.template store_vector<V>(static_cast<Index>(v) * V, x);
      }
    }
    const bool flat = t.store == Tiling::flat;
    const int total = t.store == Tiling::by_row ? t.rows * t.stored : rows * t.stored;
    for (int e = scalars + me; e < total; e += step) {
      const Place at = place_of(e, t.store, t, t.by_stored);
      if (at.row >= rows) continue;
      out.store(flat ? first * t.stored + e : offsets.out(at.row) + at.element * t.out_stride,
                simt::from_float<S>(give(at.row, at.element)));
    }
    for (int row = 0; t.padding > 0 && row < rows; ++row) {
      const auto behind = out + (offsets.out(row) + t.stored * t.out_stride);
      for (Index i = me; i < t.padding; i += step) behind.store(i * t.out_stride, simt::from_float<S>(T(0)));
    }
  });
}

}  // namespace freqrank::dct::device
