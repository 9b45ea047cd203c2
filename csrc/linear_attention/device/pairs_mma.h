#pragma once
// pairs.h on tensor cores, for tensors of one 16-bit type.

#include "linear_attention/device/pairs.h"
#include "linear_attention/device/tiles.h"

namespace freqrank::linear_attention::device {

template <class E, int Chunk>
struct PairsMma {
  using Params = PairsParams<float>;
  // of q, k, grad_o and v, `slice` columns are in shared memory at a time
  static constexpr int chunk = Chunk, slice = 64, warps = chunk / 16, column_tiles = chunk / 8;
  static constexpr int max_threads = 32 * warps, min_blocks = chunk == 64 ? 3 : 6;
  static constexpr bool is_float16 = std::is_same_v<E, float16>;
  static constexpr const char* names[2][2] = {{"linear_attention_pairs_bfloat16", "linear_attention_pairs_bfloat16_32"},
                                              {"linear_attention_pairs_float16", "linear_attention_pairs_float16_32"}};
  static constexpr const char* name = names[is_float16][Chunk == 32];
  static constexpr int tile_bytes = chunk * slice * 2, sums_at = 2 * tile_bytes;
  static constexpr int shared_bytes = sums_at + (1 + 1 + warps) * chunk * 4;

  using Sum = simt::Accumulator<E>;

  SIMT_DEVICE static simt::shared<E> tile(int i) { return simt::shared_array<E>(i * tile_bytes, chunk * slice); }
  SIMT_DEVICE static simt::shared<float> sums(int i) {
    return simt::shared_array<float>(sums_at + i * chunk * 4, chunk);
  }

  SIMT_DEVICE static void run(const Params& p) {
    const PairsPlace at = pairs_place(p);
    const Segment segment = segment_of(p.segments, at.slot);
    const Index left = segment.count - Index{at.chunk} * chunk;
    if (segment.sequence < 0 || segment.poisoned || left <= 0) return;
    const int count = left < chunk ? static_cast<int>(left) : chunk;
    const Index first = segment.first + Index{at.chunk} * chunk;
    if (simt::warp() == 0) ChunkDecays<chunk>::fetch(p, sums(0), sums(1), segment.batch, first, count, at.state_head);
    simt::copy_commit();
    simt::copy_wait<0>();
    if (simt::warp() == 0) {
      typename ChunkDecays<chunk>::Numbers live;
      const auto c = ChunkDecays<chunk>::sum_up(p, sums(0), sums(1), at.state_head, live);
      sums(0).store_vector(ChunkDecays<chunk>::token(0), c);
    }
    const int group = p.query_heads / p.state_heads;
    float mine = 0;  // of token thread()
    SIMT_NO_UNROLL
    for (int r = 0; r < group; ++r) {
      Sum score[column_tiles], dscore[column_tiles];
      product(p, p.q, p.k, at, segment, first, count, r, score);
      product(p, p.grad_o, p.v, at, segment, first, count, r, dscore);
      sum_up(p, segment, first, count, at.state_head * group + r, score, dscore);
      simt::barrier();
      if (simt::thread() < chunk) {
        mine += sums(1).load(simt::thread());
        float column = 0;
        SIMT_UNROLL
        for (int w = 0; w < warps; ++w) column += sums(2 + w).load(simt::thread());
        mine -= column;
      }
    }
    if (simt::thread() < count)
      p.pairs.store(row_of(p.segments, p.state_heads, segment.batch, at.state_head, first + simt::thread()), mine);
  }

  // Sums of A over rows, and over the columns of each warp's 16 rows.
  SIMT_DEVICE static void sum_up(const Params& p, const Segment& segment, Index first, int count, int head,
                                 const Sum (&score)[column_tiles], const Sum (&dscore)[column_tiles]) {
    const int row_tile = simt::warp();
    float rows[2] = {0, 0}, scale[2], add[2], row_c[2];
    int row[2];
    SIMT_UNROLL
    for (int h = 0; h < 2; ++h) {
      row[h] = row_tile * 16 + Sum::row(2 * h);
      const Index at = row_of(p.segments, p.query_heads, segment.batch, head, first + row[h]);
      scale[h] = p.scale * (p.query_scale && row[h] < count ? p.query_scale.load(at) : 1.0f);
      add[h] = p.query_add && row[h] < count ? p.scale * p.query_add.load(at) : 0.0f;
      row_c[h] = sums(0).load(row[h]);
    }
    SIMT_UNROLL
    for (int n = 0; n < column_tiles; ++n) {
      SIMT_UNROLL
      for (int side = 0; side < 2; ++side) {
        const int column = n * 8 + Sum::col(side);
        float total = 0;
        if (n / 2 <= row_tile) {
          const float c = sums(0).load(column);
          SIMT_UNROLL
          for (int h = 0; h < 2; ++h) {
            float x = score[n].get(2 * h + side) * (scale[h] * dscore[n].get(2 * h + side) + add[h]);
            if (p.decay != Decay::none) x *= simt::exp(row_c[h] - c);
            x = column < row[h] ? x : 0.0f;  // a token with itself: no decay between
            rows[h] += x;
            total += x;
          }
        }
        SIMT_UNROLL
        for (int step = 4; step < 32; step *= 2) total += simt::shuffle_xor(total, step);
        if (simt::lane() < 4) sums(2 + simt::warp()).store(column, total);
      }
    }
    SIMT_UNROLL
    for (int h = 0; h < 2; ++h) {
      rows[h] += simt::shuffle_xor(rows[h], 1);
      rows[h] += simt::shuffle_xor(rows[h], 2);
      if (simt::lane() % 4 == 0) sums(1).store(row[h], rows[h]);
    }
  }

  // A warp's sixteen rows of x times all rows of y that are not later.
  SIMT_DEVICE static void product(const Params& p, const Matrix& x, const Matrix& y, const PairsPlace& at,
                                  const Segment& segment, Index first, int count, int r, Sum (&out)[column_tiles]) {
    const int row_tile = simt::warp();
    SIMT_UNROLL
    for (int n = 0; n < column_tiles; ++n) out[n].fill(0.0f);
    SIMT_NO_UNROLL
    for (int begin = 0; begin < x.width; begin += slice) {
      simt::barrier();
      fetch_rows<chunk, slice, max_threads>(p, x, tile(0), segment.batch, first, count,
                                            x.head(at.state_head, p.state_heads, r), begin);
      fetch_rows<chunk, slice, max_threads>(p, y, tile(1), segment.batch, first, count,
                                            y.head(at.state_head, p.state_heads, 0), begin);
      simt::copy_commit();
      simt::copy_wait<0>();
      simt::barrier();
      SIMT_UNROLL
      for (int d = 0; d < slice; d += 16) {
        simt::FragmentA<E> a;
        simt::load_matrix_rows(a, tile(0), [&](int i, int c) { return swizzled<slice>(row_tile * 16 + i, d + c); });
        SIMT_UNROLL
        for (int n = 0; n < column_tiles; n += 2) {
          if (n / 2 > row_tile) continue;
          simt::FragmentB<E> b[2];
          simt::load_matrix_columns(b[0], b[1], tile(1),
                                    [&](int i, int c) { return swizzled<slice>(n * 8 + c, d + i); });
          simt::mma(out[n], a, b[0]);
          simt::mma(out[n + 1], a, b[1]);
        }
      }
    }
  }
};

template <class E, int Chunk, class Queue>
void enqueue_pairs_mma_as(const PairsParams<float>& p, Queue& queue) {
  using Kernel = PairsMma<E, Chunk>;
  queue.template launch<Kernel>(
      {p.segments.slots * p.chunks * p.state_heads, Kernel::max_threads, Kernel::shared_bytes}, p);
}

// `chunk`: that of the scans.
template <class E, class Queue>
void enqueue_pairs_mma(int chunk, const PairsParams<float>& p, Queue& queue) {
  if (chunk == 64) {
    enqueue_pairs_mma_as<E, 64>(p, queue);
  } else {
    enqueue_pairs_mma_as<E, 32>(p, queue);
  }
}

}  // namespace freqrank::linear_attention::device
