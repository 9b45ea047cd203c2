#pragma once
// The arguments of linear_attention's schemas as the family's; for the adapters of both devices. The ops can be called
// directly, so what memory safety rests on is checked here.

#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "linear_attention/linear_attention.h"
#include "torch/adapter.h"

namespace freqrank::torch_adapter {

namespace la = freqrank::linear_attention;

using OptionalTensor = std::optional<Tensor>;

inline la::Dtype dtype_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Half: return la::Dtype::float16;
    case ScalarType::BFloat16: return la::Dtype::bfloat16;
    case ScalarType::Float: return la::Dtype::float32;
    case ScalarType::Double: return la::Dtype::float64;
    default: STD_TORCH_CHECK(false, "linear_attention: float16, bfloat16, float32 or float64 expected"); return {};
  }
}

// Element strides of x, its first dimension moved to position `first` of the view.
inline la::View view_of(const Tensor& x, int first = 0) {
  la::View view;
  view.data = x.data_ptr();
  if (x.scalar_type() != ScalarType::Bool) view.dtype = dtype_of(x);
  for (int i = 0; i < x.dim() && first + i < 4; ++i) view.stride[first + i] = x.stride(i);
  // an empty tensor may have no memory at all; it is present nevertheless and never read
  static char nothing;
  if (view.data == nullptr) view.data = &nothing;
  return view;
}

inline la::View view_of(const OptionalTensor& x, int first = 0) { return x ? view_of(*x, first) : la::View{}; }

inline void check_real(const Tensor& x, bool double_precision, const char* name) {
  const bool is_double = x.scalar_type() == ScalarType::Double;
  STD_TORCH_CHECK(is_double == double_precision, "linear_attention: float64 and other dtypes are mixed (", name, ")");
}

inline void check_exact(const OptionalTensor& x, bool double_precision, const char* name) {
  if (!x) return;
  STD_TORCH_CHECK(x->scalar_type() == (double_precision ? ScalarType::Double : ScalarType::Float),
                  "linear_attention: ", name, " must be ", double_precision ? "float64" : "float32");
}

inline void check_shape(const OptionalTensor& x, std::vector<std::int64_t> shape, const char* name) {
  if (!x) return;
  bool same = x->dim() == static_cast<std::int64_t>(shape.size());
  for (std::size_t i = 0; same && i < shape.size(); ++i) same = x->size(static_cast<std::int64_t>(i)) == shape[i];
  STD_TORCH_CHECK(same, "linear_attention: ", name, " has a wrong shape");
}

// What feature_map_attention has beside the arguments of linear_attention.
struct Map {
  Tensor projection;
  OptionalTensor weights;
  la::Feature feature;
};

inline la::Feature feature_of(std::int64_t feature) {
  STD_TORCH_CHECK(feature >= 0 && feature <= 2, "feature_map_attention: feature must be 0, 1 or 2");
  constexpr la::Feature features[] = {la::Feature::softmax, la::Feature::exp, la::Feature::softmax_pm};
  return features[feature];
}

// A tensor of `dims` dimensions, or of one more in front: the key heads.
inline void check_by_head(const Tensor& x, std::int64_t dims, std::int64_t key_heads, const char* name) {
  STD_TORCH_CHECK(x.dim() == dims || (x.dim() == dims + 1 && x.size(0) == key_heads), "feature_map_attention: ", name,
                  " has a wrong shape");
}

// Of the map's tensors, for sizes whose key_dim is that of q and k; it becomes the number of features.
inline void check_map(const Map& map, la::Sizes& s) {
  check_by_head(map.projection, 2, s.key_heads, "projection");
  check_exact(map.projection, s.double_precision, "projection");
  s.feature = map.feature;
  s.channels = s.key_dim;
  STD_TORCH_CHECK(s.channels > 0 && s.channels <= la::max_dim && map.projection.size(-2) == s.channels,
                  "feature_map_attention: projection must be [K,M] or [Hk,K,M] with K of q between 1 and 512");
  s.key_dim = map.projection.size(-1) * (s.feature == la::Feature::softmax_pm ? 2 : 1);
  if (map.weights) {
    check_by_head(*map.weights, 1, s.key_heads, "weights");
    check_exact(map.weights, s.double_precision, "weights");
    STD_TORCH_CHECK(map.weights->size(-1) == s.key_dim, "feature_map_attention: one weight a feature expected");
  }
}

// As [Hk, ...]; all heads share one without that dimension.
inline la::View by_head(const Tensor& x, std::int64_t dims) { return view_of(x, x.dim() == dims ? 1 : 0); }

inline void check_offsets(const Tensor& cu_seqlens, const la::Sizes& s) {
  const auto* offsets = static_cast<const std::int64_t*>(cu_seqlens.data_ptr());
  STD_TORCH_CHECK(offsets[0] == 0 && offsets[s.sequences] == s.time,
                  "cu_seqlens must start at 0 and end at T = ", s.time, "; got ", offsets[0], " and ",
                  offsets[s.sequences]);
  for (std::int64_t i = 0; i < s.sequences; ++i)
    STD_TORCH_CHECK(offsets[i] <= offsets[i + 1], "cu_seqlens must not decrease; it does at entry ", i + 1);
}

// The op can be called directly, so everything that memory safety rests on is checked here; the messages that people
// see come from the Python wrapper. `on_host`: values can be read.
inline la::Sizes sizes_of(const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& log_decay,
                          const OptionalTensor& mask, const OptionalTensor& cu_seqlens,
                          const OptionalTensor& initial_kv, const OptionalTensor& initial_z, bool normalize,
                          const Map* map, bool on_host) {
  STD_TORCH_CHECK(q.dim() == 4 && k.dim() == 4 && v.dim() == 4, "linear_attention: q, k, v must have 4 dimensions");
  la::Sizes s;
  s.batch = q.size(0), s.time = q.size(1), s.heads = q.size(2), s.key_dim = q.size(3);
  s.key_heads = k.size(2), s.value_dim = v.size(3);
  check_shape(k, {s.batch, s.time, s.key_heads, s.key_dim}, "k");
  check_shape(v, {s.batch, s.time, s.key_heads, s.value_dim}, "v");
  STD_TORCH_CHECK(s.key_heads > 0 && s.heads > 0 && s.heads % s.key_heads == 0,
                  "linear_attention: heads of q must be a multiple of those of k");
  s.double_precision = q.scalar_type() == ScalarType::Double;
  if (map != nullptr) check_map(*map, s);
  STD_TORCH_CHECK(s.key_dim > 0 && s.value_dim > 0 && s.key_dim <= la::max_dim && s.value_dim <= la::max_dim,
                  "linear_attention: K and V must be between 1 and 512");
  dtype_of(q);
  check_real(k, s.double_precision, "k");
  check_real(v, s.double_precision, "v");
  s.normalize = normalize;
  s.state_heads = s.key_heads;
  if (log_decay) {
    check_exact(log_decay, s.double_precision, "log_decay");
    s.decay = log_decay->dim() == 1 ? la::Decay::per_head : la::Decay::per_token;
    s.state_heads = log_decay->size(log_decay->dim() - 1);
    STD_TORCH_CHECK(s.state_heads == s.heads || s.state_heads == s.key_heads, "linear_attention: heads of log_decay");
    if (s.decay == la::Decay::per_token) check_shape(log_decay, {s.batch, s.time, s.state_heads}, "log_decay");
  }
  if (mask) {
    STD_TORCH_CHECK(mask->scalar_type() == ScalarType::Bool, "linear_attention: mask must be bool");
    check_shape(mask, {s.batch, s.time}, "mask");
  }
  s.sequences = s.batch;
  if (cu_seqlens) {
    STD_TORCH_CHECK(cu_seqlens->scalar_type() == ScalarType::Long && cu_seqlens->dim() == 1 &&
                        cu_seqlens->size(0) >= 1 && cu_seqlens->is_contiguous() && s.batch == 1,
                    "linear_attention: cu_seqlens must be a contiguous int64 vector, with batch 1");
    s.sequences = cu_seqlens->size(0) - 1;
    if (on_host) check_offsets(*cu_seqlens, s);
  }
  check_exact(initial_kv, s.double_precision, "initial_kv");
  check_exact(initial_z, s.double_precision, "initial_z");
  check_shape(initial_kv, {s.sequences, s.state_heads, s.key_dim, s.value_dim}, "initial_kv");
  check_shape(initial_z, {s.sequences, s.state_heads, s.key_dim}, "initial_z");
  return s;
}

inline la::Inputs inputs_of(const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& log_decay,
                            const OptionalTensor& mask, const OptionalTensor& cu_seqlens,
                            const OptionalTensor& initial_kv, const OptionalTensor& initial_z, double scale, double eps,
                            const Map* map) {
  la::Inputs in;
  in.q = view_of(q), in.k = view_of(k), in.v = view_of(v);
  if (log_decay) in.log_decay = view_of(log_decay, log_decay->dim() == 1 ? 2 : 0);
  in.mask = view_of(mask);
  in.initial_kv = view_of(initial_kv), in.initial_z = view_of(initial_z);
  if (cu_seqlens) in.cu_seqlens = static_cast<const std::int64_t*>(cu_seqlens->data_ptr());
  in.scale = scale, in.eps = eps;
  if (map != nullptr) {
    in.projection = by_head(map->projection, 2);
    if (map->weights) in.weights = by_head(*map->weights, 1);
  }
  return in;
}

inline Tensor make(const Tensor& like, std::vector<std::int64_t> shape,
                   std::optional<ScalarType> dtype = std::nullopt) {
  return torch::stable::new_empty(like, shape, dtype);
}

inline Tensor workspace_of(const Tensor& like, std::size_t bytes) {
  return make(like, {static_cast<std::int64_t>(bytes)}, ScalarType::Byte);
}

inline ScalarType real_of(const la::Sizes& s) { return s.double_precision ? ScalarType::Double : ScalarType::Float; }

// A forward call: its arguments, and its outputs as torch sees them.
struct ForwardCall {
  la::Sizes sizes;
  la::Inputs in;
  la::ForwardOutputs out;
  Tensor o, kv, z;
};

inline ForwardCall forward_call(const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& log_decay,
                                const OptionalTensor& mask, const OptionalTensor& cu_seqlens,
                                const OptionalTensor& initial_kv, const OptionalTensor& initial_z, double scale,
                                bool normalize, double eps, bool output_final_state, const Map* map, bool on_host) {
  const la::Sizes s = sizes_of(q, k, v, log_decay, mask, cu_seqlens, initial_kv, initial_z, normalize, map, on_host);
  const bool with_z = output_final_state && (normalize || initial_z);
  ForwardCall call{
      s,
      inputs_of(q, k, v, log_decay, mask, cu_seqlens, initial_kv, initial_z, scale, eps, map),
      {},
      make(v, {s.batch, s.time, s.heads, s.value_dim}),
      output_final_state ? make(v, {s.sequences, s.state_heads, s.key_dim, s.value_dim}, real_of(s))
                         : make(v, {0}, real_of(s)),
      with_z ? make(v, {s.sequences, s.state_heads, s.key_dim}, real_of(s)) : make(v, {0}, real_of(s)),
  };
  call.out.o = view_of(call.o);
  if (output_final_state) call.out.final_kv = view_of(call.kv);
  if (with_z) call.out.final_z = view_of(call.z);
  return call;
}

struct Gradients {
  Tensor q, k, v, projection, weights, log_decay, initial_kv, initial_z;
};

struct BackwardCall {
  la::Sizes sizes;
  la::Inputs in;
  la::BackwardArguments args;
  Gradients out;
};

inline BackwardCall backward_call(const Tensor& grad_o, const OptionalTensor& grad_kv, const OptionalTensor& grad_z,
                                  const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& log_decay,
                                  const OptionalTensor& mask, const OptionalTensor& cu_seqlens,
                                  const OptionalTensor& initial_kv, const OptionalTensor& initial_z, double scale,
                                  bool normalize, double eps, bool decay_gradient, const Map* map, bool map_gradient,
                                  bool on_host) {
  la::Sizes s = sizes_of(q, k, v, log_decay, mask, cu_seqlens, initial_kv, initial_z, normalize, map, on_host);
  s.decay_gradient = decay_gradient && log_decay.has_value();
  s.map_gradient = map_gradient && map != nullptr;
  const la::Inputs in = inputs_of(q, k, v, log_decay, mask, cu_seqlens, initial_kv, initial_z, scale, eps, map);
  check_shape(grad_o, {s.batch, s.time, s.heads, s.value_dim}, "grad_o");
  check_real(grad_o, s.double_precision, "grad_o");
  check_exact(grad_kv, s.double_precision, "grad_kv");
  check_exact(grad_z, s.double_precision, "grad_z");
  check_shape(grad_kv, {s.sequences, s.state_heads, s.key_dim, s.value_dim}, "grad_kv");
  check_shape(grad_z, {s.sequences, s.state_heads, s.key_dim}, "grad_z");
  const auto real = [&](bool wanted, std::vector<std::int64_t> shape) {
    return make(q, wanted ? std::move(shape) : std::vector<std::int64_t>{0}, real_of(s));
  };
  const auto like = [&](bool wanted, const Tensor* x) {
    std::vector<std::int64_t> shape;
    for (int i = 0; wanted && i < x->dim(); ++i) shape.push_back(x->size(i));
    return real(wanted, std::move(shape));
  };
  const bool with_weights = s.map_gradient && map->weights.has_value();
  Gradients out{
      make(q, {s.batch, s.time, s.heads, q.size(3)}),
      make(k, {s.batch, s.time, s.key_heads, k.size(3)}),
      make(v, {s.batch, s.time, s.key_heads, s.value_dim}),
      like(s.map_gradient, s.map_gradient ? &map->projection : nullptr),
      like(with_weights, with_weights ? &*map->weights : nullptr),
      like(s.decay_gradient, s.decay_gradient ? &*log_decay : nullptr),
      real(initial_kv.has_value(), {s.sequences, s.state_heads, s.key_dim, s.value_dim}),
      real(initial_z.has_value(), {s.sequences, s.state_heads, s.key_dim}),
  };
  la::BackwardArguments args;
  args.grad_o = view_of(grad_o), args.grad_kv = view_of(grad_kv), args.grad_z = view_of(grad_z);
  args.dq = view_of(out.q), args.dk = view_of(out.k), args.dv = view_of(out.v);
  if (s.decay_gradient) args.dlog_decay = view_of(out.log_decay, s.decay == la::Decay::per_head ? 2 : 0);
  if (initial_kv) args.dinitial_kv = view_of(out.initial_kv);
  if (initial_z) args.dinitial_z = view_of(out.initial_z);
  if (s.map_gradient) args.dprojection = by_head(out.projection, 2);
  if (with_weights) args.dweights = by_head(out.weights, 1);
  return {s, in, args, out};
}

struct Step {
  la::Sizes sizes;
  la::StepArguments args;
  Tensor o;
};

inline Step step_of(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& kv, const OptionalTensor& z,
                    const OptionalTensor& log_decay, const OptionalTensor& mask, double scale, bool normalize,
                    double eps, const Map* map) {
  STD_TORCH_CHECK(q.dim() == 3 && k.dim() == 3 && v.dim() == 3,
                  "linear_attention_step: q, k, v must have 3 dimensions");
  la::Sizes s;
  s.batch = q.size(0), s.time = 1, s.sequences = s.batch;
  s.heads = q.size(1), s.key_dim = q.size(2), s.key_heads = k.size(1), s.value_dim = v.size(2);
  check_shape(k, {s.batch, s.key_heads, s.key_dim}, "k");
  check_shape(v, {s.batch, s.key_heads, s.value_dim}, "v");
  STD_TORCH_CHECK(s.key_heads > 0 && s.heads > 0 && s.heads % s.key_heads == 0,
                  "linear_attention_step: heads of q must be a multiple of those of k");
  s.double_precision = q.scalar_type() == ScalarType::Double;
  if (map != nullptr) check_map(*map, s);
  STD_TORCH_CHECK(s.key_dim > 0 && s.value_dim > 0 && s.key_dim <= la::max_dim && s.value_dim <= la::max_dim,
                  "linear_attention_step: K and V must be between 1 and 512");
  dtype_of(q);
  check_real(k, s.double_precision, "k");
  check_real(v, s.double_precision, "v");
  s.normalize = normalize;
  s.state_heads = s.key_heads;
  if (log_decay) {
    check_exact(log_decay, s.double_precision, "log_decay");
    s.decay = log_decay->dim() == 1 ? la::Decay::per_head : la::Decay::per_token;
    s.state_heads = log_decay->size(log_decay->dim() - 1);
    STD_TORCH_CHECK(s.state_heads == s.heads || s.state_heads == s.key_heads, "linear_attention_step: log_decay heads");
    if (s.decay == la::Decay::per_token) check_shape(log_decay, {s.batch, s.state_heads}, "log_decay");
  }
  if (mask) {
    STD_TORCH_CHECK(mask->scalar_type() == ScalarType::Bool, "linear_attention_step: mask must be bool");
    check_shape(mask, {s.batch}, "mask");
  }
  STD_TORCH_CHECK(!normalize || z, "linear_attention_step: normalize needs z");
  check_exact(kv, s.double_precision, "kv");
  check_exact(z, s.double_precision, "z");
  check_shape(kv, {s.batch, s.state_heads, s.key_dim, s.value_dim}, "kv");
  check_shape(z, {s.batch, s.state_heads, s.key_dim}, "z");

  Tensor o = make(v, {s.batch, s.heads, s.value_dim});
  // [B,H,D] as [B,1,H,D]
  const auto token = [](const Tensor& x) {
    la::View view = view_of(x, 1);
    view.stride[0] = view.stride[1];
    return view;
  };
  la::StepArguments args;
  args.q = token(q), args.k = token(k), args.v = token(v), args.o = token(o);
  if (log_decay) {
    args.log_decay = view_of(*log_decay, log_decay->dim() == 1 ? 2 : 1);
    if (log_decay->dim() == 2) args.log_decay.stride[0] = args.log_decay.stride[1];
  }
  args.mask = view_of(mask);
  args.kv = view_of(kv), args.z = view_of(z);
  args.scale = scale, args.eps = eps;
  if (map != nullptr) {
    args.projection = by_head(map->projection, 2);
    if (map->weights) args.weights = by_head(*map->weights, 1);
  }
  return {s, args, o};
}

}  // namespace freqrank::torch_adapter
