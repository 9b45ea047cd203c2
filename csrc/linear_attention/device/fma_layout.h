#pragma once
// The numbers of the scan on FMA units (scan_fma.h): its tile and its shared memory. Needs no CUDA.

#include <algorithm>

#include "common/gpu_limits.h"

namespace freqrank::linear_attention {

constexpr int kFmaThreads = 256, kFmaChunk = 64;
constexpr int kFmaSlice = 64;  // of the depth: as much of rows and columns as is in shared memory at a time

// In bytes from the start of shared memory, `..._at`.
struct FmaLayout {
  int chunk = kFmaChunk, tile = 0, threads = kFmaThreads, shared_bytes = 0;
  int depth = 0, slices = 0;          // a multiple of 16
  int rows_at = 0;                    // [chunk, pitch]: rows, and when they have been used, the scores
  int columns_at = 0, values_at = 0;  // [chunk, pitch], [chunk, tile]
  int state_at = 0, z_at = 0;         // [depth, tile], [depth or tile]
  int log_decay_at = 0, live_at = 0;  // [chunk] double: sums up to each token; [chunk] int: is it there, unmasked
  int row_factor_at = 0, column_factor_at = 0, scale_at = 0, add_at = 0;  // [chunk]
  int partial_at = 0;                                                     // [6, chunk]: parts of a sum over each row
};

// Elements from a row of `rows`, `columns` and the scores to the next: an odd number of 16-byte pieces, so that rows
// below each other share no bank.
constexpr int fma_pitch(bool wide) { return kFmaSlice + (wide ? 2 : 4); }

// `wide`: float64.
inline FmaLayout fma_layout_for_tile(int depth, int tile, bool wide) {
  const int element = wide ? 8 : 4;
  FmaLayout out;
  out.tile = tile;
  out.depth = (std::max(depth, 1) + 15) / 16 * 16;
  out.slices = (out.depth + kFmaSlice - 1) / kFmaSlice;
  const auto take = [&](int elements, int bytes) {  // always a multiple of 16 bytes
    const int at = out.shared_bytes;
    out.shared_bytes += elements * bytes;
    return at;
  };
  out.rows_at = take(kFmaChunk * fma_pitch(wide), element);
  out.columns_at = take(kFmaChunk * fma_pitch(wide), element);
  out.values_at = take(kFmaChunk * tile, element);
  out.state_at = take(out.depth * tile, element);
  out.z_at = take(std::max(out.depth, tile), element);
  out.log_decay_at = take(kFmaChunk, 8);
  out.live_at = take(kFmaChunk, 4);
  out.row_factor_at = take(kFmaChunk, element);
  out.column_factor_at = take(kFmaChunk, element);
  out.scale_at = take(kFmaChunk, element);
  out.add_at = take(kFmaChunk, element);
  out.partial_at = take(6 * kFmaChunk, element);
  return out;
}

// The tile has 16 pieces of 16 bytes, or 8 where the width needs no more or the GPU has no room for them.
inline FmaLayout fma_layout(int depth, int width, bool wide, const GpuLimits& limits) {
  const int half = wide ? 16 : 32;
  const FmaLayout whole = fma_layout_for_tile(depth, 2 * half, wide);
  return width > half && whole.shared_bytes <= limits.shared_bytes ? whole : fma_layout_for_tile(depth, half, wide);
}

}  // namespace freqrank::linear_attention
