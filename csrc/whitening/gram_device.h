#pragma once
// Gram matrices on a GPU: what gram.h describes, as one or two kernel launches. Host code without CUDA: plans can be
// made, read and tested anywhere; whitening/device/gram_launch.h runs them, on CUDA or under the host executor.
//
// A block makes one tile of one matrix from one part of the tokens. Where Y is X only tiles that reach the diagonal or
// lie below it are made, and mirrored. Where tiles are too few for the GPU the tokens are split, and another launch
// adds the parts up in order. No copy of X is made: tiles are converted on their way
//
//   - to the tensor cores' double precision (device/gram_mma.h), from shared memory to registers;
//   - on GPUs that are slow in double, to integers of seven digits of 8 bits whose products the tensor cores sum up
//     exactly (device/gram_integers.h), from global to shared memory, after a launch that finds each column's range.
//
// An element's error is at most c sqrt(G_ii G_jj), with G that of |weight|, u = 2^-53 and flushes of kGramFlushTokens
// tokens: c = (kGramFlushTokens + flushes + parts + 2) u by sums in double, 5e-13 and 1e-12 only after 2e7 tokens (as
// roundings are random, nearer to the root of that many u); c = 3e-14 + (flushes + parts + 6) u by sums of integers,
// and 1e-13 for 3e-14 with weights.

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

// A block's tile, of X's columns by Y's columns; blocks of an SM.
struct GramShape {
  int rows, columns, min_blocks;
};
// Those that the kernel for sums in double is compiled for: four warps, two by two.
constexpr GramShape kGramShapes[] = {{128, 64, 2}, {64, 64, 3}};
constexpr int kGramShapeCount = static_cast<int>(sizeof kGramShapes / sizeof *kGramShapes);
constexpr GramShape kGramIntegerShape = {64, 32, 2};

struct GramDeviceProblem {
  BatchSizes batch;
  std::int64_t tokens = 0, rows = 0, columns = 0;  // X is tokens x rows, Y is tokens x columns
  Dtype x = Dtype::float32, y = Dtype::float32;    // of the tensors
  bool symmetric = false;                          // Y is X
  bool weighted = false, accumulate = false;
};

struct GramDevicePlan {
  GramDeviceProblem problem;
  bool integers = false;           // sums of integers
  Dtype element = Dtype::float32;  // which kernel: float64 takes any dtypes, and weights by sums of integers
  int shape = 0;                   // of kGramShapes
  GramShape tile{};
  std::int64_t tiles_down = 0, tiles_across = 0, tiles = 0;  // of one matrix
  std::int64_t splits = 1, split_tokens = 0;
  std::int64_t blocks = 0;
  int threads = 0, shared_bytes = 0;
  // Workspace, bytes from its start: float64 [blocks, tile] if the tokens are split, and by sums of integers int32
  // [batch, chunks, columns] of X, and of Y if it is not X.
  std::int64_t chunks = 0;
  std::size_t x_exponents_at = 0, y_exponents_at = 0, bytes = 0;
  // What the launches move: x, y and the weights by tiles, the result, and the workspace. By sums of integers without
  // weights, and if all numbers are finite.
  std::int64_t read_bytes = 0, write_bytes = 0;
};

// Throws std::invalid_argument for more than kGramBatchSizes dimensions that are not 1.
GramDevicePlan plan_gram_device(const GramDeviceProblem& problem, const GpuLimits& limits);
std::size_t workspace_bytes(const GramDevicePlan& plan);

// For people: a line a launch.
std::string describe(const GramDevicePlan& plan);

}  // namespace freqrank::whitening
