#pragma once
// Cholesky factors, the whitening ladder and triangular solves on a GPU: what cholesky.h and triangular.h describe, as
// a list of kernel launches. Host code without CUDA: plans can be made, read and tested anywhere;
// device/cholesky_launch.h runs them, on CUDA or under the host executor.

#include <cstddef>
#include <cstdint>
#include <string>

#include "common/gpu_limits.h"
#include "whitening/cholesky.h"
#include "whitening/triangular.h"

namespace freqrank::whitening {

// Rows of X are solved some at a time, and what they leave to do for those after them is subtracted from these.
struct DeviceTriangularPlan {
  BatchSizes batch;
  std::int64_t n = 0, columns = 0;
  Dtype dtype = Dtype::float64;
  int rows = 0;  // of one step
  int shared_bytes = 0;
  std::int64_t launches = 0;
};

DeviceTriangularPlan plan_device_triangular(BatchSizes batch, std::int64_t n, std::int64_t columns, Dtype dtype,
                                            const GpuLimits& limits);
std::string describe(const DeviceTriangularPlan& plan);

// Where a factorisation takes place.
enum class CholeskyKernel {
  warp,    // some matrices in the registers of a warp
  block,   // one in the shared memory of a block
  panels,  // in global memory, some rows at a time: solve, update and factor the next block on the diagonal
};

struct DeviceCholeskyPlan {
  BatchSizes batch;
  std::int64_t n = 0;
  Dtype dtype = Dtype::float64;              // of the arithmetic and of the factor: float32 or float64
  bool ladder = false;                       // whitening
  std::int64_t right_sides = kNoRightSides;  // of A X = B for each matrix
  CholeskyKernel kernel = CholeskyKernel::warp;
  int columns = 0;             // warp: that a matrix may have, 8, 16 or 32
  int rows = 0;                // panels: of one step
  int threads = 0;             // block
  int width = 0;               // where they are solved in the same launch: right-hand sides that a block has at a time
  DeviceTriangularPlan solve;  // where they are not: of U^T Y = B and of U X = Y; its launches are then not 0
  int shared_bytes = 0;        // the most that a launch takes
  std::int64_t launches = 0;
  // Workspace of panels, bytes from its start: double [count] and int32 [2, levels, count].
  std::size_t means_at = 0, words_at = 0, bytes = 0;
};

// Throws std::invalid_argument where the GPU has too little shared memory.
DeviceCholeskyPlan plan_device_cholesky(BatchSizes batch, std::int64_t n, Dtype dtype, bool ladder,
                                        const GpuLimits& limits, std::int64_t right_sides = kNoRightSides);
std::size_t workspace_bytes(const DeviceCholeskyPlan& plan);
std::string describe(const DeviceCholeskyPlan& plan);

}  // namespace freqrank::whitening
