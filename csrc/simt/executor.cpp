#include "simt/simt.h"

#include <sys/mman.h>
#include <algorithm>
#include <boost/context/fiber.hpp>
#include <cstring>
#include <deque>
#include <optional>
#include <utility>
#include <vector>

namespace freqrank::simt {
inline namespace host {
namespace {

namespace context = boost::context;

std::string place(Location at) { return std::string(at.file_name()) + ":" + std::to_string(at.line()); }

// The stacks of a block's fibers: one mapping, kept from block to block, committed page by page as they are touched.
class Stacks {
 public:
  static constexpr std::size_t size = 256 * 1024, guard = 4096;
  Stacks() {
    base_ = static_cast<char*>(
        mmap(nullptr, count * size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    if (base_ == MAP_FAILED) throw std::bad_alloc();
    for (int i = 0; i < count; ++i) mprotect(base_ + i * size, guard, PROT_NONE);
  }
  ~Stacks() { munmap(base_, count * size); }
  Stacks(const Stacks&) = delete;
  // The tops are staggered: at equal distances from a power of two they would all fall into the same cache sets.
  context::stack_context at(int i) const {
    context::stack_context stack;
    stack.sp = base_ + (i + 1) * size - static_cast<std::size_t>(i % 61) * 320;
    stack.size = size / 2;
    return stack;
  }

 private:
  static constexpr int count = 1024;
  char* base_;
};

struct KeepStack {
  context::stack_context allocate() { return {}; }
  void deallocate(context::stack_context&) noexcept {}
};

// xorshift64*: all that a random order needs.
struct Random {
  std::uint64_t state;
  std::uint32_t operator()() {
    state ^= state >> 12;
    state ^= state << 25;
    state ^= state >> 27;
    return static_cast<std::uint32_t>((state * 0x2545F4914F6CDD1Dull) >> 32);
  }
  int below(int n) {
    return static_cast<int>((static_cast<std::uint64_t>((*this)()) * static_cast<std::uint32_t>(n)) >> 32);
  }
};

enum class State : std::uint8_t { ready, at_barrier, at_warp, done };

struct Copy {
  int to, bytes;
  bool valid;
  const void* from;
  int group;
  Location at;
};

struct Fiber : Thread {
  context::fiber self, scheduler;
  State state;
  Location at;        // of what it waits for
  Complete complete;  // warp operation: who finishes it, this lane's part, what it is called
  void* mine;
  const char* what;
  std::deque<Copy> copies;
  int group;
};

}  // namespace

thread_local Thread* running = nullptr;

Error::Error(std::string kernel, Location at, const std::string& text)
    : std::runtime_error(text), kernel_(std::move(kernel)), at_(at) {}

struct Executor::Machine {
  Random random;
  int shared_limit;
  Stacks stacks;
  std::vector<Fiber> fibers;
  std::vector<std::byte> shared_storage;
  std::byte* shared = nullptr;
  const char* kernel = nullptr;
  Grid grid{};
  std::optional<Error> error;

  void run_block(Index block, Body body, const void* params);
  void unwind() {
    for (Fiber& f : fibers) f.self = {};
  }
  void fail_waiting(int first, int second);
};

namespace {
thread_local Executor::Machine* machine = nullptr;

Fiber& me(Location at) { return static_cast<Fiber&>(current(at)); }

void pause(Fiber& f) { f.scheduler = std::move(f.scheduler).resume(); }
}  // namespace

Thread& current(Location at) {
  if (running == nullptr) throw Error("", at, "a simt operation outside of a kernel (" + place(at) + ")");
  return *running;
}

int shared_bytes(Location) { return machine->grid.shared_bytes; }

void fail(Location at, const std::string& text) {
  if (running == nullptr) throw Error("", at, place(at) + ": " + text);
  throw Error(machine->kernel, at,
              std::string("kernel ") + machine->kernel + ", " + place(at) + ", block " +
                  std::to_string(running->block) + ", thread " + std::to_string(running->index) + ": " + text);
}

void touch_global(const void*, int, Access, Location) {}
void touch_shared(int, int, Access, Location) {}

void block_barrier(Location at) {
  Fiber& f = me(at);
  f.state = State::at_barrier;
  f.at = at;
  f.what = "barrier";
  pause(f);
}

void meet(Complete complete, void* mine, const char* what, Location at) {
  Fiber& f = me(at);
  f.state = State::at_warp;
  f.at = at;
  f.complete = complete;
  f.mine = mine;
  f.what = what;
  pause(f);
}

void memory_barrier_of_warp(Location at) {
  meet([](void* const*) {}, nullptr, "warp_barrier", at);
}

void start_copy(int to, const void* from, int bytes, bool valid, Location at) {
  Fiber& f = me(at);
  f.copies.push_back({to, bytes, valid, from, f.group, at});
}

void commit_copies(Location at) { ++me(at).group; }

void wait_for_copies(int groups_left, Location at) {
  Fiber& f = me(at);
  while (!f.copies.empty() && f.copies.front().group < f.group - groups_left) {
    const Copy& copy = f.copies.front();
    if (copy.valid)
      std::memcpy(f.shared + copy.to, copy.from, copy.bytes);
    else
      std::memset(f.shared + copy.to, 0, copy.bytes);
    f.copies.pop_front();
  }
}

// Two threads that should be at the same place are not.
void Executor::Machine::fail_waiting(int first, int second) {
  const auto describe = [&](int i) {
    const Fiber& f = fibers[i];
    const std::string who = "thread " + std::to_string(i);
    if (f.state == State::done) return who + " has ended";
    return who + " waits at " + f.what + " in " + place(f.at);
  };
  if (fibers[first].state == State::done) std::swap(first, second);
  throw Error(kernel, fibers[first].at,
              std::string("kernel ") + kernel + ", " + place(fibers[first].at) + ", block " +
                  std::to_string(fibers[first].block) + ": divergent " + fibers[first].what + ": " + describe(first) +
                  ", " + describe(second));
}

namespace {
bool together(const Fiber& a, const Fiber& b) {
  if (a.state != b.state) return false;
  if (a.state == State::done) return true;
  return a.at.line() == b.at.line() && a.at.column() == b.at.column() &&
         std::strcmp(a.at.file_name(), b.at.file_name()) == 0 && std::strcmp(a.what, b.what) == 0;
}
}  // namespace

void Executor::Machine::run_block(Index block, Body body, const void* params) {
  const int threads = grid.threads, warps = threads / warp_size;
  std::memset(shared, 0xff, grid.shared_bytes);
  for (int i = 0; i < threads; ++i) {
    Fiber& f = fibers[i];
    f.index = i;
    f.threads = threads;
    f.block = block;
    f.blocks = grid.blocks;
    f.shared = shared;
    f.state = State::ready;
    f.copies.clear();
    f.group = 0;
    const context::stack_context stack = stacks.at(i);
    f.self = context::fiber(std::allocator_arg, context::preallocated(stack.sp, stack.size, stack), KeepStack{},
                            [&f, this, body, params](context::fiber&& scheduler) {
                              f.scheduler = std::move(scheduler);
                              try {
                                body(params);
                              } catch (const Error& e) {
                                if (!error) error = e;
                              }
                              f.state = State::done;
                              return std::move(f.scheduler);
                            });
  }
  std::vector<int> runnable(warps);
  for (int w = 0; w < warps; ++w) runnable[w] = w;
  int at_barrier = 0;
  while (true) {
    while (!runnable.empty()) {
      const int pick = random.below(static_cast<int>(runnable.size()));
      const int first = runnable[pick] * warp_size;
      const std::uint32_t r = random();
      const int start = r & 31, stride = ((r >> 5) & 31) | 1, flip = (r >> 10) & 31;
      for (int k = 0; k < warp_size; ++k) {
        Fiber& f = fibers[first + (((start + k * stride) ^ flip) & 31)];
        running = &f;
        f.self = std::move(f.self).resume();
        running = nullptr;
        if (error) throw *error;
      }
      Fiber& leader = fibers[first];
      for (int i = 1; i < warp_size; ++i)
        if (!together(leader, fibers[first + i])) fail_waiting(first, first + i);
      if (leader.state == State::at_warp) {
        void* parts[warp_size];
        for (int i = 0; i < warp_size; ++i) {
          parts[i] = fibers[first + i].mine;
          fibers[first + i].state = State::ready;
        }
        leader.complete(parts);
      } else {
        at_barrier += leader.state == State::at_barrier;
        runnable[pick] = runnable.back();
        runnable.pop_back();
      }
    }
    if (at_barrier == 0) return;
    for (int w = 1; w < warps; ++w)
      if (!together(fibers[0], fibers[w * warp_size])) fail_waiting(0, w * warp_size);
    for (int i = 0; i < threads; ++i) fibers[i].state = State::ready;
    for (int w = 0; w < warps; ++w) runnable.push_back(w);
    at_barrier = 0;
  }
}

Executor::Executor(std::uint64_t seed, int shared_limit) : machine_(std::make_unique<Machine>()) {
  machine_->random.state = (seed + 1) * 0x9E3779B97F4A7C15ull;
  machine_->shared_limit = shared_limit;
}
Executor::~Executor() = default;

void Executor::launch(const char* name, int max_threads, Grid grid, Body body, const void* params, Location at) {
  Machine& m = *machine_;
  const auto refuse = [&](const std::string& text) {
    throw Error(name, at, std::string("kernel ") + name + ", launched in " + place(at) + ": " + text);
  };
  if (running != nullptr || machine != nullptr) refuse("launched from within a kernel");
  if (grid.blocks < 0 || grid.blocks > 0x7fffffff) refuse("the grid has " + std::to_string(grid.blocks) + " blocks");
  if (grid.blocks == 0) return;
  if (grid.threads < warp_size || grid.threads % warp_size != 0 || grid.threads > max_threads || max_threads > 1024)
    refuse("a block has " + std::to_string(grid.threads) + " threads: a multiple of 32 up to " +
           std::to_string(max_threads) + " is allowed");
  if (grid.shared_bytes < 0 || grid.shared_bytes > m.shared_limit)
    refuse("a block has " + std::to_string(grid.shared_bytes) + " bytes of shared memory: at most " +
           std::to_string(m.shared_limit) + " are allowed");
  m.kernel = name;
  m.grid = grid;
  m.error.reset();
  if (static_cast<int>(m.fibers.size()) < grid.threads) m.fibers.resize(grid.threads);
  m.shared_storage.resize(grid.shared_bytes + 128);
  m.shared =
      reinterpret_cast<std::byte*>((reinterpret_cast<std::uintptr_t>(m.shared_storage.data()) + 127) / 128 * 128);
  machine = &m;
  try {
    for (Index block = 0; block < grid.blocks; ++block) m.run_block(block, body, params);
  } catch (...) {
    m.unwind();
    machine = nullptr;
    running = nullptr;
    throw;
  }
  machine = nullptr;
}

}  // namespace host
}  // namespace freqrank::simt
