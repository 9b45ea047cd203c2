#pragma once
// Gram matrices in double precision: X^T diag(w) Y, products and sums in double whatever X and Y are stored in.

#include <cstdint>

#include "common/parallel.h"
#include "whitening/matrix.h"

namespace freqrank::whitening {

struct GramPlan {
  BatchSizes batch;
  std::int64_t tokens, rows, columns;           // X is tokens x rows, Y is tokens x columns
  bool symmetric;                               // Y is X: one half is computed and mirrored
  std::int64_t tile_rows, tile_columns, tiles;  // tiles of one matrix
  // The tokens are cut into `splits` parts, summed in order at the end. The cut depends on the sizes alone, so the
  // result is the same bit for bit on any number of threads.
  std::int64_t splits, split_tokens;
  std::int64_t slots;  // how many tiles may be in work at a time
};

struct GramArguments {
  MatrixBatch x, y;                // y is not looked at if the plan is symmetric
  const double* weight = nullptr;  // null, or one for each token
  std::int64_t weight_stride = 0;
  const std::int64_t* weight_batch_strides = nullptr;
  MatrixBatch out;          // float64
  bool accumulate = false;  // add to `out` instead of writing it
};

GramPlan plan_gram(BatchSizes batch, std::int64_t tokens, std::int64_t rows, std::int64_t columns, bool symmetric);
std::int64_t workspace_bytes(const GramPlan& plan);
// `workspace` must be aligned to 64 bytes.
void run(const GramPlan& plan, const GramArguments& arguments, void* workspace, const ParallelFor& parallel_for);

}  // namespace freqrank::whitening
