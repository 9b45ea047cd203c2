// Binds linear attention's kernels: plan, workspace and run of csrc/linear_attention/device.h under the host executor.

#include <cstdint>
#include <vector>

#include "bindings.h"
#include "linear_attention/device.h"
#include "linear_attention/device/launch.h"

namespace py = pybind11;

namespace freqrank::simt_bindings {

namespace {

namespace la = linear_attention;

la::Dtype dtype_of(const std::string& name) {
  if (name == "float16") return la::Dtype::float16;
  if (name == "bfloat16") return la::Dtype::bfloat16;
  if (name == "float32") return la::Dtype::float32;
  if (name == "float64") return la::Dtype::float64;
  throw py::value_error("dtype must be float16, bfloat16, float32 or float64; got " + name);
}

// The tensors of one call by name, and its options.
struct Arguments {
  const py::dict& arrays;
  const py::dict& options;

  bool has(const char* name) const { return arrays.contains(name) && !arrays[name].is_none(); }
  py::array array(const char* name) const { return arrays[name].cast<py::array>(); }
  std::int64_t size(const char* name, int dim) const { return array(name).shape(dim); }
  // Its dimensions begin at position `first` of the view.
  la::View view(const char* name, int first = 0) const {
    la::View v;
    if (!has(name)) return v;
    const py::array x = array(name);
    static char nothing[16];
    v.data = x.size() == 0 ? nothing : const_cast<void*>(x.data());
    const std::string key = std::string(name) + "_dtype";
    v.dtype = options.contains(key.c_str()) ? dtype_of(options[key.c_str()].cast<std::string>())
              : x.itemsize() == 2           ? dtype_of(options["half"].cast<std::string>())
              : x.itemsize() == 4           ? la::Dtype::float32
                                            : la::Dtype::float64;
    for (py::ssize_t d = 0; d < x.ndim(); ++d) v.stride[first + d] = x.strides(d) / x.itemsize();
    return v;
  }
  // Of `dims` dimensions, for all heads, or one more.
  la::View by_head(const char* name, int dims) const {
    return view(name, has(name) && array(name).ndim() == dims ? 1 : 0);
  }
  template <class T>
  T option(const char* name, T otherwise) const {
    return options.contains(name) ? options[name].cast<T>() : otherwise;
  }
};

la::DeviceProblem problem_of(const Arguments& a) {
  la::DeviceProblem p;
  la::Sizes& s = p.sizes;
  s.batch = a.size("q", 0), s.time = a.size("q", 1), s.heads = a.size("q", 2), s.key_dim = a.size("q", 3);
  if (a.has("projection")) {
    s.feature = static_cast<la::Feature>(a.option("feature", 0));
    s.channels = s.key_dim;
    s.key_dim = a.size("projection", a.array("projection").ndim() - 1);
    if (s.feature == la::Feature::softmax_pm) s.key_dim *= 2;
    s.map_gradient = a.has("dprojection");
  }
  s.key_heads = a.size("k", 2), s.value_dim = a.size("v", 3);
  s.sequences = a.has("cu_seqlens") ? a.size("cu_seqlens", 0) - 1 : s.batch;
  s.state_heads = s.key_heads;
  if (a.has("log_decay")) {
    const py::array g = a.array("log_decay");
    s.decay = g.ndim() == 1 ? la::Decay::per_head : la::Decay::per_token;
    s.state_heads = g.shape(g.ndim() - 1);
  }
  s.normalize = a.option("normalize", false);
  s.double_precision = a.array("q").itemsize() == 8;
  s.decay_gradient = a.has("dlog_decay");
  p.backward = a.has("grad_o");
  const auto q = a.view("q").dtype, k = a.view("k").dtype, v = a.view("v").dtype;
  p.half = q == k && q == v && (q == la::Dtype::float16 || q == la::Dtype::bfloat16);
  p.with_offsets = a.has("cu_seqlens");
  p.with_z = a.has("initial_z") || a.has("final_z") || a.has("grad_z");
  return p;
}

GpuLimits limits_of(const Arguments& a) {
  GpuLimits limits;
  limits.sms = a.option("sms", limits.sms);
  limits.shared_bytes = a.option("shared_bytes", limits.shared_bytes);
  limits.shared_bytes_per_sm = a.option("shared_bytes_per_sm", limits.shared_bytes_per_sm);
  return limits;
}

py::dict described(const la::DevicePlan& plan) {
  py::dict d;
  d["text"] = la::describe(plan);
  d["split"] = plan.split;
  d["slots"] = plan.slots;
  d["segment_length"] = plan.segment_length;
  d["tensor_cores"] = plan.kernel == la::ScanKernel::tensor_cores;
  d["bytes"] = plan.bytes;
  py::list scans;
  for (int i = 0; i < plan.scans; ++i) {
    py::dict scan;
    scan["role"] = la::name(plan.scan[i].role);
    scan["blocks"] = plan.scan[i].blocks;
    scan["shared_bytes"] = plan.scan[i].shared_bytes;
    scan["rows_per_block"] = plan.scan[i].rows_per_block;
    scan["width_tiles"] = plan.scan[i].width_tiles;
    scan["mapped"] = plan.scan[i].mapped;
    scan["read_bytes"] = plan.scan[i].read_bytes;
    scan["write_bytes"] = plan.scan[i].write_bytes;
    scans.append(scan);
  }
  d["scans"] = scans;
  return d;
}

// Forward, or with grad_o backward, into the arrays given.
py::dict run(simt::Executor& executor, const py::dict& arrays, const py::dict& options) {
  const Arguments a{arrays, options};
  const la::DevicePlan plan = la::plan_device(problem_of(a), limits_of(a));
  la::Inputs in;
  in.q = a.view("q"), in.k = a.view("k"), in.v = a.view("v");
  in.log_decay = a.view("log_decay", a.has("log_decay") && a.array("log_decay").ndim() == 1 ? 2 : 0);
  if (a.has("mask")) {
    const py::array m = a.array("mask");
    in.mask.data = const_cast<void*>(m.data());
    for (int d = 0; d < 2; ++d) in.mask.stride[d] = m.strides(d);
  }
  in.initial_kv = a.view("initial_kv"), in.initial_z = a.view("initial_z");
  if (a.has("cu_seqlens")) in.cu_seqlens = static_cast<const std::int64_t*>(a.array("cu_seqlens").data());
  in.projection = a.by_head("projection", 2), in.weights = a.by_head("weights", 1);
  in.scale = a.option("scale", 1.0), in.eps = a.option("eps", 0.0);
  const la::Normalizer normalizer{a.view("o"), a.view("denominator"), a.view("rest")};

  std::vector<std::uint8_t> memory(la::workspace_bytes(plan) + la::kDeviceAlign, 0xff);  // NaN
  const auto address = reinterpret_cast<std::uintptr_t>(memory.data());
  void* const workspace = memory.data() + (la::kDeviceAlign - address % la::kDeviceAlign);
  simt::Queue queue(executor);
  if (plan.problem.backward) {
    la::BackwardArguments b;
    b.grad_o = a.view("grad_o"), b.grad_kv = a.view("grad_kv"), b.grad_z = a.view("grad_z");
    b.dq = a.view("dq"), b.dk = a.view("dk"), b.dv = a.view("dv");
    b.dlog_decay = a.view("dlog_decay", a.has("dlog_decay") && a.array("dlog_decay").ndim() == 1 ? 2 : 0);
    b.dprojection = a.by_head("dprojection", 2), b.dweights = a.by_head("dweights", 1);
    b.dinitial_kv = a.view("dinitial_kv"), b.dinitial_z = a.view("dinitial_z");
    la::device::run_device_backward(plan, in, b, normalizer, workspace, queue);
  } else {
    la::ForwardOutputs out;
    out.o = a.view("o"), out.final_kv = a.view("final_kv"), out.final_z = a.view("final_z");
    la::device::run_device_forward(plan, in, out, normalizer, workspace, queue);
  }
  return described(plan);
}

}  // namespace

void bind_linear_attention(py::module_& m) {
  m.def("linear_attention", &run, py::arg("executor"), py::arg("arrays"), py::arg("options") = py::dict(),
        "Forward, or with grad_o backward, into the arrays given by the names of linear_attention.h; the plan");
  m.def(
      "linear_attention_plan",
      [](const py::dict& arrays, const py::dict& options) {
        const Arguments a{arrays, options};
        return described(la::plan_device(problem_of(a), limits_of(a)));
      },
      py::arg("arrays"), py::arg("options") = py::dict());
}

}  // namespace freqrank::simt_bindings
