#pragma once
// What the kernels of linear attention are given, and where a block stands in the sequences.

#include <type_traits>

#include "linear_attention/device.h"
#include "simt/simt.h"

namespace freqrank::linear_attention::device {

using simt::Index;

// A tensor [B,T,heads,width] of any strides, in elements.
struct Matrix {
  simt::const_global_bytes data;
  Index stride[4] = {};
  int heads = 0, width = 0;
  Dtype dtype = Dtype::float32;
  bool pieces = false;  // every 16 bytes from a multiple of 16 bytes of a row on lie together, aligned

  // Head r of the group that shares state s.
  SIMT_DEVICE int head(int state_head, int state_heads, int r) const { return state_head * heads / state_heads + r; }
  SIMT_DEVICE Index at(Index batch, Index token, int head) const {
    return batch * stride[0] + token * stride[1] + head * stride[2];
  }
};
struct Output {
  simt::global_bytes data;
  Index stride[4] = {};
  int heads = 0, width = 0;
  Dtype dtype = Dtype::float32;
  bool pieces = false;

  SIMT_DEVICE int head(int state_head, int state_heads, int r) const { return state_head * heads / state_heads + r; }
  SIMT_DEVICE Index at(Index batch, Index token, int head) const {
    return batch * stride[0] + token * stride[1] + head * stride[2];
  }
};

// States [N or slots, state heads, depth, width], or without the last dimension. T is const A or A.
template <class T>
struct States {
  simt::global<T> data;
  Index stride[4] = {};
  SIMT_DEVICE Index at(Index n, int head) const { return n * stride[0] + head * stride[1]; }
};

// Which tokens a block works on. Sequences are cut into segments of `length` tokens, each of which has a slot.
struct Segments {
  Index batch = 0, time = 0, sequences = 0;
  Index length = 0, per_sequence = 1, slots = 0;
  // With cu_seqlens, what device/segments.h made of them: for each slot its sequence (-1: none), first token and count
  // (negative: the offsets are wrong, and -1 - count tokens become NaN).
  simt::global<const Index> table;
};

struct Segment {
  Index sequence, batch, first, count;
  bool poisoned;
};

// Where a token's number is in an array [B,heads,T].
SIMT_DEVICE Index row_of(const Segments& s, int heads, Index batch, int head, Index token) {
  return (batch * heads + head) * s.time + token;
}

SIMT_DEVICE Segment segment_of(const Segments& s, Index slot) {
  if (s.table) {
    const Index count = s.table.load(3 * slot + 2);
    return {s.table.load(3 * slot), 0, s.table.load(3 * slot + 1), count < 0 ? -1 - count : count, count < 0};
  }
  const Index n = slot / s.per_sequence, first = (slot - n * s.per_sequence) * s.length;
  const Index left = s.time - first;
  return {n, n, first, left < s.length ? (left < 0 ? 0 : left) : s.length, false};
}

// What is known of each token beside the tensors.
template <class A>
struct TokenParams {
  simt::global<const unsigned char> mask;  // [B,T], may be null
  Index mask_stride[2] = {};
  Decay decay = Decay::none;
  simt::global<const A> log_decay;  // [Hs] or [B,T,Hs]
  Index decay_stride[3] = {};
};

// A feature map that tensor cores apply (feature_map.h).
struct MapParams {
  simt::const_global_bytes fragments;  // null: there is no map
  simt::global<const float> weights;   // [key heads, features], may be null
  Index weights_stride[2] = {};
  int heads = 1, key_heads = 1;         // heads: of the projection, 1 or key_heads
  int channel_tiles = 0, features = 0;  // channel_tiles: of 16
  Feature feature = Feature::none;

  SIMT_DEVICE int head(int state_head, int state_heads) const { return state_head * heads / state_heads; }
  SIMT_DEVICE int key_head(int state_head, int state_heads) const { return state_head * key_heads / state_heads; }
};

// One launch of the scan. With i and j tokens of a sequence, D(i, j) the decay between them (1 where i = j):
//
//   forward order   out_i = out_factor * sum over j <= i of D(i, j) P(i, j) values_j
//   reverse order   out_i = out_factor * sum over j >= i of D(j, i) P(i, j) values_j
//   P(i, j) = column_factor * (scale_t rows_i . columns_j + add_t)      t the query's token: i forward, j in reverse
//
// where all tokens of other segments are in the state, sum of decayed columns_j values_j^T with the same factors. A is
// the type of the arithmetic. Forward, dq, dk and dv are four such launches with the operands in other places.
template <class A>
struct ScanParams : TokenParams<A> {
  Segments segments;
  bool reverse = false, states_only = false;
  int state_heads = 1;
  int row_heads = 1, column_heads = 1;  // query heads that share a state, on the side that has query heads; else 1
  int rows_per_block = 1;               // of the row_heads
  int row_blocks = 1, width_tiles = 1;
  int depth = 1, width = 1;  // of columns and of values
  Matrix rows, columns, values;
  Output out;
  A column_factor = 1, out_factor = 1;

  // The normaliser. Forward: out is divided by out_factor * (sum of P + rows . z) + eps, which is kept in
  // `denominator`. Backward: scale_t and add_t of the queries; 1 and 0 where null.
  bool normalize = false;
  A eps = 0;
  simt::global<A> denominator;                   // [B,H,T]
  Output rest;                                   // what rounding takes from out; may be null
  simt::global<const A> query_scale, query_add;  // [B,H,T]
  int query_heads = 1;
  // z is a vector beside the state: the decayed sum of columns (key_sum, of length depth) or of values (value_sum, of
  // length width: weights 1 in forward order, add_t in reverse; out gets decay * (add_i or 1) * z).
  bool key_sum = false, value_sum = false;

  // By sequence, or by slot if the sequences are split. May be null.
  bool by_slot = false;
  States<const A> initial_state, initial_z;
  States<A> final_state, final_z;
  simt::global<double> segment_decay;  // [slots, Hs]: the sum of log_decay; may be null

  // For the gradient of the decay: (out_factor * what the state gives to out) . with, [tiles of the
  // width,B,out.heads,T].
  Matrix with;
  simt::global<A> dots;
  // The state and what it gives, or the scores, to float's accuracy though tensors have 16 bits.
  bool exact_state = false, exact_scores = false;

  // Which of rows, columns and values are the channels that a map makes the depth's or the width's features of.
  MapParams map;
  bool map_rows = false, map_columns = false, map_values = false;
};

// Where a block works.
struct Place {
  Index slot;
  int state_head, row_block, tile;
};

template <class A>
SIMT_DEVICE Place place_of(const ScanParams<A>& p) {
  Index b = simt::block();
  Place at;
  at.tile = static_cast<int>(b % p.width_tiles);
  b /= p.width_tiles;
  at.row_block = static_cast<int>(b % p.row_blocks);
  b /= p.row_blocks;
  at.state_head = static_cast<int>(b % p.state_heads);
  at.slot = b / p.state_heads;
  return at;
}

template <class A>
SIMT_DEVICE bool is_live(const TokenParams<A>& p, Index batch, Index token) {
  return !p.mask || p.mask.load(batch * p.mask_stride[0] + token * p.mask_stride[1]) != 0;
}

template <class T>
SIMT_DEVICE T not_a_number() {
  if constexpr (sizeof(T) == 8) {
    return simt::bits_as<T>(std::uint64_t{0x7ff8000000000000});
  } else {
    return simt::bits_as<T>(0x7fc00000u);
  }
}

// exp() of anything at or below this is 0. Larger sums stay exact enough to be subtracted.
template <class A>
constexpr A lowest_log_decay = sizeof(A) == 8 ? A(-800) : A(-128);

// NaN where a log decay is positive, which must not go unnoticed.
template <class A>
SIMT_DEVICE A bounded_log_decay(A g) {
  if (g < lowest_log_decay<A>) return lowest_log_decay<A>;
  return g > A(0) ? not_a_number<A>() : g;
}

// The logarithm of the decay at a token.
template <class A>
SIMT_DEVICE A log_decay_of(const TokenParams<A>& p, Index batch, Index token, int state_head) {
  if (p.decay == Decay::none) return A(0);
  return bounded_log_decay(
      p.decay == Decay::per_head
          ? p.log_decay.load(state_head * p.decay_stride[2])
          : p.log_decay.load(batch * p.decay_stride[0] + token * p.decay_stride[1] + state_head * p.decay_stride[2]));
}

// Calls f with a value of the element type.
template <class A, class F>
SIMT_DEVICE void with_dtype(Dtype dtype, const F& f) {
  if constexpr (sizeof(A) == 8) {
    f(double{});
  } else if (dtype == Dtype::float32) {
    f(float{});
  } else if (dtype == Dtype::float16) {
    f(float16{});
  } else {
    f(bfloat16{});
  }
}

// A block's part of the outputs when the offsets that it stands for are wrong.
template <class A>
SIMT_DEVICE void poison(const ScanParams<A>& p, const Place& place, const Segment& segment, int tile_width) {
  const A nan = not_a_number<A>();
  const int from = place.tile * tile_width;
  const int to = from + tile_width < p.width ? from + tile_width : p.width;
  const int columns = to - from;
  if (!p.states_only) {
    for (int r = 0; r < p.rows_per_block; ++r) {
      const int row = place.row_block * p.rows_per_block + r;
      if (row >= p.row_heads) break;
      const int head = p.out.head(place.state_head, p.state_heads, row);
      for (Index e = simt::thread(); e < segment.count * columns; e += simt::threads()) {
        const Index t = e / columns;
        const Index i = p.out.at(segment.batch, segment.first + t, head) + (from + e - t * columns) * p.out.stride[3];
        with_dtype<A>(p.out.dtype, [&](auto x) {
          using S = decltype(x);
          p.out.data.template as<S>().store(i, simt::from_float<S>(nan));
          if (p.rest.data)
            p.rest.data.template as<S>().store(
                p.rest.at(segment.batch, segment.first + t, head) + (from + e - t * columns) * p.rest.stride[3],
                simt::from_float<S>(nan));
        });
      }
      const int query = p.reverse ? 0 : place.state_head * p.query_heads / p.state_heads + row;
      for (Index t = simt::thread(); t < segment.count; t += simt::threads()) {
        const Index token = segment.first + t;
        if (p.normalize && place.tile == 0)
          p.denominator.store(row_of(p.segments, p.query_heads, segment.batch, query, token), nan);
        if (p.dots)
          p.dots.store(row_of(p.segments, p.out.heads, place.tile * p.segments.batch + segment.batch, head, token),
                       nan);
      }
    }
  }
  if (place.row_block != 0) return;
  const Index n = p.by_slot ? place.slot : segment.sequence;
  if (p.final_state.data && n >= 0) {
    for (int e = simt::thread(); e < p.depth * columns; e += simt::threads()) {
      const int d = e / columns, c = from + e - d * columns;
      p.final_state.data.store(
          p.final_state.at(n, place.state_head) + d * p.final_state.stride[2] + c * p.final_state.stride[3], nan);
    }
  }
  if (p.final_z.data && n >= 0) {
    const int begin = p.key_sum ? 0 : from, end = p.key_sum ? (place.tile == 0 ? p.depth : 0) : to;
    for (int i = begin + simt::thread(); i < end; i += simt::threads())
      p.final_z.data.store(p.final_z.at(n, place.state_head) + i * p.final_z.stride[2], nan);
  }
  if (p.segment_decay && place.tile == 0 && simt::thread() == 0)
    p.segment_decay.store(place.slot * p.state_heads + place.state_head, static_cast<double>(nan));
}

}  // namespace freqrank::linear_attention::device
