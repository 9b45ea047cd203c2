#pragma once
// What the code compiled once for each instruction set offers to the drivers in linear_attention.cpp.

#include "linear_attention/linear_attention.h"

namespace freqrank::linear_attention {

// Columns of every scratch tile come in multiples of this, whatever the instruction set.
constexpr std::int64_t pad = 16;

static inline std::int64_t round_up(std::int64_t x, std::int64_t to) { return (x + to - 1) / to * to; }

// How a pass goes over the segments of the sequences.
enum class Stage {
  whole,  // a task takes the sequences of a part, one segment after another
  // or, if the plan is split:
  sums,      // a task sums up what one segment adds to the state,
  starts,    // a task carries those sums through one sequence,
  segments,  // a task takes one segment, with the state at its start
};

// Segments are numbered through all sequences; some numbers at the end of a sequence may be unused.
static inline std::int64_t first_slot(const Sizes& sizes, const std::int64_t* cu_seqlens, std::int64_t sequence,
                                      std::int64_t length) {
  return sequence + (cu_seqlens == nullptr ? sequence * (sizes.time / length) : cu_seqlens[sequence] / length);
}
static inline std::int64_t slots(const Sizes& sizes, std::int64_t length) {
  return sizes.batch * (sizes.time / length) + sizes.sequences;
}

// Elements of a padded state and its z, and of what a segment keeps of it: the decay across the segment comes with it.
static inline std::int64_t state_elements(const Sizes& sizes) {
  return round_up(sizes.key_dim, pad) * (round_up(sizes.value_dim, pad) + 1);
}
static inline std::int64_t sum_elements(const Sizes& sizes) { return state_elements(sizes) + pad; }

// Elements of the gradient of a feature map: [C,M], then those of the weights.
static inline std::int64_t map_columns(const Sizes& sizes) {
  return sizes.feature == Feature::softmax_pm ? sizes.key_dim / 2 : sizes.key_dim;
}
static inline std::int64_t map_elements(const Sizes& sizes) {
  return sizes.channels * map_columns(sizes) + sizes.key_dim;
}

// Parts of the workspace that tasks share. Slots are those of segments, chunk slots those of chunks.
struct Shared {
  void* sums = nullptr;          // [slots,Hs,sum_elements] arithmetic type: sums, then starts of segments, if split
  void* reciprocal = nullptr;    // [B,T,H] arithmetic type: 1 / denominator
  void* ddenominator = nullptr;  // [B,T,H] arithmetic type: gradient of the denominator
  double* q_dq = nullptr;        // [B,T,Hs]: q . (the part of dq that comes from before the chunk)
  double* decay_sums = nullptr;  // [slots,Hs]: sum over a segment of the decay's gradient
  void* states = nullptr;        // [chunk slots,Hs,state_elements] arithmetic type: the state before each chunk
  void* map_sums = nullptr;      // [slots,Hk,map_elements] arithmetic type: gradient from a segment, if split
  double* map_totals = nullptr;  // [parts,Hk,map_elements]
};

#define FREQRANK_LINEAR_ATTENTION_VARIANT(isa)                                                                        \
  namespace isa {                                                                                                     \
  void forward_task(const Plan& plan, const Inputs& in, const ForwardOutputs& out, const Shared& shared, Stage stage, \
                    std::int64_t task, void* lane);                                                                   \
  void backward_query_task(const Plan& plan, const Inputs& in, const BackwardArguments& args, const Shared& shared,   \
                           Stage stage, std::int64_t task, void* lane);                                               \
  void backward_key_task(const Plan& plan, const Inputs& in, const BackwardArguments& args, const Shared& shared,     \
                         Stage stage, std::int64_t task, void* lane);                                                 \
  void step_task(const Sizes& sizes, const StepArguments& args, std::int64_t task);                                   \
  std::size_t forward_lane_bytes(const Plan& plan);                                                                   \
  std::size_t backward_lane_bytes(const Plan& plan);                                                                  \
  }
FREQRANK_LINEAR_ATTENTION_VARIANT(baseline)
FREQRANK_LINEAR_ATTENTION_VARIANT(avx2)
FREQRANK_LINEAR_ATTENTION_VARIANT(avx512)
#undef FREQRANK_LINEAR_ATTENTION_VARIANT

}  // namespace freqrank::linear_attention
