#include <cmath>

#include "common/half.h"
#include "cuda.h"
#include "linear_attention/launch.h"

namespace freqrank::bench {

namespace {

namespace la = linear_attention;

struct AttentionCase {
  std::int64_t batch, time, heads, dim;
  la::Dtype dtype = la::Dtype::bfloat16;
  bool backward = false, normalize = false;

  std::size_t size() const { return dtype == la::Dtype::bfloat16 ? 2 : 4; }
  std::size_t tensor_bytes() const { return static_cast<std::size_t>(batch * time * heads * dim) * size(); }
  // q, k, v, o; the backward pass alone: q, k, v, do, dq, dk, dv.
  std::int64_t bytes() const { return static_cast<std::int64_t>(tensor_bytes()) * (backward ? 7 : 4); }
  std::string name() const {
    const auto x = [](std::int64_t n) { return "x" + std::to_string(n); };
    return std::string("linear_attention/cuda/") + (backward ? "backward " : "forward ") +
           (normalize ? "normalised " : "") + std::to_string(batch) + x(time) + x(heads) + x(dim) +
           (dtype == la::Dtype::bfloat16 ? " bfloat16" : " float32");
  }
  la::Sizes sizes() const {
    la::Sizes s;
    s.batch = s.sequences = batch;
    s.time = time;
    s.heads = s.key_heads = s.state_heads = heads;
    s.key_dim = s.value_dim = dim;
    s.normalize = normalize;
    return s;
  }
  la::DevicePlan plan(bool of_backward) const {
    la::DeviceProblem problem;
    problem.sizes = sizes();
    problem.backward = of_backward;
    problem.half = dtype == la::Dtype::bfloat16;
    return la::plan_device(problem, current_gpu_limits());
  }
};

// Positive random numbers, so that denominators are far from 0, a million of them over and over.
Memory filled(std::size_t bytes, la::Dtype dtype) {
  static const std::vector<float> numbers = [] {
    std::vector<float> x = normal(1 << 20);
    for (float& value : x) value = std::abs(value);
    return x;
  }();
  static const std::vector<bfloat16> rounded = [] {
    std::vector<bfloat16> x;
    for (const float value : numbers) x.push_back(from_float<bfloat16>(value));
    return x;
  }();
  const bool half = dtype == la::Dtype::bfloat16;
  const std::size_t step = half ? rounded.size() * sizeof(bfloat16) : numbers.size() * sizeof(float);
  const void* const source = half ? static_cast<const void*>(rounded.data()) : numbers.data();
  Memory memory = allocate(bytes);
  for (std::size_t at = 0; at < bytes; at += step)
    check(
        cudaMemcpy(static_cast<char*>(memory.get()) + at, source, std::min(step, bytes - at), cudaMemcpyHostToDevice));
  return memory;
}

void run_case(const AttentionCase& each, benchmark::State& state) {
  const la::DevicePlan forward = each.plan(false), backward = each.plan(true);
  const std::size_t bytes = each.tensor_bytes();
  const Memory q = filled(bytes, each.dtype), k = filled(bytes, each.dtype), v = filled(bytes, each.dtype),
               o = allocate(bytes);
  const Memory denominator = allocate(static_cast<std::size_t>(each.batch * each.time * each.heads) * sizeof(float));
  const Memory workspace = allocate(std::max(la::workspace_bytes(forward), la::workspace_bytes(backward)));
  const auto view = [&](const Memory& memory) {
    const std::int64_t token = each.heads * each.dim;
    return la::View{memory.get(), each.dtype, {each.time * token, token, each.dim, 1}};
  };
  la::Inputs in;
  in.q = view(q), in.k = view(k), in.v = view(v);
  in.scale = 0.125, in.eps = 1e-6;
  la::ForwardOutputs out;
  out.o = view(o);
  la::Normalizer normalizer;
  if (each.normalize) normalizer.denominator.data = denominator.get();
  const auto run_forward = [&] { la::run_forward(forward, in, out, normalizer, workspace.get(), nullptr); };
  if (!each.backward) return measure_cuda(state, each.time, each.bytes(), run_forward);

  run_forward();  // the backward pass takes its o and denominators
  if (each.normalize) normalizer.o = view(o);
  const Memory grad_o = filled(bytes, each.dtype), dq = allocate(bytes), dk = allocate(bytes), dv = allocate(bytes);
  la::BackwardArguments args;
  args.grad_o = view(grad_o), args.dq = view(dq), args.dk = view(dk), args.dv = view(dv);
  measure_cuda(state, each.time, each.bytes(),
               [&] { la::run_backward(backward, in, args, normalizer, workspace.get(), nullptr); });
}

// One token of decoding, q, k and v in bfloat16.
void run_step_case(std::int64_t batch, std::int64_t heads, std::int64_t dim, std::int64_t bytes,
                   benchmark::State& state) {
  const auto rows = static_cast<std::size_t>(batch * heads * dim);
  const Memory q = filled(2 * rows, la::Dtype::bfloat16), k = allocate(2 * rows),
               v = filled(2 * rows, la::Dtype::bfloat16), o = allocate(2 * rows);
  const Memory kv = filled(4 * rows * static_cast<std::size_t>(dim), la::Dtype::float32);
  check(cudaMemset(k.get(), 0, 2 * rows));  // the state is read and written, and stays what it is
  la::Sizes sizes;
  sizes.batch = sizes.sequences = batch;
  sizes.time = 1;
  sizes.heads = sizes.key_heads = sizes.state_heads = heads;
  sizes.key_dim = sizes.value_dim = dim;
  const auto view = [&](const Memory& memory) {
    return la::View{memory.get(), la::Dtype::bfloat16, {heads * dim, heads * dim, dim, 1}};
  };
  la::StepArguments args;
  args.q = view(q), args.k = view(k), args.v = view(v), args.o = view(o);
  args.kv = {kv.get(), la::Dtype::float32, {heads * dim * dim, dim * dim, dim, 1}};
  args.scale = 0.125;
  measure_cuda(state, batch, bytes, [&] { la::run_step(sizes, args, nullptr); });
}

}  // namespace

void add_linear_attention_cuda() {
  if (!has_gpu()) return;
  const bool quick = options().quick;
  std::vector<AttentionCase> cases{{4, 2048, 16, 128}, {8, 1024, 8, 64}};
  if (!quick) {
    const std::vector<AttentionCase> more{{1, 8192, 96, 128}, {2, 16384, 16, 128}, {4, 4096, 64, 128},
                                          {8, 2048, 32, 256}, {1, 65536, 1, 128},  {1, 65536, 4, 128},
                                          {1, 65536, 16, 64}, {1, 65536, 16, 256}};
    cases.insert(cases.end(), more.begin(), more.end());
  }
  for (const bool backward : {false, true}) {
    for (AttentionCase each : cases) {
      each.backward = backward;
      for (const bool normalize : {false, true}) {
        each.normalize = normalize;
        if (normalize && each.batch == 1) continue;
        add(each.name(), reporting_errors([each](benchmark::State& state) { run_case(each, state); }));
      }
    }
    AttentionCase single{4, 2048, 16, 64, la::Dtype::float32, backward};
    if (!quick) add(single.name(), reporting_errors([single](benchmark::State& state) { run_case(single, state); }));
  }
  for (const std::int64_t batch :
       quick ? std::vector<std::int64_t>{8} : std::vector<std::int64_t>{1, 8, 32, 128, 256}) {
    const std::int64_t heads = 32, dim = 128, bytes = batch * heads * (2 * dim * dim * 4 + 4 * dim * 2);
    const std::string name = "linear_attention/cuda/step " + std::to_string(batch) + "x32x128 bfloat16";
    add(name, reporting_errors([=](benchmark::State& state) { run_step_case(batch, heads, dim, bytes, state); }));
  }
}

}  // namespace freqrank::bench
