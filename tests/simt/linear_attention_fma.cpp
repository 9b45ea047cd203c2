// Binds single launches of the scan on FMA units, and the decoding step: their parameters, from numpy arrays.

#include <algorithm>
#include <cstdint>
#include <string>

#include "bindings.h"
#include "linear_attention/device/scan_fma.h"
#include "linear_attention/device/step.h"

namespace py = pybind11;

namespace freqrank::simt_bindings {

namespace {

namespace la = linear_attention;

la::Dtype dtype_of(const py::array& x) {
  const char kind = x.dtype().kind();
  if (kind == 'u') return la::Dtype::bfloat16;  // as uint16
  if (x.itemsize() == 2) return la::Dtype::float16;
  return x.itemsize() == 4 ? la::Dtype::float32 : la::Dtype::float64;
}

// Dimensions from position `first` of the view on.
la::View view_of(const py::array& x, int first = 0) {
  la::View v;
  v.data = const_cast<void*>(x.data());
  v.dtype = dtype_of(x);
  for (py::ssize_t d = 0; d < x.ndim(); ++d) v.stride[first + d] = x.strides(d) / x.itemsize();
  return v;
}

template <class T>
T get(const py::dict& values, const char* key, T otherwise) {
  return values.contains(key) ? values[key].cast<T>() : otherwise;
}

template <class A>
struct Arguments {
  const py::dict& values;
  simt::Queue& queue;

  bool has(const char* key) const { return values.contains(key) && !values[key].is_none(); }
  py::array array(const char* key) const { return values[key].cast<py::array>(); }
  la::View view(const char* key, int first = 0) const { return has(key) ? view_of(array(key), first) : la::View{}; }
  // A contiguous array.
  template <class T>
  simt::global<T> all(const char* key) const {
    return has(key) ? queue.view(static_cast<T*>(view(key).data), 0, array(key).size()) : simt::global<T>{};
  }
  la::device::Matrix matrix(const char* key) const {
    if (!has(key)) return {};
    const py::array x = array(key);
    return la::device::matrix_of(view(key), x.shape(0), x.shape(1), x.shape(2), x.shape(3), queue);
  }
  la::device::Output output(const char* key) const {
    if (!has(key)) return {};
    const py::array x = array(key);
    return la::device::output_of(view(key), x.shape(0), x.shape(1), x.shape(2), x.shape(3), queue);
  }
  template <class T>
  la::device::States<T> states(const char* key) const {
    if (!has(key)) return {};
    const py::array x = array(key);
    return la::device::states_of<T>(view(key), {x.shape(0), x.shape(1), x.shape(2), x.ndim() > 3 ? x.shape(3) : 1},
                                    queue);
  }
};

template <class A>
py::dict scan_fma(simt::Executor& executor, const py::dict& values) {
  simt::Queue queue(executor);
  const Arguments<A> in{values, queue};
  la::device::ScanParams<A> p;
  p.columns = in.matrix("columns");
  p.values = in.matrix("values");
  p.rows = in.matrix("rows");
  p.out = in.output("out");
  p.rest = in.output("rest");
  p.with = in.matrix("with");
  p.depth = p.columns.width;
  p.width = p.values.width;
  p.segments.batch = in.array("columns").shape(0);
  p.segments.time = in.array("columns").shape(1);
  p.segments.table = in.template all<const simt::Index>("table");
  p.segments.sequences = get<simt::Index>(values, "sequences", p.segments.batch);
  p.segments.length = get<simt::Index>(values, "segment_length", p.segments.time);
  p.segments.per_sequence = get<simt::Index>(values, "segments_per_sequence", 1);
  p.segments.slots = in.has("table") ? in.array("table").shape(0) : p.segments.sequences * p.segments.per_sequence;
  p.reverse = get(values, "reverse", false);
  p.states_only = get(values, "states_only", false);
  p.state_heads = get(values, "state_heads", 1);
  p.row_heads = get(values, "row_heads", 1);
  p.column_heads = get(values, "column_heads", 1);
  p.rows_per_block = get(values, "rows_per_block", p.row_heads);
  p.row_blocks = (p.row_heads + p.rows_per_block - 1) / p.rows_per_block;
  p.query_heads = get(values, "query_heads", 1);
  p.column_factor = get<A>(values, "column_factor", 1);
  p.out_factor = get<A>(values, "out_factor", 1);
  if (in.has("mask")) {
    const la::View mask = in.view("mask");
    const la::device::Extent e = la::device::extent_of(mask, {p.segments.batch, p.segments.time, 1, 1});
    p.mask = queue.view(static_cast<const unsigned char*>(mask.data), e.begin, e.end);
    std::copy(mask.stride, mask.stride + 2, p.mask_stride);
  }
  if (in.has("log_decay")) {  // [Hs] or [B,T,Hs]
    const bool per_head = in.array("log_decay").ndim() == 1;
    p.decay = per_head ? la::Decay::per_head : la::Decay::per_token;
    const la::View g = in.view("log_decay", per_head ? 2 : 0);
    const simt::Index rows = per_head ? 1 : p.segments.batch, tokens = per_head ? 1 : p.segments.time;
    const la::device::Extent e = la::device::extent_of(g, {rows, tokens, p.state_heads, 1});
    p.log_decay = queue.view(static_cast<const A*>(g.data), e.begin, e.end);
    std::copy(g.stride, g.stride + 3, p.decay_stride);
  }
  p.normalize = get(values, "normalize", false);
  p.eps = get<A>(values, "eps", 0);
  p.denominator = in.template all<A>("denominator");
  p.query_scale = in.template all<const A>("query_scale");
  p.query_add = in.template all<const A>("query_add");
  p.key_sum = get(values, "key_sum", false);
  p.value_sum = get(values, "value_sum", false);
  p.by_slot = get(values, "by_slot", false);
  p.initial_state = in.template states<const A>("initial_state");
  p.initial_z = in.template states<const A>("initial_z");
  p.final_state = in.template states<A>("final_state");
  p.final_z = in.template states<A>("final_z");
  p.segment_decay = in.template all<double>("segment_decay");
  p.dots = in.template all<A>("dots");

  GpuLimits limits;
  limits.shared_bytes = get(values, "shared_bytes", limits.shared_bytes);
  const la::FmaLayout layout = la::fma_layout(p.depth, p.width, sizeof(A) == 8, limits);
  la::DevicePlan::Scan scan;
  scan.depth = p.depth;
  scan.width = p.width;
  scan.tile = layout.tile;
  p.width_tiles = scan.width_tiles = (p.width + layout.tile - 1) / layout.tile;
  scan.blocks = p.segments.slots * p.state_heads * p.row_blocks * p.width_tiles;
  la::device::enqueue_scan_fma(scan, p, queue);
  py::dict out;
  out["tile"] = layout.tile;
  out["slices"] = layout.slices;
  out["chunk"] = layout.chunk;
  return out;
}

// q, k, v, o [B,heads,..], log_decay [Hs] or [B,Hs], mask [B], kv, z; behind a map its `feature`, projection [C,M] or
// [Hk,C,M] and weights [M] or [Hk,M].
void step(simt::Executor& executor, const py::dict& values) {
  simt::Queue queue(executor);
  const Arguments<float> in{values, queue};
  const auto of_a_token = [&](const char* key) {  // stride[1] is the time's
    la::View x = in.view(key);
    std::rotate(x.stride + 1, x.stride + 3, x.stride + 4);
    return x;
  };
  la::Sizes sizes;
  const py::array q = in.array("q"), k = in.array("k"), kv = in.array("kv");
  sizes.batch = sizes.sequences = q.shape(0);
  sizes.time = 1;
  sizes.heads = q.shape(1);
  sizes.key_heads = k.shape(1);
  sizes.key_dim = kv.shape(2);
  sizes.value_dim = kv.shape(3);
  sizes.state_heads = kv.shape(1);
  sizes.normalize = get(values, "normalize", false);
  sizes.double_precision = q.itemsize() == 8;
  la::StepArguments args;
  args.q = of_a_token("q");
  args.k = of_a_token("k");
  args.v = of_a_token("v");
  args.o = of_a_token("o");
  args.mask = in.view("mask");
  args.kv = in.view("kv");
  args.z = in.view("z");
  if (in.has("log_decay")) {
    const bool per_head = in.array("log_decay").ndim() == 1;
    sizes.decay = per_head ? la::Decay::per_head : la::Decay::per_token;
    args.log_decay = per_head ? in.view("log_decay", 2) : of_a_token("log_decay");
  }
  args.scale = get(values, "scale", 1.0);
  args.eps = get(values, "eps", 0.0);
  if (in.has("projection")) {
    const std::string feature = get<std::string>(values, "feature", "softmax");
    sizes.feature = feature == "softmax" ? la::Feature::softmax
                    : feature == "exp"   ? la::Feature::exp
                                         : la::Feature::softmax_pm;
    sizes.channels = q.shape(2);
    const auto by_head = [&](const char* key, int dims) {
      return in.has(key) ? in.view(key, in.array(key).ndim() == dims ? 1 : 0) : la::View{};
    };
    args.projection = by_head("projection", 2);
    args.weights = by_head("weights", 1);
  }
  la::device::enqueue_step(sizes, args, queue);
}

}  // namespace

void bind_linear_attention_fma(py::module_& m) {
  m.def(
      "linear_attention_scan_fma",
      [](simt::Executor& executor, bool wide, const py::dict& values) {
        return wide ? scan_fma<double>(executor, values) : scan_fma<float>(executor, values);
      },
      "One launch of the scan; `values` are ScanParams' fields", py::arg("executor"), py::arg("wide"),
      py::arg("values"));
  m.def("linear_attention_step", &step, "The decoding step; `values` are StepArguments' fields", py::arg("executor"),
        py::arg("values"));
  m.def(
      "linear_attention_fma_tile",
      [](int depth, int width, bool wide) { return la::fma_layout(depth, width, wide, GpuLimits{}).tile; },
      "Columns of the values that a block of the scan takes", py::arg("depth"), py::arg("width"), py::arg("wide"));
}

}  // namespace freqrank::simt_bindings
