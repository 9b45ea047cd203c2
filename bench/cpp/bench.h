#pragma once
// What the families' benchmarks share. A benchmark is called "<family>/<device>/<case>" and reports bytes per second of
// the bytes that must move and, as a fraction of it, a copy measured just before.

#include <benchmark/benchmark.h>

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "common/parallel.h"

namespace freqrank::bench {

struct Options {
  int threads = 1;
  bool quick = false;
  std::size_t cache_bytes = 0;  // of the CPU's last level
};
const Options& options();
const ParallelFor& parallel_for();  // over Options::threads

// Cold data: inputs of which there are so many copies that together they exceed the cache, taken in turn.
template <class T>
class Rotation {
 public:
  explicit Rotation(std::vector<T> first) {
    const std::size_t bytes = first.size() * sizeof(T), limit = 1024;
    const std::size_t copies = 1 + 2 * options().cache_bytes / (bytes + 1);
    buffers_.assign(copies < limit ? copies : limit, first);
  }
  const T* next() {
    index_ = (index_ + 1) % buffers_.size();
    return buffers_[index_].data();
  }

 private:
  std::vector<std::vector<T>> buffers_;
  std::size_t index_ = 0;
};

std::vector<float> normal(std::size_t count);

// Bytes per second that a copy of `bytes` / 2 reads and writes, cold, on all threads; median of several.
double copy_rate(std::int64_t bytes);

// Sets the counters that every benchmark has. `n` is what a table runs over.
void report(benchmark::State& state, std::int64_t n, std::int64_t bytes, double total_seconds,
            double copy_bytes_per_second);

// Times `run` on the CPU.
void measure(benchmark::State& state, std::int64_t n, std::int64_t bytes, const std::function<void()>& run);

// Registers `function`, which times itself (UseManualTime).
void add(const std::string& name, std::function<void(benchmark::State&)> function);

// One of these in each family's file.
void add_dct();
void add_linear_attention();
void add_whitening();
void add_dct_cuda();  // nothing where there is no GPU, as the next one
void add_linear_attention_cuda();

}  // namespace freqrank::bench
