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
  bool load_pairs, store_pairs;
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
  // Two elements at once where they and all rows start at a multiple of their size.
  const auto pairs = [&](const void* base, Index elements, Index stride, Dtype dtype,
                         std::int64_t BatchDim::* batch_stride) {
    bool even = stride == 1 && elements % 2 == 0 &&
                reinterpret_cast<std::uintptr_t>(base) % static_cast<std::uintptr_t>(2 * bytes_of(dtype)) == 0;
    for (const BatchDim& dim : step.batch) even = even && dim.*batch_stride % 2 == 0;
    return even;
  };
  t.load_pairs = pairs(pointers.in, axis.filled, axis.in_stride, step.from_dtype, &BatchDim::in_stride) &&
                 step.load != Tiling::by_row;
  t.rows = step.rows_per_block;
  t.n = static_cast<int>(axis.n);
  t.filled = static_cast<int>(axis.filled);
  t.stored = static_cast<int>(axis.out_size < axis.n ? axis.out_size : axis.n);
  t.padding = axis.out_size - t.stored;
  t.store_pairs = pairs(pointers.out, t.stored, axis.out_stride, step.to_dtype, &BatchDim::out_stride) &&
                  step.store != Tiling::by_row;
  t.in_stride = axis.in_stride;
  t.out_stride = axis.out_stride;
  t.by_rows = Divider(t.rows);
  t.by_filled = Divider(t.filled == 0 ? 1 : t.filled);
  t.by_stored = Divider(t.stored);
  t.offsets_at = step.shared_bytes - step.rows_per_block * kBlockRowBytes;
  return t;
}

// Loads that are in flight at once in each thread.
template <class T>
constexpr int tile_loads = sizeof(T) == 8 ? 4 : 8;

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

// Calls take(row, i, value) for every element that is read, and with 0 for those up to n that are not, for `rows` rows
// from `first` on. The caller has filled `offsets` unless the tile is flat, and puts barriers around.
template <class T, class Take>
SIMT_DEVICE void load_tile(const Tile& t, const RowOffsets& offsets, Index first, int rows, const Take& take) {
  constexpr int loads = tile_loads<T>;
  const int me = simt::thread(), step = simt::threads();
  const bool flat = t.load == Tiling::flat;
  if (t.load_pairs) {
    const int total = rows * t.filled;
    for (int e = 2 * me; e < total; e += loads * 2 * step) {
      Complex<T> x[loads];
      with_dtype<T>(t.from_dtype, [&](auto example) {
        using S = decltype(example);
        const auto in = t.in.template as<S>();
        simt::pack<S, 2> raw[loads] = {};
        SIMT_UNROLL
        for (int k = 0; k < loads; ++k) {
          const int at = e + k * 2 * step, row = t.by_filled.quotient(at);
          if (at >= total) continue;
          raw[k] = in.template load_vector<2>(flat ? first * t.filled + at : offsets.in(row) + (at - row * t.filled));
        }
        SIMT_UNROLL
        for (int k = 0; k < loads; ++k) {
          x[k] = {static_cast<T>(simt::to_float(raw[k][0])), static_cast<T>(simt::to_float(raw[k][1]))};
        }
      });
      SIMT_UNROLL
      for (int k = 0; k < loads; ++k) {
        const int at = e + k * 2 * step, row = t.by_filled.quotient(at);
        if (at >= total) continue;
        take(row, at - row * t.filled, x[k].re);
        take(row, at - row * t.filled + 1, x[k].im);
      }
    }
  } else {
    const int total = (t.load == Tiling::by_row ? t.rows : rows) * t.filled;
    for (int e = me; e < total; e += loads * step) {
      T x[loads];
      with_dtype<T>(t.from_dtype, [&](auto example) {
        using S = decltype(example);
        const auto in = t.in.template as<S>();
        S raw[loads] = {};
        SIMT_UNROLL
        for (int k = 0; k < loads; ++k) {
          const Place at = place_of(e + k * step, t.load, t, t.by_filled);
          if (e + k * step >= total || at.row >= rows) continue;
          raw[k] = in.load(flat ? first * t.filled + e + k * step : offsets.in(at.row) + at.element * t.in_stride);
        }
        SIMT_UNROLL
        for (int k = 0; k < loads; ++k) x[k] = static_cast<T>(simt::to_float(raw[k]));
      });
      SIMT_UNROLL
      for (int k = 0; k < loads; ++k) {
        const Place at = place_of(e + k * step, t.load, t, t.by_filled);
        if (e + k * step < total && at.row < rows) take(at.row, at.element, x[k]);
      }
    }
  }
  const int missing = t.n - t.filled;
  for (int row = 0; missing > 0 && row < rows; ++row) {
    for (int i = t.filled + me; i < t.n; i += step) take(row, i, T(0));
  }
}

// Writes give(row, i), element i of the result, for all that is stored of `rows` rows from `first` on.
template <class T, class Give>
SIMT_DEVICE void store_tile(const Tile& t, const RowOffsets& offsets, Index first, int rows, const Give& give) {
  const int me = simt::thread(), step = simt::threads();
  const bool flat = t.store == Tiling::flat;
  if (t.store_pairs) {
    for (int e = 2 * me; e < rows * t.stored; e += 2 * step) {
      const int row = t.by_stored.quotient(e), i = e - row * t.stored;
      const T x = give(row, i), y = give(row, i + 1);
      with_dtype<T>(t.to_dtype, [&](auto example) {
        using S = decltype(example);
        t.out.template as<S>().template store_vector<2>(flat ? first * t.stored + e : offsets.out(row) + i,
                                                        {{simt::from_float<S>(x), simt::from_float<S>(y)}});
      });
    }
  } else {
    const int total = (t.store == Tiling::by_row ? t.rows : rows) * t.stored;
    for (int e = me; e < total; e += step) {
      const Place at = place_of(e, t.store, t, t.by_stored);
      if (at.row >= rows) continue;
      const T x = give(at.row, at.element);
      with_dtype<T>(t.to_dtype, [&](auto example) {
        using S = decltype(example);
        t.out.template as<S>().store(flat ? first * t.stored + e : offsets.out(at.row) + at.element * t.out_stride,
                                     simt::from_float<S>(x));
      });
    }
  }
  with_dtype<T>(t.to_dtype, [&](auto example) {
    using S = decltype(example);
    for (int row = 0; t.padding > 0 && row < rows; ++row) {
      const auto behind = t.out.template as<S>() + (offsets.out(row) + t.stored * t.out_stride);
      for (Index i = me; i < t.padding; i += step) behind.store(i * t.out_stride, simt::from_float<S>(T(0)));
    }
  });
}

}  // namespace freqrank::dct::device
