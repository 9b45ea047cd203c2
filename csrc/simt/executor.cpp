#include <sys/mman.h>

#include <algorithm>
#include <bit>
#include <boost/context/fiber.hpp>
#include <cmath>
#include <cstring>
#include <deque>
#include <numeric>
#include <optional>
#include <utility>
#include <vector>

#include "simt/shadow.h"
#include "simt/simt.h"  // and with it executor.h

namespace freqrank::simt {
inline namespace host {
namespace {

namespace context = boost::context;

std::string place(Location at) { return std::string(at.file_name()) + ":" + std::to_string(at.line()); }

bool same_place(Location a, Location b) {
  return a.line() == b.line() && a.column() == b.column() && std::strcmp(a.file_name(), b.file_name()) == 0;
}

// The stacks of a block's fibers: one mapping for all executors of this thread, committed page by page as it is
// touched.
class Stacks {
 public:
  Stacks() {
    base_ = static_cast<char*>(
        mmap(nullptr, count * size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    if (base_ == MAP_FAILED) throw std::bad_alloc();
  }
  ~Stacks() { munmap(base_, count * size); }
  Stacks(const Stacks&) = delete;
  Stacks& operator=(const Stacks&) = delete;
  // Stacks 0 to n - 1 get a page below them that must not be touched.
  void protect(int n) {
    for (; protected_ < n; ++protected_) mprotect(base_ + protected_ * size, guard, PROT_NONE);
  }
  context::stack_context at(int i) const {
    context::stack_context stack;
    // At distances that are a power of two, all would start in the same cache sets.
    const std::size_t stagger = static_cast<std::size_t>(i % 61) * 320;
    stack.sp = base_ + (i + 1) * size - stagger;
    stack.size = size - guard - stagger;
    return stack;
  }

 private:
  static constexpr std::size_t count = 1024, size = 256 * 1024, guard = 4096;
  char* base_;
  int protected_ = 0;
};
thread_local Stacks stacks;

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

// Source locations as small numbers. The compiler makes one object a location, so its address identifies it.
class Sites {
 public:
  std::uint16_t number(Location at) {
    static_assert(sizeof(Location) == sizeof(void*));
    const auto key = std::bit_cast<std::uintptr_t>(at);
    Entry& entry = recent_[(key >> 3) % recent_.size()];
    if (entry.key != key) entry = {key, intern(key, at)};
    return entry.number;
  }
  Location at(std::uint16_t number) const { return sites_[number]; }
  std::size_t count() const { return sites_.size(); }

 private:
  std::uint16_t intern(std::uintptr_t key, Location at) {
    const auto [found, fresh] = numbers_.try_emplace(key, static_cast<std::uint16_t>(sites_.size()));
    if (fresh) {
      if (sites_.size() == 65535) throw std::runtime_error("simt: more than 65535 places touch memory");
      sites_.push_back(at);
    }
    return found->second;
  }
  struct Entry {
    std::uintptr_t key = 1;
    std::uint16_t number = 0;
  };
  std::vector<Entry> recent_ = std::vector<Entry>(1024);
  std::unordered_map<std::uintptr_t, std::uint16_t> numbers_;
  std::vector<Location> sites_;
};

// An access to memory, kept until the warp's next meeting, when those of its lanes are put side by side.
enum class Kind : std::uint8_t { global_read, global_write, global_atomic, shared_read, shared_write, shared_atomic };
struct Logged {
  std::uint64_t address;
  std::uint16_t site;
  std::uint8_t bytes;
  Kind kind;
};

struct Copy {
  int to, bytes;
  const void* from;
  int group;
  Location at;
};

enum class State : std::uint8_t { ready, at_barrier, at_meeting, done };

struct Fiber : Thread {
  context::fiber self, scheduler;
  State state;
  Location at;  // of what it waits for
  Meeting meeting;
  Complete complete;
  void* mine;
  std::uint32_t* warp_epoch;
  std::vector<Logged> log;
  std::deque<Copy> copies;
  int copy_group;
};

const char* name_of(const Fiber& f) {
  if (f.state == State::at_barrier) return "barrier";
  switch (f.meeting) {
    case Meeting::warp_barrier: return "warp_barrier";
    case Meeting::shuffle: return "shuffle";
    case Meeting::vote: return "vote";
    case Meeting::matrix_load: return "matrix load";
    case Meeting::mma: return "mma";
  }
  return "";
}

bool together(const Fiber& a, const Fiber& b) {
  if (a.state != b.state) return false;
  if (a.state == State::done) return true;
  if (a.state == State::at_meeting && (a.complete != b.complete || a.meeting != b.meeting)) return false;
  return std::bit_cast<const void*>(a.at) == std::bit_cast<const void*>(b.at) || same_place(a.at, b.at);
}

struct Expectation {
  std::uintptr_t begin, end;
  int element_bytes;
  std::uint32_t epoch;
  bool by_next_launch;
  Location at;
};

}  // namespace

struct Machine {
  Random random{};
  int shared_limit = 0;
  std::vector<Fiber> fibers;
  std::vector<std::uint32_t> warp_epochs;
  std::vector<std::byte> shared_storage;
  std::byte* shared = nullptr;

  // The launch.
  const char* kernel = "";
  Grid grid{};
  std::optional<Error> error;

  // Races. Epochs never repeat, so records need no clearing.
  std::uint32_t epoch = 1, launch_epoch = 1, block_epoch = 1;
  std::vector<std::pair<std::uint32_t, Index>> block_epochs;  // of the launch: first epoch, block
  Pages global_pages;
  std::vector<Page> shared_pages;
  std::vector<Expectation> expectations;
  std::string kernels_since_expectation;

  // Counting.
  Sites sites;
  std::map<std::string, KernelCounts> counters;
  std::vector<Counts> counts;  // of the launch, by site

  Counts& at_site(std::uint16_t site) {
    if (site >= counts.size()) counts.resize(sites.count());
    return counts[site];
  }
  Counts& at_site(Location at) { return at_site(sites.number(at)); }

  void run_block(Index block, Executor::Body body, const void* params);
  void advance(int first);
  [[noreturn]] void fail_apart(const Fiber& a, const Fiber& b);
  void next_epoch() {
    if (++epoch == 0xffffffffu) throw std::runtime_error("simt: an executor has seen 2^32 barriers; make a new one");
  }

  [[noreturn]] void fail_race(const Record& record, bool other_is_write, const char* memory, std::uint64_t byte,
                              const char* verb, Location at);
  void check_read(Record& r, const Fiber& f, bool is_shared, std::uint64_t byte, std::uint16_t site, Location at);
  void check_read_of_fresh(const Record& r, const Fiber& f, bool is_shared, std::uint64_t byte, Location at);
  void check_write(Record& r, const Fiber& f, bool is_shared, std::uint64_t byte, std::uint16_t site, Location at,
                   bool atomic);

  // Putting the lanes' accesses side by side.
  struct Group {
    Logged first;
    std::uint32_t lanes = 0;
    std::uint64_t addresses[warp_size];
  };
  std::vector<Group> groups;
  std::vector<std::vector<std::uint32_t>> groups_of_site;
  std::vector<std::uint32_t> occurrences;
  void count_accesses(int first);
  void count(const Group& group);
  void check_expectations(bool of_launch, const std::string& who, Location at);
};

thread_local Thread* running __attribute__((tls_model("initial-exec"))) = nullptr;
namespace {
thread_local Machine* machine __attribute__((tls_model("initial-exec"))) = nullptr;

Fiber& me(Location at) { return static_cast<Fiber&>(current(at)); }
void pause(Fiber& f) { f.scheduler = std::move(f.scheduler).resume(); }
std::string thread_name(int i) { return "thread " + std::to_string(i); }
}  // namespace

void fail_outside(Location at) { throw Error("", at, place(at) + ": a simt operation outside of a kernel"); }

void fail(Location at, const std::string& text) {
  if (running == nullptr) throw Error("", at, place(at) + ": " + text);
  throw Error(machine->kernel, at,
              std::string("kernel ") + machine->kernel + ", " + place(at) + ", block " +
                  std::to_string(running->block) + ", thread " + std::to_string(running->index) + ": " + text);
}

void fail_outside_array(const char* memory, Index i, int count, Index begin, Index end, Location at) {
  fail(at,
       std::string(memory) + " memory: element" +
           (count > 1 ? "s " + std::to_string(i) + " to " + std::to_string(i + count - 1) : " " + std::to_string(i)) +
           " outside [" + std::to_string(begin) + ", " + std::to_string(end) + ")");
}

void fail_misaligned(const char* memory, Index i, int bytes, Location at) {
  fail(at, std::string(memory) + " memory: misaligned access of " + std::to_string(bytes) + " bytes at element " +
               std::to_string(i));
}

void check_shared_array(int byte_offset, Index count, int element_bytes, Location at) {
  const Index end = byte_offset + count * element_bytes;
  if (byte_offset < 0 || count < 0 || end > current(at).shared_bytes)
    fail(at, "shared_array: bytes " + std::to_string(byte_offset) + " to " + std::to_string(end) +
                 " of a block that has " + std::to_string(current(at).shared_bytes));
  if (byte_offset % element_bytes != 0)
    fail(at, "shared_array: offset " + std::to_string(byte_offset) + " is misaligned for elements of " +
                 std::to_string(element_bytes) + " bytes");
}

namespace {
std::string name_of(Role role) {
  return role == Role::a ? "fragment A" : role == Role::b ? "fragment B" : "accumulator";
}
std::string pair(int row, int col) { return "(" + std::to_string(row) + ", " + std::to_string(col) + ")"; }
}  // namespace

void fail_fragment(Role role, int i, int count, Location at) {
  fail(at, name_of(role) + ": element " + std::to_string(i) + " of " + std::to_string(count));
}

void fail_fragment_place(Role role, int i, int row, int col, int said_row, int said_col, Location at) {
  fail(at, name_of(role) + ": lane " + std::to_string(current(at).index % warp_size) + " holds (row, col) " +
               pair(row, col) + " as its element " + std::to_string(i) + ", not " + pair(said_row, said_col));
}

void fail_fragment_not_given(Role role, int i, int row, int col, Location at) {
  fail(at, name_of(role) + ": element " + std::to_string(i) + ", (row, col) " + pair(row, col) + ", was never given");
}

// --- Races ---

void Machine::fail_race(const Record& r, bool other_is_write, const char* memory, std::uint64_t byte, const char* verb,
                        Location at) {
  const std::uint32_t when = other_is_write ? r.write_epoch : r.read_epoch;
  const int other = (other_is_write ? r.writer : r.reader) & thread_mask;
  std::string who = thread_name(other);
  std::string cure = "with no barrier between";
  if (when < block_epoch) {
    const auto after = std::upper_bound(block_epochs.begin(), block_epochs.end(), when,
                                        [](std::uint32_t e, const auto& b) { return e < b.first; });
    who = "block " + std::to_string(std::prev(after)->second) + ", " + who;
    cure = "in the same launch, and nothing orders blocks";
  } else if (other / warp_size == running->index / warp_size) {
    cure = "with no barrier or warp_barrier between (shuffles and votes do not order memory)";
  }
  fail(at, std::string("race in ") + memory + " memory at byte " + std::to_string(byte) + ": " + verb + " what " + who +
               (other_is_write ? " wrote in " : " read in ") +
               place(sites.at(other_is_write ? r.write_site : r.read_site)) + ", " + cure);
}

inline void Machine::check_read(Record& r, const Fiber& f, bool is_shared, std::uint64_t byte, std::uint16_t site,
                                Location at) {
  // The common cases first: written before the last barrier, by this block or, for global memory, by no block.
  const bool settled = is_shared ? r.write_epoch >= block_epoch && r.write_epoch < epoch && r.writer <= thread_mask
                                 : r.write_epoch < launch_epoch;
  if (!settled) check_read_of_fresh(r, f, is_shared, byte, at);
  // The reader.
  const auto index = static_cast<std::uint16_t>(f.index);
  std::uint16_t flags = r.reader & many_blocks;
  if (r.read_epoch < epoch) {
    if (r.read_epoch < launch_epoch)
      flags = 0;
    else if (r.read_epoch < block_epoch)
      flags = many_blocks;
  } else {
    const int reader = r.reader & thread_mask;
    flags = r.reader & ~thread_mask;
    if (reader != f.index) {
      if (reader / warp_size != f.index / warp_size)
        flags |= many_warps;
      else if (r.read_warp_epoch == *f.warp_epoch)
        flags |= many_lanes;
      else
        flags &= ~many_lanes;
    } else if (r.read_warp_epoch != *f.warp_epoch) {
      flags &= ~many_lanes;
    }
  }
  r.read_epoch = epoch;
  r.read_warp_epoch = *f.warp_epoch;
  r.reader = index | flags;
  r.read_site = site;
}

void Machine::check_read_of_fresh(const Record& r, const Fiber& f, bool is_shared, std::uint64_t byte, Location at) {
  const char* memory = is_shared ? "shared" : "global";
  if (r.write_epoch >= launch_epoch) {
    if (r.writer & in_flight)
      fail(at, std::string("reads ") + memory + " memory at byte " + std::to_string(byte) +
                   " while the copy_async of " + thread_name(r.writer & thread_mask) + " in " +
                   place(sites.at(r.write_site)) + " is in flight: no copy_wait has completed it");
    const int writer = r.writer & thread_mask;
    if (r.write_epoch < block_epoch) {
      if (!is_shared) fail_race(r, true, memory, byte, "reads", at);
    } else if (writer != f.index) {
      if (r.write_epoch == epoch && (writer / warp_size != f.index / warp_size || r.write_warp_epoch == *f.warp_epoch))
        fail_race(r, true, memory, byte, "reads", at);
    }
    if (((r.writer & unordered) && r.write_epoch == epoch) || (r.writer & many_atomic_blocks))
      fail_race(r, true, memory, byte, "reads", at);
  }
  if (is_shared && r.write_epoch < block_epoch)
    fail(at, "reads shared memory at byte " + std::to_string(byte) + " that no thread of the block has written");
}

inline void Machine::check_write(Record& r, const Fiber& f, bool is_shared, std::uint64_t byte, std::uint16_t site,
                                 Location at, bool atomic) {
  const char* memory = is_shared ? "shared" : "global";
  const char* verb = atomic ? "updates" : "overwrites";
  std::uint16_t flags = atomic ? by_atomic : 0;
  const std::uint32_t since = is_shared ? block_epoch : launch_epoch;
  if (r.write_epoch >= since) {
    if (r.writer & in_flight)
      fail(at, std::string(verb) + " " + memory + " memory at byte " + std::to_string(byte) +
                   " while the copy_async of " + thread_name(r.writer & thread_mask) + " in " +
                   place(sites.at(r.write_site)) + " is in flight: no copy_wait has completed it");
    const int writer = r.writer & thread_mask;
    const bool other_block = r.write_epoch < block_epoch;
    const bool apart =
        other_block || (writer != f.index && r.write_epoch == epoch &&
                        (writer / warp_size != f.index / warp_size || r.write_warp_epoch == *f.warp_epoch));
    if (atomic && (r.writer & by_atomic)) {
      if (other_block) flags |= many_atomic_blocks;
      flags |= r.writer & many_atomic_blocks;
      if (!other_block && (apart || (r.write_epoch == epoch && (r.writer & unordered)))) flags |= unordered;
    } else if (apart || ((r.writer & unordered) && r.write_epoch == epoch) || (r.writer & many_atomic_blocks)) {
      fail_race(r, true, memory, byte, verb, at);
    }
  }
  if (atomic && is_shared && r.write_epoch < block_epoch)
    fail(at, "updates shared memory at byte " + std::to_string(byte) + " that no thread of the block has written");
  if (r.read_epoch >= since) {
    const int reader = r.reader & thread_mask;
    if (r.read_epoch < block_epoch || (r.reader & many_blocks)) {
      if (!is_shared) fail_race(r, false, memory, byte, verb, at);
    } else if (r.read_epoch == epoch) {
      if ((r.reader & many_warps) || reader / warp_size != f.index / warp_size ||
          (r.read_warp_epoch == *f.warp_epoch && (reader != f.index || (r.reader & many_lanes))))
        fail_race(r, false, memory, byte, verb, at);
    }
  }
  r.write_epoch = epoch;
  r.write_warp_epoch = *f.warp_epoch;
  r.writer = static_cast<std::uint16_t>(f.index) | flags;
  r.write_site = site;
}

void touch_global(const void* pointer, int bytes, Access kind, Location at) {
  Machine& m = *machine;
  Fiber& f = me(at);
  const auto address = reinterpret_cast<std::uintptr_t>(pointer);
  const std::uint16_t site = m.sites.number(at);
  const Kind log_kind = kind == Access::read    ? Kind::global_read
                        : kind == Access::write ? Kind::global_write
                                                : Kind::global_atomic;
  f.log.push_back({address, site, static_cast<std::uint8_t>(bytes), log_kind});
  Page& page = m.global_pages.at(address);
  const int log2 = std::countr_zero(static_cast<unsigned>(bytes));
  Record* r = page.find(static_cast<int>(address % Page::size), log2);
  const int piece = 1 << page.log2_piece(), pieces = bytes >> page.log2_piece();
  for (int i = 0; i < pieces; ++i) {
    if (kind != Access::write && r[i].read_epoch < m.launch_epoch) m.at_site(site).global_read_unique_bytes += piece;
    if (kind != Access::read) {
      if (r[i].write_epoch < m.launch_epoch) m.at_site(site).global_written_unique_bytes += piece;
      m.check_write(r[i], f, false, address + i * piece, site, at, kind == Access::atomic);
    } else {
      m.check_read(r[i], f, false, address + i * piece, site, at);
    }
  }
}

namespace {
Record* shared_records(Machine& m, int offset, int bytes, int* log2_piece) {
  Page& page = m.shared_pages[offset >> Page::shift];
  Record* r = page.find(offset & (Page::size - 1), std::countr_zero(static_cast<unsigned>(bytes)));
  *log2_piece = page.log2_piece();
  return r;
}
void write_shared(Machine& m, Fiber& f, int offset, int bytes, std::uint16_t site, Location at, std::uint16_t flag) {
  int log2;
  Record* r = shared_records(m, offset, bytes, &log2);
  for (int i = 0; i < bytes >> log2; ++i) {
    m.check_write(r[i], f, true, offset + (i << log2), site, at, flag == by_atomic);
    r[i].writer |= flag;
  }
}
}  // namespace

void touch_shared(int offset, int bytes, Access kind, Location at) {
  Machine& m = *machine;
  Fiber& f = me(at);
  const std::uint16_t site = m.sites.number(at);
  const Kind log_kind = kind == Access::read    ? Kind::shared_read
                        : kind == Access::write ? Kind::shared_write
                                                : Kind::shared_atomic;
  f.log.push_back({static_cast<std::uint64_t>(offset), site, static_cast<std::uint8_t>(bytes), log_kind});
  if (kind != Access::read)
    return write_shared(m, f, offset, bytes, site, at, kind == Access::atomic ? by_atomic : std::uint16_t{0});
  int log2;
  Record* r = shared_records(m, offset, bytes, &log2);
  for (int i = 0; i < bytes >> log2; ++i) m.check_read(r[i], f, true, offset + (i << log2), site, at);
}

// --- Counting ---

void Counts::add(const Counts& other) {
  for (const CountName& c : count_names()) this->*c.member += other.*c.member;
}

const std::vector<CountName>& count_names() {
#define NAMED(x)   \
  {                \
    #x, &Counts::x \
  }
  static const std::vector<CountName> names = {NAMED(global_reads),
                                               NAMED(global_read_bytes),
                                               NAMED(global_read_sectors),
                                               NAMED(global_read_unique_bytes),
                                               NAMED(global_writes),
                                               NAMED(global_written_bytes),
                                               NAMED(global_written_sectors),
                                               NAMED(global_written_unique_bytes),
                                               NAMED(shared_reads),
                                               NAMED(shared_writes),
                                               NAMED(shared_passes),
                                               NAMED(bank_conflicts),
                                               NAMED(barriers),
                                               NAMED(warp_barriers),
                                               NAMED(shuffles),
                                               NAMED(votes),
                                               NAMED(copies),
                                               NAMED(atomics),
                                               NAMED(matrix_loads),
                                               NAMED(mma)};
#undef NAMED
  return names;
}

namespace {

int count_sectors(const std::uint64_t* addresses, int n) {
  std::uint64_t sectors[warp_size];
  bool sorted = true;
  for (int i = 0; i < n; ++i) {
    sectors[i] = addresses[i] >> 5;
    sorted &= i == 0 || sectors[i - 1] <= sectors[i];
  }
  if (!sorted) std::sort(sectors, sectors + n);
  return static_cast<int>(std::unique(sectors, sectors + n) - sectors);
}

// Passes over the banks that these 4-byte words take, beyond one.
int extra_passes(const std::uint32_t* words, int n) {
  if (n == 0) return 0;
  std::uint32_t low = words[0], high = words[0];
  for (int i = 1; i < n; ++i) {
    low = std::min(low, words[i]);
    high = std::max(high, words[i]);
  }
  if (high - low < 32) return 0;
  std::uint32_t distinct[2 * warp_size];
  std::copy(words, words + n, distinct);
  std::sort(distinct, distinct + n);
  const std::uint32_t* end = std::unique(distinct, distinct + n);
  int in_bank[32] = {}, most = 0;
  for (const std::uint32_t* w = distinct; w != end; ++w) most = std::max(most, ++in_bank[*w & 31]);
  return most - 1;
}

}  // namespace

void Machine::count(const Group& group) {
  const int bytes = group.first.bytes, lanes = std::popcount(group.lanes);
  std::uint64_t addresses[warp_size];
  Counts& c = at_site(group.first.site);
  switch (group.first.kind) {
    case Kind::global_read:
    case Kind::global_write:
    case Kind::global_atomic: {
      int n = 0;
      for (std::uint32_t left = group.lanes; left; left &= left - 1)
        addresses[n++] = group.addresses[std::countr_zero(left)];
      const int sectors = count_sectors(addresses, n);
      if (group.first.kind != Kind::global_write) {
        ++c.global_reads;
        c.global_read_bytes += static_cast<std::uint64_t>(bytes) * lanes;
        c.global_read_sectors += sectors;
      }
      if (group.first.kind != Kind::global_read) {
        ++c.global_writes;
        c.global_written_bytes += static_cast<std::uint64_t>(bytes) * lanes;
        c.global_written_sectors += sectors;
      }
      c.atomics += group.first.kind == Kind::global_atomic;
      break;
    }
    default: {
      c.shared_reads += group.first.kind != Kind::shared_write;
      c.shared_writes += group.first.kind != Kind::shared_read;
      c.atomics += group.first.kind == Kind::shared_atomic;
      // 8-byte accesses are served by half warps, 16-byte ones by quarters.
      const int phases = bytes <= 4 ? 1 : bytes / 4, lanes_a_phase = warp_size / phases;
      for (int phase = 0; phase < phases; ++phase) {
        std::uint32_t words[warp_size];
        int n = 0;
        for (int i = phase * lanes_a_phase; i < (phase + 1) * lanes_a_phase; ++i)
          if (group.lanes >> i & 1)
            for (int k = 0; k < std::max(bytes, 4); k += 4)
              words[n++] = static_cast<std::uint32_t>(group.addresses[i] / 4 + k / 4);
        const auto extra = extra_passes(words, n);
        c.bank_conflicts += extra;
        c.shared_passes += extra + (n > 0);
      }
    }
  }
}

// The k-th access of each lane at one place in the source since the last meeting is one instruction of the warp.
void Machine::count_accesses(int first) {
  const std::vector<Logged>& leader = fibers[first].log;
  bool uniform = true;
  for (int i = 1; i < warp_size && uniform; ++i) uniform = fibers[first + i].log.size() == leader.size();
  if (uniform && leader.empty()) return;
  for (int i = 1; i < warp_size && uniform; ++i) {
    const std::vector<Logged>& log = fibers[first + i].log;
    for (std::size_t k = 0; k < log.size(); ++k)
      uniform &= log[k].site == leader[k].site && log[k].kind == leader[k].kind && log[k].bytes == leader[k].bytes;
  }
  if (uniform) {
    Group group;
    group.lanes = 0xffffffffu;
    for (std::size_t k = 0; k < leader.size(); ++k) {
      group.first = leader[k];
      for (int i = 0; i < warp_size; ++i) group.addresses[i] = fibers[first + i].log[k].address;
      count(group);
    }
  } else {
    groups.clear();
    groups_of_site.resize(sites.count() * 8);
    occurrences.resize(sites.count() * 8);
    const auto key = [](const Logged& l) {
      return static_cast<std::size_t>(l.site) * 8 + static_cast<std::size_t>(l.kind);
    };
    for (int i = 0; i < warp_size; ++i) {
      const std::vector<Logged>& log = fibers[first + i].log;
      for (const Logged& l : log) occurrences[key(l)] = 0;
      for (const Logged& l : log) {
        std::vector<std::uint32_t>& of_site = groups_of_site[key(l)];
        const std::uint32_t k = occurrences[key(l)]++;
        if (k == of_site.size()) {
          of_site.push_back(static_cast<std::uint32_t>(groups.size()));
          groups.emplace_back().first = l;
        }
        Group& group = groups[of_site[k]];
        group.lanes |= 1u << i;
        group.addresses[i] = l.address;
      }
    }
    for (const Group& group : groups) {
      count(group);
      groups_of_site[key(group.first)].clear();
    }
  }
  for (int i = 0; i < warp_size; ++i) fibers[first + i].log.clear();
}

// --- Meeting ---

void block_barrier(Location at) {
  Fiber& f = me(at);
  f.state = State::at_barrier;
  f.at = at;
  pause(f);
}

void meet(Meeting kind, Complete complete, void* mine, Location at) {
  Fiber& f = me(at);
  f.state = State::at_meeting;
  f.meeting = kind;
  f.at = at;
  f.complete = complete;
  f.mine = mine;
  pause(f);
}

void start_copy(int to, const void* from, int bytes, Location at) {
  Fiber& f = me(at);
  Machine& m = *machine;
  const std::uint16_t site = m.sites.number(at);
  f.log.push_back({static_cast<std::uint64_t>(to), site, static_cast<std::uint8_t>(bytes), Kind::shared_write});
  write_shared(m, f, to, bytes, site, at, in_flight);
  f.copies.push_back({to, bytes, from, f.copy_group, at});
}

void commit_copies(Location at) { ++me(at).copy_group; }

void wait_for_copies(int groups_left, Location at) {
  Fiber& f = me(at);
  Machine& m = *machine;
  while (!f.copies.empty() && f.copies.front().group < f.copy_group - groups_left) {
    const Copy& copy = f.copies.front();
    if (copy.from)
      std::memcpy(f.shared + copy.to, copy.from, copy.bytes);
    else
      std::memset(f.shared + copy.to, 0, copy.bytes);
    int log2;
    Record* r = shared_records(m, copy.to, copy.bytes, &log2);
    for (int i = 0; i < copy.bytes >> log2; ++i) {
      r[i].writer &= ~in_flight;
      r[i].write_epoch = m.epoch;
      r[i].write_warp_epoch = *f.warp_epoch;
    }
    f.copies.pop_front();
  }
}

float truncating_sum(float sum, const double* products, int n, int width) {
  for (int first = 0; first < n; first += width) {
    const double* p = products + first;
    double largest = std::fabs(static_cast<double>(sum));
    bool finite = std::isfinite(sum);
    for (int k = 0; k < width; ++k) {
      largest = std::max(largest, std::fabs(p[k]));
      finite &= std::isfinite(p[k]);
    }
    if (!finite) {
      for (int k = 0; k < width; ++k) sum = static_cast<float>(sum + p[k]);
      continue;
    }
    if (largest == 0) continue;
    // 2^(24 - e), where the largest addend is in [2^e, 2^(e+1))
    const auto exponent = static_cast<std::int64_t>(std::bit_cast<std::uint64_t>(largest) >> 52) - 1023;
    const double scale = std::bit_cast<double>(static_cast<std::uint64_t>(24 - exponent + 1023) << 52);
    double units = std::trunc(sum * scale);
    for (int k = 0; k < width; ++k) units += std::trunc(p[k] * scale);
    const double exact = units / scale;
    float rounded = static_cast<float>(exact);
    if (std::fabs(exact) < 0x1p128 && std::fabs(static_cast<double>(rounded)) > std::fabs(exact))
      rounded = std::nextafter(rounded, 0.f);
    sum = rounded;
  }
  return sum;
}

// --- Running ---

// Two threads that should be at the same place are not.
void Machine::fail_apart(const Fiber& a, const Fiber& b) {
  const Fiber& waits = a.state == State::done ? b : a;
  const Fiber& other = a.state == State::done ? a : b;
  const auto describe = [](const Fiber& f) {
    if (f.state == State::done) return thread_name(f.index) + " has ended";
    return thread_name(f.index) + " waits at the " + name_of(f) + " in " + place(f.at);
  };
  throw Error(kernel, waits.at,
              std::string("kernel ") + kernel + ", " + place(waits.at) + ", block " + std::to_string(waits.block) +
                  ": divergent " + name_of(waits) + ": " + describe(waits) + ", " + describe(other));
}

// Runs a warp's lanes until each waits or has ended, in random order; completes the meeting that they have come to.
void Machine::advance(int first) {
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
    if (!together(leader, fibers[first + i])) fail_apart(leader, fibers[first + i]);
  count_accesses(first);
  if (leader.state != State::at_meeting) return;
  void* parts[warp_size];
  for (int i = 0; i < warp_size; ++i) {
    parts[i] = fibers[first + i].mine;
    fibers[first + i].state = State::ready;
  }
  Counts& c = at_site(leader.at);
  switch (leader.meeting) {
    case Meeting::warp_barrier:
      ++c.warp_barriers;
      ++*leader.warp_epoch;
      break;
    case Meeting::shuffle: ++c.shuffles; break;
    case Meeting::vote: ++c.votes; break;
    case Meeting::matrix_load: ++c.matrix_loads; break;
    case Meeting::mma: ++c.mma; break;
  }
  if (leader.complete) leader.complete(parts, leader.at);
}

void Machine::run_block(Index block, Executor::Body body, const void* params) {
  const int threads = grid.threads, warps = threads / warp_size;
  next_epoch();
  block_epoch = epoch;
  block_epochs.emplace_back(epoch, block);
  std::memset(shared, 0xff, grid.shared_bytes);  // NaN in every format
  std::fill(warp_epochs.begin(), warp_epochs.end(), 0);
  for (int i = 0; i < threads; ++i) {
    Fiber& f = fibers[i];
    f.index = i;
    f.threads = threads;
    f.block = block;
    f.blocks = grid.blocks;
    f.shared = shared;
    f.shared_bytes = grid.shared_bytes;
    f.state = State::ready;
    f.warp_epoch = &warp_epochs[i / warp_size];
    f.log.clear();
    f.copies.clear();
    f.copy_group = 0;
    const context::stack_context stack = stacks.at(i);
    f.self = context::fiber(std::allocator_arg, context::preallocated(stack.sp, stack.size, stack), KeepStack{},
                            [&f, this, body, params](context::fiber&& scheduler) {
                              f.scheduler = std::move(scheduler);
                              try {
                                body(params);
                                if (!f.copies.empty())
                                  fail(f.copies.front().at, "the thread ends while this copy_async is in flight");
                              } catch (const Error& e) {
                                if (!error) error = e;
                              } catch (const std::exception& e) {
                                if (!error) error.emplace(kernel, Location::current(), e.what());
                              }
                              f.state = State::done;
                              return std::move(f.scheduler);
                            });
  }
  std::vector<int> runnable(warps);
  std::iota(runnable.begin(), runnable.end(), 0);
  while (true) {
    bool barrier = false;
    while (!runnable.empty()) {
      const int pick = random.below(static_cast<int>(runnable.size()));
      const int first = runnable[pick] * warp_size;
      advance(first);
      if (fibers[first].state == State::ready) continue;
      barrier |= fibers[first].state == State::at_barrier;
      runnable[pick] = runnable.back();
      runnable.pop_back();
    }
    if (!barrier) return;
    for (int w = 1; w < warps; ++w)
      if (!together(fibers[0], fibers[w * warp_size])) fail_apart(fibers[0], fibers[w * warp_size]);
    ++at_site(fibers[0].at).barriers;
    next_epoch();
    for (int i = 0; i < threads; ++i) fibers[i].state = State::ready;
    runnable.resize(warps);
    std::iota(runnable.begin(), runnable.end(), 0);
  }
}

Executor::Executor(std::uint64_t seed, int shared_limit) : machine_(std::make_unique<Machine>()) {
  machine_->random.state = (seed + 1) * 0x9E3779B97F4A7C15ull;
  if (machine_->random.state == 0) machine_->random.state = 1;
  machine_->shared_limit = shared_limit;
}
Executor::~Executor() = default;

void Executor::launch(const char* name, int max_threads, Grid grid, Body body, const void* params, Location at) {
  Machine& m = *machine_;
  const auto refuse = [&](const std::string& text) {
    throw Error(name, at, std::string("kernel ") + name + ", launched in " + place(at) + ": " + text);
  };
  if (machine != nullptr) refuse("launched from within a kernel");
  if (grid.blocks < 0 || grid.blocks > 0x7fffffff)
    refuse("a grid of " + std::to_string(grid.blocks) + " blocks: 0 to 2147483647 are allowed");
  if (grid.blocks == 0) return;
  if (grid.threads < warp_size || grid.threads % warp_size != 0 || grid.threads > max_threads || max_threads > 1024)
    refuse("a block of " + std::to_string(grid.threads) + " threads: a multiple of 32 up to " +
           std::to_string(max_threads) + " is allowed");
  if (grid.shared_bytes < 0 || grid.shared_bytes > m.shared_limit)
    refuse("a block with " + std::to_string(grid.shared_bytes) + " bytes of shared memory: at most " +
           std::to_string(m.shared_limit) + " are allowed");
  m.kernel = name;
  m.grid = grid;
  m.error.reset();
  if (m.expectations.empty() && m.global_pages.count() > 1 << 15) m.global_pages.clear();
  m.next_epoch();
  m.launch_epoch = m.epoch;
  m.block_epochs.clear();
  m.counts.assign(m.sites.count(), {});
  if (static_cast<int>(m.fibers.size()) < grid.threads) m.fibers.resize(grid.threads);
  stacks.protect(grid.threads);
  m.warp_epochs.resize(1024 / warp_size);
  m.shared_storage.resize(grid.shared_bytes + 128);
  m.shared_pages.resize(std::max<std::size_t>(m.shared_pages.size(), grid.shared_bytes / Page::size + 1));
  m.shared = m.shared_storage.data();
  m.shared += (128 - reinterpret_cast<std::uintptr_t>(m.shared) % 128) % 128;

  // Blocks in the order a, a + b, a + 2b, ... modulo their number.
  const auto n = static_cast<std::uint64_t>(grid.blocks);
  const std::uint64_t first = m.random() % n;
  std::uint64_t step = 1 + m.random() % n;
  while (std::gcd(step, n) != 1) ++step;
  machine = &m;
  try {
    for (std::uint64_t i = 0; i < n; ++i) m.run_block(static_cast<Index>((first + i * (step % n)) % n), body, params);
  } catch (...) {
    for (Fiber& f : m.fibers) f.self = {};  // unwinds the others' stacks
    machine = nullptr;
    running = nullptr;
    throw;
  }
  machine = nullptr;

  KernelCounts& kernel = m.counters[name];
  ++kernel.launches;
  kernel.blocks += n;
  kernel.threads += n * grid.threads;
  kernel.shared_bytes = grid.shared_bytes;
  for (std::size_t site = 0; site < m.counts.size(); ++site) {
    Counts& c = m.counts[site];
    bool any = false;
    for (const CountName& name_ : count_names()) any |= c.*name_.member != 0;
    if (!any) continue;
    kernel.total.add(c);
    kernel.lines[place(m.sites.at(static_cast<std::uint16_t>(site)))].add(c);
  }
  if (!m.expectations.empty()) {
    m.kernels_since_expectation += std::string(m.kernels_since_expectation.empty() ? "" : ", ") + name;
    m.check_expectations(true, name, at);
  }
}

void Executor::expect_written(const void* data, Index count, int element_bytes, bool by_next_launch, Location at) {
  const auto begin = reinterpret_cast<std::uintptr_t>(data);
  if (machine_->expectations.empty()) machine_->kernels_since_expectation.clear();
  machine_->next_epoch();
  machine_->expectations.push_back({begin, begin + static_cast<std::uintptr_t>(count) * element_bytes, element_bytes,
                                    machine_->epoch, by_next_launch, at});
}

void Executor::check_written() {
  machine_->check_expectations(false, machine_->kernels_since_expectation, Location::current());
}

void Machine::check_expectations(bool of_launch, const std::string& who, Location at) {
  std::vector<Expectation> now, later;
  for (const Expectation& e : expectations) (e.by_next_launch == of_launch ? now : later).push_back(e);
  expectations = std::move(later);
  for (const Expectation& e : now)
    for (std::uintptr_t a = e.begin; a < e.end;) {
      Page* page = global_pages.find(a);
      const int offset = static_cast<int>(a % Page::size);
      const Record* r = page && page->records() ? &page->records()[offset >> page->log2_piece()] : nullptr;
      if (r == nullptr || r->write_epoch < e.epoch)
        throw Error(who, of_launch ? at : e.at,
                    "kernel " + who + (of_launch ? ", launched in " + place(at) : "") + ": element " +
                        std::to_string((a - e.begin) / e.element_bytes) + " of the output that " + place(e.at) +
                        " expects to be written was not written");
      a += (std::uintptr_t{1} << page->log2_piece()) - (a & ((std::uintptr_t{1} << page->log2_piece()) - 1));
    }
}

const std::map<std::string, KernelCounts>& Executor::counters() const { return machine_->counters; }
void Executor::reset_counters() { machine_->counters.clear(); }

namespace {
// The line of the matching kernels where `excess` is largest, as an error, unless it is nowhere positive.
template <class F>
void require_none(const std::map<std::string, KernelCounts>& counters, const std::string& kernel, F excess,
                  const char* what) {
  if (!kernel.empty() && !counters.count(kernel))
    throw Error(kernel, Location::current(), "kernel " + kernel + " was not launched");
  for (const auto& [name, counts] : counters) {
    if (!kernel.empty() && name != kernel) continue;
    const std::string* worst = nullptr;
    std::uint64_t most = 0, total = 0;
    for (const auto& [line, c] : counts.lines) {
      const std::uint64_t e = excess(c);
      total += e;
      if (e > most) {
        most = e;
        worst = &line;
      }
    }
    if (worst)
      throw Error(name, Location::current(),
                  "kernel " + name + ", " + *worst + ": " + std::to_string(most) + " " + what + " (" +
                      std::to_string(total) + " in the whole kernel)");
  }
}
}  // namespace

void Executor::require_no_bank_conflicts(const std::string& kernel) const {
  require_none(
      counters(), kernel, [](const Counts& c) { return c.bank_conflicts; },
      "shared-memory passes lost to bank conflicts");
}

void Executor::require_full_sectors(const std::string& kernel) const {
  const auto excess = [](std::uint64_t sectors, std::uint64_t bytes) {
    return 32 * sectors > bytes ? 32 * sectors - bytes : 0;
  };
  require_none(
      counters(), kernel,
      [&](const Counts& c) {
        return excess(c.global_read_sectors, c.global_read_bytes) +
               excess(c.global_written_sectors, c.global_written_bytes);
      },
      "bytes of touched sectors of global memory unused by the instruction");
}

SparseMemory::SparseMemory(std::uint64_t bytes)
    : data_(mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)),
      bytes_(bytes) {
  if (data_ == MAP_FAILED) throw std::bad_alloc();
}
SparseMemory::~SparseMemory() { munmap(data_, bytes_); }

}  // namespace host
}  // namespace freqrank::simt
