// Linear attention's CUDA kernels against the CPU back end in float64.
#include <cmath>
#include <memory>
#include <random>
#include <set>

#include "cuda_test.h"
#include "linear_attention/device.h"
#include "linear_attention/launch.h"

namespace freqrank::linear_attention {

namespace {

using namespace cuda_test;
using i64 = std::int64_t;
using Shape = std::vector<i64>;

// --- problems -----------------------------------------------------------------------------------------------------

struct Problem {
  Dtype dtype = Dtype::bfloat16;
  i64 batch = 1, time = 1, heads = 1, key_heads = 1, key_dim = 64, value_dim = 64;
  Decay decay = Decay::none;
  i64 state_heads = 0;  // of the decay: heads or key_heads
  double strength = 0.3;
  bool normalize = false, mask = false, state = false;
  Shape lengths;  // of the sequences, if cu_seqlens are given
  Dtype value_dtype = dtype;
  int layout = 0;  // 1: heads before time; 2: rows that vectors cannot be loaded from
  // Of a step: what makes key_dim features of so many channels, with weights and a map a key head, or one without.
  Feature feature = Feature::none;
  i64 channels = 0;
  bool weighted = false;

  i64 sequences() const { return lengths.empty() ? batch : static_cast<i64>(lengths.size()); }
  i64 states() const { return decay == Decay::none ? key_heads : state_heads; }
  bool wide() const { return dtype == Dtype::float64; }
  Dtype real() const { return wide() ? Dtype::float64 : Dtype::float32; }
  bool with_z() const { return normalize; }
};

Problem problem(Dtype dtype, i64 batch, i64 time, i64 heads, i64 key_heads, i64 key_dim, i64 value_dim) {
  Problem p;
  p.dtype = p.value_dtype = dtype;
  p.batch = batch, p.time = time, p.heads = heads, p.key_heads = key_heads;
  p.key_dim = key_dim, p.value_dim = value_dim;
  return p;
}

std::string words(const Problem& p) {
  static const char* const decays[] = {"no decay", "a decay a head", "a decay a token"};
  std::string text = dtype_name(static_cast<int>(p.dtype));
  if (p.value_dtype != p.dtype) text += std::string(", values ") + dtype_name(static_cast<int>(p.value_dtype));
  for (const i64 size : {p.batch, p.time, p.heads, p.key_heads, p.key_dim, p.value_dim})
    text += " " + std::to_string(size);
  text += std::string(", ") + decays[static_cast<int>(p.decay)];
  if (p.decay != Decay::none) text += " of " + std::to_string(p.state_heads) + " heads";
  if (p.normalize) text += ", normalised";
  if (p.mask) text += ", masked";
  if (p.state) text += ", from a state";
  if (!p.lengths.empty()) text += ", " + std::to_string(p.lengths.size()) + " sequences";
  if (p.layout != 0) text += ", layout " + std::to_string(p.layout);
  if (p.feature != Feature::none) {
    text += ", map " + std::to_string(static_cast<int>(p.feature)) + " of " + std::to_string(p.channels) + " channels";
    if (p.weighted) text += ", weighted";
  }
  return text;
}

Sizes sizes_of(const Problem& p) {
  Sizes s;
  s.batch = p.batch, s.time = p.time, s.heads = p.heads, s.key_heads = p.key_heads;
  s.key_dim = p.key_dim, s.value_dim = p.value_dim;
  s.sequences = p.sequences(), s.state_heads = p.states();
  s.decay = p.decay, s.normalize = p.normalize, s.double_precision = p.wide();
  return s;
}

// --- tensors ------------------------------------------------------------------------------------------------------

i64 contiguous(const Shape& sizes, Shape& strides) {
  strides.assign(sizes.size(), 0);
  i64 stride = 1;
  for (std::size_t d = sizes.size(); d-- > 0; stride *= sizes[d]) strides[d] = stride;
  return stride;
}

// A tensor on the GPU, in its dtype and layout, and on the host: the same numbers in float64, contiguous.
class Tensor {
 public:
  Tensor(Dtype dtype, const Shape& sizes, int layout, int first) : dtype_(dtype), sizes_(sizes), first_(first) {
    const i64 elements = contiguous(sizes, host_strides_);
    strides_ = host_strides_;
    i64 extent = elements;
    if (layout == 1) {  // [B,H,T,D]
      strides_[2] = sizes[1] * sizes[3], strides_[1] = sizes[3];
    } else if (layout == 2) {
      for (std::size_t d = 0; d + 1 < sizes.size(); ++d) strides_[d] = strides_[d] / sizes.back() * (sizes.back() + 1);
      extent = elements / std::max<i64>(sizes.back(), 1) * (sizes.back() + 1);
    }
    bytes_.assign(static_cast<std::size_t>(extent * size_of(dtype)), static_cast<char>(kPaint));
    values.assign(static_cast<std::size_t>(elements), 0.0);
    device_ = std::make_unique<Guarded>(bytes_.size(), layout == 2 ? size_of(dtype) : 0);
  }

  std::vector<double> values;

  // Takes numbers as the dtype rounds them.
  void fill(const std::function<double()>& next) {
    std::size_t at = 0;
    each_offset(sizes_, strides_, [&](i64 offset) {
      put(dtype_, bytes_, offset, next());
      values[at++] = get(dtype_, bytes_, offset);
    });
    restore();
  }
  void restore() const { device_->fill(bytes_); }
  void paint() const { device_->paint(); }
  bool intact() const { return device_->intact(); }
  bool unchanged() const { return device_->read() == bytes_; }
  std::vector<char> bytes() const { return device_->read(); }
  std::vector<double> read() const {
    const std::vector<char> now = device_->read();
    std::vector<double> out;
    each_offset(sizes_, strides_, [&](i64 offset) { out.push_back(get(dtype_, now, offset)); });
    return out;
  }
  View on_device() const { return view(device_->data(), dtype_, strides_); }
  View on_host() { return view(values.data(), Dtype::float64, host_strides_); }

 private:
  View view(void* data, Dtype dtype, const Shape& strides) const {
    View v;
    v.data = data, v.dtype = dtype;
    for (std::size_t d = 0; d < strides.size(); ++d) v.stride[static_cast<std::size_t>(first_) + d] = strides[d];
    return v;
  }

  Dtype dtype_;
  Shape sizes_, strides_, host_strides_;
  int first_;  // position of the first dimension in views
  std::vector<char> bytes_;
  std::unique_ptr<Guarded> device_;
};

// --- the test -----------------------------------------------------------------------------------------------------

double error(const std::vector<double>& got, const std::vector<double>& want, double least = 0) {
  double difference = 0, norm = 0;
  for (std::size_t i = 0; i < want.size(); ++i) {
    difference += (got[i] - want[i]) * (got[i] - want[i]);
    norm += want[i] * want[i];
  }
  norm = std::max(std::sqrt(norm), least);
  return std::sqrt(difference) / (norm > 0 ? norm : 1);
}

double tolerance(Dtype dtype) {
  switch (dtype) {
    case Dtype::float32: return 1e-5;
    case Dtype::float64: return 1e-12;
    default: return 3.3e-3;
  }
}

// One problem: its tensors, and what the CPU makes of it.
class Trial {
 public:
  Trial(const Problem& p, std::uint64_t seed, const GpuLimits& limits, cudaStream_t stream)
      : p_(p), random_(seed), limits_(limits), stream_(stream) {
    const double positive = p.normalize ? 1 : 0;
    const auto normal = [this] { return normal_(random_); };
    const auto maybe_positive = [this, positive] {
      const double x = normal_(random_);
      return positive != 0 ? std::abs(x) : x;
    };
    const auto uniform = [this] { return uniform_(random_); };
    q_ = input(p.dtype, {p.batch, p.time, p.heads, p.key_dim}, maybe_positive);
    k_ = input(p.dtype, {p.batch, p.time, p.key_heads, p.key_dim}, maybe_positive);
    v_ = input(p.value_dtype, {p.batch, p.time, p.key_heads, p.value_dim}, normal);
    grad_o_ = input(p.value_dtype, {p.batch, p.time, p.heads, p.value_dim}, normal);
    const auto decay = [this] { return -p_.strength * uniform_(random_); };
    if (p.decay == Decay::per_head) decay_ = input(p.real(), {p.states()}, decay, 2);
    if (p.decay == Decay::per_token) decay_ = input(p.real(), {p.batch, p.time, p.states()}, decay);
    const Shape kv{p.sequences(), p.states(), p.key_dim, p.value_dim}, z{p.sequences(), p.states(), p.key_dim};
    if (p.state) kv_ = input(p.real(), kv, normal);
    if (p.state && p.with_z()) z_ = input(p.real(), z, uniform);
    grad_kv_ = input(p.real(), kv, normal);
    if (p.with_z()) grad_z_ = input(p.real(), z, normal);
    if (p.mask) {
      for (i64 i = 0; i < p.batch * p.time; ++i) mask_.push_back(uniform() > 0.3 ? 1 : 0);
      device_mask_ = std::make_unique<Guarded>(mask_.size(), 0);
      device_mask_->fill(mask_);
    }
    if (!p.lengths.empty()) {
      offsets_.push_back(0);
      for (const i64 length : p.lengths) offsets_.push_back(offsets_.back() + length);
      std::vector<char> bytes(offsets_.size() * 8);
      std::memcpy(bytes.data(), offsets_.data(), bytes.size());
      device_offsets_ = std::make_unique<Guarded>(bytes.size(), 0);
      device_offsets_->fill(bytes);
    }
  }

  DevicePlan plan(bool backward) const {
    DeviceProblem d;
    d.sizes = sizes_of(p_);
    d.sizes.decay_gradient = backward && p_.decay != Decay::none;
    d.backward = backward;
    d.half = size_of(p_.dtype) == 2 && p_.value_dtype == p_.dtype;
    d.with_offsets = !p_.lengths.empty();
    d.with_z = p_.with_z();
    return plan_device(d, limits_);
  }

  std::string fault() {
    const i64 rows = p_.batch * p_.heads * p_.time;
    Tensor& o = output(p_.value_dtype, {p_.batch, p_.time, p_.heads, p_.value_dim});
    const Shape kv{p_.sequences(), p_.states(), p_.key_dim, p_.value_dim};
    const Shape z{p_.sequences(), p_.states(), p_.key_dim};
    Tensor& final_kv = output(p_.real(), kv);
    Tensor* final_z = p_.with_z() ? &output(p_.real(), z) : nullptr;
    Tensor* denominator = p_.normalize ? &output(p_.real(), {rows}) : nullptr;
    Normalizer normalizer;
    if (denominator) normalizer.denominator = denominator->on_device();
    if (denominator && (p_.value_dtype == Dtype::float16 || p_.value_dtype == Dtype::bfloat16))
      normalizer.rest = output(p_.value_dtype, {p_.batch, p_.time, p_.heads, p_.value_dim}).on_device();

    on_the_cpu();
    const DevicePlan forward = plan(false);
    ForwardOutputs out;
    out.o = o.on_device(), out.final_kv = final_kv.on_device();
    if (final_z) out.final_z = final_z->on_device();
    std::string fault = launch(workspace_bytes(forward), [&](void* workspace) {
      run_forward(forward, inputs(), out, normalizer, workspace, stream_);
    });
    if (!fault.empty()) return "forward: " + fault;
    compare("o", o, want_o_, tolerance(p_.value_dtype));
    compare("the state", final_kv, want_kv_, tolerance(p_.dtype));
    if (final_z) compare("z", *final_z, want_z_, tolerance(p_.dtype));
    if (!wrong_.empty()) return wrong_;

    outputs_.clear();
    const DevicePlan backward = plan(true);
    BackwardArguments args;
    args.grad_o = grad_o_->on_device(), args.grad_kv = grad_kv_->on_device();
    if (grad_z_) args.grad_z = grad_z_->on_device();
    Tensor& dq = output(p_.dtype, {p_.batch, p_.time, p_.heads, p_.key_dim});
    Tensor& dk = output(p_.dtype, {p_.batch, p_.time, p_.key_heads, p_.key_dim});
    Tensor& dv = output(p_.value_dtype, {p_.batch, p_.time, p_.key_heads, p_.value_dim});
    args.dq = dq.on_device(), args.dk = dk.on_device(), args.dv = dv.on_device();
    const bool per_head = p_.decay == Decay::per_head;
    Tensor* ddecay = nullptr;
    if (p_.decay != Decay::none) {
      ddecay = per_head ? &output(p_.real(), {p_.states()}, 2) : &output(p_.real(), {p_.batch, p_.time, p_.states()});
      args.dlog_decay = ddecay->on_device();
    }
    Tensor* dkv = p_.state ? &output(p_.real(), kv) : nullptr;
    Tensor* dz = p_.state && p_.with_z() ? &output(p_.real(), z) : nullptr;
    if (dkv) args.dinitial_kv = dkv->on_device();
    if (dz) args.dinitial_z = dz->on_device();
    normalizer.o = o.on_device();
    fault = launch(workspace_bytes(backward),
                   [&](void* workspace) { run_backward(backward, inputs(), args, normalizer, workspace, stream_); });
    if (!fault.empty()) return "backward: " + fault;
    compare("dq", dq, want_q_, tolerance(p_.dtype));
    compare("dk", dk, want_k_, tolerance(p_.dtype));
    compare("dv", dv, want_v_, tolerance(p_.value_dtype));
    if (dkv) compare("the gradient of the state", *dkv, want_dkv_, tolerance(p_.dtype));
    if (dz) compare("the gradient of z", *dz, want_dz_, tolerance(p_.dtype));
    if (ddecay) compare_decay(*ddecay, per_head);
    return wrong_;
  }

 private:
  using Owned = std::unique_ptr<Tensor>;

  Owned input(Dtype dtype, const Shape& sizes, const std::function<double()>& next, int first = 0) {
    const bool tokens = sizes.size() == 4 && sizes[1] == p_.time && first == 0 && sizes[0] == p_.batch;
    auto made = std::make_unique<Tensor>(dtype, sizes, tokens ? p_.layout : 0, first);
    made->fill(next);
    inputs_.push_back(made.get());
    return made;
  }

  // Stays where it is until the trial ends.
  Tensor& output(Dtype dtype, const Shape& sizes, int first = 0) {
    made_.push_back(std::make_unique<Tensor>(dtype, sizes, 0, first));
    outputs_.push_back(made_.back().get());
    return *made_.back();
  }

  Inputs inputs() const {
    Inputs in;
    in.q = q_->on_device(), in.k = k_->on_device(), in.v = v_->on_device();
    if (decay_) in.log_decay = decay_->on_device();
    if (kv_) in.initial_kv = kv_->on_device();
    if (z_) in.initial_z = z_->on_device();
    if (device_mask_) in.mask = mask_view(device_mask_->data());
    if (device_offsets_) in.cu_seqlens = static_cast<const i64*>(device_offsets_->data());
    in.scale = scale(), in.eps = eps;
    return in;
  }

  View mask_view(void* data) const {
    View v;
    v.data = data, v.stride[0] = p_.time, v.stride[1] = 1;
    return v;
  }
  double scale() const { return 1 / std::sqrt(static_cast<double>(p_.key_dim)); }

  // In float64, with a decay for each token: its gradient then shows the terms of the one that a head has.
  void on_the_cpu() {
    Sizes s = sizes_of(p_);
    s.double_precision = true;
    std::vector<double> decay, ddecay;
    Inputs in;
    in.q = q_->on_host(), in.k = k_->on_host(), in.v = v_->on_host();
    if (p_.decay != Decay::none) {
      s.decay = Decay::per_token, s.decay_gradient = true;
      const auto heads = static_cast<std::size_t>(p_.states());
      decay.resize(static_cast<std::size_t>(p_.batch * p_.time) * heads);
      for (std::size_t i = 0; i < decay.size(); ++i)
        decay[i] = decay_->values[p_.decay == Decay::per_head ? i % heads : i];
      ddecay.resize(decay.size());
      in.log_decay = by_token(decay);
    }
    if (kv_) in.initial_kv = kv_->on_host();
    if (z_) in.initial_z = z_->on_host();
    if (p_.mask) in.mask = mask_view(mask_.data());
    if (!offsets_.empty()) in.cu_seqlens = offsets_.data();
    in.scale = scale(), in.eps = eps;

    const i64 sequences = p_.sequences(), states = p_.states();
    const auto make = [](std::vector<double>& x, const Shape& sizes) {
      View v;
      v.dtype = Dtype::float64;
      Shape strides;
      x.assign(static_cast<std::size_t>(contiguous(sizes, strides)), 0.0);
      v.data = x.data();
      std::copy(strides.begin(), strides.end(), v.stride);
      return v;
    };
    ForwardOutputs out;
    out.o = make(want_o_, {p_.batch, p_.time, p_.heads, p_.value_dim});
    out.final_kv = make(want_kv_, {sequences, states, p_.key_dim, p_.value_dim});
    if (p_.with_z()) out.final_z = make(want_z_, {sequences, states, p_.key_dim});
    const Plan forward = plan_forward(s, 1);
    std::vector<char> workspace(workspace_bytes_forward(forward));
    run_forward(forward, in, out, workspace.data(), serial());

    BackwardArguments args;
    args.grad_o = grad_o_->on_host(), args.grad_kv = grad_kv_->on_host();
    if (grad_z_) args.grad_z = grad_z_->on_host();
    args.dq = make(want_q_, {p_.batch, p_.time, p_.heads, p_.key_dim});
    args.dk = make(want_k_, {p_.batch, p_.time, p_.key_heads, p_.key_dim});
    args.dv = make(want_v_, {p_.batch, p_.time, p_.key_heads, p_.value_dim});
    if (!ddecay.empty()) args.dlog_decay = by_token(ddecay);
    if (kv_) args.dinitial_kv = make(want_dkv_, {sequences, states, p_.key_dim, p_.value_dim});
    if (z_) args.dinitial_z = make(want_dz_, {sequences, states, p_.key_dim});
    const Plan backward = plan_backward(s, 1);
    workspace.assign(workspace_bytes_backward(backward), 0);
    run_backward(backward, in, args, workspace.data(), serial());
    want_decay_ = ddecay;
  }

  View by_token(std::vector<double>& x) const {
    View v;
    v.data = x.data(), v.dtype = Dtype::float64;
    v.stride[0] = p_.time * p_.states(), v.stride[1] = p_.states(), v.stride[2] = 1;
    return v;
  }

  // Twice, the second time as a captured graph, and what must not have happened.
  std::string launch(std::size_t bytes, const std::function<void(void*)>& enqueue) {
    const Guarded workspace(bytes, 0);
    const auto once = [&] { enqueue(workspace.data()); };
    run_once(stream_, once);
    std::vector<std::vector<char>> first;
    for (const Tensor* x : outputs_) {
      first.push_back(x->bytes());
      x->paint();
    }
    workspace.paint();
    run_captured(stream_, once);
    for (std::size_t i = 0; i < outputs_.size(); ++i) {
      if (outputs_[i]->bytes() != first[i]) return "the captured graph gives other bits";
      if (!outputs_[i]->intact()) return "a write beyond an output";
    }
    for (const Tensor* x : inputs_) {
      if (!x->intact() || !x->unchanged()) return "an input was written to";
    }
    return workspace.intact() ? "" : "a write beyond the workspace";
  }

  void compare(const char* name, const Tensor& got, const std::vector<double>& want, double allowed, double least = 0) {
    const double e = error(got.read(), want, least);
    if (e <= allowed || !wrong_.empty()) return;
    char text[120];
    std::snprintf(text, sizeof text, "%s: relative error %.3g, allowed %.3g", name, e, allowed);
    wrong_ = text;
  }

  void compare_decay(const Tensor& got, bool per_head) {
    const double allowed = p_.dtype == Dtype::float64 ? 1e-11 : p_.dtype == Dtype::float32 ? 3e-5 : 2e-2;
    if (!per_head) return compare("the gradient of the decay", got, want_decay_, allowed);
    const auto heads = static_cast<std::size_t>(p_.states());
    std::vector<double> sums(heads);
    double terms = 0;  // a sum over all tokens may come close to 0: it is put beside its terms
    for (std::size_t i = 0; i < want_decay_.size(); ++i) {
      sums[i % heads] += want_decay_[i];
      terms += want_decay_[i] * want_decay_[i];
    }
    compare("the gradient of the decay", got, sums, allowed, std::sqrt(terms));
  }

  static constexpr double eps = 1e-6;
  const Problem p_;
  std::mt19937_64 random_;
  std::normal_distribution<double> normal_;
  std::uniform_real_distribution<double> uniform_;
  const GpuLimits limits_;
  const cudaStream_t stream_;
  std::vector<const Tensor*> inputs_, outputs_;
  Owned q_, k_, v_, grad_o_, decay_, kv_, z_, grad_kv_, grad_z_;
  std::vector<Owned> made_;
  std::vector<char> mask_;
  std::vector<i64> offsets_;
  std::unique_ptr<Guarded> device_mask_, device_offsets_;
  std::vector<double> want_o_, want_kv_, want_z_, want_q_, want_k_, want_v_, want_decay_, want_dkv_, want_dz_;
  std::string wrong_;
};

// One token of decoding, its batch p.batch.
std::string step_fault(const Problem& p, std::uint64_t seed, cudaStream_t stream) {
  std::mt19937_64 random(seed);
  std::normal_distribution<double> normal;
  std::uniform_real_distribution<double> uniform;
  const auto number = [&] { return normal(random); };
  const auto positive = [&] { return std::abs(normal(random)); };
  const auto input = [&](Dtype dtype, const Shape& sizes, const std::function<double()>& next, int first = 0) {
    auto made = std::make_unique<Tensor>(dtype, sizes, 0, first);
    made->fill(next);
    return made;
  };
  const bool mapped = p.feature != Feature::none;
  const i64 channels = mapped ? p.channels : p.key_dim, maps = p.weighted ? p.key_heads : 1;
  const i64 columns = p.feature == Feature::softmax_pm ? p.key_dim / 2 : p.key_dim;
  const auto q = input(p.dtype, {p.batch, 1, p.heads, channels},
                       p.normalize && !mapped ? std::function<double()>(positive) : number);
  const auto k = input(p.dtype, {p.batch, 1, p.key_heads, channels}, positive);
  const auto small = [&] { return number() / std::sqrt(static_cast<double>(p.channels)); };
  const auto projection = mapped ? input(p.real(), {maps, channels, columns}, small) : nullptr;
  const auto weights = p.weighted ? input(p.real(), {maps, p.key_dim}, positive) : nullptr;
  const auto v = input(p.value_dtype, {p.batch, 1, p.key_heads, p.value_dim}, number);
  const auto kv = input(p.real(), {p.batch, p.states(), p.key_dim, p.value_dim}, number);
  const auto z = input(p.real(), {p.batch, p.states(), p.key_dim}, positive);
  const auto decay = [&] { return -p.strength * uniform(random); };
  const auto log_decay = p.decay == Decay::none       ? nullptr
                         : p.decay == Decay::per_head ? input(p.real(), {p.states()}, decay, 2)
                                                      : input(p.real(), {p.batch, 1, p.states()}, decay);
  Tensor o(p.value_dtype, {p.batch, 1, p.heads, p.value_dim}, 0, 0);
  Sizes s = sizes_of(p);
  s.time = 1;
  s.feature = p.feature, s.channels = p.channels;
  const auto arguments = [&](bool device, View out) {
    StepArguments a;
    const auto of = [&](const std::unique_ptr<Tensor>& x) { return device ? x->on_device() : x->on_host(); };
    a.q = of(q), a.k = of(k), a.v = of(v), a.kv = of(kv), a.z = of(z);
    if (log_decay) a.log_decay = of(log_decay);
    if (projection) a.projection = of(projection);
    if (weights) a.weights = of(weights);
    if (maps == 1) a.projection.stride[0] = a.weights.stride[0] = 0;
    a.o = out;
    a.scale = 0.3, a.eps = 1e-3;
    return a;
  };
  const StepArguments on_device = arguments(true, o.on_device());
  const auto enqueue = [&] { run_step(s, on_device, stream); };
  run_once(stream, enqueue);
  const std::vector<char> first = o.bytes(), first_kv = kv->bytes(), first_z = z->bytes();
  kv->restore(), z->restore(), o.paint();
  run_captured(stream, enqueue);
  if (o.bytes() != first || kv->bytes() != first_kv || z->bytes() != first_z)
    return "the captured graph gives other bits";
  for (const Tensor* x : std::vector<const Tensor*>{q.get(), k.get(), v.get(), kv.get(), z.get(), &o}) {
    if (!x->intact()) return "a write beyond a tensor";
  }
  s.double_precision = true;
  run_step(s, arguments(false, o.on_host()), serial());
  const double allowed = tolerance(p.real());
  const double worst = std::max(error(kv->read(), kv->values), error(z->read(), z->values));
  const double of_o = error(o.read(), o.values);
  if (worst <= allowed && of_o <= tolerance(p.value_dtype)) return "";
  char text[120];
  std::snprintf(text, sizeof text, "relative errors %.3g of the state, %.3g of o", worst, of_o);
  return text;
}

class Tester {
 public:
  void test(const Problem& p) {
    std::unique_ptr<Trial> trial;
    tally_.test(
        words(p),
        [&] {
          trial = std::make_unique<Trial>(p, static_cast<std::uint64_t>(tally_.problems()), limits_, stream_);
          for (const bool backward : {false, true}) {
            const DevicePlan plan = trial->plan(backward);
            kernels_.insert(std::string(plan.kernel == ScanKernel::tensor_cores ? "tensor cores" : "FMA units") +
                            (plan.split ? ", split" : ""));
          }
          return trial->fault();
        },
        [&] { return describe(trial->plan(false)) + describe(trial->plan(true)); });
  }
  void step(const Problem& p) {
    tally_.test(
        "step " + words(p), [&] { return step_fault(p, static_cast<std::uint64_t>(tally_.problems()), stream_); },
        [] { return std::string(); });
    kernels_.insert(p.feature == Feature::none ? "step" : "step behind a map");
  }
  int finish() const {
    std::string names;
    for (const std::string& kernel : kernels_) names += (names.empty() ? "" : "; ") + kernel;
    return tally_.finish("kernels: " + names);
  }

 private:
  const GpuLimits limits_ = current_gpu_limits();
  const Stream stream_;
  Tally tally_;
  std::set<std::string> kernels_;
};

struct DecayKind {
  Decay decay;
  bool by_query_head;
};
constexpr DecayKind kDecays[] = {{Decay::none, false},
                                 {Decay::per_head, true},
                                 {Decay::per_head, false},
                                 {Decay::per_token, true},
                                 {Decay::per_token, false}};

Problem with(Problem p, const DecayKind& kind) {
  p.decay = kind.decay;
  p.state_heads = kind.by_query_head ? p.heads : p.key_heads;
  return p;
}

void test_dtype(Tester& tester, Dtype dtype, bool small) {
  const std::vector<std::pair<i64, i64>> dims =
      small ? std::vector<std::pair<i64, i64>>{{64, 64}, {36, 20}}
            : std::vector<std::pair<i64, i64>>{{64, 64},   {36, 20},  {128, 128}, {100, 72}, {20, 128},
                                               {256, 256}, {200, 96}, {3, 5},     {7, 256}};
  for (const auto& [key_dim, value_dim] : dims) {
    for (const DecayKind& kind : kDecays) {
      Problem p = with(problem(dtype, 2, small ? 70 : 150, 4, 2, key_dim, value_dim), kind);
      p.state = true;
      tester.test(p);
      p.normalize = true;
      if (!small || kind.decay == Decay::per_token) tester.test(p);
    }
  }
  for (const i64 time : small ? Shape{1, 65} : Shape{1, 2, 31, 32, 33, 63, 64, 65, 128, 129, 777}) {
    tester.test(with(problem(dtype, 1, time, 2, 2, 64, 64), kDecays[1]));
  }
  for (const bool normalize : {false, true}) {
    Problem p = with(problem(dtype, 2, small ? 90 : 190, 2, 1, 64, 32), kDecays[3]);
    p.mask = p.state = true, p.normalize = normalize;
    tester.test(p);
    p.batch = 1, p.lengths = {0, 70, 1, 0, small ? 64 : 264, 5, 0}, p.time = small ? 140 : 340;
    tester.test(p);
    p.mask = false, p.decay = Decay::none;
    tester.test(p);
    for (const int layout : {1, 2}) {
      Problem strided = with(problem(dtype, 2, 90, 2, 2, 64, 32), kDecays[1]);
      strided.layout = layout, strided.normalize = normalize;
      tester.test(strided);
    }
    // few heads and many tokens: split
    Problem few = with(problem(dtype, 1, small ? 600 : 3000, 1, 1, 64, 64), kDecays[1]);
    few.normalize = normalize, few.strength = 0.05, few.state = true;
    tester.test(few);
    few.decay = Decay::none;
    if (!small) tester.test(few);
  }
  if (!small) {
    tester.test(problem(dtype, 8, 130, 64, 64, 64, 64));  // enough of them: not split
    tester.test(problem(dtype, 0, 10, 2, 2, 64, 64));
    tester.test(problem(dtype, 2, 0, 2, 2, 64, 64));
  }
  for (const DecayKind& kind : kDecays) {
    for (const bool normalize : {false, true}) {
      for (const auto& [key_dim, value_dim] : dims) {
        Problem p = with(problem(dtype, 3, 1, 10, 2, key_dim, value_dim), kind);
        p.normalize = normalize;
        if (!small || kind.decay != Decay::per_head) tester.step(p);
      }
    }
  }
  tester.step(problem(dtype, small ? 2 : 70, 1, 4, 4, 512, small ? 64 : 512));
  for (const Feature feature : {Feature::softmax, Feature::exp, Feature::softmax_pm}) {
    for (const auto& [channels, features] : {std::pair<i64, i64>{64, 64}, {20, 34}, {256, 512}}) {
      for (const bool normalize : {false, true}) {
        Problem p = with(problem(dtype, 3, 1, 10, 2, features, 72), kDecays[normalize ? 3 : 2]);
        p.feature = feature, p.channels = channels, p.weighted = p.normalize = normalize;
        tester.step(p);
      }
    }
  }
}

int test_everything(bool small) {
  Tester tester;
  for (const Dtype dtype : {Dtype::bfloat16, Dtype::float16, Dtype::float32, Dtype::float64}) {
    if (!small || dtype == Dtype::bfloat16 || dtype == Dtype::float32) test_dtype(tester, dtype, small);
  }
  // features in float32 beside values in 16 bits
  Problem mixed = problem(Dtype::float32, 1, 150, 4, 2, 64, 64);
  mixed.value_dtype = Dtype::bfloat16;
  tester.test(mixed);
  tester.step(mixed);
  return tester.finish();
}

}  // namespace

}  // namespace freqrank::linear_attention

int main(int argc, char** argv) {
  return freqrank::cuda_test::run_program(argc, argv, freqrank::linear_attention::test_everything);
}
