#include "bench.h"
#include "whitening/cholesky.h"
#include "whitening/gram.h"

namespace freqrank::bench {

namespace {

namespace wh = whitening;

// 64-byte aligned, as the family's workspaces must be.
class Workspace {
 public:
  explicit Workspace(std::int64_t bytes) : memory_(static_cast<std::size_t>(bytes) + 64) {}
  void* get() { return reinterpret_cast<void*>((reinterpret_cast<std::uintptr_t>(memory_.data()) + 63) / 64 * 64); }

 private:
  std::vector<char> memory_;
};

void gram(benchmark::State& state, std::int64_t tokens, std::int64_t n) {
  const wh::GramPlan plan = wh::plan_gram({{}}, tokens, n, n, true);
  Workspace workspace(wh::workspace_bytes(plan));
  Rotation<float> x(normal(static_cast<std::size_t>(tokens * n)));
  std::vector<double> out(static_cast<std::size_t>(n * n));
  measure(state, n, tokens * n * 4 + n * n * 8, [&] {
    wh::GramArguments arguments;
    arguments.x = {const_cast<float*>(x.next()), wh::Dtype::float32, n, 1, nullptr};
    arguments.out = {out.data(), wh::Dtype::float64, n, 1, nullptr};
    wh::run(plan, arguments, workspace.get(), parallel_for());
  });
}

void cholesky(benchmark::State& state, std::int64_t batch, std::int64_t n) {
  const wh::CholeskyPlan plan = wh::plan_cholesky({{batch}}, n, wh::Dtype::float32);
  Workspace workspace(wh::workspace_bytes(plan));
  std::vector<float> matrices = normal(static_cast<std::size_t>(batch * n * n));
  for (std::int64_t b = 0; b < batch; ++b)  // dominant diagonals: positive definite
    for (std::int64_t i = 0; i < n; ++i)
      matrices[static_cast<std::size_t>((b * n + i) * n + i)] = 4 * static_cast<float>(n);
  Rotation<float> a(std::move(matrices));
  std::vector<float> factor(static_cast<std::size_t>(batch * n * n));
  std::vector<std::int32_t> info(static_cast<std::size_t>(batch));
  const std::int64_t stride = n * n;
  measure(state, n, 2 * batch * n * n * 4, [&] {
    const wh::MatrixBatch in{const_cast<float*>(a.next()), wh::Dtype::float32, n, 1, &stride};
    wh::run(plan, wh::CholeskyArguments{in, factor.data(), info.data()}, workspace.get(), parallel_for());
  });
}

}  // namespace

void add_whitening() {
  for (const std::int64_t n : {256, 512})
    if (!options().quick || n == 256)
      add("whitening/cpu/gram 4096x" + std::to_string(n) + " float32",
          [n](benchmark::State& state) { gram(state, 4096, n); });
  const std::vector<std::pair<std::int64_t, std::int64_t>> sizes{{256, 32}, {64, 128}, {16, 512}};
  for (const auto& [batch, n] : sizes) {
    if (options().quick && n != 128) continue;
    const std::string shape = std::to_string(batch) + "x" + std::to_string(n) + "x" + std::to_string(n);
    add("whitening/cpu/cholesky " + shape + " float32",
        [batch = batch, n = n](benchmark::State& state) { cholesky(state, batch, n); });
  }
}

}  // namespace freqrank::bench
