// CUDA adapters of the linear_attention family: check, allocate through torch, run on the current stream.
#include "common/cuda_device.h"
#include "linear_attention/launch.h"
#include "torch/cuda_adapter.h"
#include "torch/linear_attention_problem.h"

namespace freqrank::torch_adapter {

namespace {

bool is_half(const Tensor& x) { return x.scalar_type() == ScalarType::Half || x.scalar_type() == ScalarType::BFloat16; }

// Memory of another device would be read as if it were this one's.
void check_device(const Tensor& q, const OptionalTensor& x, const char* name) {
  STD_TORCH_CHECK(!x || (x->is_cuda() && x->get_device_index() == q.get_device_index()), "linear_attention: ", name,
                  " must be on the GPU of q");
}

la::DevicePlan plan_of(const la::Sizes& s, const Tensor& q, const Tensor& k, const Tensor& v, bool same_dtypes,
                       bool backward, bool with_offsets, bool with_z) {
  la::DeviceProblem problem;
  problem.sizes = s;
  problem.backward = backward;
  problem.half = same_dtypes && is_half(q) && k.scalar_type() == q.scalar_type() && v.scalar_type() == q.scalar_type();
  problem.with_offsets = with_offsets;
  problem.with_z = with_z;
  return la::plan_device(problem, gpu_limits(q.get_device_index()));
}

// Features of exp, or with weights, may be larger than float16's numbers.
void check_map(const Tensor& q, const Map& map) {
  check_device(q, map.projection, "projection"), check_device(q, map.weights, "weights");
  STD_TORCH_CHECK(q.scalar_type() != ScalarType::Half || (map.feature != la::Feature::exp && !map.weights),
                  "feature_map_attention: features of exp, or with weights, may not fit into float16");
}

using ForwardResult = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

ForwardResult forward(const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& log_decay,
                      const OptionalTensor& mask, const OptionalTensor& cu_seqlens, const OptionalTensor& initial_kv,
                      const OptionalTensor& initial_z, double scale, bool normalize, double eps,
                      bool output_final_state, bool for_backward, const Map* map) {
  check_device(q, q, "q"), check_device(q, k, "k"), check_device(q, v, "v");
  check_device(q, log_decay, "log_decay"), check_device(q, mask, "mask"), check_device(q, cu_seqlens, "cu_seqlens");
  check_device(q, initial_kv, "initial_kv"), check_device(q, initial_z, "initial_z");
  if (map != nullptr) check_map(q, *map);
  const torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
  const ForwardCall call = forward_call(q, k, v, log_decay, mask, cu_seqlens, initial_kv, initial_z, scale, normalize,
                                        eps, output_final_state, map, false);
  const la::Sizes& s = call.sizes;
  const Tensor denominator = normalize ? make(v, {s.batch, s.heads, s.time}, real_of(s)) : make(v, {0}, real_of(s));
  const la::DevicePlan plan = plan_of(s, q, k, v, true, false, cu_seqlens.has_value(), initial_z.has_value());
  const Tensor workspace = workspace_of(q, la::workspace_bytes(plan));
  const bool with_rest = for_backward && normalize && is_half(v);
  const Tensor rest = with_rest ? make(v, {s.batch, s.time, s.heads, s.value_dim}) : make(v, {0});
  la::Normalizer normalizer;
  if (normalize) normalizer.denominator = view_of(denominator);
  if (with_rest) normalizer.rest = view_of(rest);
  la::run_forward(plan, call.in, call.out, normalizer, workspace.mutable_data_ptr(),
                  current_stream(q.get_device_index()));
  return {call.o, call.kv, call.z, denominator, rest};
}

Gradients backward(const Tensor& grad_o, const OptionalTensor& grad_kv, const OptionalTensor& grad_z, const Tensor& q,
                   const Tensor& k, const Tensor& v, const OptionalTensor& log_decay, const OptionalTensor& mask,
                   const OptionalTensor& cu_seqlens, const OptionalTensor& initial_kv, const OptionalTensor& initial_z,
                   const OptionalTensor& o, const OptionalTensor& denominator, const OptionalTensor& rest, double scale,
                   bool normalize, double eps, bool decay_gradient, const Map* map, bool map_gradient) {
  check_device(q, q, "q"), check_device(q, k, "k"), check_device(q, v, "v"), check_device(q, grad_o, "grad_o");
  check_device(q, log_decay, "log_decay"), check_device(q, mask, "mask"), check_device(q, cu_seqlens, "cu_seqlens");
  check_device(q, initial_kv, "initial_kv"), check_device(q, initial_z, "initial_z");
  check_device(q, grad_kv, "grad_kv"), check_device(q, grad_z, "grad_z");
  check_device(q, o, "o"), check_device(q, denominator, "denominator");
  if (map != nullptr) check_map(q, *map);
  const torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
  const BackwardCall call = backward_call(grad_o, grad_kv, grad_z, q, k, v, log_decay, mask, cu_seqlens, initial_kv,
                                          initial_z, scale, normalize, eps, decay_gradient, map, map_gradient, false);
  const la::Sizes& s = call.sizes;
  la::Normalizer normalizer;
  if (normalize) {
    STD_TORCH_CHECK(o && denominator, "linear_attention_backward: normalize needs o and denominator on CUDA");
    check_shape(o, {s.batch, s.time, s.heads, s.value_dim}, "o");
    check_real(*o, s.double_precision, "o");
    check_shape(denominator, {s.batch, s.heads, s.time}, "denominator");
    check_exact(denominator, s.double_precision, "denominator");
    STD_TORCH_CHECK(denominator->is_contiguous(), "linear_attention_backward: denominator must be contiguous");
    normalizer = {view_of(o), view_of(denominator), {}};
    if (rest && rest->numel() > 0) {
      check_device(q, rest, "rest");
      check_shape(rest, {s.batch, s.time, s.heads, s.value_dim}, "rest");
      STD_TORCH_CHECK(rest->scalar_type() == o->scalar_type(),
                      "linear_attention_backward: rest must have the dtype of o");
      normalizer.rest = view_of(rest);
    }
  }
  const la::DevicePlan plan = plan_of(s, q, k, v, grad_o.scalar_type() == q.scalar_type(), true, cu_seqlens.has_value(),
                                      grad_z.has_value() || initial_z.has_value());
  const Tensor workspace = workspace_of(q, la::workspace_bytes(plan));
  la::run_backward(plan, call.in, call.args, normalizer, workspace.mutable_data_ptr(),
                   current_stream(q.get_device_index()));
  return call.out;
}

ForwardResult linear_attention_cuda(Tensor q, Tensor k, Tensor v, OptionalTensor log_decay, OptionalTensor mask,
                                    OptionalTensor cu_seqlens, OptionalTensor initial_kv, OptionalTensor initial_z,
                                    double scale, bool normalize, double eps, bool output_final_state,
                                    bool for_backward) {
  return forward(q, k, v, log_decay, mask, cu_seqlens, initial_kv, initial_z, scale, normalize, eps, output_final_state,
                 for_backward, nullptr);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> linear_attention_backward_cuda(
    Tensor grad_o, OptionalTensor grad_kv, OptionalTensor grad_z, Tensor q, Tensor k, Tensor v,
    OptionalTensor log_decay, OptionalTensor mask, OptionalTensor cu_seqlens, OptionalTensor initial_kv,
    OptionalTensor initial_z, OptionalTensor o, OptionalTensor denominator, OptionalTensor rest, double scale,
    bool normalize, double eps, bool decay_gradient) {
  const Gradients d = backward(grad_o, grad_kv, grad_z, q, k, v, log_decay, mask, cu_seqlens, initial_kv, initial_z, o,
                               denominator, rest, scale, normalize, eps, decay_gradient, nullptr, false);
  return {d.q, d.k, d.v, d.log_decay, d.initial_kv, d.initial_z};
}

ForwardResult feature_map_attention_cuda(Tensor q, Tensor k, Tensor v, Tensor projection, OptionalTensor weights,
                                         std::int64_t feature, OptionalTensor log_decay, OptionalTensor mask,
                                         OptionalTensor cu_seqlens, OptionalTensor initial_kv, OptionalTensor initial_z,
                                         bool normalize, double eps, bool output_final_state, bool for_backward) {
  const Map map{projection, weights, feature_of(feature)};
  return forward(q, k, v, log_decay, mask, cu_seqlens, initial_kv, initial_z, 1.0, normalize, eps, output_final_state,
                 for_backward, &map);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> feature_map_attention_backward_cuda(
    Tensor grad_o, OptionalTensor grad_kv, OptionalTensor grad_z, Tensor q, Tensor k, Tensor v, Tensor projection,
    OptionalTensor weights, std::int64_t feature, OptionalTensor log_decay, OptionalTensor mask,
    OptionalTensor cu_seqlens, OptionalTensor initial_kv, OptionalTensor initial_z, OptionalTensor o,
    OptionalTensor denominator, OptionalTensor rest, bool normalize, double eps, bool decay_gradient,
    bool map_gradient) {
  const Map map{projection, weights, feature_of(feature)};
  const Gradients d = backward(grad_o, grad_kv, grad_z, q, k, v, log_decay, mask, cu_seqlens, initial_kv, initial_z, o,
                               denominator, rest, 1.0, normalize, eps, decay_gradient, &map, map_gradient);
  return {d.q, d.k, d.v, d.projection, d.weights, d.log_decay, d.initial_kv, d.initial_z};
}

Tensor step_cuda(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& kv, const OptionalTensor& z,
                 const OptionalTensor& log_decay, const OptionalTensor& mask, double scale, bool normalize, double eps,
                 const Map* map) {
  check_device(q, q, "q"), check_device(q, k, "k"), check_device(q, v, "v"), check_device(q, kv, "kv");
  check_device(q, z, "z"), check_device(q, log_decay, "log_decay"), check_device(q, mask, "mask");
  if (map != nullptr) {
    check_device(q, map->projection, "projection"), check_device(q, map->weights, "weights");
  }
  const torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
  const Step step = step_of(q, k, v, kv, z, log_decay, mask, scale, normalize, eps, map);
  la::run_step(step.sizes, step.args, current_stream(q.get_device_index()));
  return step.o;
}

Tensor linear_attention_step_cuda(Tensor q, Tensor k, Tensor v, Tensor kv, OptionalTensor z, OptionalTensor log_decay,
                                  OptionalTensor mask, double scale, bool normalize, double eps) {
  return step_cuda(q, k, v, kv, z, log_decay, mask, scale, normalize, eps, nullptr);
}

Tensor feature_map_attention_step_cuda(Tensor q, Tensor k, Tensor v, Tensor projection, OptionalTensor weights,
                                       std::int64_t feature, Tensor kv, OptionalTensor z, OptionalTensor log_decay,
                                       OptionalTensor mask, bool normalize, double eps) {
  const Map map{projection, weights, feature_of(feature)};
  return step_cuda(q, k, v, kv, z, log_decay, mask, 1.0, normalize, eps, &map);
}

}  // namespace

}  // namespace freqrank::torch_adapter

STABLE_TORCH_LIBRARY_IMPL(freqrank, CUDA, m) {
  m.impl("linear_attention", TORCH_BOX(&freqrank::torch_adapter::linear_attention_cuda));
  m.impl("linear_attention_backward", TORCH_BOX(&freqrank::torch_adapter::linear_attention_backward_cuda));
  m.impl("feature_map_attention", TORCH_BOX(&freqrank::torch_adapter::feature_map_attention_cuda));
  m.impl("feature_map_attention_backward", TORCH_BOX(&freqrank::torch_adapter::feature_map_attention_backward_cuda));
  m.impl("linear_attention_step", TORCH_BOX(&freqrank::torch_adapter::linear_attention_step_cuda));
  m.impl("feature_map_attention_step", TORCH_BOX(&freqrank::torch_adapter::feature_map_attention_step_cuda));
}
