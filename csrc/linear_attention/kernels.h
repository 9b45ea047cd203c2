#pragma once
// What the code compiled once for each instruction set offers to the drivers in linear_attention.cpp.

#include "linear_attention/linear_attention.h"

namespace freqrank::linear_attention {

// Parts of the workspace that tasks of the backward pass share; doubles whatever the arithmetic.
struct Shared {
  void* reciprocal = nullptr;    // [B,T,H] arithmetic type: 1 / denominator
  void* ddenominator = nullptr;  // [B,T,H] arithmetic type: gradient of the denominator
  double* q_dq = nullptr;        // [B,T,Hs]: q . (the part of dq that comes from before the chunk)
  double* head_sums = nullptr;   // [N,Hs]: sum over a sequence of the decay's gradient
  void* states = nullptr;        // [slots,Hs,V+1,padded K] arithmetic type: S^T and z before each chunk but the first
};

// Columns of every scratch tile come in multiples of this, whatever the instruction set.
constexpr std::int64_t pad = 16;

static inline std::int64_t round_up(std::int64_t x, std::int64_t to) { return (x + to - 1) / to * to; }

#define FREQRANK_LINEAR_ATTENTION_VARIANT(isa)                                                                      \
  namespace isa {                                                                                                   \
  void forward_task(const Plan& plan, const Inputs& in, const ForwardOutputs& out, std::int64_t task, void* lane);  \
  void backward_query_task(const Plan& plan, const Inputs& in, const BackwardArguments& args, const Shared& shared, \
                           std::int64_t task, void* lane);                                                          \
  void backward_key_task(const Plan& plan, const Inputs& in, const BackwardArguments& args, const Shared& shared,   \
                         std::int64_t task, void* lane);                                                            \
  void step_task(const Sizes& sizes, const StepArguments& args, std::int64_t task);                                 \
  std::size_t forward_lane_bytes(const Plan& plan);                                                                 \
  std::size_t backward_lane_bytes(const Plan& plan);                                                                \
  }
FREQRANK_LINEAR_ATTENTION_VARIANT(baseline)
FREQRANK_LINEAR_ATTENTION_VARIANT(avx2)
FREQRANK_LINEAR_ATTENTION_VARIANT(avx512)
#undef FREQRANK_LINEAR_ATTENTION_VARIANT

}  // namespace freqrank::linear_attention
