#pragma once
// Triangular systems: A X = B, or X A = B.

#include <cstdint>

#include "common/parallel.h"
#include "whitening/matrix.h"

namespace freqrank::whitening {

struct TriangularPlan {
  BatchSizes batch;
  std::int64_t n, columns;  // A is n x n, and there are `columns` right-hand sides
  Dtype dtype;              // float32 or float64
  std::int64_t tiles;       // of the right-hand sides of one system
  std::int64_t slots;
};

struct TriangularArguments {
  MatrixBatch a, b, x;  // b and x are n x columns if `left`, else columns x n; x is b or overlaps none of the others
  bool upper = false, left = true, unit_triangular = false;
};

TriangularPlan plan_triangular(BatchSizes batch, std::int64_t n, std::int64_t columns, Dtype dtype);
std::int64_t workspace_bytes(const TriangularPlan& plan);
// Reads only the triangle of A that was named, without its diagonal if it is unit triangular. A zero on the diagonal
// divides by zero. `workspace` must be aligned to 64 bytes.
void run(const TriangularPlan& plan, const TriangularArguments& arguments, void* workspace,
         const ParallelFor& parallel_for);

}  // namespace freqrank::whitening
