#pragma once
// pairs.h on ordinary units, for every other dtype.

#include "linear_attention/device/fma_layout.h"
#include "linear_attention/device/pairs.h"

namespace freqrank::linear_attention::device {

template <class A>
struct PairsFma {
  using Params = PairsParams<A>;
  static constexpr int chunk = kFmaChunk, slice = 32, pitch = slice + 1, score_pitch = chunk + 1;
  static constexpr int max_threads = 256, min_blocks = 1, side = 16, each = chunk / side;
  static constexpr const char* name = sizeof(A) == 8 ? "linear_attention_pairs_double" : "linear_attention_pairs_float";
  static constexpr int size = static_cast<int>(sizeof(A));
  static constexpr int left_at = 0, right_at = chunk * pitch * size;  // then, in their place, A [chunk, chunk]
  static constexpr int sums_at =
      (2 * chunk * pitch * size > chunk * score_pitch * size ? 2 * chunk * pitch * size : chunk * score_pitch * size);
  static constexpr int shared_bytes = (sums_at + 7) / 8 * 8 + chunk * 8;

  SIMT_DEVICE static void run(const Params& p) {
    const PairsPlace at = pairs_place(p);
    const Segment segment = segment_of(p.segments, at.slot);
    const Index left = segment.count - Index{at.chunk} * chunk;
    if (segment.sequence < 0 || segment.poisoned || left <= 0) return;
    const int count = left < chunk ? static_cast<int>(left) : chunk;
    const Index first = segment.first + Index{at.chunk} * chunk;
    const auto sums = simt::shared_array<double>(shared_bytes - chunk * 8, chunk);
    if (simt::thread() == 0) {
      double sum = 0;
      for (int t = 0; t < chunk; ++t) {
        if (t < count && is_live(p, segment.batch, first + t))
          sum += static_cast<double>(log_decay_of(p, segment.batch, first + t, at.state_head));
        sums.store(t, sum);
      }
    }
    const int group = p.query_heads / p.state_heads;
    A mine = 0;  // of token thread()
    for (int r = 0; r < group; ++r) mine += pairs_of_head(p, at, segment, first, count, r, sums);
    if (simt::thread() < count)
      p.pairs.store(row_of(p.segments, p.state_heads, segment.batch, at.state_head, first + simt::thread()), mine);
  }

  // A thread's rows are side apart, and so are its columns.
  SIMT_DEVICE static A pairs_of_head(const Params& p, const PairsPlace& at, const Segment& segment, Index first,
                                     int count, int r, simt::shared<double> sums) {
    A score[each][each], dscore[each][each];
    product(p, p.q, p.k, at, segment, first, count, r, score);
    product(p, p.grad_o, p.v, at, segment, first, count, r, dscore);
    const auto all = simt::shared_array<A>(left_at, chunk * score_pitch);
    const int head = at.state_head * (p.query_heads / p.state_heads) + r;
    simt::barrier();
    SIMT_UNROLL
    for (int i = 0; i < each; ++i) {
      const int row = simt::thread() / side + i * side;
      const Index query = row_of(p.segments, p.query_heads, segment.batch, head, first + row);
      const A scale = p.scale * (p.query_scale && row < count ? p.query_scale.load(query) : A(1));
      const A add = p.query_add && row < count ? p.scale * p.query_add.load(query) : A(0);
      SIMT_UNROLL
      for (int j = 0; j < each; ++j) {
        const int column = simt::thread() % side + j * side;
        A x = 0;
        if (column < row && row < count)  // a token with itself: no decay between
          x = score[i][j] * (scale * dscore[i][j] + add) *
              simt::exp(static_cast<A>(sums.load(row) - sums.load(column)));
        all.store(row * score_pitch + column, x);
      }
    }
    simt::barrier();
    A rows = 0, columns = 0;
    if (simt::thread() < chunk) {
      for (int t = 0; t < chunk; ++t) {
        rows += all.load(simt::thread() * score_pitch + t);
        columns += all.load(t * score_pitch + simt::thread());
      }
    }
    simt::barrier();
    return rows - columns;
  }

  SIMT_DEVICE static void product(const Params& p, const Matrix& x, const Matrix& y, const PairsPlace& at,
                                  const Segment& segment, Index first, int count, int r, A (&out)[each][each]) {
    const auto left = simt::shared_array<A>(left_at, chunk * pitch);
    const auto right = simt::shared_array<A>(right_at, chunk * pitch);
    const int x_head = x.head(at.state_head, p.state_heads, r), y_head = y.head(at.state_head, p.state_heads, 0);
    SIMT_UNROLL
    for (int i = 0; i < each; ++i) {
      SIMT_UNROLL
      for (int j = 0; j < each; ++j) out[i][j] = 0;
    }
    for (int begin = 0; begin < x.width; begin += slice) {
      simt::barrier();
      fetch(p, x, left, segment, first, count, x_head, begin);
      fetch(p, y, right, segment, first, count, y_head, begin);
      simt::barrier();
      SIMT_NO_UNROLL
      for (int d = 0; d < slice; ++d) {
        A a[each], b[each];
        SIMT_UNROLL
        for (int i = 0; i < each; ++i) {
          a[i] = left.load((simt::thread() / side + i * side) * pitch + d);
          b[i] = right.load((simt::thread() % side + i * side) * pitch + d);
        }
        SIMT_UNROLL
        for (int i = 0; i < each; ++i) {
          SIMT_UNROLL
          for (int j = 0; j < each; ++j) out[i][j] = simt::fma(a[i], b[j], out[i][j]);
        }
      }
    }
  }

  SIMT_DEVICE static void fetch(const Params& p, const Matrix& m, simt::shared<A> to, const Segment& segment,
                                Index first, int count, int head, int begin) {
    with_dtype<A>(m.dtype, [&](auto x) {
      const auto from = m.data.template as<decltype(x)>();
      for (int e = simt::thread(); e < chunk * slice; e += max_threads) {
        const int row = e / slice, column = begin + e % slice;
        const bool valid = row < count && column < m.width && is_live(p, segment.batch, first + row);
        to.store(row * pitch + e % slice, valid ? static_cast<A>(simt::to_float(from.load(
                                                      m.at(segment.batch, first + row, head) + column * m.stride[3])))
                                                : A(0));
      }
    });
  }
};

template <class A, class Queue>
void enqueue_pairs_fma(const PairsParams<A>& p, Queue& queue) {
  using Kernel = PairsFma<A>;
  queue.template launch<Kernel>(
      {p.segments.slots * p.chunks * p.state_heads, Kernel::max_threads, Kernel::shared_bytes}, p);
}

}  // namespace freqrank::linear_attention::device
