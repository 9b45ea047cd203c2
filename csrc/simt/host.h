#pragma once
// The host back end: the operations of simt.h, checked and counted by the executor. The GPU's are in cuda.h.

#include <bit>
#include <cmath>
#include <cstddef>
#include <cstring>
#include <string>
#include <type_traits>

#include "simt/executor.h"

namespace freqrank::simt {
inline namespace host {

#define SIMT_AT Location at = Location::current()

// --- Where am I ---
inline int thread(SIMT_AT) { return current(at).index; }
inline int threads(SIMT_AT) { return current(at).threads; }
inline int lane(SIMT_AT) { return current(at).index % warp_size; }
inline int warp(SIMT_AT) { return current(at).index / warp_size; }
inline Index block(SIMT_AT) { return current(at).block; }
inline Index blocks(SIMT_AT) { return current(at).blocks; }

// Every thread of the block, or of the warp, arrives; what they wrote before is seen by the others after.
inline void barrier(SIMT_AT) { block_barrier(at); }
inline void warp_barrier(SIMT_AT) { meet(Meeting::warp_barrier, nullptr, nullptr, at); }

// --- Memory ---
[[noreturn]] void fail_outside_array(const char* memory, Index i, int count, Index begin, Index end, Location at);
[[noreturn]] void fail_misaligned(const char* memory, Index i, int bytes, Location at);

// Elements [begin, end) of an array may be touched; indices are relative to `base`, which need not lie inside.
template <class T>
class global {
 public:
  using Value = std::remove_const_t<T>;

  global() = default;
  global(T* base, Index begin, Index end) : base_(reinterpret_cast<std::uintptr_t>(base)), begin_(begin), end_(end) {}
  template <class U, class = std::enable_if_t<std::is_same_v<const U, T>>>
  global(global<U> other) : base_(other.base_), begin_(other.begin_), end_(other.end_) {}

  Value load(Index i, SIMT_AT) const { return load_vector<1>(i, at)[0]; }
  void store(Index i, Value v, SIMT_AT) const { store_vector<1>(i, pack<Value, 1>{{v}}, at); }
  template <int V>
  pack<Value, V> load_vector(Index i, SIMT_AT) const {
    const void* from = check<V>(i, Access::read, at);
    pack<Value, V> out;
    std::memcpy(&out, from, sizeof out);
    return out;
  }
  template <int V>
  void store_vector(Index i, pack<Value, V> v, SIMT_AT) const {
    static_assert(!std::is_const_v<T>, "a store through global<const T>");
    std::memcpy(check<V>(i, Access::write, at), &v, sizeof v);
  }
  global operator+(Index n) const {
    global out;
    out.base_ = base_ + static_cast<std::uintptr_t>(n) * sizeof(T);
    out.begin_ = begin_ - n;
    out.end_ = end_ - n;
    return out;
  }
  explicit operator bool() const { return base_ != 0; }

  // For the executor and the other operations: the address of V checked elements.
  template <int V>
  Value* check(Index i, Access kind, Location at) const {
    if (i < begin_ || i > end_ - V) fail_outside_array("global", i, V, begin_, end_, at);
    const std::uintptr_t address = base_ + static_cast<std::uintptr_t>(i) * sizeof(T);
    if (address % (V * sizeof(T)) != 0) fail_misaligned("global", i, V * sizeof(T), at);
    touch_global(reinterpret_cast<const void*>(address), V * sizeof(T), kind, at);
    return reinterpret_cast<Value*>(address);
  }
  T* address() const { return reinterpret_cast<T*>(base_); }
  Index begin() const { return begin_; }
  Index end() const { return end_; }

 private:
  template <class>
  friend class global;
  std::uintptr_t base_ = 0;
  Index begin_ = 0, end_ = 0;
};

// Memory whose element type is a run-time branch. Bounds are in bytes.
template <class Byte>
class untyped_global {
 public:
  untyped_global() = default;
  untyped_global(Byte* base, Index begin, Index end) : base_(base), begin_(begin), end_(end) {}
  template <class T>
  auto as() const {
    using Element = std::conditional_t<std::is_const_v<Byte>, const T, T>;
    constexpr Index size = sizeof(T);
    const Index first = begin_ >= 0 ? (begin_ + size - 1) / size : -(-begin_ / size);
    const Index last = end_ >= 0 ? end_ / size : -((-end_ + size - 1) / size);
    return global<Element>(static_cast<Element*>(base_), first, last);
  }
  explicit operator bool() const { return base_ != nullptr; }

 private:
  Byte* base_ = nullptr;
  Index begin_ = 0, end_ = 0;
};
using global_bytes = untyped_global<void>;
using const_global_bytes = untyped_global<const void>;

// An array in the block's shared memory.
template <class T>
class shared {
 public:
  shared() = default;
  shared(int offset, int begin, int end) : offset_(offset), begin_(begin), end_(end) {}

  T load(int i, SIMT_AT) const { return load_vector<1>(i, at)[0]; }
  void store(int i, T v, SIMT_AT) const { store_vector<1>(i, pack<T, 1>{{v}}, at); }
  template <int V>
  pack<T, V> load_vector(int i, SIMT_AT) const {
    const T* from = check<V>(i, Access::read, at);
    pack<T, V> out;
    std::memcpy(&out, from, sizeof out);
    return out;
  }
  template <int V>
  void store_vector(int i, pack<T, V> v, SIMT_AT) const {
    std::memcpy(check<V>(i, Access::write, at), &v, sizeof v);
  }
  shared operator+(int n) const { return {offset_ + n * static_cast<int>(sizeof(T)), begin_ - n, end_ - n}; }

  // For the other operations: the place of V elements, checked.
  template <int V>
  int offset(int i, Location at) const {
    if (i < begin_ || i > end_ - V) fail_outside_array("shared", i, V, begin_, end_, at);
    const int byte = offset_ + i * static_cast<int>(sizeof(T));
    if (byte % (V * sizeof(T)) != 0) fail_misaligned("shared", i, V * sizeof(T), at);
    return byte;
  }
  template <int V>
  T* check(int i, Access kind, Location at) const {
    const int byte = offset<V>(i, at);
    touch_shared(byte, V * sizeof(T), kind, at);
    return reinterpret_cast<T*>(current(at).shared + byte);
  }

 private:
  int offset_ = 0, begin_ = 0, end_ = 0;
};

void check_shared_array(int byte_offset, Index count, int element_bytes, Location at);
template <class T>
shared<T> shared_array(int byte_offset, int count, SIMT_AT) {
  check_shared_array(byte_offset, count, sizeof(T), at);
  return {byte_offset, 0, count};
}

// Bytes (4, 8 or 16) from global to shared memory without passing through registers. They have arrived, for the thread
// that copied, once copy_wait<N> leaves their group behind the N youngest. `valid` false writes zeros and reads
// nothing.
template <int Bytes, class T>
void copy_async(shared<T> to, int i, global<const T> from, Index j, bool valid = true, SIMT_AT) {
  static_assert(Bytes == 4 || Bytes == 8 || Bytes == 16, "copy_async moves 4, 8 or 16 bytes");
  static_assert(Bytes % sizeof(T) == 0);
  constexpr int V = Bytes / sizeof(T);
  const int byte = to.template offset<V>(i, at);
  const void* source = valid ? from.template check<V>(j, Access::read, at) : nullptr;
  start_copy(byte, source, Bytes, at);
}
inline void copy_commit(SIMT_AT) { commit_copies(at); }
template <int N>
void copy_wait(SIMT_AT) {
  wait_for_copies(N, at);
}

// --- Between the lanes of a warp: all 32 take part ---
template <class T>
T exchange(T value, int from, Location at) {
  static_assert(std::is_trivially_copyable_v<T>);
  struct Mine {
    T value;
    int from;
    T result;
  } mine{value, from, value};
  meet(
      Meeting::shuffle,
      [](void* const lanes[32], Location) {
        for (int i = 0; i < warp_size; ++i) {
          Mine& m = *static_cast<Mine*>(lanes[i]);
          m.result = static_cast<Mine*>(lanes[m.from])->value;
        }
      },
      &mine, at);
  return mine.result;
}
inline void check_width(int width, Location at) {
  if (width < 1 || width > 32 || (width & (width - 1)))
    fail(at, "shuffle: the width must be a power of two from 1 to 32");
}
// The value that `lane` (within groups of `width` lanes) gave.
template <class T>
T shuffle(T v, int from, int width = warp_size, SIMT_AT) {
  check_width(width, at);
  return exchange(v, (lane(at) & ~(width - 1)) | (from & (width - 1)), at);
}
template <class T>
T shuffle_xor(T v, int mask, int width = warp_size, SIMT_AT) {
  check_width(width, at);
  const int me = lane(at), other = me ^ mask;
  return exchange(v, other < warp_size && (other & ~(width - 1)) <= (me & ~(width - 1)) ? other : me, at);
}
template <class T>
T shuffle_up(T v, int delta, int width = warp_size, SIMT_AT) {
  check_width(width, at);
  const int me = lane(at);
  return exchange(v, me - delta >= (me & ~(width - 1)) ? me - delta : me, at);
}
template <class T>
T shuffle_down(T v, int delta, int width = warp_size, SIMT_AT) {
  check_width(width, at);
  const int me = lane(at);
  return exchange(v, me + delta <= (me | (width - 1)) ? me + delta : me, at);
}
inline unsigned ballot(bool predicate, SIMT_AT) {
  struct Mine {
    bool predicate;
    unsigned result;
  } mine{predicate, 0};
  meet(
      Meeting::vote,
      [](void* const lanes[32], Location) {
        unsigned mask = 0;
        for (int i = 0; i < warp_size; ++i) mask |= static_cast<unsigned>(static_cast<Mine*>(lanes[i])->predicate) << i;
        for (int i = 0; i < warp_size; ++i) static_cast<Mine*>(lanes[i])->result = mask;
      },
      &mine, at);
  return mine.result;
}
inline bool any(bool predicate, SIMT_AT) { return ballot(predicate, at) != 0; }
inline bool all(bool predicate, SIMT_AT) { return ballot(predicate, at) == 0xffffffffu; }

// --- Atomics: the old value comes back. Sums of floats depend on the order and so break repeatability. ---
template <class Memory, class I, class T, class F>
T update(Memory memory, I i, T value, F f, Location at) {
  T* const address = memory.template check<1>(i, Access::atomic, at);
  T old;
  std::memcpy(&old, address, sizeof old);
  const T fresh = f(old, value);
  std::memcpy(address, &fresh, sizeof fresh);
  return old;
}
template <class T>
T atomic_add(global<T> memory, Index i, T value, SIMT_AT) {
  return update(memory, i, value, [](T a, T b) { return static_cast<T>(a + b); }, at);
}
template <class T>
T atomic_add(shared<T> memory, int i, T value, SIMT_AT) {
  return update(memory, i, value, [](T a, T b) { return static_cast<T>(a + b); }, at);
}
template <class T>
T atomic_max(global<T> memory, Index i, T value, SIMT_AT) {
  return update(memory, i, value, [](T a, T b) { return b > a ? b : a; }, at);
}
template <class T>
T atomic_max(shared<T> memory, int i, T value, SIMT_AT) {
  return update(memory, i, value, [](T a, T b) { return b > a ? b : a; }, at);
}

// --- Numbers ---
template <class S>
auto to_float(S x) {
  return freqrank::to_float(x);
}
template <class S>
S from_float(float x) {
  return freqrank::from_float<S>(x);
}
template <class S>
S from_float(double x) {
  if constexpr (std::is_same_v<S, double>)
    return x;
  else
    return freqrank::from_float<S>(static_cast<float>(x));
}
inline int opaque(int x) { return x; }
inline float fma(float a, float b, float c) { return std::fma(a, b, c); }
inline double fma(double a, double b, double c) { return std::fma(a, b, c); }
inline float sqrt(float x) { return std::sqrt(x); }
inline double sqrt(double x) { return std::sqrt(x); }
inline float rsqrt(float x) { return 1 / std::sqrt(x); }
inline double rsqrt(double x) { return 1 / std::sqrt(x); }
inline float exp(float x) { return std::exp(x); }
inline double exp(double x) { return std::exp(x); }
template <class To, class From>
To bits_as(From x) {
  return std::bit_cast<To>(x);
}

// --- Launching ---
class Queue {
 public:
  explicit Queue(Executor& executor) : executor_(&executor) {}

  template <class Kernel>
  void launch(Grid grid, const typename Kernel::Params& params, SIMT_AT) {
    executor_->launch(
        Kernel::name, Kernel::max_threads, grid,
        [](const void* p) { Kernel::run(*static_cast<const typename Kernel::Params*>(p)); }, &params, at);
  }
  // Elements [begin, end) from `base`; the bounds are checked on the host only.
  template <class T>
  global<T> view(T* base, Index begin, Index end) const {
    return {base, begin, end};
  }
  global_bytes view_bytes(void* base, Index begin, Index end) const { return {base, begin, end}; }
  const_global_bytes view_bytes(const void* base, Index begin, Index end) const { return {base, begin, end}; }
  // Every element of the view must have been written when the next launch ends.
  template <class T>
  void expect_written(global<T> view, SIMT_AT) {
    executor_->expect_written(view.address() + view.begin(), view.end() - view.begin(), sizeof(T), true, at);
  }
  Executor& executor() const { return *executor_; }

 private:
  Executor* executor_;
};

#undef SIMT_AT

}  // namespace host
}  // namespace freqrank::simt
