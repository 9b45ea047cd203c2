// Google Benchmark over the torch-free library:
//   freqrank_bench [--threads=N] [--quick] [--benchmark_filter=REGEX] [--benchmark_out=FILE] ...
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <random>
#include <thread>

#include "bench.h"
#include "common/isa.h"

namespace freqrank::bench {

namespace {

Options& mutable_options() {
  static Options options;
  return options;
}

std::size_t last_level_cache() {
  std::size_t largest = 0;
  for (int index = 0; index < 5; ++index) {
    std::ifstream file("/sys/devices/system/cpu/cpu0/cache/index" + std::to_string(index) + "/size");
    std::size_t size = 0;
    char unit = 0;
    if (file >> size >> unit) largest = std::max(largest, size << (unit == 'M' ? 20 : 10));
  }
  return largest != 0 ? largest : std::size_t{32} << 20;
}

double seconds(const std::function<void()>& run) {
  const auto begin = std::chrono::steady_clock::now();
  run();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

}  // namespace

const Options& options() { return mutable_options(); }

const ParallelFor& parallel_for() {
  static const ParallelFor pool = options().threads > 1 ? thread_pool(options().threads) : serial();
  return pool;
}

std::vector<float> normal(std::size_t count) {
  std::mt19937 engine(1);
  std::normal_distribution<float> distribution;
  std::vector<float> x(count);
  for (float& value : x) value = distribution(engine);
  return x;
}

double copy_rate(std::int64_t bytes) {
  const std::int64_t half = std::max<std::int64_t>(bytes / 2, 1);
  Rotation<char> from(std::vector<char>(static_cast<std::size_t>(half), 1));
  std::vector<char> to(static_cast<std::size_t>(half), 2);
  std::vector<double> times;
  for (int i = 0; i < 9; ++i) {
    const char* source = from.next();
    times.push_back(seconds([&] {
      parallel_for()(half, 1 << 16, [&](std::int64_t begin, std::int64_t end) {
        std::memcpy(to.data() + begin, source + begin, static_cast<std::size_t>(end - begin));
      });
    }));
  }
  std::nth_element(times.begin(), times.begin() + 4, times.end());
  return 2 * static_cast<double>(half) / times[4];
}

void report(benchmark::State& state, std::int64_t n, std::int64_t bytes, double total_seconds,
            double copy_bytes_per_second) {
  const double rate = static_cast<double>(bytes) * static_cast<double>(state.iterations()) / total_seconds;
  state.counters["n"] = static_cast<double>(n);
  state.counters["bytes"] = static_cast<double>(bytes);
  state.counters["bytes_per_second"] = rate;
  state.counters["of_copy"] = rate / copy_bytes_per_second;
}

void measure(benchmark::State& state, std::int64_t n, std::int64_t bytes, const std::function<void()>& run) {
  const double copy = copy_rate(bytes);
  run();
  double total = 0;
  for (auto _ : state) {
    const double time = seconds(run);
    state.SetIterationTime(time);
    total += time;
  }
  report(state, n, bytes, total, copy);
}

void add(const std::string& name, std::function<void(benchmark::State&)> function) {
  benchmark::RegisterBenchmark(name.c_str(), std::move(function))
      ->UseManualTime()
      ->Unit(benchmark::kMicrosecond)
      ->MinTime(options().quick ? 0.01 : 0.05)
      ->Repetitions(options().quick ? 3 : 5);
}

}  // namespace freqrank::bench

int main(int argc, char** argv) {
  using namespace freqrank;
  auto& options = bench::mutable_options();
  options.threads = static_cast<int>(std::thread::hardware_concurrency());
  options.cache_bytes = bench::last_level_cache();
  const auto ours = [&](const char* argument) {
    if (std::strncmp(argument, "--threads=", 10) == 0) {
      options.threads = std::max(1, std::atoi(argument + 10));
      return true;
    }
    if (std::strcmp(argument, "--quick") == 0) return options.quick = true;
    return false;
  };
  argc = static_cast<int>(std::remove_if(argv + 1, argv + argc, ours) - argv);
  benchmark::AddCustomContext("isa", isa_name());
  benchmark::AddCustomContext("threads", std::to_string(options.threads));
  bench::add_dct();
  bench::add_linear_attention();
  bench::add_whitening();
#ifdef FREQRANK_HAS_CUDA
  bench::add_dct_cuda();
  bench::add_linear_attention_cuda();
#endif
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 1;
  benchmark::RunSpecifiedBenchmarks();
  benchmark::Shutdown();
}
