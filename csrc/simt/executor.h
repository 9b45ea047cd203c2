#pragma once
// The host executor: runs kernels block by block, every thread a fiber, and reports what would go wrong on a GPU
// (docs/simt.md). Included by simt.h. host.h gives kernels their operations; this header is what those operations and
// the tests call.

#include <cstdint>
#include <map>
#include <memory>
#include <source_location>
#include <stdexcept>
#include <string>

#include "simt/counters.h"

namespace freqrank::simt {
inline namespace host {

using Location = std::source_location;

// What went wrong in a kernel, and where. what() names the kernel, the source line, the block and the thread.
class Error : public std::runtime_error {
 public:
  Error(std::string kernel, Location at, const std::string& text)
      : std::runtime_error(text), kernel_(std::move(kernel)), at_(at) {}
  const std::string& kernel() const { return kernel_; }
  Location at() const { return at_; }

 private:
  std::string kernel_;
  Location at_;
};

struct Machine;

class Executor {
 public:
  // `seed` decides the order of blocks, warps and lanes, and must not decide results. A block of a launch may have
  // `shared_limit` bytes of shared memory: an H100's by default, 163 KB on an A100.
  explicit Executor(std::uint64_t seed = 0, int shared_limit = 227 * 1024);
  ~Executor();
  Executor(const Executor&) = delete;
  Executor& operator=(const Executor&) = delete;

  using Body = void (*)(const void* params);
  void launch(const char* name, int max_threads, Grid grid, Body body, const void* params, Location at);

  // Every element given here must have been written by the end of the next launch, or, with `by_next_launch` false, by
  // the call of check_written(). An error names the first that was not.
  void expect_written(const void* data, Index count, int element_bytes, bool by_next_launch = true,
                      Location at = Location::current());
  void check_written();

  const std::map<std::string, KernelCounts>& counters() const;
  void reset_counters();
  // Errors that name the kernel and the worst line, unless: shared memory was used without bank conflicts; every
  // instruction on global memory touched no more sectors than its bytes fill. "" stands for every kernel.
  void require_no_bank_conflicts(const std::string& kernel = "") const;
  void require_full_sectors(const std::string& kernel = "") const;

 private:
  std::unique_ptr<Machine> machine_;
};

// Zeros of any size, of which only the touched pages exist: for huge lengths and strides.
class SparseMemory {
 public:
  explicit SparseMemory(std::uint64_t bytes);
  ~SparseMemory();
  SparseMemory(const SparseMemory&) = delete;
  SparseMemory& operator=(const SparseMemory&) = delete;
  void* data() const { return data_; }
  std::uint64_t bytes() const { return bytes_; }

 private:
  void* data_;
  std::uint64_t bytes_;
};

// --- What host.h is made of ---

// The thread that runs.
struct Thread {
  int index, threads;
  Index block, blocks;
  std::byte* shared;
  int shared_bytes;
};
extern thread_local Thread* running __attribute__((tls_model("initial-exec")));
[[noreturn]] void fail_outside(Location at);
inline Thread& current(Location at) {
  if (running == nullptr) fail_outside(at);
  return *running;
}
[[noreturn]] void fail(Location at, const std::string& text);

enum class Access : std::uint8_t { read, write, atomic };
// Checked for races and counted; `bytes` is 1, 2, 4, 8 or 16 and they are aligned.
void touch_global(const void* address, int bytes, Access kind, Location at);
void touch_shared(int offset, int bytes, Access kind, Location at);

void block_barrier(Location at);
// The lanes of a warp meet: the last to arrive calls `complete` with what each lane gave.
enum class Meeting : std::uint8_t { warp_barrier, shuffle, vote, matrix_load, mma };
using Complete = void (*)(void* const lanes[32], Location at);
void meet(Meeting kind, Complete complete, void* mine, Location at);

void start_copy(int to, const void* from, int bytes, Location at);  // `from` null: zeros
void commit_copies(Location at);
void wait_for_copies(int groups_left, Location at);

}  // namespace host
}  // namespace freqrank::simt
