#pragma once
// Segments of sequences: where they are when cu_seqlens says so, and their states carried from one to the next.

#include "linear_attention/device/params.h"

namespace freqrank::linear_attention::device {

// Segments::table and the slots of each sequence from cu_seqlens. Where the offsets are not 0, .., T without a
// decrease, no sequence can be told from another, and every slot is to become NaN.
struct OffsetsKernel {
  static constexpr const char* name = "linear_attention_offsets";
  static constexpr int max_threads = 256, min_blocks = 1;
  struct Params {
    simt::global<const Index> offsets;  // [sequences + 1]
    Index time, sequences, length, slots;
    simt::global<Index> table, sequence_slots;  // [slots,3], [sequences,2]
  };

  SIMT_DEVICE static void run(const Params& p) {
    const auto scratch = simt::shared_array<int>(0, max_threads / simt::warp_size);
    int wrong = 0;
    for (Index n = simt::thread(); n <= p.sequences; n += simt::threads()) {
      const Index at = p.offsets.load(n);
      if (at < 0 || at > p.time || (n == 0 && at != 0) || (n == p.sequences && at != p.time)) wrong = 1;
      if (n > 0 && p.offsets.load(n - 1) > at) wrong = 1;
    }
    if (simt::block_max(wrong, scratch) != 0) {
      for (Index x = simt::thread(); x < p.slots; x += simt::threads()) {
        const Index first = x * p.time / p.slots, end = (x + 1) * p.time / p.slots;
        put(p, x, x < p.sequences ? x : Index{-1}, first, -1 - (end - first));
      }
      for (Index n = simt::thread(); n < p.sequences; n += simt::threads()) {
        p.sequence_slots.store(2 * n, n);
        p.sequence_slots.store(2 * n + 1, 1);
      }
      return;
    }
    for (Index x = simt::thread(); x < p.slots; x += simt::threads()) {
      if (p.sequences == 0) {
        put(p, x, -1, 0, 0);
        continue;
      }
      // the last sequence whose slots begin at x or before
      Index low = 0, high = p.sequences - 1;
      while (low < high) {
        const Index middle = (low + high + 1) / 2;
        if (p.offsets.load(middle) / p.length + middle <= x) {
          low = middle;
        } else {
          high = middle - 1;
        }
      }
      const Index begin = p.offsets.load(low), end = p.offsets.load(low + 1);
      const Index first = begin + (x - (begin / p.length + low)) * p.length;
      if (first < end || (first == begin && begin == end)) {
        put(p, x, low, first, end - first < p.length ? end - first : p.length);
      } else {
        put(p, x, -1, 0, 0);
      }
    }
    for (Index n = simt::thread(); n < p.sequences; n += simt::threads()) {
      const Index begin = p.offsets.load(n), count = p.offsets.load(n + 1) - begin;
      p.sequence_slots.store(2 * n, begin / p.length + n);
      p.sequence_slots.store(2 * n + 1, count == 0 ? Index{1} : (count + p.length - 1) / p.length);
    }
  }

  SIMT_DEVICE static void put(const Params& p, Index slot, Index sequence, Index first, Index count) {
    p.table.store(3 * slot, sequence);
    p.table.store(3 * slot + 1, first);
    p.table.store(3 * slot + 2, count);
  }
};

template <class Queue>
void enqueue_offsets(const OffsetsKernel::Params& p, Queue& queue) {
  queue.template launch<OffsetsKernel>({1, OffsetsKernel::max_threads, OffsetsKernel::max_threads / 32 * 4}, p);
}

// What each segment adds to the state becomes the state before it (in reverse: after it), one segment after another.
template <class A>
struct CarryKernel {
  static constexpr const char* name = sizeof(A) == 8 ? "linear_attention_carry_double" : "linear_attention_carry";
  static constexpr int max_threads = 256, min_blocks = 4;
  struct Params {
    bool reverse;
    Index sequences, per_sequence;
    simt::global<const Index> sequence_slots;  // with cu_seqlens
    int state_heads, depth, width;
    int tiles;                         // blocks that share a state
    simt::global<A> states, z;         // [slots,Hs,depth,width], [slots,Hs,depth]; z may be null
    simt::global<const double> decay;  // [slots,Hs]
    States<const A> initial, initial_z;
    States<A> final, final_z;
  };

  SIMT_DEVICE static void run(const Params& p) {
    Index b = simt::block();
    const int tile = static_cast<int>(b % p.tiles);
    b /= p.tiles;
    const int head = static_cast<int>(b % p.state_heads);
    const Index n = b / p.state_heads;
    const Index from = p.sequence_slots ? p.sequence_slots.load(2 * n) : n * p.per_sequence;
    const Index count = p.sequence_slots ? p.sequence_slots.load(2 * n + 1) : p.per_sequence;
    const int e = tile * max_threads + simt::thread();
    const int size = p.depth * p.width;
    if (e < size) {
      const int d = e / p.width, c = e - d * p.width;
      const auto& initial = p.initial;
      A running =
          initial.data ? initial.data.load(initial.at(n, head) + d * initial.stride[2] + c * initial.stride[3]) : A(0);
      running = carry(p, p.states, from, count, head, size, e, running);
      if (p.final.data)
        p.final.data.store(p.final.at(n, head) + d * p.final.stride[2] + c * p.final.stride[3], running);
    } else if (p.z && e - size < p.depth) {
      const int d = e - size;
      A running = p.initial_z.data ? p.initial_z.data.load(p.initial_z.at(n, head) + d * p.initial_z.stride[2]) : A(0);
      running = carry(p, p.z, from, count, head, p.depth, d, running);
      if (p.final_z.data) p.final_z.data.store(p.final_z.at(n, head) + d * p.final_z.stride[2], running);
    }
  }

  SIMT_DEVICE static A carry(const Params& p, simt::global<A> x, Index from, Index count, int head, int size, int e,
                             A running) {
    for (Index k = 0; k < count; ++k) {
      const Index slot = from + (p.reverse ? count - 1 - k : k), at = slot * p.state_heads + head;
      const A added = x.load(at * size + e);
      x.store(at * size + e, running);
      running = simt::fma(simt::exp(static_cast<A>(p.decay.load(at))), running, added);
    }
    return running;
  }
};

template <class A, class Queue>
void enqueue_carry(typename CarryKernel<A>::Params p, Queue& queue) {
  constexpr int threads = CarryKernel<A>::max_threads;
  p.tiles = (p.depth * p.width + (p.z ? p.depth : 0) + threads - 1) / threads;
  queue.template launch<CarryKernel<A>>({p.sequences * p.state_heads * p.tiles, threads, 0}, p);
}

}  // namespace freqrank::linear_attention::device
