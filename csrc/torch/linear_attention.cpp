// CPU adapters of the linear_attention family: check, allocate through torch, run.
#include "torch/linear_attention_problem.h"

namespace freqrank::torch_adapter {

namespace {

ForwardCall forward(const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& log_decay,
                    const OptionalTensor& mask, const OptionalTensor& cu_seqlens, const OptionalTensor& initial_kv,
                    const OptionalTensor& initial_z, double scale, bool normalize, double eps, bool output_final_state,
                    const Map* map) {
  ForwardCall call = forward_call(q, k, v, log_decay, mask, cu_seqlens, initial_kv, initial_z, scale, normalize, eps,
                                  output_final_state, map, true);
  const la::Plan plan = la::plan_forward(call.sizes, torch::stable::get_num_threads());
  const Tensor workspace = workspace_of(q, la::workspace_bytes_forward(plan));
  la::run_forward(plan, call.in, call.out, workspace.mutable_data_ptr(), torch_parallel_for());
  return call;
}

Gradients backward(const Tensor& grad_o, const OptionalTensor& grad_kv, const OptionalTensor& grad_z, const Tensor& q,
                   const Tensor& k, const Tensor& v, const OptionalTensor& log_decay, const OptionalTensor& mask,
                   const OptionalTensor& cu_seqlens, const OptionalTensor& initial_kv, const OptionalTensor& initial_z,
                   double scale, bool normalize, double eps, bool decay_gradient, const Map* map, bool map_gradient) {
  const BackwardCall call = backward_call(grad_o, grad_kv, grad_z, q, k, v, log_decay, mask, cu_seqlens, initial_kv,
                                          initial_z, scale, normalize, eps, decay_gradient, map, map_gradient, true);
  const la::Plan plan = la::plan_backward(call.sizes, torch::stable::get_num_threads());
  const Tensor workspace = workspace_of(q, la::workspace_bytes_backward(plan));
  la::run_backward(plan, call.in, call.args, workspace.mutable_data_ptr(), torch_parallel_for());
  return call.out;
}

}  // namespace

// Nothing is kept for the backward pass, which makes the denominators again.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> linear_attention(Tensor q, Tensor k, Tensor v,
                                                                    OptionalTensor log_decay, OptionalTensor mask,
                                                                    OptionalTensor cu_seqlens,
                                                                    OptionalTensor initial_kv, OptionalTensor initial_z,
                                                                    double scale, bool normalize, double eps,
                                                                    bool output_final_state, bool /*for_backward*/) {
  const ForwardCall call = forward(q, k, v, log_decay, mask, cu_seqlens, initial_kv, initial_z, scale, normalize, eps,
                                   output_final_state, nullptr);
  return {call.o, call.kv, call.z, make(v, {0}, real_of(call.sizes)), make(v, {0})};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> linear_attention_backward(
    Tensor grad_o, OptionalTensor grad_kv, OptionalTensor grad_z, Tensor q, Tensor k, Tensor v,
    OptionalTensor log_decay, OptionalTensor mask, OptionalTensor cu_seqlens, OptionalTensor initial_kv,
    OptionalTensor initial_z, OptionalTensor /*o*/, OptionalTensor /*denominator*/, OptionalTensor /*rest*/,
    double scale, bool normalize, double eps, bool decay_gradient) {
  const Gradients d = backward(grad_o, grad_kv, grad_z, q, k, v, log_decay, mask, cu_seqlens, initial_kv, initial_z,
                               scale, normalize, eps, decay_gradient, nullptr, false);
  return {d.q, d.k, d.v, d.log_decay, d.initial_kv, d.initial_z};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> feature_map_attention(
    Tensor q, Tensor k, Tensor v, Tensor projection, OptionalTensor weights, std::int64_t feature,
    OptionalTensor log_decay, OptionalTensor mask, OptionalTensor cu_seqlens, OptionalTensor initial_kv,
    OptionalTensor initial_z, bool normalize, double eps, bool output_final_state, bool /*for_backward*/) {
  const Map map{projection, weights, feature_of(feature)};
  const ForwardCall call = forward(q, k, v, log_decay, mask, cu_seqlens, initial_kv, initial_z, 1.0, normalize, eps,
                                   output_final_state, &map);
  return {call.o, call.kv, call.z, make(v, {0}, real_of(call.sizes)), make(v, {0})};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> feature_map_attention_backward(
    Tensor grad_o, OptionalTensor grad_kv, OptionalTensor grad_z, Tensor q, Tensor k, Tensor v, Tensor projection,
    OptionalTensor weights, std::int64_t feature, OptionalTensor log_decay, OptionalTensor mask,
    OptionalTensor cu_seqlens, OptionalTensor initial_kv, OptionalTensor initial_z, OptionalTensor /*o*/,
    OptionalTensor /*denominator*/, OptionalTensor /*rest*/, bool normalize, double eps, bool decay_gradient,
    bool map_gradient) {
  const Map map{projection, weights, feature_of(feature)};
  const Gradients d = backward(grad_o, grad_kv, grad_z, q, k, v, log_decay, mask, cu_seqlens, initial_kv, initial_z,
                               1.0, normalize, eps, decay_gradient, &map, map_gradient);
  return {d.q, d.k, d.v, d.projection, d.weights, d.log_decay, d.initial_kv, d.initial_z};
}

Tensor linear_attention_step(Tensor q, Tensor k, Tensor v, Tensor kv, OptionalTensor z, OptionalTensor log_decay,
                             OptionalTensor mask, double scale, bool normalize, double eps) {
  const Step step = step_of(q, k, v, kv, z, log_decay, mask, scale, normalize, eps, nullptr);
  la::run_step(step.sizes, step.args, torch_parallel_for());
  return step.o;
}

Tensor feature_map_attention_step(Tensor q, Tensor k, Tensor v, Tensor projection, OptionalTensor weights,
                                  std::int64_t feature, Tensor kv, OptionalTensor z, OptionalTensor log_decay,
                                  OptionalTensor mask, bool normalize, double eps) {
  const Map map{projection, weights, feature_of(feature)};
  const Step step = step_of(q, k, v, kv, z, log_decay, mask, 1.0, normalize, eps, &map);
  la::run_step(step.sizes, step.args, torch_parallel_for());
  return step.o;
}

}  // namespace freqrank::torch_adapter

STABLE_TORCH_LIBRARY_IMPL(freqrank, CPU, m) {
  m.impl("linear_attention", TORCH_BOX(&freqrank::torch_adapter::linear_attention));
  m.impl("linear_attention_backward", TORCH_BOX(&freqrank::torch_adapter::linear_attention_backward));
  m.impl("feature_map_attention", TORCH_BOX(&freqrank::torch_adapter::feature_map_attention));
  m.impl("feature_map_attention_backward", TORCH_BOX(&freqrank::torch_adapter::feature_map_attention_backward));
  m.impl("linear_attention_step", TORCH_BOX(&freqrank::torch_adapter::linear_attention_step));
  m.impl("feature_map_attention_step", TORCH_BOX(&freqrank::torch_adapter::feature_map_attention_step));
}
