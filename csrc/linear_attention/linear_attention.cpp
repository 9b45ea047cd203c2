#include "linear_attention/linear_attention.h"

#include <algorithm>
#include <atomic>
#include <cstring>

#include "common/isa.h"
#include "linear_attention/kernels.h"

namespace freqrank::linear_attention {

namespace {

constexpr std::size_t alignment = 64;

std::size_t aligned(std::size_t bytes) { return (bytes + alignment - 1) / alignment * alignment; }

Plan plan_common(const Sizes& sizes, std::int64_t threads) {
  Plan plan;
  plan.sizes = sizes;
  // Work inside a chunk grows with its length, work between chunks shrinks, and grows with the heads. For the decay's
  // gradient the state before each chunk is kept: fewer of them.
  const std::int64_t dim = std::max(sizes.key_dim, sizes.value_dim);
  plan.chunk = sizes.decay_gradient && dim > 32 ? 64 : dim <= 128 ? 32 : 48;
  plan.segment = 512 / plan.chunk * plan.chunk;
  // A part has a sum of its own of the feature map's gradient: few parts, however many sequences there are.
  plan.parts = sizes.sequences;
  if (sizes.map_gradient) {
    plan.parts = std::min(plan.parts, std::max<std::int64_t>(1, 64 / std::max<std::int64_t>(1, sizes.key_heads)));
  }
  // Split, there is a third more to do, spread evenly; not split, threads wait while the last ones work.
  threads = std::max<std::int64_t>(1, threads);
  const std::int64_t tasks = plan.parts * sizes.key_heads, rounds = (tasks + threads - 1) / threads;
  plan.split = sizes.time > plan.segment && 3 * rounds * threads > 4 * tasks;
  const std::int64_t most = plan.split ? slots(sizes, plan.segment) * sizes.key_heads : tasks;
  plan.lanes = std::max<std::int64_t>(1, std::min(threads, most));
  return plan;
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
std::size_t lay_out(const Plan& plan, bool backward, char* base, Shared* shared) {
  const Sizes& s = plan.sizes;
  const auto real = s.double_precision ? sizeof(double) : sizeof(float);
  std::size_t used = 0;
  const auto take = [&](std::int64_t count, std::size_t size) {
    char* part = base == nullptr ? nullptr : base + used;
    used += aligned(static_cast<std::size_t>(count) * size);
    return part;
  };
  const std::int64_t segments = slots(s, plan.segment);
  Shared out;
  if (plan.split) out.sums = take(segments * s.state_heads * sum_elements(s), real);
  if (backward && s.normalize) {
    out.reciprocal = take(s.batch * s.time * s.heads, real);
    out.ddenominator = take(s.batch * s.time * s.heads, real);
  }
  if (backward && s.decay_gradient) {
    out.q_dq = reinterpret_cast<double*>(take(s.batch * s.time * s.state_heads, sizeof(double)));
    out.decay_sums = reinterpret_cast<double*>(take(segments * s.state_heads, sizeof(double)));
    out.states = take(slots(s, plan.chunk) * s.state_heads * state_elements(s), real);
  }
  if (backward && s.map_gradient) {
    out.map_totals = reinterpret_cast<double*>(take(plan.parts * s.key_heads * map_elements(s), sizeof(double)));
    if (plan.split) out.map_sums = take(segments * s.key_heads * map_elements(s), real);
  }
  if (shared != nullptr) *shared = out;
  return used;
}

std::size_t workspace_bytes(const Plan& plan, bool backward) {
  return plan.lane_bytes * static_cast<std::size_t>(plan.lanes) + alignment + lay_out(plan, backward, nullptr, nullptr);
}

// A pass over all segments. task(stage, i, lane)
template <class Task>
void for_each_segment(const Plan& plan, char* lanes, const ParallelFor& parallel_for, const Task& task) {
  const Sizes& s = plan.sizes;
  const auto stage = [&](Stage which, std::int64_t tasks) {
    for_each_task(tasks, plan, lanes, parallel_for, [&](std::int64_t i, void* lane) { task(which, i, lane); });
  };
  if (!plan.split) return stage(Stage::whole, plan.parts * s.key_heads);
  const std::int64_t segments = slots(s, plan.segment) * s.key_heads;
  stage(Stage::sums, segments);
  stage(Stage::starts, s.sequences * s.key_heads);
  stage(Stage::segments, segments);
}

void store(const View& view, std::int64_t at, double x) {
  if (view.dtype == Dtype::float64) {
    static_cast<double*>(view.data)[at] = x;
  } else {
    static_cast<float*>(view.data)[at] = static_cast<float>(x);
  }
}

// The sums of segments onto the totals of their parts, in the order in which a task that takes all of a part does it.
template <class Real>
void add_map_sums(const Plan& plan, const Inputs& in, const Shared& shared, bool reverse) {
  const Sizes& s = plan.sizes;
  const std::int64_t n = map_elements(s);
  for (std::int64_t part = 0; part < plan.parts; ++part) {
    const auto slot_of = [&](std::int64_t sequence) {
      return sequence == s.sequences ? slots(s, plan.segment) : first_slot(s, in.cu_seqlens, sequence, plan.segment);
    };
    const std::int64_t begin = slot_of(part * s.sequences / plan.parts);
    const std::int64_t end = slot_of((part + 1) * s.sequences / plan.parts);
    for (std::int64_t i = 0; i < end - begin; ++i) {
      const std::int64_t slot = reverse ? end - 1 - i : begin + i;
      double* to = shared.map_totals + part * s.key_heads * n;
      const Real* from = static_cast<const Real*>(shared.map_sums) + slot * s.key_heads * n;
      for (std::int64_t j = 0; j < s.key_heads * n; ++j) to[j] += static_cast<double>(from[j]);
    }
  }
}

// Totals [parts,Hk,..] to an output [Hk,rows,columns], or to one that all heads share.
void store_map_gradient(const Plan& plan, const double* totals, std::int64_t rows, std::int64_t columns,
                        const View& to) {
  const Sizes& s = plan.sizes;
  const bool one = to.stride[0] == 0;
  for (std::int64_t h = 0; h < (one ? 1 : s.key_heads); ++h) {
    for (std::int64_t i = 0; i < rows * columns; ++i) {
      double sum = 0;
      for (std::int64_t u = h; u < plan.parts * s.key_heads; u += one ? 1 : s.key_heads) {
        sum += totals[u * map_elements(s) + i];
      }
      store(to, h * to.stride[0] + i / columns * to.stride[1] + i % columns * to.stride[2], sum);
    }
  }
}

}  // namespace

Plan plan_forward(const Sizes& sizes, std::int64_t threads) {
  Sizes forward = sizes;
  forward.decay_gradient = forward.map_gradient = false;
  Plan plan = plan_common(forward, threads);
  plan.lane_bytes = aligned(FREQRANK_DISPATCH(forward_lane_bytes, plan));
  return plan;
}

Plan plan_backward(const Sizes& sizes, std::int64_t threads) {
  Plan plan = plan_common(sizes, threads);
  plan.lane_bytes = aligned(FREQRANK_DISPATCH(backward_lane_bytes, plan));
  return plan;
}

std::size_t workspace_bytes_forward(const Plan& plan) { return workspace_bytes(plan, false); }
std::size_t workspace_bytes_backward(const Plan& plan) { return workspace_bytes(plan, true); }

void run_forward(const Plan& plan, const Inputs& in, const ForwardOutputs& out, void* workspace,
                 const ParallelFor& parallel_for) {
  char* lanes = align(workspace);
  Shared shared;
  lay_out(plan, false, lanes + plan.lane_bytes * static_cast<std::size_t>(plan.lanes), &shared);
  for_each_segment(plan, lanes, parallel_for, [&](Stage stage, std::int64_t task, void* lane) {
    FREQRANK_DISPATCH(forward_task, plan, in, out, shared, stage, task, lane);
  });
}

void run_backward(const Plan& plan, const Inputs& in, const BackwardArguments& args, void* workspace,
                  const ParallelFor& parallel_for) {
  const Sizes& s = plan.sizes;
  char* lanes = align(workspace);
  Shared shared;
  lay_out(plan, true, lanes + plan.lane_bytes * static_cast<std::size_t>(plan.lanes), &shared);
  const std::int64_t segments = slots(s, plan.segment);
  if (s.decay_gradient) std::fill_n(shared.decay_sums, segments * s.state_heads, 0.0);
  if (s.map_gradient) std::fill_n(shared.map_totals, plan.parts * s.key_heads * map_elements(s), 0.0);
  if (s.map_gradient && plan.split) {
    const auto real = s.double_precision ? sizeof(double) : sizeof(float);
    std::memset(shared.map_sums, 0, static_cast<std::size_t>(segments * s.key_heads * map_elements(s)) * real);
  }
  const auto add_sums = [&](bool reverse) {
    if (!s.map_gradient || !plan.split) return;
    s.double_precision ? add_map_sums<double>(plan, in, shared, reverse)
                       : add_map_sums<float>(plan, in, shared, reverse);
  };
  for_each_segment(plan, lanes, parallel_for, [&](Stage stage, std::int64_t task, void* lane) {
    FREQRANK_DISPATCH(backward_query_task, plan, in, args, shared, stage, task, lane);
  });
  add_sums(false);
  for_each_segment(plan, lanes, parallel_for, [&](Stage stage, std::int64_t task, void* lane) {
    FREQRANK_DISPATCH(backward_key_task, plan, in, args, shared, stage, task, lane);
  });
  add_sums(true);
  if (s.decay_gradient && s.decay == Decay::per_head) {
    for (std::int64_t h = 0; h < s.state_heads; ++h) {
      double sum = 0;
      for (std::int64_t slot = 0; slot < segments; ++slot) sum += shared.decay_sums[slot * s.state_heads + h];
      store(args.dlog_decay, h * args.dlog_decay.stride[2], sum);
    }
  }
  if (s.map_gradient) {
    const std::int64_t columns = map_columns(s);
    store_map_gradient(plan, shared.map_totals, s.channels, columns, args.dprojection);
    if (args.dweights) {
      View weights = args.dweights;  // [Hk,K] as [Hk,1,K]
      weights.stride[2] = weights.stride[1];
      store_map_gradient(plan, shared.map_totals + s.channels * columns, 1, s.key_dim, weights);
    }
  }
}

void run_step(const Sizes& sizes, const StepArguments& args, const ParallelFor& parallel_for) {
  const std::int64_t products = sizes.key_dim * (sizes.value_dim + sizes.channels);
  const std::int64_t grain = std::max<std::int64_t>(1, 32768 / std::max<std::int64_t>(1, products));
  parallel_for(sizes.batch * sizes.state_heads, grain, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t task = begin; task < end; ++task) FREQRANK_DISPATCH(step_task, sizes, args, task);
  });
}

}  // namespace freqrank::linear_attention
