#pragma once
// Gram matrices on a GPU: what gram.h describes, as one or two kernel launches. Host code without CUDA: plans can be
// made, read and tested anywhere; whitening/device/gram_launch.h runs them, on CUDA or under the host executor.
//
// A block makes one tile of one matrix from one part of the tokens, on the tensor cores' double precision. Tiles are
// converted on their way from shared memory to registers; no copy of X is made. Where Y is X only tiles that reach the
// diagonal or lie below it are made, and mirrored. Where tiles are too few for the GPU the tokens are split, and a
// second launch adds the parts up in order.
//
// An element's error is at most (kGramFlushTokens + flushes + parts + 2) u sqrt(G_ii G_jj), u = 2^-53 and G that of
// |weight|, below 1e-12 up to 1.8e7 tokens; rounding being random, it is nearer to the root of that many u.

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "common/gpu_limits.h"
#include "whitening/gram.h"

namespace freqrank::whitening {

constexpr int kGramBatchSizes = 6;  // batch dimensions that kernels can tell apart, those of size 1 apart

// So many tokens are summed in registers, then added to the result.
constexpr int kGramFlushTokens = 4096;

// The shapes that the kernel is compiled for: four warps, two by two, have a tile of X's columns by Y's columns.
struct GramShape {
  int rows, columns, min_blocks;
};
constexpr GramShape kGramShapes[] = {{128, 64, 2}, {64, 64, 3}};
constexpr int kGramShapeCount = static_cast<int>(sizeof kGramShapes / sizeof *kGramShapes);

struct GramDeviceProblem {
  BatchSizes batch;
  std::int64_t tokens = 0, rows = 0, columns = 0;  // X is tokens x rows, Y is tokens x columns
  Dtype x = Dtype::float32, y = Dtype::float32;    // of the tensors
  bool symmetric = false;                          // Y is X
  bool weighted = false, accumulate = false;
};

struct GramDevicePlan {
  GramDeviceProblem problem;
  Dtype element = Dtype::float32;  // of the tiles in shared memory: float64 where x and y differ
  int shape = 0;                   // of kGramShapes
  std::int64_t tiles_down = 0, tiles_across = 0, tiles = 0;  // of one matrix
  std::int64_t splits = 1, split_tokens = 0;
  std::int64_t blocks = 0;
  int threads = 0, shared_bytes = 0;
  std::size_t bytes = 0;  // workspace: float64 [blocks, tile], if the tokens are split
  // What the launches move: x, y and the weights by tiles, the result, and the workspace.
  std::int64_t read_bytes = 0, write_bytes = 0;
};

// Throws std::invalid_argument for more than kGramBatchSizes dimensions that are not 1.
GramDevicePlan plan_gram_device(const GramDeviceProblem& problem, const GpuLimits& limits);
std::size_t workspace_bytes(const GramDevicePlan& plan);

// For people: a line a launch.
std::string describe(const GramDevicePlan& plan);

}  // namespace freqrank::whitening
