// Every op's schema. Sizes are SymInt so that one compiled graph serves many; the adapters take them as int64_t.
#include "common/isa.h"
#include "torch/adapter.h"

STABLE_TORCH_LIBRARY(freqrank, m) {
  // information about this build
  m.def("cpu_isa() -> str");
  m.def("cuda_targets() -> str");

  // dct
  // Along each of `dims` (not negative, distinct): crop or zero-pad to `lengths` (None: the sizes of x), transform,
  // crop or zero-pad to `sizes` (None: the lengths). norm, in_ends, out_ends as in dct/dct.h. The result is contiguous.
  m.def(
      "dct(Tensor x, int[] dims, SymInt[]? lengths, SymInt[]? sizes, int type, int norm, int in_ends, int out_ends) "
      "-> Tensor");
  // The plan of that call in words, for a tensor of these sizes and strides on "cpu" or "cuda"; `limits` are the GPU's,
  // from dct_cuda_limits, or none: those of an H100.
  m.def(
      "dct_plan(SymInt[] in_sizes, SymInt[] in_strides, ScalarType dtype, int[] dims, SymInt[]? lengths, "
      "SymInt[]? sizes, int type, int norm, int in_ends, int out_ends, str device, int[] limits) -> str");
  m.def("dct_cuda_limits(int device) -> int[]");

  // linear_attention
  // On CUDA with `normalize` forward returns the denominators [B,H,T] and, `for_backward`, what rounding took from a
  // 16-bit o; backward takes o and them. Else they are empty.
  m.def(
      "linear_attention(Tensor q, Tensor k, Tensor v, Tensor? log_decay, Tensor? mask, Tensor? cu_seqlens, "
      "Tensor? initial_kv, Tensor? initial_z, float scale, bool normalize, float eps, bool output_final_state, "
      "bool for_backward) -> (Tensor o, Tensor kv, Tensor z, Tensor denominator, Tensor rest)");
  m.def(
      "linear_attention_backward(Tensor grad_o, Tensor? grad_kv, Tensor? grad_z, Tensor q, Tensor k, Tensor v, "
      "Tensor? log_decay, Tensor? mask, Tensor? cu_seqlens, Tensor? initial_kv, Tensor? initial_z, Tensor? o, "
      "Tensor? denominator, Tensor? rest, float scale, bool normalize, float eps, bool decay_gradient) -> "
      "(Tensor dq, Tensor dk, Tensor dv, Tensor dlog_decay, Tensor dinitial_kv, Tensor dinitial_z)");
  // The same over features of q and k; feature: 0 softmax, 1 exp, 2 softmax_pm. On CUDA: q, k, v of one 16-bit dtype,
  // up to 128 channels, features and V, no decay_gradient.
  m.def(
      "feature_map_attention(Tensor q, Tensor k, Tensor v, Tensor projection, Tensor? weights, int feature, "
      "Tensor? log_decay, Tensor? mask, Tensor? cu_seqlens, Tensor? initial_kv, Tensor? initial_z, bool normalize, "
      "float eps, bool output_final_state, bool for_backward) -> "
      "(Tensor o, Tensor kv, Tensor z, Tensor denominator, Tensor rest)");
  m.def(
      "feature_map_attention_backward(Tensor grad_o, Tensor? grad_kv, Tensor? grad_z, Tensor q, Tensor k, Tensor v, "
      "Tensor projection, Tensor? weights, int feature, Tensor? log_decay, Tensor? mask, Tensor? cu_seqlens, "
      "Tensor? initial_kv, Tensor? initial_z, Tensor? o, Tensor? denominator, Tensor? rest, bool normalize, float eps, "
      "bool decay_gradient, bool map_gradient) -> "
      "(Tensor dq, Tensor dk, Tensor dv, Tensor dprojection, Tensor dweights, Tensor dlog_decay, Tensor dinitial_kv, "
      "Tensor dinitial_z)");
  m.def(
      "linear_attention_step(Tensor q, Tensor k, Tensor v, Tensor(a!) kv, Tensor(b!)? z, Tensor? log_decay, "
      "Tensor? mask, float scale, bool normalize, float eps) -> Tensor");
  m.def(
      "feature_map_attention_step(Tensor q, Tensor k, Tensor v, Tensor projection, Tensor? weights, int feature, "
      "Tensor(a!) kv, Tensor(b!)? z, Tensor? log_decay, Tensor? mask, bool normalize, float eps) -> Tensor");

  // whitening
  m.def("gram(Tensor x, Tensor? y, Tensor? weight) -> Tensor");
  m.def("gram_(Tensor(a!) acc, Tensor x, Tensor? y, Tensor? weight) -> ()");
  m.def("cholesky_ex(Tensor A, bool upper) -> (Tensor L, Tensor info)");
  m.def("cholesky_solve_ex(Tensor A, Tensor B, bool upper) -> (Tensor X, Tensor L, Tensor info)");
  m.def("solve_triangular(Tensor A, Tensor B, bool upper, bool left, bool unitriangular) -> Tensor");
  m.def("whiten(Tensor gram, Tensor? scale) -> (Tensor factor, Tensor damping, Tensor info)");
}

static std::string cpu_isa() { return freqrank::isa_name(); }

STABLE_TORCH_LIBRARY_IMPL(freqrank, CompositeExplicitAutograd, m) { m.impl("cpu_isa", TORCH_BOX(&cpu_isa)); }
