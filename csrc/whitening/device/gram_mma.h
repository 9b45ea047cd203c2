#pragma once
// Tiles of X^T diag(w) Y on the tensor cores, in double.

#include <type_traits>

#include "whitening/device/gram_layout.h"
#include "whitening/device/gram_params.h"

namespace freqrank::whitening::device {

// What the two kernels share: who has which element of a tile. A warp has 8 * RowFragments x 32 of it, and of each
// fragment of 8 x 8 a lane has two neighbours in a row.
template <int RowFragments>
struct GramTile {
  static constexpr int fragments = 4;  // of a warp, side by side
  static constexpr int warp_rows = 8 * RowFragments, warp_columns = 8 * fragments;
  static constexpr int rows = 2 * warp_rows, columns = 2 * warp_columns, threads = 32 * GramLayout::warps;
  static constexpr int ratio = rows / columns;
  static_assert(8 * warp_columns * 8 == GramLayout::scratch_bytes);
  using Pair = simt::pack<double, 2>;

  // Where a thread's pair of fragment (f, c) lies in a part: all threads' pairs side by side.
  SIMT_DEVICE static int at_part(int f, int c) { return ((f * fragments + c) * threads + simt::thread()) * 2; }

  // Where an element of eight rows lies in a warp's scratch: pairs are permuted so that they are written, and the
  // columns read, without bank conflicts.
  SIMT_DEVICE static int at_scratch(int row, int column) {
    return row * warp_columns + (column / 2 ^ (row / 2 | row % 2 * 4)) * 2 + column % 2;
  }

  // Eight rows of a warp's result, and where Y is X what mirrors them; `add` to what is there. By way of the scratch,
  // for neighbours in memory to be written together.
  SIMT_DEVICE static void put(const GramParams& p, const GramPlace& at, simt::global<double> out,
                              simt::shared<double> scratch, int f, const Pair (&values)[fragments], bool add) {
    const int lane = simt::opaque(simt::lane());
    simt::warp_barrier();  // what lay there has been read
    SIMT_UNROLL
    for (int c = 0; c < fragments; ++c)
      scratch.template store_vector<2>(at_scratch(lane / 4, c * 8 + lane % 4 * 2), values[c]);
    simt::warp_barrier();
    const Index first_row = Index{at.down} * rows + simt::warp() / 2 * warp_rows + f * 8;
    const Index first_column = Index{at.across} * columns + simt::warp() % 2 * warp_columns;
    {
      const Index j = first_column + lane;
      const Index left = p.x.columns - first_row;
      const auto to = out + (first_row * p.out_row_stride + j * p.out_column_stride);
      // row r is wanted if first <= r < end
      const Index first = p.symmetric ? j - first_row : 0, end = j < p.y.columns ? left : 0;
      double sums[8];
      SIMT_UNROLL
      for (int r = 0; r < 8; ++r) {
        sums[r] = scratch.load(at_scratch(r, lane));
        if (add && first <= r && r < end) sums[r] += to.load(r * p.out_row_stride);
      }
      SIMT_UNROLL
      for (int r = 0; r < 8; ++r) {
        if (first <= r && r < end) to.store(r * p.out_row_stride, sums[r]);
      }
    }
    if (!p.symmetric) return;
    const Index i = first_row + lane % 8, j = first_column + lane / 8;
    const Index end = i < p.x.columns ? i - j : 0;
    const auto to = out + (j * p.out_row_stride + i * p.out_column_stride);
    double sums[8];
    SIMT_UNROLL
    for (int k = 0; k < 8; ++k) {
      sums[k] = scratch.load(at_scratch(lane % 8, lane / 8 + 4 * k));
      if (add && 4 * k < end) sums[k] += to.load(4 * k * p.out_row_stride);
    }
    SIMT_UNROLL
    for (int k = 0; k < 8; ++k) {
      if (4 * k < end) to.store(4 * k * p.out_row_stride, sums[k]);
    }
  }
};

template <class E, int RowFragments>
struct GramKernel {
  using Params = GramParams;
  using Tile = GramTile<RowFragments>;
  static constexpr GramShape shape = RowFragments == 8 ? kGramShapes[0] : kGramShapes[1];
  static_assert(shape.rows == Tile::rows && shape.columns == Tile::columns);
  static constexpr GramLayout layout = gram_layout(shape, sizeof(E));
  static constexpr int max_threads = Tile::threads, min_blocks = shape.min_blocks;
  static constexpr int type = std::is_same_v<E, float16> ? 0 : std::is_same_v<E, bfloat16> ? 1 : sizeof(E) == 4 ? 2 : 3;
  static constexpr const char* names[4][2] = {{"gram_float16", "gram_float16_small"},
                                              {"gram_bfloat16", "gram_bfloat16_small"},
                                              {"gram_float32", "gram_float32_small"},
                                              {"gram_float64", "gram_float64_small"}};
  static constexpr const char* name = names[type][RowFragments == 4];

  static constexpr int stages = GramLayout::stages, stage_tokens = layout.stage_tokens, pitch = layout.pitch;
  static constexpr int steps = 2, depth = 4 * steps;  // of one instruction
  static_assert(stage_tokens % depth == 0 && kGramFlushTokens % stage_tokens == 0);

  using Sum = simt::Accumulator<double>;
  using Sums = Sum[RowFragments / 2][Tile::fragments][2];

  SIMT_DEVICE static simt::shared<E> tile(int stage) {
    return simt::shared_array<E>(stage * layout.stage_bytes, stage_tokens * pitch);
  }
  SIMT_DEVICE static simt::shared<double> weights(int stage) {
    return simt::shared_array<double>(layout.weights_at + stage * stage_tokens * 8, stage_tokens);
  }

  SIMT_DEVICE static simt::shared<double> scratch() {
    constexpr int bytes = GramLayout::scratch_bytes;
    return simt::shared_array<double>(layout.scratch_at + simt::warp() * bytes, bytes / 8);
  }

  // A block's own part of everything.
  struct Work {
    GramPlace at;
    Index first;  // token
    int tokens;
    Index x, y, weight;  // the first token's elements
    bool apart;          // Y's tile does not lie within X's, and is brought beside it
  };

  SIMT_DEVICE static void run(const Params& p) {
    Index task = simt::block();
    const Index part = task / p.tiles;
    const int split = static_cast<int>(part % p.splits);
    task = part / p.splits * p.tiles + task % p.tiles;
    Work w;
    w.at = gram_place<Tile::ratio>(p, task);
    w.first = split * p.split_tokens;
    const Index left = p.tokens - w.first;
    const Index tokens = left < p.split_tokens ? left : p.split_tokens;
    w.x = gram_offset(p, w.at.batch, p.x.batch_strides) + w.first * p.x.token_stride;
    w.y = gram_offset(p, w.at.batch, p.y.batch_strides) + w.first * p.y.token_stride;
    w.weight = gram_offset(p, w.at.batch, p.weight_batch_strides) + w.first * p.weight_stride;
    w.apart = !p.symmetric || w.at.across / Tile::ratio != w.at.down;
    if (!p.weight && simt::thread() < stages * stage_tokens) {
      simt::shared_array<double>(layout.weights_at, stages * stage_tokens).store(simt::thread(), 1.0);
    }

    const Index count = (tokens + stage_tokens - 1) / stage_tokens;
    SIMT_NO_UNROLL
    for (int s = 0; s < stages - 1; ++s) {
      if (s < count) fetch(p, w, s, s, tokens);
      simt::copy_commit();
    }
    // a warp whose elements all lie above the diagonal has nothing to do
    const bool wanted =
        !p.symmetric || Index{w.at.down} * Tile::rows + simt::warp() / 2 * Tile::warp_rows + Tile::warp_rows >
                            Index{w.at.across} * Tile::columns + simt::warp() % 2 * Tile::warp_columns;
    constexpr int flush = kGramFlushTokens / stage_tokens;
    int stage = 0;
    Index s = 0;
    do {
      Sums sums;
      clear(sums);
      const Index end = count - s < flush ? count : s + flush;
      const bool flushed = s > 0;
      SIMT_NO_UNROLL
      for (; s < end; ++s) {
        simt::copy_wait<stages - 2>();
        simt::barrier();
        const int ahead = stage == 0 ? stages - 1 : stage - 1;
        if (s + stages - 1 < count) fetch(p, w, ahead, s + stages - 1, tokens);
        simt::copy_commit();
        if (wanted) multiply(w, stage, sums);
        stage = stage == stages - 1 ? 0 : stage + 1;
      }
      write(p, w.at, sums, flushed);
    } while (s < count);
  }

  SIMT_DEVICE static void clear(Sums& sums) {
    SIMT_UNROLL
    for (int f = 0; f < RowFragments; ++f) {
      SIMT_UNROLL
      for (int c = 0; c < Tile::fragments; ++c) sums[f / 2][c][f % 2].fill(0.0);
    }
  }

  // --- From global to shared memory ---
  SIMT_DEVICE static void fetch(const Params& p, const Work& w, int stage, Index s, Index tokens) {
    const Index first = s * stage_tokens, left = tokens - first;
    const int count = left < stage_tokens ? static_cast<int>(left) : stage_tokens;
    fetch_columns<Tile::rows>(p.x, w.x + first * p.x.token_stride, stage, 0, Index{w.at.down} * Tile::rows, count);
    if (w.apart)
      fetch_columns<Tile::columns>(p.y, w.y + first * p.y.token_stride, stage, Tile::rows,
                                   Index{w.at.across} * Tile::columns, count);
    if (p.weight && simt::thread() < stage_tokens) {
      const int t = simt::thread();
      simt::copy_async<8>(weights(stage), t, p.weight, w.weight + (first + t) * p.weight_stride, t < count);
    }
  }

  // `Width` columns from `column` on, to element `to` of each token; what is outside becomes 0 and is not read.
  template <int Width>
  SIMT_DEVICE static void fetch_columns(const GramOperand& m, Index from, int stage, int to, Index column, int count) {
    const auto data = m.data.template as<E>();
    if (m.pieces) {
      constexpr int piece = 16 / sizeof(E), across = Width / piece, step = max_threads / across;
      static_assert(max_threads % across == 0 && stage_tokens % step == 0);
      const int thread = simt::opaque(simt::thread());
      const int at = thread % across * piece;
      int t = thread / across;
      const bool inside = column + at < m.columns;
      Index i = from + t * m.token_stride + column + at;
      SIMT_UNROLL
      for (int k = 0; k < stage_tokens / step; ++k) {
        simt::copy_async<16>(tile(stage), t * pitch + to + at, data, i, inside && t < count);
        t += step;
        i += step * m.token_stride;
      }
      return;
    }
    // one at a time, neighbouring threads along whichever dimension has neighbours in memory
    const bool along_tokens = m.token_stride == 1 && m.column_stride != 1;
    SIMT_NO_UNROLL
    for (int e = simt::thread(); e < stage_tokens * Width; e += max_threads) {
      const int t = along_tokens ? e % stage_tokens : e / Width, c = along_tokens ? e / stage_tokens : e % Width;
      const bool valid = t < count && column + c < m.columns;
      const Index i = from + t * m.token_stride + (column + c) * m.column_stride;
      const int k = t * pitch + to + c;
      if constexpr (sizeof(E) == 2) {
        tile(stage).store(k, valid ? data.load(i) : E{0});
      } else if constexpr (sizeof(E) == 4) {
        simt::copy_async<4>(tile(stage), k, data, i, valid);
      } else if (m.dtype == Dtype::float64) {
        simt::copy_async<8>(tile(stage), k, data, i, valid);
      } else {
        tile(stage).store(k, valid ? load_any(m, i) : 0.0);
      }
    }
  }
  SIMT_DEVICE static double load_any(const GramOperand& m, Index i) {
    switch (m.dtype) {
      case Dtype::float16: return simt::to_float(m.data.template as<float16>().load(i));
      case Dtype::bfloat16: return simt::to_float(m.data.template as<bfloat16>().load(i));
      case Dtype::float32: return m.data.template as<float>().load(i);
      case Dtype::float64: return m.data.template as<double>().load(i);
    }
    return 0;
  }

  // --- From shared memory to the sums ---
  SIMT_DEVICE static void multiply(const Work& w, int stage, Sums& sums) {
    const auto x = tile(stage);
    const auto weight = weights(stage);
    const int y_at = w.apart ? Tile::rows : w.at.across % Tile::ratio * Tile::columns;
    const int token = simt::lane() % 4, column = simt::lane() / 4;  // of a fragment of X^T and of Y alike
    const int x_at = simt::warp() / 2 * Tile::warp_rows + column;
    const int y_column = y_at + simt::warp() % 2 * Tile::warp_columns + column;
    SIMT_NO_UNROLL
    for (int d = 0; d < stage_tokens; d += depth) {
      simt::FragmentB<double> b[Tile::fragments][steps];
      SIMT_UNROLL
      for (int s = 0; s < steps; ++s) {
        const int t = d + 4 * s + token;
        const double factor = weight.load(t);
        SIMT_UNROLL
        for (int c = 0; c < Tile::fragments; ++c)
          b[c][s].set_at(0, token, column, factor * wide(x.load(t * pitch + y_column + 8 * c)));
      }
      SIMT_UNROLL
      for (int f = 0; f < RowFragments / 2; ++f) {
        simt::FragmentA<double> a[steps][2];
        SIMT_UNROLL
        for (int s = 0; s < steps; ++s) {
          SIMT_UNROLL
          for (int h = 0; h < 2; ++h)
            a[s][h].set_at(0, column, token, wide(x.load((d + 4 * s + token) * pitch + x_at + 16 * f + 8 * h)));
        }
        SIMT_UNROLL
        for (int c = 0; c < Tile::fragments; ++c) simt::mma(sums[f][c], a, b[c]);
      }
    }
  }
  SIMT_DEVICE static double wide(E v) { return static_cast<double>(simt::to_float(v)); }

  // --- From the sums to memory ---
  SIMT_DEVICE static void write(const Params& p, const GramPlace& at, const Sums& sums, bool flushed) {
    const auto out = p.out + gram_offset(p, at.batch, p.out_batch_strides);
    const auto part = p.splits > 1 ? p.parts + simt::block() * (Tile::rows * Tile::columns) : p.parts;
    SIMT_UNROLL
    for (int f = 0; f < RowFragments; ++f) {
      typename Tile::Pair values[Tile::fragments];
      SIMT_UNROLL
      for (int c = 0; c < Tile::fragments; ++c) {
        const Sum& sum = sums[f / 2][c][f % 2];
        values[c] = {{sum.get(0), sum.get(1)}};
      }
      if (p.splits == 1) {
        Tile::put(p, at, out, scratch(), f, values, p.accumulate || flushed);
        continue;
      }
      SIMT_UNROLL
      for (int c = 0; c < Tile::fragments; ++c) {
        if (flushed) {
          const auto before = part.template load_vector<2>(Tile::at_part(f, c));
          values[c][0] += before[0], values[c][1] += before[1];
        }
        part.template store_vector<2>(Tile::at_part(f, c), values[c]);
      }
    }
  }
};

// Adds up the parts of a split sum, one after another. A block has eight of each warp's rows.
template <int RowFragments>
struct GramSumParts {
  using Params = GramParams;
  using Tile = GramTile<RowFragments>;
  static constexpr const char* name = RowFragments == 8 ? "gram_sum_parts" : "gram_sum_parts_small";
  static constexpr int max_threads = Tile::threads, min_blocks = 8;

  SIMT_DEVICE static void run(const Params& p) {
    const int f = static_cast<int>(simt::block() % RowFragments);
    const Index task = simt::block() / RowFragments;
    const auto at = gram_place<Tile::ratio>(p, task);
    const auto out = p.out + gram_offset(p, at.batch, p.out_batch_strides);
    const Index tile = Index{at.batch} * p.splits * p.tiles + task % p.tiles;
    typename Tile::Pair sums[Tile::fragments] = {};
    SIMT_NO_UNROLL
    for (int k = 0; k < p.splits; ++k) {
      const auto part = p.parts + (tile + k * p.tiles) * (Tile::rows * Tile::columns);
      SIMT_UNROLL
      for (int c = 0; c < Tile::fragments; ++c) {
        const auto value = part.template load_vector<2>(Tile::at_part(f, c));
        sums[c][0] += value[0], sums[c][1] += value[1];
      }
    }
    constexpr int bytes = GramLayout::scratch_bytes;
    Tile::put(p, at, out, simt::shared_array<double>(simt::warp() * bytes, bytes / 8), f, sums, p.accumulate);
  }
};

template <int RowFragments, class Queue>
void enqueue_gram_mma_as(const GramDevicePlan& plan, const GramParams& p, Queue& queue) {
  const simt::Grid grid{plan.blocks, plan.threads, plan.shared_bytes};
  switch (plan.element) {
    case Dtype::float16: queue.template launch<GramKernel<float16, RowFragments>>(grid, p); break;
    case Dtype::bfloat16: queue.template launch<GramKernel<bfloat16, RowFragments>>(grid, p); break;
    case Dtype::float32: queue.template launch<GramKernel<float, RowFragments>>(grid, p); break;
    case Dtype::float64: queue.template launch<GramKernel<double, RowFragments>>(grid, p); break;
  }
  if (plan.splits > 1)
    queue.template launch<GramSumParts<RowFragments>>(
        {plan.blocks / plan.splits * RowFragments, plan.threads, GramLayout::warps * GramLayout::scratch_bytes}, p);
}

template <class Queue>
void enqueue_gram_mma(const GramDevicePlan& plan, const GramParams& p, Queue& queue) {
  if (plan.shape == 0) {
    enqueue_gram_mma_as<8>(plan, p, queue);
  } else {
    enqueue_gram_mma_as<4>(plan, p, queue);
  }
}

}  // namespace freqrank::whitening::device
