#pragma once
// The host executor: runs kernels block by block, every thread a fiber. host.h gives kernels their operations; this
// header is what those operations and the tests call.

#include <cstdint>
#include <memory>
#include <source_location>
#include <stdexcept>
#include <string>

namespace freqrank::simt {
inline namespace host {

using Location = std::source_location;

// What went wrong in a kernel, where. what() names the kernel, the source line, the block and the thread.
class Error : public std::runtime_error {
 public:
  Error(std::string kernel, Location at, const std::string& text);
  const std::string& kernel() const { return kernel_; }
  Location at() const { return at_; }

 private:
  std::string kernel_;
  Location at_;
};

// What the operations in host.h need to know of the thread that says them.
struct Thread {
  int index;    // in the block
  int threads;  // of the block
  Index block, blocks;
  std::byte* shared;  // the block's shared memory
};
extern thread_local Thread* running __attribute__((tls_model("initial-exec")));
Thread& current(Location at);  // the thread that runs, or an error

class Executor {
 public:
  explicit Executor(std::uint64_t seed = 0, int shared_limit = 227 * 1024);
  ~Executor();
  Executor(const Executor&) = delete;

  using Body = void (*)(const void* params);
  void launch(const char* name, int max_threads, Grid grid, Body body, const void* params, Location at);

  struct Machine;

 private:
  std::unique_ptr<Machine> machine_;
};

enum class Access { read, write, atomic };
void touch_global(const void* address, int bytes, Access kind, Location at);
void touch_shared(int offset, int bytes, Access kind, Location at);
[[noreturn]] void fail(Location at, const std::string& text);

void block_barrier(Location at);
void memory_barrier_of_warp(Location at);
// The lanes of a warp meet: `complete` is called once with what each lane gave.
using Complete = void (*)(void* const lanes[32]);
void meet(Complete complete, void* mine, const char* what, Location at);

// cp.async
void start_copy(int to, const void* from, int bytes, bool valid, Location at);
void commit_copies(Location at);
void wait_for_copies(int groups_left, Location at);

}  // namespace host
}  // namespace freqrank::simt
