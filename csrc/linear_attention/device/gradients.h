#pragma once
// What the gradients need beside the scans.

#include "linear_attention/device/params.h"

namespace freqrank::linear_attention::device {

// The normaliser's part: with o = n / d, the gradient of n is do / d and that of d is -(do . o) / d. A warp a row. dq
// is a difference of what the two give: beside it, the rounding of o to 16 bits and that of scores are not small.
template <class A>
struct NormalizerKernel {
  static constexpr const char* name =
      sizeof(A) == 8 ? "linear_attention_normalizer_double" : "linear_attention_normalizer";
  static constexpr int max_threads = 256, min_blocks = 4;
  struct Params {
    Index rows, time;          // rows: B H T
    Matrix gradient, o, rest;  // rest: what rounding took from o; may be null
    simt::global<const A> denominator;
    simt::global<const unsigned char> mask;
    Index mask_stride[2];
    simt::global<A> scale, add;
  };

  SIMT_DEVICE static void run(const Params& p) {
    const Index row = simt::block() * (max_threads / 32) + simt::warp();
    if (row >= p.rows) return;
    const Index sequence = row / p.time, t = row - sequence * p.time, batch = sequence / p.o.heads;
    const int head = static_cast<int>(sequence - batch * p.o.heads);
    const bool live = !p.mask || p.mask.load(batch * p.mask_stride[0] + t * p.mask_stride[1]) != 0;
    A sum = 0;
    if (live) {
      const Index x = p.gradient.at(batch, t, head), y = p.o.at(batch, t, head);
      with_dtype<A>(p.gradient.dtype, [&](auto g) {
        with_dtype<A>(p.o.dtype, [&](auto o) {
          const auto gradient = p.gradient.data.template as<decltype(g)>();
          const auto out = p.o.data.template as<decltype(o)>();
          const auto rest = p.rest.data.template as<decltype(o)>();
          const Index z = p.rest.at(batch, t, head);
          for (int i = simt::lane(); i < p.o.width; i += 32) {
            A exact = static_cast<A>(simt::to_float(out.load(y + i * p.o.stride[3])));
            if (p.rest.data) exact += static_cast<A>(simt::to_float(rest.load(z + i * p.rest.stride[3])));
            sum = simt::fma(static_cast<A>(simt::to_float(gradient.load(x + i * p.gradient.stride[3]))), exact, sum);
          }
        });
      });
    }
    sum = simt::warp_sum(sum);
    if (simt::lane() != 0) return;
    const A reciprocal = live ? 1 / p.denominator.load(row) : A(0);
    p.scale.store(row, reciprocal);
    p.add.store(row, live ? -sum * reciprocal : A(0));
  }
};

template <class A, class Queue>
void enqueue_normalizer(const typename NormalizerKernel<A>::Params& p, Queue& queue) {
  constexpr int warps = NormalizerKernel<A>::max_threads / 32;
  queue.template launch<NormalizerKernel<A>>({(p.rows + warps - 1) / warps, 32 * warps, 0}, p);
}

// The gradient of log_decay at t sums score x dscore over the pairs of tokens j < t <= i. In a segment, from its end
// backwards: the pairs across its end, <state there, its gradient>; and of each token, what its query has with the
// chunks before, minus what its key has with the chunks after (the scans' dots), and the pairs inside its chunk
// (pairs.h). Begun anew at every segment, this difference of sums stays nearly as exact as its parts.
template <class A>
struct DecayGradientKernel {
  static constexpr const char* name =
      sizeof(A) == 8 ? "linear_attention_decay_gradient_double" : "linear_attention_decay_gradient";
  static constexpr int max_threads = 256, min_blocks = 2, warps = max_threads / 32;
  struct Params {
    Segments segments;
    int state_heads, query_heads, key_heads;  // key_heads: of key_dots
    int query_tiles, key_tiles;
    int depth, width;
    simt::global<const A> query_dots, key_dots;    // [tiles,B,heads,T]
    simt::global<const A> pairs;                   // [B,Hs,T]
    simt::global<const A> states, states_z;        // [slots,Hs,depth,width] before each segment
    simt::global<const A> final, final_z;          // [N,Hs,depth,width] after the last one
    simt::global<const A> gradients, gradients_z;  // after each segment
    simt::global<const unsigned char> mask;
    Index mask_stride[2];
    simt::global<A> by_token;  // [B,T,Hs] of any strides, or null
    Index by_token_stride[3];
    simt::global<double> head_sums;  // [slots,Hs], or null
  };

  SIMT_DEVICE static void run(const Params& p) {
    const auto scratch = simt::shared_array<double>(0, warps);
    const Index slot = simt::block() / p.state_heads;
    const int head = static_cast<int>(simt::block() - slot * p.state_heads);
    const Segment segment = segment_of(p.segments, slot);
    if (segment.sequence < 0 && !segment.poisoned) {
      if (p.head_sums && simt::thread() == 0) p.head_sums.store(slot * p.state_heads + head, 0.0);
      return;
    }
    // each thread's part is in one order, whatever the number of threads that share the work
    double across = 0;
    if (!segment.poisoned) {
      const bool last = is_last(p, slot, segment);
      const Index here = slot * p.state_heads + head;
      const Index after = last ? segment.sequence * p.state_heads + head : here + p.state_heads;
      const int size = p.depth * p.width;
      for (int e = simt::thread(); e < size; e += max_threads)
        across += static_cast<double>(last ? p.final.load(after * size + e) : p.states.load(after * size + e)) *
                  static_cast<double>(p.gradients.load(here * size + e));
      if (p.gradients_z) {
        for (int e = simt::thread(); e < p.depth; e += max_threads)
          across +=
              static_cast<double>(last ? p.final_z.load(after * p.depth + e) : p.states_z.load(after * p.depth + e)) *
              static_cast<double>(p.gradients_z.load(here * p.depth + e));
      }
    } else {
      across = not_a_number<double>();
    }
    double running = simt::block_sum(across, scratch);

    double sum = 0;  // thread 0's: of the whole segment
    for (Index end = segment.count; end > 0; end -= max_threads) {
      const Index t = end - 1 - simt::thread();
      const bool inside = t >= 0;
      const Index token = segment.first + t;
      const bool live =
          inside && (!p.mask || p.mask.load(segment.batch * p.mask_stride[0] + token * p.mask_stride[1]) != 0);
      double x = live ? difference(p, segment.batch, token, head) : 0.0;
      // inclusive sum over the threads before: tokens after this one
      SIMT_UNROLL
      for (int step = 1; step < 32; step *= 2) {
        const double other = simt::shuffle_up(x, step);
        if (simt::lane() >= step) x += other;
      }
      simt::barrier();
      if (simt::lane() == 31) scratch.store(simt::warp(), x);
      simt::barrier();
      double before = 0, all = 0;
      for (int w = 0; w < warps; ++w) {
        const double part = scratch.load(w);
        if (w < simt::warp()) before += part;
        all += part;
      }
      const double gradient = live ? running + (before + x) : 0.0;
      running += all;
      if (inside && p.by_token)
        p.by_token.store(
            segment.batch * p.by_token_stride[0] + token * p.by_token_stride[1] + head * p.by_token_stride[2],
            static_cast<A>(gradient));
      if (p.head_sums) sum += simt::block_sum(gradient, scratch);
    }
    if (p.head_sums && simt::thread() == 0) p.head_sums.store(slot * p.state_heads + head, sum);
  }

  SIMT_DEVICE static bool is_last(const Params& p, Index slot, const Segment& segment) {
    if (slot + 1 >= p.segments.slots) return true;
    const Segment next = segment_of(p.segments, slot + 1);
    return next.sequence != segment.sequence;
  }

  // By how much the sum grows from the token after this one to it.
  SIMT_DEVICE static double difference(const Params& p, Index batch, Index token, int head) {
    const Segments& s = p.segments;
    const int group = p.query_heads / p.state_heads, key = head * p.key_heads / p.state_heads;
    double x = static_cast<double>(p.pairs.load(row_of(s, p.state_heads, batch, head, token)));
    for (int tile = 0; tile < p.query_tiles; ++tile) {
      for (int r = 0; r < group; ++r)
        x += static_cast<double>(
            p.query_dots.load(row_of(s, p.query_heads, tile * s.batch + batch, head * group + r, token)));
    }
    for (int tile = 0; tile < p.key_tiles; ++tile)
      x -= static_cast<double>(p.key_dots.load(row_of(s, p.key_heads, tile * s.batch + batch, key, token)));
    return x;
  }
};

template <class A, class Queue>
void enqueue_decay_gradient(const typename DecayGradientKernel<A>::Params& p, Queue& queue) {
  using Kernel = DecayGradientKernel<A>;
  queue.template launch<Kernel>({p.segments.slots * p.state_heads, Kernel::max_threads, Kernel::warps * 8}, p);
}

// [slots,heads] -> [heads]: a thread a head.
template <class A>
struct SumSlotsKernel {
  static constexpr const char* name =
      sizeof(A) == 8 ? "linear_attention_sum_slots_double" : "linear_attention_sum_slots";
  static constexpr int max_threads = 256, min_blocks = 1;
  struct Params {
    Index slots;
    int heads;
    simt::global<const double> from;
    simt::global<A> to;
    Index stride;
  };
  SIMT_DEVICE static void run(const Params& p) {
    const Index head = simt::block() * max_threads + simt::thread();
    if (head >= p.heads) return;
    double sum = 0;
    for (Index slot = 0; slot < p.slots; ++slot) sum += p.from.load(slot * p.heads + head);
    p.to.store(head * p.stride, static_cast<A>(sum));
  }
};

template <class A, class Queue>
void enqueue_sum_slots(const typename SumSlotsKernel<A>::Params& p, Queue& queue) {
  constexpr int threads = SumSlotsKernel<A>::max_threads;
  queue.template launch<SumSlotsKernel<A>>({(p.heads + threads - 1) / threads, threads, 0}, p);
}

// [tokens, heads * group, width] -> [tokens, heads, width] of any strides: sums over the states that share a key head.
template <class A>
struct SumHeadsKernel {
  static constexpr const char* name =
      sizeof(A) == 8 ? "linear_attention_sum_heads_double" : "linear_attention_sum_heads";
  static constexpr int max_threads = 256, min_blocks = 4;
  struct Params {
    Index count, time;  // elements of the result; T
    int group;
    simt::global<const A> from;
    Output to;
  };
  SIMT_DEVICE static void run(const Params& p) {
    const Index i = simt::block() * max_threads + simt::thread();
    if (i >= p.count) return;
    const Index row = i / p.to.width, token = row / p.to.heads, batch = token / p.time;
    const int c = static_cast<int>(i - row * p.to.width), head = static_cast<int>(row - token * p.to.heads);
    A sum = 0;
    for (int r = 0; r < p.group; ++r) sum += p.from.load((row * p.group + r) * p.to.width + c);
    with_dtype<A>(p.to.dtype, [&](auto x) {
      using S = decltype(x);
      p.to.data.template as<S>().store(p.to.at(batch, token - batch * p.time, head) + c * p.to.stride[3],
                                       simt::from_float<S>(sum));
    });
  }
};

template <class A, class Queue>
void enqueue_sum_heads(const typename SumHeadsKernel<A>::Params& p, Queue& queue) {
  constexpr int threads = SumHeadsKernel<A>::max_threads;
  queue.template launch<SumHeadsKernel<A>>({(p.count + threads - 1) / threads, threads, 0}, p);
}

}  // namespace freqrank::linear_attention::device
