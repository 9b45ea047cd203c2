#pragma once
// Shared memory of the tensor-core scan, in bytes. Host code reads it for the plan.

#include "linear_attention/device.h"

namespace freqrank::linear_attention {

struct MmaLayout {
  int rows, columns, values;  // two buffers each, the second `*_bytes` behind the first
  int rows_bytes, values_bytes;
  int scores;
  int decay;        // float [2 chunks][4][chunk]: running sum, factor of the state, factor to the state, live
  int whole;        // float [2]
  int query;        // float [2 steps][2][chunk]: scale_t, add_t
  int weight;       // float [chunk]: what token j's column counts in the state
  int denominator;  // float [parts][chunk]
  int exponent;     // float [parts][chunk]: of a row of scores, float16 only
  int z;            // float [max(depth, tile)]
  int dots;         // float [warps][chunk]
  int exchange;     // float [2][2][chunk][warps], in the place of dots: feature_map.h, where the shape makes features
  int waiting;      // accumulators of a thread that wait in the place of the scores while it does
  int total;        // double: the segment's sum of log decays
  int facts;        // int64 [5], int32 [5]: what the block works on
  int bytes;        // but for `parked`
  int parked;       // float [values of a thread's accumulators][threads]: with several column heads
  int parked_bytes;
};

constexpr MmaLayout mma_layout(const MmaShape& s) {
  const int larger = s.depth > s.tile ? s.depth : s.tile;
  const int parts = s.warps / (s.chunk / 16);
  MmaLayout at{};
  int used = 0;
  const auto take = [&](int bytes) {
    const int begin = used;
    used += (bytes + 127) / 128 * 128;
    return begin;
  };
  at.rows_bytes = s.chunk * s.depth * 2;
  at.values_bytes = s.chunk * s.tile * 2;
  at.rows = take(2 * at.rows_bytes);
  at.columns = take(2 * at.rows_bytes);
  at.values = take(2 * at.values_bytes);
  at.scores = take(s.chunk * s.chunk * 2);
  at.decay = take(2 * 4 * s.chunk * 4);
  at.whole = take(2 * 4);
  at.query = take(2 * 2 * s.chunk * 4);
  at.weight = take(s.chunk * 4);
  at.denominator = take(parts * s.chunk * 4);
  at.exponent = take(parts * s.chunk * 4);
  at.z = take(larger * 4);
  at.dots = at.exchange = take((s.depth == s.tile ? 4 : 1) * s.warps * s.chunk * 4);
  at.waiting = s.depth == s.tile && s.depth * s.tile / s.warps / 32 >= 128 ? s.chunk * s.chunk / 2 / (32 * s.warps) : 0;
  at.total = take(8);
  at.facts = take(5 * 8 + 5 * 4);
  at.bytes = used;
  at.parked_bytes = s.chunk * s.tile * 4;
  at.parked = take(at.parked_bytes);
  return at;
}

}  // namespace freqrank::linear_attention
