#pragma once
// Runs a plan on a queue: a CUDA stream or the host executor. Allocates nothing, waits for nothing.

#include <algorithm>
#include <stdexcept>

#include "linear_attention/device/gradients.h"
#include "linear_attention/device/map_gradient.h"
#include "linear_attention/device/pairs.h"
#include "linear_attention/device/segments.h"
#include "linear_attention/device/views.h"

namespace freqrank::linear_attention::device {

// Defined in their headers and compiled in files of their own (linear_attention/launch/).
template <class E, class Queue>
void enqueue_scan_mma(int shape, const DevicePlan::Scan& scan, const ScanParams<float>& p, Queue& queue);
template <class A, class Queue>
void enqueue_scan_fma(const DevicePlan::Scan& scan, const ScanParams<A>& p, Queue& queue);
template <class E, class Queue>
void enqueue_pairs_mma(int chunk, const PairsParams<float>& p, Queue& queue);
template <class A, class Queue>
void enqueue_pairs_fma(const PairsParams<A>& p, Queue& queue);

// Everything that the launches of one call share.
template <class A, class Queue>
class Call {
 public:
  Call(const DevicePlan& plan, const Inputs& in, void* workspace, Queue& queue)
      : plan_(plan), s_(plan.problem.sizes), in_(in), base_(static_cast<char*>(workspace)), queue_(queue) {}

  void forward(const ForwardOutputs& out, const Normalizer& normalizer) {
    begin();
    if (plan_.split) {
      sum_segments(Role::states, {});
      carry(false, in_.initial_kv, in_.initial_z, out.final_kv, out.final_z);
    }
    ScanParams<A> p = scan(Role::forward);
    p.rows = queries(in_.q, channels());
    p.columns = keys(in_.k, channels());
    p.values = keys(in_.v, s_.value_dim);
    p.out = output_of(out.o, s_.batch, s_.time, s_.heads, s_.value_dim, queue_);
    p.out_factor = static_cast<A>(in_.scale);
    p.normalize = s_.normalize;
    p.eps = static_cast<A>(in_.eps);
    if (s_.normalize) p.denominator = row(normalizer.denominator.data);
    p.exact_scores = static_cast<bool>(normalizer.rest);  // for dq, which is a difference of sums that have o in them
    if (normalizer.rest) p.rest = output_of(normalizer.rest, s_.batch, s_.time, s_.heads, s_.value_dim, queue_);
    p.key_sum = plan_.with_z;
    p.by_slot = plan_.split;
    if (plan_.split) {
      p.initial_state = workspace_states<const A>(plan_.states_at);
      if (plan_.with_z) p.initial_z = workspace_z<const A>(plan_.states_z_at);
    } else {
      p.initial_state = states_of<const A>(in_.initial_kv, state_sizes(), queue_);
      p.final_state = states_of<A>(out.final_kv, state_sizes(), queue_);
      if (plan_.with_z) {
        p.initial_z = states_of<const A>(in_.initial_z, z_sizes(), queue_);
        p.final_z = states_of<A>(out.final_z, z_sizes(), queue_);
      }
    }
    launch(Role::forward, p);
  }

  void backward(const BackwardArguments& arguments, const Normalizer& normalizer) {
    begin();
    BackwardArguments args = arguments;
    if (plan_.maps()) {
      args.dq = contiguous(plan_.query_features_at, {s_.batch, s_.time, s_.heads, s_.key_dim});
      args.dk = contiguous(plan_.key_features_at, {s_.batch, s_.time, s_.key_heads, s_.key_dim});
    }
    const Matrix grad_o = queries(args.grad_o, s_.value_dim);
    if (s_.normalize) prepare_normalizer(args, normalizer);
    if (plan_.split) {
      sum_segments(Role::states, {});
      const bool keep = s_.decay_gradient;
      carry(false, in_.initial_kv, in_.initial_z, keep ? contiguous(plan_.final_at, state_sizes()) : View{},
            keep && plan_.with_z ? contiguous(plan_.final_z_at, z_sizes()) : View{});
      sum_segments(Role::state_gradients, grad_o);
      carry(true, args.grad_kv, args.grad_z, args.dinitial_kv, args.dinitial_z);
    }
    query_gradient(args, grad_o);
    key_gradient(args, grad_o);
    value_gradient(args, grad_o);
    if (plan_.parts()) {
      sum_heads(plan_.key_parts_at, args.dk, s_.key_dim);
      sum_heads(plan_.value_parts_at, args.dv, s_.value_dim);
    }
    if constexpr (sizeof(A) == 4) {
      if (plan_.maps()) map_gradient(arguments, args);
    }
    if (s_.decay_gradient) {
      pairs_in_chunks(grad_o);
      decay_gradient(args);
    }
  }

 private:
  using Sizes4 = Index[4];

  void begin() {
    segments_ = {s_.batch, s_.time, s_.sequences, plan_.segment_length, plan_.segments_per_sequence, plan_.slots, {}};
    if (in_.mask) {
      const Index sizes[4] = {s_.batch, s_.time, 1, 1};
      const Extent e = extent_of(in_.mask, sizes);
      tokens_.mask = queue_.view(static_cast<const unsigned char*>(in_.mask.data), e.begin, e.end);
      std::copy(in_.mask.stride, in_.mask.stride + 2, tokens_.mask_stride);
    }
    tokens_.decay = s_.decay;
    if (s_.decay != Decay::none) {
      const Extent e = extent_of(in_.log_decay, decay_sizes_);
      tokens_.log_decay = queue_.view(static_cast<const A*>(in_.log_decay.data), e.begin, e.end);
      std::copy(in_.log_decay.stride, in_.log_decay.stride + 3, tokens_.decay_stride);
    }
    if constexpr (sizeof(A) == 4) {
      if (plan_.maps()) prepare_map();
    }
    if (in_.cu_seqlens == nullptr || plan_.slots == 0) return;
    OffsetsKernel::Params p{};
    p.offsets = queue_.view(in_.cu_seqlens, 0, s_.sequences + 1);
    p.time = s_.time, p.sequences = s_.sequences, p.length = plan_.segment_length, p.slots = plan_.slots;
    auto* table = reinterpret_cast<Index*>(base_ + plan_.offsets_at);
    p.table = queue_.view(table, 0, 3 * plan_.slots);
    p.sequence_slots = queue_.view(table, 3 * plan_.slots, 3 * plan_.slots + 2 * s_.sequences) + 3 * plan_.slots;
    segments_.table = p.table;
    sequence_slots_ = p.sequence_slots;
    enqueue_offsets(p, queue_);
  }

  // --- Where things are ---
  Matrix queries(const View& x, Index width) const { return matrix_of(x, s_.batch, s_.time, s_.heads, width, queue_); }
  Matrix keys(const View& x, Index width) const { return matrix_of(x, s_.batch, s_.time, s_.key_heads, width, queue_); }
  Index channels() const { return plan_.maps() ? s_.channels : s_.key_dim; }  // of q and k
  const Sizes4& state_sizes() const { return state_sizes_; }
  const Sizes4& z_sizes() const { return z_sizes_; }
  simt::global<A> row(void* data) const { return queue_.view(static_cast<A*>(data), 0, s_.batch * s_.time * s_.heads); }
  // A tensor of the arithmetic's type in the workspace.
  View contiguous(std::size_t at, const Index (&sizes)[4]) const {
    View v;
    v.data = base_ + at;
    v.dtype = sizeof(A) == 8 ? Dtype::float64 : Dtype::float32;
    v.stride[3] = 1;
    for (int d = 2; d >= 0; --d) v.stride[d] = v.stride[d + 1] * sizes[d + 1];
    return v;
  }
  template <class T>
  States<T> workspace_states(std::size_t at, bool transposed = false) const {
    const Index sizes[4] = {plan_.slots, s_.state_heads, s_.key_dim, s_.value_dim};
    return states_of<T>(contiguous(at, sizes), sizes, queue_, transposed);
  }
  template <class T>
  States<T> workspace_z(std::size_t at) const {
    const Index sizes[4] = {plan_.slots, s_.state_heads, s_.key_dim, 1};
    return states_of<T>(contiguous(at, sizes), sizes, queue_);
  }
  const DevicePlan::Scan& planned(Role role) const {
    for (int i = 0; i < plan_.scans; ++i)
      if (plan_.scan[i].role == role) return plan_.scan[i];
    throw std::logic_error("linear_attention: the plan lacks a scan");
  }

  // --- Scans ---
  ScanParams<A> scan(Role role) const {
    const DevicePlan::Scan& planned = this->planned(role);
    ScanParams<A> p;
    p.segments = segments_;
    p.reverse = role == Role::key_gradient || role == Role::value_gradient || role == Role::state_gradients;
    p.states_only = role == Role::states || role == Role::state_gradients;
    p.state_heads = static_cast<int>(s_.state_heads);
    p.row_heads = planned.row_heads, p.column_heads = planned.column_heads;
    p.rows_per_block = planned.rows_per_block, p.row_blocks = planned.row_blocks;
    p.width_tiles = planned.width_tiles;
    p.depth = planned.depth, p.width = planned.width;
    p.query_heads = static_cast<int>(s_.heads);
    // what these scans give to differences of large sums: the decay's gradient, and dq with a normalizer
    p.exact_state = (s_.decay_gradient && role != Role::value_gradient) ||
                    (plan_.problem.backward && s_.normalize && (role == Role::states || role == Role::query_gradient));
    p.column_factor = p.reverse ? static_cast<A>(in_.scale) : A(1);
    static_cast<TokenParams<A>&>(p) = tokens_;
    if (plan_.problem.backward && s_.normalize) {
      p.query_scale = row(base_ + plan_.query_scale_at);
      p.query_add = row(base_ + plan_.query_add_at);
    }
    if (plan_.maps()) {
      p.map = map_;
      p.map_rows = role == Role::forward || role == Role::value_gradient;
      p.map_columns = p.map_rows || role == Role::states;
      p.map_values = !p.map_columns;
    }
    return p;
  }

  // --- Feature maps ---
  simt::global_bytes bytes_at(std::size_t at, Index count) const {
    return queue_.view_bytes(static_cast<void*>(base_ + at), 0, count);
  }
  template <class T>
  simt::global<T> floats_at(std::size_t at, Index count) const {
    return queue_.view(reinterpret_cast<T*>(base_ + at), 0, count);
  }
  // A projection or weights, of so many heads.
  simt::global<const float> by_head(const View& x, const Index (&sizes)[4]) const {
    const Extent e = extent_of(x, sizes);
    return queue_.view(static_cast<const float*>(x.data), e.begin, e.end);
  }
  Index map_heads(const View& x) const { return x.stride[0] == 0 ? 1 : s_.key_heads; }
  Index products() const { return s_.feature == Feature::softmax_pm ? s_.key_dim / 2 : s_.key_dim; }

  void prepare_map() {
    const View &projection = in_.projection, &weights = in_.weights;
    const bool backward = plan_.problem.backward;
    PrepareMapKernel::Params p{};
    p.heads = static_cast<int>(map_heads(projection)), p.key_heads = static_cast<int>(s_.key_heads);
    p.channels = static_cast<int>(s_.channels), p.products = static_cast<int>(products());
    p.features = static_cast<int>(s_.key_dim), p.depth = kMmaShapes[plan_.shape].depth;
    p.is_float16 = in_.q.dtype == Dtype::float16;
    p.projection = by_head(projection, {p.heads, s_.channels, products(), 1});
    std::copy(projection.stride, projection.stride + 3, p.projection_stride);
    if (weights) {
      p.weights = by_head(weights, {map_heads(weights), s_.key_dim, 1, 1});
      std::copy(weights.stride, weights.stride + 2, p.weights_stride);
    }
    const Index size = 4 * p.pieces() * 4, weight_count = s_.key_heads * p.depth;
    p.fragments = bytes_at(plan_.map_at, size);
    if (backward) p.transposed = bytes_at(plan_.transposed_map_at, size);
    if (weights) p.padded_weights = floats_at<float>(plan_.map_weights_at, weight_count);
    enqueue_prepare_map(p, queue_);

    map_.fragments = queue_.view_bytes(static_cast<const void*>(base_ + plan_.map_at), 0, size);
    map_.weights = p.padded_weights;
    map_.heads = p.heads, map_.key_heads = p.key_heads;
    map_.channel_tiles = (p.channels + 15) / 16, map_.features = p.features;
    map_.feature = s_.feature;
    if (backward)
      transposed_map_ = queue_.view_bytes(static_cast<const void*>(base_ + plan_.transposed_map_at), 0, size);
  }

  // `of_features`: with the gradients of features in the place of those of q and k.
  void map_gradient(const BackwardArguments& args, const BackwardArguments& of_features) const {
    MapGradientParams p{};
    static_cast<TokenParams<float>&>(p) = tokens_;
    p.batch = s_.batch, p.time = s_.time;
    p.map = map_;
    p.transposed = transposed_map_;
    p.slots_per_key_head = plan_.map_slots;
    const Index slots = s_.key_heads * plan_.map_slots;
    if (args.dprojection)
      p.projection_sums = floats_at<float>(plan_.projection_sums_at, slots * s_.channels * s_.key_dim);
    if (args.dweights) p.weight_sums = floats_at<float>(plan_.weight_sums_at, slots * s_.key_dim);
    const auto launch = [&](const View& x, const View& gradient, const View& dx, Index heads, int parts, int first) {
      p.heads = static_cast<int>(heads), p.parts = parts;
      p.group = static_cast<int>(heads / s_.key_heads), p.first_slot = first;
      p.x = matrix_of(x, s_.batch, s_.time, heads, s_.channels, queue_);
      p.dx = output_of(dx, s_.batch, s_.time, heads, s_.channels, queue_);
      p.gradient = queue_.view(static_cast<const float*>(gradient.data), 0, s_.batch * s_.time * heads * s_.key_dim);
      if (x.dtype == Dtype::float16) {
        enqueue_map_gradient<float16>(kMmaShapes[plan_.shape].depth, p, queue_);
      } else {
        enqueue_map_gradient<bfloat16>(kMmaShapes[plan_.shape].depth, p, queue_);
      }
    };
    launch(in_.q, of_features.dq, args.dq, s_.heads, plan_.query_map_parts, 0);
    launch(in_.k, of_features.dk, args.dk, s_.key_heads, plan_.key_map_parts,
           static_cast<int>(s_.heads / s_.key_heads) * plan_.query_map_parts);
    if (args.dprojection) sum_map(args, p);
  }

  void sum_map(const BackwardArguments& args, const MapGradientParams& sums) const {
    MapSumKernel::Params p{};
    p.key_heads = static_cast<int>(s_.key_heads), p.slots = plan_.map_slots;
    p.channels = static_cast<int>(s_.channels), p.products = static_cast<int>(products());
    p.features = static_cast<int>(s_.key_dim);
    p.projection_heads = static_cast<int>(map_heads(args.dprojection));
    p.projection_sums = sums.projection_sums;
    const Extent e = extent_of(args.dprojection, {p.projection_heads, s_.channels, products(), 1});
    p.projection = queue_.view(static_cast<float*>(args.dprojection.data), e.begin, e.end);
    std::copy(args.dprojection.stride, args.dprojection.stride + 3, p.projection_stride);
    if (args.dweights) {
      p.weight_heads = static_cast<int>(map_heads(args.dweights));
      p.weight_sums = sums.weight_sums;
      const Extent w = extent_of(args.dweights, {p.weight_heads, s_.key_dim, 1, 1});
      p.weights = queue_.view(static_cast<float*>(args.dweights.data), w.begin, w.end);
      std::copy(args.dweights.stride, args.dweights.stride + 2, p.weights_stride);
    }
    enqueue_map_sum(p, queue_);
  }

  void launch(Role role, const ScanParams<A>& p) const {
    const DevicePlan::Scan& scan = planned(role);
    if constexpr (sizeof(A) == 4) {
      if (plan_.kernel == ScanKernel::tensor_cores) {
        if (p.columns.dtype == Dtype::float16) {
          enqueue_scan_mma<float16>(plan_.shape, scan, p, queue_);
        } else {
          enqueue_scan_mma<bfloat16>(plan_.shape, scan, p, queue_);
        }
        return;
      }
    }
    enqueue_scan_fma<A>(scan, p, queue_);
  }

  // What each segment adds to the state, or to its gradient.
  void sum_segments(Role role, const Matrix& grad_o) const {
    ScanParams<A> p = scan(role);
    const bool gradients = role == Role::state_gradients;
    p.columns = gradients ? grad_o : keys(in_.k, channels());
    p.values = gradients ? queries(in_.q, channels()) : keys(in_.v, s_.value_dim);
    p.by_slot = true;
    p.final_state = workspace_states<A>(gradients ? plan_.gradients_at : plan_.states_at, gradients);
    if (plan_.with_z) p.final_z = workspace_z<A>(gradients ? plan_.gradients_z_at : plan_.states_z_at);
    (gradients ? p.value_sum : p.key_sum) = plan_.with_z;
    if (!gradients) {
      p.query_scale = p.query_add = {};
      p.segment_decay = queue_.view(reinterpret_cast<double*>(base_ + plan_.decay_at), 0, plan_.slots * s_.state_heads);
    }
    launch(role, p);
  }

  void carry(bool reverse, const View& initial, const View& initial_z, const View& final, const View& final_z) const {
    typename CarryKernel<A>::Params p{};
    p.reverse = reverse;
    p.sequences = s_.sequences, p.per_sequence = plan_.segments_per_sequence;
    p.sequence_slots = sequence_slots_;
    p.state_heads = static_cast<int>(s_.state_heads);
    p.depth = static_cast<int>(s_.key_dim), p.width = static_cast<int>(s_.value_dim);
    p.states = workspace_states<A>(reverse ? plan_.gradients_at : plan_.states_at).data;
    p.decay = queue_.view(reinterpret_cast<const double*>(base_ + plan_.decay_at), 0, plan_.slots * s_.state_heads);
    p.initial = states_of<const A>(initial, state_sizes(), queue_);
    p.final = states_of<A>(final, state_sizes(), queue_);
    if (plan_.with_z) {
      p.z = workspace_z<A>(reverse ? plan_.gradients_z_at : plan_.states_z_at).data;
      p.initial_z = states_of<const A>(initial_z, z_sizes(), queue_);
      p.final_z = states_of<A>(final_z, z_sizes(), queue_);
    }
    enqueue_carry<A>(p, queue_);
  }

  void prepare_normalizer(const BackwardArguments& args, const Normalizer& normalizer) const {
    typename NormalizerKernel<A>::Params p{};
    p.rows = s_.batch * s_.time * s_.heads;
    p.time = s_.time;
    p.gradient = queries(args.grad_o, s_.value_dim);
    p.o = queries(normalizer.o, s_.value_dim);
    if (normalizer.rest) p.rest = queries(normalizer.rest, s_.value_dim);
    p.denominator = row(normalizer.denominator.data);
    p.mask = tokens_.mask;
    std::copy(tokens_.mask_stride, tokens_.mask_stride + 2, p.mask_stride);
    p.scale = row(base_ + plan_.query_scale_at);
    p.add = row(base_ + plan_.query_add_at);
    enqueue_normalizer<A>(p, queue_);
  }

  simt::global<A> dots(std::size_t at, const ScanParams<A>& p) const {
    return queue_.view(reinterpret_cast<A*>(base_ + at), 0, p.width_tiles * s_.batch * s_.time * p.out.heads);
  }

  void query_gradient(const BackwardArguments& args, const Matrix& grad_o) const {
    ScanParams<A> p = scan(Role::query_gradient);
    p.rows = grad_o;
    p.columns = keys(in_.v, s_.value_dim);
    p.values = keys(in_.k, channels());
    p.out = output_of(args.dq, s_.batch, s_.time, s_.heads, s_.key_dim, queue_);
    p.out_factor = static_cast<A>(in_.scale);
    p.value_sum = p.exact_scores = s_.normalize;
    p.by_slot = plan_.split;
    p.initial_state = plan_.split ? workspace_states<const A>(plan_.states_at, true)
                                  : states_of<const A>(in_.initial_kv, state_sizes(), queue_, true);
    if (s_.normalize)
      p.initial_z =
          plan_.split ? workspace_z<const A>(plan_.states_z_at) : states_of<const A>(in_.initial_z, z_sizes(), queue_);
    if (s_.decay_gradient) {
      p.with = queries(in_.q, s_.key_dim);
      p.dots = dots(plan_.query_dots_at, p);
    }
    launch(Role::query_gradient, p);
  }

  // Of a key head, or where several states share one, of each state.
  Output key_output(const View& x, std::size_t parts_at, Index width) const {
    if (!plan_.parts()) return output_of(x, s_.batch, s_.time, s_.key_heads, width, queue_);
    const Index sizes[4] = {s_.batch, s_.time, s_.state_heads, width};
    return output_of(contiguous(parts_at, sizes), s_.batch, s_.time, s_.state_heads, width, queue_);
  }

  void key_gradient(const BackwardArguments& args, const Matrix& grad_o) const {
    ScanParams<A> p = scan(Role::key_gradient);
    p.rows = keys(in_.v, s_.value_dim);
    p.columns = grad_o;
    p.values = queries(in_.q, channels());
    p.out = key_output(args.dk, plan_.key_parts_at, s_.key_dim);
    p.value_sum = plan_.with_z;
    p.by_slot = plan_.split;
    p.initial_state = plan_.split ? workspace_states<const A>(plan_.gradients_at, true)
                                  : states_of<const A>(args.grad_kv, state_sizes(), queue_, true);
    if (plan_.with_z) {
      p.initial_z =
          plan_.split ? workspace_z<const A>(plan_.gradients_z_at) : states_of<const A>(args.grad_z, z_sizes(), queue_);
      if (!plan_.split) p.final_z = states_of<A>(args.dinitial_z, z_sizes(), queue_);
    }
    if (s_.decay_gradient) {
      p.with = keys(in_.k, s_.key_dim);
      p.dots = dots(plan_.key_dots_at, p);
    }
    launch(Role::key_gradient, p);
  }

  void value_gradient(const BackwardArguments& args, const Matrix& grad_o) const {
    ScanParams<A> p = scan(Role::value_gradient);
    p.rows = keys(in_.k, channels());
    p.columns = queries(in_.q, channels());
    p.values = grad_o;
    p.out = key_output(args.dv, plan_.value_parts_at, s_.value_dim);
    p.query_add = {};
    p.by_slot = plan_.split;
    p.initial_state = plan_.split ? workspace_states<const A>(plan_.gradients_at)
                                  : states_of<const A>(args.grad_kv, state_sizes(), queue_);
    if (!plan_.split) p.final_state = states_of<A>(args.dinitial_kv, state_sizes(), queue_);
    launch(Role::value_gradient, p);
  }

  void sum_heads(std::size_t from, const View& to, Index width) const {
    typename SumHeadsKernel<A>::Params p{};
    p.count = s_.batch * s_.time * s_.key_heads * width;
    p.time = s_.time;
    p.group = static_cast<int>(s_.state_heads / s_.key_heads);
    p.from = queue_.view(reinterpret_cast<const A*>(base_ + from), 0, p.count * p.group);
    p.to = output_of(to, s_.batch, s_.time, s_.key_heads, width, queue_);
    enqueue_sum_heads<A>(p, queue_);
  }

  simt::global<A> pairs() const {
    return queue_.view(reinterpret_cast<A*>(base_ + plan_.pairs_at), 0, s_.batch * s_.time * s_.state_heads);
  }

  void pairs_in_chunks(const Matrix& grad_o) const {
    PairsParams<A> p;
    static_cast<TokenParams<A>&>(p) = tokens_;
    p.segments = segments_;
    const int chunk = planned(Role::query_gradient).chunk;
    p.chunks = static_cast<int>(plan_.segment_length / chunk);
    p.state_heads = static_cast<int>(s_.state_heads), p.query_heads = static_cast<int>(s_.heads);
    p.q = queries(in_.q, s_.key_dim), p.k = keys(in_.k, s_.key_dim);
    p.v = keys(in_.v, s_.value_dim), p.grad_o = grad_o;
    p.scale = static_cast<A>(in_.scale);
    if (s_.normalize) {
      p.query_scale = row(base_ + plan_.query_scale_at);
      p.query_add = row(base_ + plan_.query_add_at);
    }
    p.pairs = pairs();
    if constexpr (sizeof(A) == 4) {
      if (plan_.kernel == ScanKernel::tensor_cores) {
        if (p.q.dtype == Dtype::float16) {
          enqueue_pairs_mma<float16>(chunk, p, queue_);
        } else {
          enqueue_pairs_mma<bfloat16>(chunk, p, queue_);
        }
        return;
      }
    }
    enqueue_pairs_fma<A>(p, queue_);
  }

  void decay_gradient(const BackwardArguments& args) const {
    typename DecayGradientKernel<A>::Params p{};
    p.segments = segments_;
    p.state_heads = static_cast<int>(s_.state_heads);
    p.query_heads = static_cast<int>(s_.heads);
    p.key_heads = static_cast<int>(plan_.parts() ? s_.state_heads : s_.key_heads);
    p.query_tiles = planned(Role::query_gradient).width_tiles;
    p.key_tiles = planned(Role::key_gradient).width_tiles;
    p.depth = static_cast<int>(s_.key_dim), p.width = static_cast<int>(s_.value_dim);
    const Index tokens = s_.batch * s_.time;
    p.query_dots =
        queue_.view(reinterpret_cast<const A*>(base_ + plan_.query_dots_at), 0, p.query_tiles * tokens * p.query_heads);
    p.key_dots =
        queue_.view(reinterpret_cast<const A*>(base_ + plan_.key_dots_at), 0, p.key_tiles * tokens * p.key_heads);
    p.pairs = pairs();
    p.states = workspace_states<const A>(plan_.states_at).data;
    p.gradients = workspace_states<const A>(plan_.gradients_at).data;
    p.final = states_of<const A>(contiguous(plan_.final_at, state_sizes()), state_sizes(), queue_).data;
    if (plan_.with_z) {
      p.states_z = workspace_z<const A>(plan_.states_z_at).data;
      p.gradients_z = workspace_z<const A>(plan_.gradients_z_at).data;
      p.final_z = states_of<const A>(contiguous(plan_.final_z_at, z_sizes()), z_sizes(), queue_).data;
    }
    p.mask = tokens_.mask;
    std::copy(tokens_.mask_stride, tokens_.mask_stride + 2, p.mask_stride);
    const View& out = args.dlog_decay;
    const bool per_head = s_.decay == Decay::per_head;
    const Extent e = extent_of(out, decay_sizes_);
    const auto to = queue_.view(static_cast<A*>(out.data), e.begin, e.end);
    if (per_head) {
      p.head_sums = queue_.view(reinterpret_cast<double*>(base_ + plan_.head_sums_at), 0, plan_.slots * s_.state_heads);
    } else {
      p.by_token = to;
      std::copy(out.stride, out.stride + 3, p.by_token_stride);
    }
    enqueue_decay_gradient<A>(p, queue_);
    if (per_head)
      enqueue_sum_slots<A>({plan_.slots, static_cast<int>(s_.state_heads), p.head_sums, to, out.stride[2]}, queue_);
  }

  const DevicePlan& plan_;
  const Sizes& s_;
  const Inputs& in_;
  char* base_;
  Queue& queue_;
  const Sizes4 state_sizes_ = {s_.sequences, s_.state_heads, s_.key_dim, s_.value_dim};
  const Sizes4 z_sizes_ = {s_.sequences, s_.state_heads, s_.key_dim, 1};
  const Sizes4 decay_sizes_ = {s_.decay == Decay::per_head ? 1 : s_.batch, s_.decay == Decay::per_head ? 1 : s_.time,
                               s_.state_heads, 1};
  Segments segments_;
  TokenParams<A> tokens_;
  simt::global<const Index> sequence_slots_;
  MapParams map_;
  simt::const_global_bytes transposed_map_;
};

template <class Queue>
void run_device_forward(const DevicePlan& plan, const Inputs& in, const ForwardOutputs& out,
                        const Normalizer& normalizer, void* workspace, Queue& queue) {
  if (plan.problem.sizes.double_precision) {
    Call<double, Queue>(plan, in, workspace, queue).forward(out, normalizer);
  } else {
    Call<float, Queue>(plan, in, workspace, queue).forward(out, normalizer);
  }
}

template <class Queue>
void run_device_backward(const DevicePlan& plan, const Inputs& in, const BackwardArguments& args,
                         const Normalizer& normalizer, void* workspace, Queue& queue) {
  if (plan.problem.sizes.double_precision) {
    Call<double, Queue>(plan, in, workspace, queue).backward(args, normalizer);
  } else {
    Call<float, Queue>(plan, in, workspace, queue).backward(args, normalizer);
  }
}

}  // namespace freqrank::linear_attention::device
