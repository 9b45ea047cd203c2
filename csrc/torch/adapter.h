#pragma once
// What every adapter needs from torch. The families know nothing of torch; nothing else here does arithmetic.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include "common/half.h"
#include "common/parallel.h"

namespace freqrank::torch_adapter {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// torch's own thread pool, so torch.set_num_threads holds.
inline ParallelFor torch_parallel_for() {
  return [](std::int64_t n, std::int64_t grain, const RangeBody& body) {
    torch::stable::parallel_for(0, n, grain, [&](std::int64_t begin, std::int64_t end) { body(begin, end); });
  };
}

}  // namespace freqrank::torch_adapter
