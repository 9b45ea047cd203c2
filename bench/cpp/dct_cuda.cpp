#include "cuda.h"
#include "dct/launch.h"
#include "dct_cases.h"

namespace freqrank::bench {

namespace {

void run_case(const DctCase& each, benchmark::State& state) {
  const dct::DevicePlan plan = dct::plan_device(each.problem(), current_gpu_limits());
  const auto half = static_cast<std::size_t>(each.bytes() / 2);
  const Memory in = allocate(half), out = allocate(half), workspace = allocate(dct::workspace_bytes(plan));
  const std::vector<float> host = normal(half / sizeof(float));
  check(cudaMemcpy(in.get(), host.data(), half, cudaMemcpyHostToDevice));
  const auto transform = [&] { dct::run(plan, {in.get(), out.get()}, workspace.get(), nullptr); };
  measure_cuda(state, each.n, each.bytes(), transform);
}

}  // namespace

void add_dct_cuda() {
  if (!has_gpu()) return;
  for (const DctCase& each : dct_cases(1 << 26))
    add(each.name("cuda"), reporting_errors([each](benchmark::State& state) { run_case(each, state); }));
}

}  // namespace freqrank::bench
