#include "linear_attention/linear_attention.h"

#include <algorithm>
#include <atomic>

#include "common/isa.h"
#include "linear_attention/kernels.h"

namespace freqrank::linear_attention {

namespace {

constexpr std::size_t alignment = 64;

std::size_t aligned(std::size_t bytes) { return (bytes + alignment - 1) / alignment * alignment; }

Plan plan_common(const Sizes& sizes) {
  Plan plan;
  plan.sizes = sizes;
  // Work inside a chunk grows with its length, work between chunks shrinks; small heads want short chunks.
  plan.chunk = std::max(sizes.key_dim, sizes.value_dim) <= 32 ? 32 : 64;
  plan.value_tile = sizes.value_dim;
  return plan;
}

std::int64_t value_tiles(const Plan& plan) {
  return plan.value_tile == 0 ? 1 : (plan.sizes.value_dim + plan.value_tile - 1) / plan.value_tile;
}

// Tasks are handed out one by one; each belongs to nobody's thread and writes only what is its own.
template <class Task>
void for_each_task(std::int64_t tasks, const Plan& plan, char* lanes, const ParallelFor& parallel_for,
                   const Task& task) {
  std::atomic<std::int64_t> next{0};
  parallel_for(std::min(plan.lanes, tasks), 1, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t lane = begin; lane < end; ++lane) {
      for (std::int64_t i = next++; i < tasks; i = next++)
        task(i, lanes + plan.lane_bytes * static_cast<std::size_t>(lane));
    }
  });
}

char* align(void* workspace) { return reinterpret_cast<char*>(aligned(reinterpret_cast<std::uintptr_t>(workspace))); }

// Lays out the parts that tasks share; with a null base it only measures.
std::size_t lay_out(const Plan& plan, char* base, Shared* shared) {
  const Sizes& s = plan.sizes;
  const auto real = s.double_precision ? sizeof(double) : sizeof(float);
  std::size_t used = 0;
  const auto take = [&](std::int64_t count, std::size_t size) {
    char* part = base == nullptr ? nullptr : base + used;
    used += aligned(static_cast<std::size_t>(count) * size);
    return part;
  };
  Shared out;
  if (s.normalize) {
    out.reciprocal = take(s.batch * s.time * s.heads, real);
    out.ddenominator = take(s.batch * s.time * s.heads, real);
  }
  if (s.decay_gradient) {
    out.q_dq = reinterpret_cast<double*>(take(s.batch * s.time * s.state_heads, sizeof(double)));
    out.head_sums = reinterpret_cast<double*>(take(s.sequences * s.state_heads, sizeof(double)));
    const std::int64_t slots = s.batch * (s.time / plan.chunk) + s.sequences;
    out.states = take(slots * s.state_heads * round_up(s.key_dim, pad) * (s.value_dim + 1), real);
  }
  if (shared != nullptr) *shared = out;
  return used;
}

}  // namespace

Plan plan_forward(const Sizes& sizes, std::int64_t threads) {
  Plan plan = plan_common(sizes);
  // Few sequences and heads: columns of v are independent of each other, the scores are computed again for each tile.
  if (sizes.sequences * sizes.key_heads < 8 && sizes.value_dim > 64) plan.value_tile = 64;
  plan.lanes = std::max<std::int64_t>(
      1, std::min(std::max<std::int64_t>(threads, 1), sizes.sequences * sizes.key_heads * value_tiles(plan)));
  plan.lane_bytes = aligned(FREQRANK_DISPATCH(forward_lane_bytes, plan));
  return plan;
}

Plan plan_backward(const Sizes& sizes, std::int64_t threads) {
  Plan plan = plan_common(sizes);
  plan.lanes =
      std::max<std::int64_t>(1, std::min(std::max<std::int64_t>(threads, 1), sizes.sequences * sizes.key_heads));
  plan.lane_bytes = aligned(FREQRANK_DISPATCH(backward_lane_bytes, plan));
  return plan;
}

std::size_t workspace_bytes_forward(const Plan& plan) {
  return plan.lane_bytes * static_cast<std::size_t>(plan.lanes) + alignment;
}

std::size_t workspace_bytes_backward(const Plan& plan) {
  return workspace_bytes_forward(plan) + lay_out(plan, nullptr, nullptr);
}

void run_forward(const Plan& plan, const Inputs& in, const ForwardOutputs& out, void* workspace,
                 const ParallelFor& parallel_for) {
  const Sizes& s = plan.sizes;
  for_each_task(s.sequences * s.key_heads * value_tiles(plan), plan, align(workspace), parallel_for,
                [&](std::int64_t task, void* lane) { FREQRANK_DISPATCH(forward_task, plan, in, out, task, lane); });
}

void run_backward(const Plan& plan, const Inputs& in, const BackwardArguments& args, void* workspace,
                  const ParallelFor& parallel_for) {
  const Sizes& s = plan.sizes;
  char* lanes = align(workspace);
  Shared shared;
  lay_out(plan, lanes + plan.lane_bytes * static_cast<std::size_t>(plan.lanes), &shared);
  const std::int64_t tasks = s.sequences * s.key_heads;
  for_each_task(tasks, plan, lanes, parallel_for, [&](std::int64_t task, void* lane) {
    FREQRANK_DISPATCH(backward_query_task, plan, in, args, shared, task, lane);
  });
  for_each_task(tasks, plan, lanes, parallel_for, [&](std::int64_t task, void* lane) {
    FREQRANK_DISPATCH(backward_key_task, plan, in, args, shared, task, lane);
  });
  if (s.decay_gradient && s.decay == Decay::per_head) {
    for (std::int64_t h = 0; h < s.state_heads; ++h) {
      double sum = 0;
      for (std::int64_t n = 0; n < s.sequences; ++n) sum += shared.head_sums[n * s.state_heads + h];
      const std::int64_t at = h * args.dlog_decay.stride[2];
      if (s.double_precision) {
        static_cast<double*>(args.dlog_decay.data)[at] = sum;
      } else {
        static_cast<float*>(args.dlog_decay.data)[at] = static_cast<float>(sum);
      }
    }
  }
}

void run_step(const Sizes& sizes, const StepArguments& args, const ParallelFor& parallel_for) {
  const std::int64_t grain =
      std::max<std::int64_t>(1, 32768 / std::max<std::int64_t>(1, sizes.key_dim * sizes.value_dim));
  parallel_for(sizes.batch * sizes.state_heads, grain, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t task = begin; task < end; ++task) FREQRANK_DISPATCH(step_task, sizes, args, task);
  });
}

}  // namespace freqrank::linear_attention
