#include "linear_attention/linear_attention.h"

#include "bench.h"

namespace freqrank::bench {

void add_linear_attention() {
  for (const std::int64_t time : {512, 2048, 8192}) {
    if (options().quick && time != 2048) continue;
    const std::int64_t heads = 8, dim = 64, elements = time * heads * dim;
    const std::string name = "linear_attention/cpu/forward 1x" + std::to_string(time) + "x8x64 float32";
    add(name, [=](benchmark::State& state) {
      namespace la = linear_attention;
      la::Sizes sizes;
      sizes.batch = sizes.sequences = 1;
      sizes.time = time;
      sizes.heads = sizes.key_heads = sizes.state_heads = heads;
      sizes.key_dim = sizes.value_dim = dim;
      const la::Plan plan = la::plan_forward(sizes, options().threads);
      std::vector<char> workspace(la::workspace_bytes_forward(plan));
      Rotation<float> qkv(normal(static_cast<std::size_t>(3 * elements)));
      std::vector<float> o(static_cast<std::size_t>(elements));
      const auto view = [&](const float* data) {
        return la::View{const_cast<float*>(data), la::Dtype::float32, {elements, heads * dim, dim, 1}};
      };
      measure(state, time, 4 * elements * 4, [&] {
        const float* data = qkv.next();
        la::Inputs in;
        in.q = view(data);
        in.k = view(data + elements);
        in.v = view(data + 2 * elements);
        in.scale = 0.125;
        la::ForwardOutputs out;
        out.o = view(o.data());
        la::run_forward(plan, in, out, workspace.data(), parallel_for());
      });
    });
  }
}

}  // namespace freqrank::bench
