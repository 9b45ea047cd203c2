#pragma once
// Causal linear attention on the CPU, chunk by chunk:
//
//   S_t = exp(g_t) S_{t-1} + k_t v_t^T      z_t = exp(g_t) z_{t-1} + k_t      o_t = scale q_t^T S_t
//
// with o_t divided by (scale q_t.z_t + eps) if `normalize`. The caller owns all memory: plan() is pure,
// workspace_bytes() says how much scratch run() needs, run() allocates nothing and starts no thread.

#include <cstddef>
#include <cstdint>

#include "common/parallel.h"

namespace freqrank::linear_attention {

enum class Dtype { float16, bfloat16, float32, float64 };

// A tensor of up to four dimensions. Strides count elements and may be anything, 0 included for what is only read.
struct View {
  void* data = nullptr;
  Dtype dtype = Dtype::float32;
  std::int64_t stride[4] = {0, 0, 0, 0};
  explicit operator bool() const { return data != nullptr; }
};

enum class Decay { none, per_head, per_token };

// phi(x) = feature(x projection) * weights. softmax_pm: the softmax over [x projection, -x projection].
enum class Feature { none, softmax, exp, softmax_pm };

constexpr std::int64_t max_dim = 512;  // of K and V

struct Sizes {
  std::int64_t batch = 0, time = 0, heads = 0, key_heads = 0, key_dim = 0, value_dim = 0;
  std::int64_t sequences = 0;    // batch, or one less than the entries of cu_seqlens
  std::int64_t state_heads = 0;  // key_heads, or heads if the decay differs within a group of query heads
  Decay decay = Decay::none;     // log_decay has state_heads heads
  bool normalize = false;
  bool double_precision = false;  // float64 throughout; otherwise float32 arithmetic on 16- and 32-bit tensors
  bool decay_gradient = false;    // backward only
  // With a feature map q and k hold `channels` numbers, of which it makes the key_dim features that the scan sees.
  Feature feature = Feature::none;
  std::int64_t channels = 0;
  bool map_gradient = false;  // backward only: that of the projection and of the weights
};

// Numbers that tuning touches, and what follows from them. Results do not depend on `split` and `lanes`.
struct Plan {
  Sizes sizes;
  std::int64_t chunk = 0;    // tokens a chunk
  std::int64_t segment = 0;  // tokens a segment: some chunks whose sum of k v^T is made on its own
  std::int64_t parts = 0;    // a task takes one of so many parts of the sequences, for one key head
  bool split = false;        // there are too few such tasks: segments are tasks, at the price of summing them up twice
  std::int64_t lanes = 0;    // scratch areas: how many tasks may run at the same time
  std::size_t lane_bytes = 0;  // scratch of a lane
};

Plan plan_forward(const Sizes& sizes, std::int64_t threads);
Plan plan_backward(const Sizes& sizes, std::int64_t threads);
std::size_t workspace_bytes_forward(const Plan& plan);
std::size_t workspace_bytes_backward(const Plan& plan);

// Shapes: q [B,T,H,K], k [B,T,Hk,K], v [B,T,Hk,V], log_decay [Hs] as strides (0,0,s) or [B,T,Hs], mask [B,T] of bytes,
// kv [N,Hs,K,V], z [N,Hs,K]. States and decay have the arithmetic's dtype; q, k and v may have different ones. With a
// feature map also projection [Hk,C,M] and weights [Hk,K], of the arithmetic's dtype; a stride of 0 shares one between
// heads, and K of q and k is C = sizes.channels.
struct Inputs {
  View q, k, v, log_decay, mask, initial_kv, initial_z;  // the last four may be absent
  const std::int64_t* cu_seqlens = nullptr;  // [N+1], from 0 to T without a decrease; null: one per batch row
  double scale = 1.0, eps = 0.0;
  View projection, weights;  // weights may be absent
};

struct ForwardOutputs {
  View o;                  // [B,T,H,V]
  View final_kv, final_z;  // may be absent
};

struct BackwardArguments {
  View grad_o;                   // [B,T,H,V]
  View grad_kv, grad_z;          // of the final state; may be absent
  View dq, dk, dv;               // outputs
  View dlog_decay;               // output, strides as those of log_decay; absent unless sizes.decay_gradient
  View dinitial_kv, dinitial_z;  // outputs; may be absent
  View dprojection, dweights;    // outputs, summed over heads if their stride is 0; absent unless sizes.map_gradient
};

void run_forward(const Plan& plan, const Inputs& in, const ForwardOutputs& out, void* workspace,
                 const ParallelFor& parallel_for);
void run_backward(const Plan& plan, const Inputs& in, const BackwardArguments& args, void* workspace,
                  const ParallelFor& parallel_for);

// One token, B = sizes.batch, T unused: strides of the time dimension are ignored. kv and z are updated in place.
struct StepArguments {
  View q, k, v, log_decay, mask;  // [B,.,H,K] ...; log_decay and mask may be absent
  View kv, z;                     // [B,Hs,K,V], [B,Hs,K]; z may be absent unless normalize
  View o;                         // [B,.,H,V]
  double scale = 1.0, eps = 0.0;
  View projection, weights;  // as in Inputs
};
void run_step(const Sizes& sizes, const StepArguments& args, const ParallelFor& parallel_for);

}  // namespace freqrank::linear_attention
