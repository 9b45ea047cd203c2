#pragma once
// The scan on tensor cores, for tensors of one 16-bit type. A block walks through a segment chunk by chunk, each warp
// with its own columns of the values and of the state, which stays in its registers as float:
//
//   scores P, 16 rows a warp  ->  shared memory  ->  out = decayed rows . state + P values  ->  state update
//
// Registers are tight: what follows from a lane's number is computed where it is used, from an opaque copy of it.
//
// The state is kept transposed: its accumulators, rounded in place, are the fragments that rows . state needs. The next
// step's tiles arrive by asynchronous copies meanwhile. float16's range is too small for the scores, for the state and
// for the weights: each gets a power of two of its own.

#include "linear_attention/device/feature_map.h"
#include "linear_attention/device/mma_layout.h"
#include "linear_attention/device/tiles.h"

namespace freqrank::linear_attention::device {

template <class E, int Shape>
struct ScanMma {
  using Params = ScanParams<float>;
  static constexpr MmaShape shape = kMmaShapes[Shape];
  static constexpr MmaLayout layout = mma_layout(shape);
  static constexpr int depth = shape.depth, tile = shape.tile, chunk = shape.chunk, warps = shape.warps;
  static constexpr bool scaled = std::is_same_v<E, float16>;
  static constexpr int max_threads = 32 * warps, min_blocks = shape.min_blocks;
  static constexpr const char* names[2][3] = {
      {"linear_attention_bfloat16_64", "linear_attention_bfloat16_128", "linear_attention_bfloat16_256"},
      {"linear_attention_float16_64", "linear_attention_float16_128", "linear_attention_float16_256"}};
  static constexpr const char* name = names[scaled][Shape];

  static constexpr int own = tile / warps;  // columns of values that a warp has
  static constexpr int row_tiles = chunk / 16, depth_tiles = depth / 16, own_tiles = own / 8, state_tiles = own / 16;
  static constexpr int row_share = shape.rows / 16;  // of row_tiles, in registers at a time
  static constexpr int parts = warps / row_tiles;    // warps that share 16 rows of the scores
  static constexpr int part = chunk / parts, part_tiles = part / 8;
  static_assert(own % 16 == 0 && warps % row_tiles == 0 && chunk % 32 == 0 && (part == 8 || part % 16 == 0));

  // Features are made where a tile holds all of them.
  static constexpr bool maps = depth == tile;
  using Features = FeatureTile<E, chunk, depth, warps>;

  using A = simt::FragmentA<E>;
  using B = simt::FragmentB<E>;
  using Sum = simt::Accumulator<E>;
  // So much of the state waits in shared memory meanwhile.
  static constexpr int waiting = layout.waiting / Sum::count;

  template <int Width>
  SIMT_DEVICE static int place(int row, int column) {
    return swizzled<Width>(row, column);
  }

  // A warp's columns of the state, transposed: [own, depth].
  struct State {
    Sum at[state_tiles][2 * depth_tiles];
  };

  // Outputs of row_share * 16 rows from `first` on.
  struct Out {
    Sum at[row_share][own_tiles];
    int first;
  };

  // What a block works on. Kept in shared memory: the registers are the state's.
  struct Block {
    const Params& p;

    SIMT_DEVICE simt::shared<E> rows(int parity) const {
      return simt::shared_array<E>(layout.rows + parity * layout.rows_bytes, chunk * depth);
    }
    SIMT_DEVICE simt::shared<E> columns(int parity) const {
      return simt::shared_array<E>(layout.columns + parity * layout.rows_bytes, chunk * depth);
    }
    SIMT_DEVICE simt::shared<E> values(int parity) const {
      return simt::shared_array<E>(layout.values + parity * layout.values_bytes, chunk * tile);
    }
    SIMT_DEVICE simt::shared<E> scores() const { return simt::shared_array<E>(layout.scores, chunk * chunk); }
    SIMT_DEVICE simt::shared<float> exchange(int which) const {
      return simt::shared_array<float>(layout.exchange + which * Features::exchange * 4, Features::exchange);
    }
    // Before there are scores.
    SIMT_DEVICE simt::shared<float> waiting_room() const {
      return simt::shared_array<float>(layout.scores, chunk * chunk / 2);
    }
    // With exact_scores: in the place of the next step's rows, which come later then.
    SIMT_DEVICE simt::shared<E> score_rests(int rows_parity) const {
      static_assert(chunk <= depth);
      return simt::shared_array<E>(layout.rows + (1 - rows_parity) * layout.rows_bytes, chunk * chunk);
    }
    SIMT_DEVICE simt::shared<float> decay(int parity, int which) const {
      return simt::shared_array<float>(layout.decay + (parity * 4 + which) * chunk * 4, chunk);
    }
    SIMT_DEVICE simt::shared<float> whole() const { return simt::shared_array<float>(layout.whole, 2); }
    SIMT_DEVICE simt::shared<float> query(int parity, int which) const {
      return simt::shared_array<float>(layout.query + (parity * 2 + which) * chunk * 4, chunk);
    }
    SIMT_DEVICE simt::shared<float> weight() const { return simt::shared_array<float>(layout.weight, chunk); }
    SIMT_DEVICE simt::shared<float> denominator() const {
      return simt::shared_array<float>(layout.denominator, parts * chunk);
    }
    SIMT_DEVICE simt::shared<float> exponent() const {
      return simt::shared_array<float>(layout.exponent, parts * chunk);
    }
    SIMT_DEVICE simt::shared<float> z() const {
      return simt::shared_array<float>(layout.z, depth > tile ? depth : tile);
    }
    SIMT_DEVICE simt::shared<float> dots() const { return simt::shared_array<float>(layout.dots, warps * chunk); }
    SIMT_DEVICE simt::shared<float> parked() const {
      return simt::shared_array<float>(layout.parked, layout.parked_bytes / 4);
    }
    SIMT_DEVICE simt::shared<double> total_decay() const { return simt::shared_array<double>(layout.total, 1); }
    SIMT_DEVICE simt::shared<Index> long_facts() const { return simt::shared_array<Index>(layout.facts, 5); }
    SIMT_DEVICE simt::shared<int> facts() const { return simt::shared_array<int>(layout.facts + 40, 5); }

    SIMT_DEVICE void remember(const Place& where, const Segment& segment, int chunks, int heads) const {
      if (simt::thread() != 0) return;
      long_facts().store(0, segment.sequence);
      long_facts().store(1, segment.batch);
      long_facts().store(2, segment.first);
      long_facts().store(3, segment.count);
      long_facts().store(4, where.slot);
      facts().store(0, where.state_head);
      facts().store(1, where.row_block);
      facts().store(2, where.tile);
      facts().store(3, chunks);
      facts().store(4, heads);
      total_decay().store(0, 0.0);
    }
    SIMT_DEVICE Index batch() const { return long_facts().load(1); }
    SIMT_DEVICE Index slot() const { return long_facts().load(4); }
    SIMT_DEVICE Index state_index() const { return long_facts().load(p.by_slot ? 4 : 0); }
    SIMT_DEVICE int state_head() const { return facts().load(0); }
    SIMT_DEVICE int row_block() const { return facts().load(1); }
    SIMT_DEVICE int tile_number() const { return facts().load(2); }
    SIMT_DEVICE int chunks() const { return facts().load(3); }
    SIMT_DEVICE int heads() const { return facts().load(4); }  // steps a chunk

    SIMT_DEVICE bool columns_vary() const { return p.column_heads > 1; }  // from step to step; else the rows do
    SIMT_DEVICE Index first_of(int c) const { return long_facts().load(2) + Index{c} * chunk; }
    SIMT_DEVICE int count_of(int c) const {
      const Index left = long_facts().load(3) - Index{c} * chunk;
      return left < chunk ? static_cast<int>(left) : chunk;
    }
    // Of the group that shares the state.
    SIMT_DEVICE int row_of_group(int r) const { return columns_vary() ? 0 : row_block() * p.rows_per_block + r; }
    SIMT_DEVICE int head(const Matrix& m, int r) const { return m.head(state_head(), p.state_heads, r); }
    SIMT_DEVICE int out_head(int r) const { return p.out.head(state_head(), p.state_heads, row_of_group(r)); }
    SIMT_DEVICE int query_head(int r) const {
      return state_head() * p.query_heads / p.state_heads + (columns_vary() ? r : row_of_group(r));
    }
  };

  // A step: one head of one chunk.
  struct Turn {
    int number = 0, head = 0, step_parity = 0;  // number: of the chunk, in the order of the scan

    SIMT_DEVICE int chunk_of(const Block& b) const { return b.p.reverse ? b.chunks() - 1 - number : number; }
    SIMT_DEVICE int chunk_parity() const { return number % 2; }
    SIMT_DEVICE int rows_parity(const Block& b) const { return b.columns_vary() ? chunk_parity() : step_parity; }
    SIMT_DEVICE int columns_parity(const Block& b) const { return b.columns_vary() ? step_parity : chunk_parity(); }
    SIMT_DEVICE bool last(const Block& b) const { return head + 1 == b.heads(); }
    // Whether new rows, or new columns and values, have come.
    SIMT_DEVICE bool brings_rows(const Block& b) const { return head == 0 || !b.columns_vary(); }
    SIMT_DEVICE bool brings_columns(const Block& b) const { return head == 0 || b.columns_vary(); }
    // Whether the columns' first head is on, before which the state has not been touched in this chunk.
    SIMT_DEVICE bool opens(const Block& b) const { return !b.columns_vary() || head == 0; }
    SIMT_DEVICE Turn next(const Block& b) const {
      return last(b) ? Turn{number + 1, 0, 1 - step_parity} : Turn{number, head + 1, 1 - step_parity};
    }
  };

  template <int Width>
  SIMT_DEVICE static void fetch(const Block& b, const Matrix& m, simt::shared<E> to, int c, int head, int column) {
    fetch_rows<chunk, Width, max_threads>(b.p, m, to, b.batch(), b.first_of(c), b.count_of(c), head, column);
  }

  SIMT_DEVICE static void prefetch_rows(const Block& b, const Turn& turn) {
    const Params& p = b.p;
    fetch<depth>(b, p.rows, b.rows(turn.rows_parity(b)), turn.chunk_of(b), b.head(p.rows, b.row_of_group(turn.head)),
                 0);
  }

  // All but the rows if the scores are exact.
  SIMT_DEVICE static void prefetch(const Block& b, const Turn& turn) {
    const Params& p = b.p;
    const int c = turn.chunk_of(b), r = turn.head;
    if (!p.states_only && !p.exact_scores && turn.brings_rows(b)) prefetch_rows(b, turn);
    if (turn.brings_columns(b)) {
      const int parity = turn.columns_parity(b), column_head = b.columns_vary() ? r : 0;
      fetch<depth>(b, p.columns, b.columns(parity), c, b.head(p.columns, column_head), 0);
      fetch<tile>(b, p.values, b.values(parity), c, b.head(p.values, column_head), b.tile_number() * tile);
    }
    if (p.query_scale && simt::thread() < chunk) {
      const int t = simt::thread();
      const Index at = row_of(p.segments, p.query_heads, b.batch(), b.query_head(r), b.first_of(c) + t);
      simt::copy_async<4>(b.query(turn.step_parity, 0), t, p.query_scale, at, t < b.count_of(c));
      if (p.query_add) simt::copy_async<4>(b.query(turn.step_parity, 1), t, p.query_add, at, t < b.count_of(c));
    }
    if (r == 0 && simt::warp() == 0)
      ChunkDecays<chunk>::fetch(p, b.decay(turn.chunk_parity(), 0), b.decay(turn.chunk_parity(), 3), b.batch(),
                                b.first_of(c), b.count_of(c), b.state_head());
    simt::copy_commit();
  }

  // By warp 0: what the log decays of a chunk mean for its tokens.
  SIMT_DEVICE static void spread_decays(const Block& b, int parity) {
    using Decays = ChunkDecays<chunk>;
    typename Decays::Numbers live, to_out, to_state;
    const auto sums = Decays::sum_up(b.p, b.decay(parity, 0), b.decay(parity, 3), b.state_head(), live);
    const float last = simt::shuffle(sums[Decays::each - 1], 31);
    SIMT_UNROLL
    for (int k = 0; k < Decays::each; ++k) {
      const float start = simt::exp(sums[k]), end = simt::exp(last - sums[k]);
      to_out[k] = b.p.reverse ? end : start;
      to_state[k] = b.p.reverse ? start : end;
    }
    b.decay(parity, 0).store_vector(Decays::token(0), sums);
    b.decay(parity, 1).store_vector(Decays::token(0), to_out);
    b.decay(parity, 2).store_vector(Decays::token(0), to_state);
    if (simt::lane() != 0) return;
    b.whole().store(parity, simt::exp(last));
    b.total_decay().store(0, b.total_decay().load(0) + static_cast<double>(last));
  }

  // The features of what has come, in its place: rows, columns and values, one after another.
  SIMT_DEVICE static void map(const Block& b, const Turn& turn) {
    const Params& p = b.p;
    SIMT_NO_UNROLL
    for (int which = 0; which < 3; ++which) {
      const bool comes = which == 0 ? turn.brings_rows(b) && !p.states_only : turn.brings_columns(b);
      if (!comes || !(which == 0 ? p.map_rows : which == 1 ? p.map_columns : p.map_values)) continue;
      const int parity = which == 0 ? turn.rows_parity(b) : turn.columns_parity(b);
      make_features(b, turn,
                    which == 0   ? b.rows(parity)
                    : which == 1 ? b.columns(parity)
                                 : b.values(parity),
                    b.exchange(which % 2));
    }
  }

  SIMT_DEVICE static void make_features(const Block& b, const Turn& turn, simt::shared<E> to,
                                        simt::shared<float> exchange) {
    const MapParams& map = b.p.map;
    typename Features::Products y;
    Features::multiply(map, map.head(b.state_head(), b.p.state_heads), to, y);
    Features::exponentiate(map, y, exchange);
    simt::barrier();
    const int key_head = map.key_head(b.state_head(), b.p.state_heads);
    SIMT_UNROLL
    for (int r = 0; r < row_tiles; ++r) {
      SIMT_UNROLL
      for (int h = 0; h < 2; ++h) {
        const int row = Features::row_of(r, h);
        const float factor = Features::factor(map, exchange, row);
        const bool live = b.decay(turn.chunk_parity(), 3).load(row) != 0.0f;
        SIMT_UNROLL
        for (int n = 0; n < Features::own_tiles; ++n) {
          const auto w = Features::weights(map, key_head, n);
          simt::pack<E, 2> x;
          SIMT_UNROLL
          for (int k = 0; k < 2; ++k)
            x[k] = simt::from_float<E>(live ? y.at[r][n].get(2 * h + k) * factor * w[k] : 0.0f);
          to.store_vector(place<depth>(row, Features::feature_of(n, 0)), x);
        }
      }
    }
  }

  // x rounded, or what that takes from it.
  template <bool Rest>
  SIMT_DEVICE static E rounded(float x) {
    const E out = simt::from_float<E>(x);
    if constexpr (Rest) {
      return simt::from_float<E>(x - simt::to_float(out));
    } else {
      return out;
    }
  }
  SIMT_DEVICE static float absolute(float x) { return x < 0 ? -x : x; }

  // Scores of 16 rows and `part` columns, with decay and factors, to shared memory; what the normaliser needs of them.
  SIMT_DEVICE static void score(const Block& b, const Turn& turn) {
    const Params& p = b.p;
    const int chunk_parity = turn.chunk_parity(), step_parity = turn.step_parity;
    const int row_tile = simt::warp() / parts, first = simt::warp() % parts * part;
    const auto rows = b.rows(turn.rows_parity(b)), columns = b.columns(turn.columns_parity(b));
    // as load_matrix_rows and load_matrix_columns would have it, which would keep it from one chunk to the next
    const int lane = simt::opaque(simt::lane());
    const auto needed = [&](int column_tile) { return p.reverse ? column_tile >= row_tile : column_tile <= row_tile; };
    Sum sum[part_tiles];
    SIMT_UNROLL
    for (int n = 0; n < part_tiles; ++n) sum[n].fill(0.0f);
    SIMT_UNROLL
    for (int d = 0; d < depth_tiles; ++d) {
      A left;
      simt::load_matrix_rows(left, rows,
                             [&](int, int) { return place<depth>(row_tile * 16 + lane % 16, d * 16 + lane / 16 * 8); });
      if constexpr (part_tiles == 1) {
        if (needed(first / 16)) {
          B right;
          simt::load_matrix_columns(
              right, columns, [&](int, int) { return place<depth>(first + lane % 8, d * 16 + lane / 8 % 2 * 8); });
          simt::mma(sum[0], left, right);
        }
      } else {
        SIMT_UNROLL
        for (int n = 0; n < part_tiles; n += 2) {
          if (!needed(first / 16 + n / 2)) continue;
          B right[2];
          simt::load_matrix_columns(right[0], right[1], columns, [&](int, int) {
            return place<depth>(first + n * 8 + lane % 8 + lane / 16 * 8, d * 16 + lane / 8 % 2 * 8);
          });
          simt::mma(sum[n], left, right[0]);
          simt::mma(sum[n + 1], left, right[1]);
        }
      }
    }

    const auto c = b.decay(chunk_parity, 0);
    const auto scale = b.query(step_parity, 0), add = b.query(step_parity, 1);
    const int top = row_tile * 16 + simt::opaque(simt::lane()) / 4;
    const int row[2] = {top, top + 8};
    float row_c[2], row_scale[2] = {p.column_factor, p.column_factor}, row_add[2] = {0, 0};
    SIMT_UNROLL
    for (int h = 0; h < 2; ++h) {
      row_c[h] = c.load(row[h]);
      if (!p.reverse && p.query_scale) row_scale[h] *= scale.load(row[h]);
      if (!p.reverse && p.query_add) row_add[h] = p.column_factor * add.load(row[h]);
    }
    float total[2] = {0, 0}, most[2] = {0, 0};
    SIMT_UNROLL
    for (int n = 0; n < part_tiles; ++n) {
      if (!needed((first + n * 8) / 16)) continue;
      SIMT_UNROLL
      for (int side = 0; side < 2; ++side) {
        const int column = first + n * 8 + simt::opaque(simt::lane()) % 4 * 2 + side;
        const float column_c = c.load(column);
        float factor = 1, extra = 0;
        if (p.reverse && p.query_scale) factor = scale.load(column);
        if (p.reverse && p.query_add) extra = p.column_factor * add.load(column);
        SIMT_UNROLL
        for (int h = 0; h < 2; ++h) {
          const bool counts = p.reverse ? column >= row[h] : column <= row[h];
          float x = factor * row_scale[h] * sum[n].get(2 * h + side) + (extra + row_add[h]);
          if (p.decay != Decay::none) x *= simt::exp(p.reverse ? column_c - row_c[h] : row_c[h] - column_c);
          x = counts ? x : 0.0f;
          sum[n].set(2 * h + side, x);
          total[h] += x;
          most[h] = absolute(x) > most[h] ? absolute(x) : most[h];
        }
      }
    }
    float shrunk[2] = {1, 1};
    if constexpr (scaled) {
      SIMT_UNROLL
      for (int h = 0; h < 2; ++h) {
        for (int step = 1; step < 4; step *= 2) {
          const float other = simt::shuffle_xor(most[h], step);
          most[h] = other > most[h] ? other : most[h];
        }
        if (parts > 1 && simt::lane() % 4 == 0) b.exponent().store(simt::warp() % parts * chunk + row[h], most[h]);
      }
      if constexpr (parts > 1) {
        simt::barrier();
        SIMT_UNROLL
        for (int h = 0; h < 2; ++h) {
          SIMT_UNROLL
          for (int k = 0; k < parts; ++k) {
            const float other = b.exponent().load(k * chunk + row[h]);
            most[h] = other > most[h] ? other : most[h];
          }
        }
        simt::barrier();
      }
      SIMT_UNROLL
      for (int h = 0; h < 2; ++h) {
        const int e = shrink(most[h]);
        shrunk[h] = power_of_two(-e);
        if (simt::warp() % parts == 0 && simt::lane() % 4 == 0) b.exponent().store(row[h], power_of_two(e));
      }
    }
    SIMT_UNROLL
    for (int n = 0; n < part_tiles; ++n) {
      if (!needed((first + n * 8) / 16)) continue;
      SIMT_UNROLL
      for (int h = 0; h < 2; ++h) {
        simt::pack<E, 2> x;
        SIMT_UNROLL
        for (int side = 0; side < 2; ++side) x[side] = simt::from_float<E>(sum[n].get(2 * h + side) * shrunk[h]);
        const int at = place<chunk>(row[h], first + n * 8 + simt::opaque(simt::lane()) % 4 * 2);
        b.scores().store_vector(at, x);
        if (!p.exact_scores) continue;
        SIMT_UNROLL
        for (int side = 0; side < 2; ++side) x[side] = rounded<true>(sum[n].get(2 * h + side) * shrunk[h]);
        b.score_rests(turn.rows_parity(b)).store_vector(at, x);
      }
    }
    if (p.normalize) add_denominators(b, rows, total, row, chunk_parity);
  }

  // This part's share of sum P + rows . z, where a lane has the sums of P over its own columns of two rows.
  SIMT_DEVICE static void add_denominators(const Block& b, simt::shared<E> rows, float (&total)[2], const int (&row)[2],
                                           int chunk_parity) {
    const auto out = b.denominator();
    const int own_part = simt::warp() % parts;
    SIMT_UNROLL
    for (int h = 0; h < 2; ++h) {
      total[h] += simt::shuffle_xor(total[h], 1);
      total[h] += simt::shuffle_xor(total[h], 2);
      if (simt::lane() % 4 == 0) out.store(own_part * chunk + row[h], total[h]);
    }
    // two lanes a row, sixteen apart: eight lanes in a row share a piece of z, and rows of the tile do not share banks
    constexpr int share = depth / parts / 2;
    const int lane = simt::opaque(simt::lane()), mine = simt::warp() / parts * 16 + lane % 16;
    const int begin = own_part * (2 * share) + lane / 16 * share;
    float sum = 0;
    SIMT_UNROLL
    for (int d = 0; d < share; d += 8) {
      const auto x = rows.template load_vector<8>(place<depth>(mine, begin + d));
      SIMT_UNROLL
      for (int e = 0; e < 8; e += 4) {
        const auto y = b.z().template load_vector<4>(begin + d + e);
        SIMT_UNROLL
        for (int k = 0; k < 4; ++k) sum = simt::fma(simt::to_float(x[e + k]), y[k], sum);
      }
    }
    sum += simt::shuffle_xor(sum, 16);
    simt::warp_barrier();
    if (simt::lane() < 16) {
      const int at = own_part * chunk + mine;
      out.store(at, out.load(at) + b.decay(chunk_parity, 1).load(mine) * sum);
    }
  }

  // What token j's column counts in the state.
  SIMT_DEVICE static void weigh(const Block& b, const Turn& turn) {
    const Params& p = b.p;
    if (simt::thread() >= chunk) return;
    const int t = simt::thread();
    float w = p.column_factor * b.decay(turn.chunk_parity(), 2).load(t);
    if (p.reverse && p.query_scale) w *= b.query(turn.step_parity, 0).load(t);
    b.weight().store(t, w);
  }

  // out += rows . state
  SIMT_DEVICE static void add_state(const Block& b, const State& state, Out& out, simt::shared<E> rows, float shrunk) {
    const int here = simt::opaque(out.first);
    SIMT_UNROLL
    for (int d = 0; d < depth_tiles; ++d) {
      A left[row_share];
      SIMT_UNROLL
      for (int r = 0; r < row_share; ++r)
        simt::load_matrix_rows(left[r], rows,
                               [&](int i, int c) { return place<depth>(r * 16 + i + here, d * 16 + c); });
      add_state_tile<false>(state, out, left, d, shrunk);
      if (b.p.exact_state) add_state_tile<true>(state, out, left, d, shrunk);
    }
  }

  // The state rounded, or what rounding takes from it.
  template <bool Rest>
  SIMT_DEVICE static void add_state_tile(const State& state, Out& out, const A (&left)[row_share], int d,
                                         float shrunk) {
    SIMT_UNROLL
    for (int n = 0; n < own_tiles; ++n) {
      B right;
      SIMT_UNROLL
      for (int half = 0; half < 2; ++half) {
        simt::pack<E, 2> x;
        SIMT_UNROLL
        for (int k = 0; k < 2; ++k) x[k] = rounded<Rest>(state.at[n / 2][2 * d + half].get(n % 2 * 2 + k) * shrunk);
        right.set_pack(2 * half, x);
      }
      SIMT_UNROLL
      for (int r = 0; r < row_share; ++r) simt::mma(out.at[r][n], left[r], right);
    }
  }

  // out = factors . rows . state + what z adds.
  SIMT_DEVICE static void from_state(const Block& b, const State& state, Out& out, const Turn& turn) {
    const Params& p = b.p;
    const auto rows = b.rows(turn.rows_parity(b));
    float shrunk = 1, grown = 1;
    if constexpr (scaled) {
      float most = 0;
      SIMT_UNROLL
      for (int m = 0; m < state_tiles; ++m) {
        SIMT_UNROLL
        for (int n = 0; n < 2 * depth_tiles; ++n) {
          SIMT_UNROLL
          for (int i = 0; i < Sum::count; ++i) {
            const float x = absolute(state.at[m][n].get(i));
            most = x > most ? x : most;
          }
        }
      }
      const int e = shrink(simt::warp_max(most));
      shrunk = power_of_two(-e);
      grown = power_of_two(e);
    }
    SIMT_UNROLL
    for (int r = 0; r < row_share; ++r) {
      SIMT_UNROLL
      for (int n = 0; n < own_tiles; ++n) out.at[r][n].fill(0.0f);
    }
    add_state(b, state, out, rows, shrunk);
    SIMT_UNROLL
    for (int r = 0; r < row_share; ++r) {
      SIMT_UNROLL
      for (int h = 0; h < 2; ++h) {
        const int row = out.first + r * 16 + simt::opaque(simt::lane()) / 4 + 8 * h;
        const float start = b.decay(turn.chunk_parity(), 1).load(row);
        float factor = start * grown, of_z = start;
        if (!p.reverse && p.query_scale) factor *= b.query(turn.step_parity, 0).load(row);
        if (!p.reverse && p.value_sum) of_z *= p.query_add ? b.query(turn.step_parity, 1).load(row) : 0.0f;
        SIMT_UNROLL
        for (int n = 0; n < own_tiles; ++n) {
          SIMT_UNROLL
          for (int k = 0; k < 2; ++k) {
            float x = out.at[r][n].get(2 * h + k) * factor;
            if (p.value_sum)
              x += of_z * b.z().load(simt::warp() * own + n * 8 + simt::opaque(simt::lane()) % 4 * 2 + k);
            out.at[r][n].set(2 * h + k, x);
          }
        }
      }
    }
  }

  // out += P values.
  SIMT_DEVICE static void from_scores(const Block& b, Out& out, const Turn& turn) {
    const auto values = b.values(turn.columns_parity(b)), scores = b.scores();
    const int here = simt::opaque(0);
    if constexpr (scaled) scale_rows(b, out, true);
    SIMT_NO_UNROLL
    for (int c = 0; c < row_tiles; ++c) {
      B right[own_tiles];
      SIMT_UNROLL
      for (int n = 0; n < own_tiles; n += 2)
        simt::load_matrix_rows(right[n], right[n + 1], values, [&](int i, int k) {
          return place<tile>(c * 16 + i + here, simt::warp() * own + n * 8 + k);
        });
      SIMT_UNROLL
      for (int r = 0; r < row_share; ++r) {
        const int row_tile = out.first / 16 + r;
        if (b.p.reverse ? c < row_tile : c > row_tile) continue;
        A left;
        simt::load_matrix_rows(left, scores,
                               [&](int i, int k) { return place<chunk>(out.first + r * 16 + i + here, c * 16 + k); });
        SIMT_UNROLL
        for (int n = 0; n < own_tiles; ++n) simt::mma(out.at[r][n], left, right[n]);
        if (!b.p.exact_scores) continue;
        simt::load_matrix_rows(left, b.score_rests(turn.rows_parity(b)),
                               [&](int i, int k) { return place<chunk>(out.first + r * 16 + i + here, c * 16 + k); });
        SIMT_UNROLL
        for (int n = 0; n < own_tiles; ++n) simt::mma(out.at[r][n], left, right[n]);
      }
    }
    if constexpr (scaled) scale_rows(b, out, false);
  }

  // By the power of two that each row of the scores was divided by, or back.
  SIMT_DEVICE static void scale_rows(const Block& b, Out& out, bool down) {
    SIMT_UNROLL
    for (int r = 0; r < row_share; ++r) {
      SIMT_UNROLL
      for (int h = 0; h < 2; ++h) {
        const float grown = b.exponent().load(out.first + r * 16 + Sum::row(2 * h));
        const float factor = down ? power_of_two(-exponent_of(grown)) : grown;
        SIMT_UNROLL
        for (int n = 0; n < own_tiles; ++n) {
          SIMT_UNROLL
          for (int k = 0; k < 2; ++k) out.at[r][n].set(2 * h + k, out.at[r][n].get(2 * h + k) * factor);
        }
      }
    }
  }

  SIMT_DEVICE static bool is_weighted(const Params& p) {
    return scaled || p.decay != Decay::none || p.column_factor != 1.0f || p.query_scale;
  }

  // state += weighted values . columns for 16 tokens, the weighted values rounded, or what rounding takes from them.
  template <bool Rest>
  SIMT_DEVICE static void add_columns(const Block& b, State& state, simt::shared<E> values, simt::shared<E> columns,
                                      int t, float weights_shrunk) {
    const int here = simt::opaque(t);
    A left[state_tiles];
    SIMT_UNROLL
    for (int m = 0; m < state_tiles; ++m) {
      simt::load_matrix_columns(left[m], values,
                                [&](int r, int c) { return place<tile>(c + here, simt::warp() * own + m * 16 + r); });
    }
    if (is_weighted(b.p)) {
      SIMT_UNROLL
      for (int side = 0; side < 2; ++side) {
        const auto w = b.weight().template load_vector<2>(t + side * 8 + simt::lane() % 4 * 2);
        SIMT_UNROLL
        for (int m = 0; m < state_tiles; ++m) {
          SIMT_UNROLL
          for (int h = 0; h < 2; ++h) {
            const int i = side * 4 + h * 2;
            simt::pack<E, 2> x;
            SIMT_UNROLL
            for (int k = 0; k < 2; ++k)
              x[k] = rounded<Rest>(simt::to_float(left[m].get(i + k)) * (w[k] * weights_shrunk));
            left[m].set_pack(i, x);
          }
        }
      }
    }
    SIMT_UNROLL
    for (int n = 0; n < 2 * depth_tiles; n += 2) {
      B right[2];
      simt::load_matrix_rows(right[0], right[1], columns,
                             [&](int r, int c) { return place<depth>(r + here, n * 8 + c); });
      SIMT_UNROLL
      for (int m = 0; m < state_tiles; ++m) {
        simt::mma(state.at[m][n], left[m], right[0]);
        simt::mma(state.at[m][n + 1], left[m], right[1]);
      }
    }
  }

  SIMT_DEVICE static void update_state(const Block& b, State& state, const Turn& turn) {
    const Params& p = b.p;
    const auto values = b.values(turn.columns_parity(b)), columns = b.columns(turn.columns_parity(b));
    float weights_shrunk = 1, grown = 1;
    if constexpr (scaled) {
      float most = 0;
      SIMT_UNROLL
      for (int k = 0; k < chunk / 32; ++k) {
        const float x = absolute(b.weight().load(k * 32 + simt::lane()));
        most = x > most ? x : most;
      }
      int e = exponent_of(simt::warp_max(most)) + 1;
      e = e < -100 ? -100 : e > 100 ? 100 : e;
      weights_shrunk = power_of_two(-e);
      grown = power_of_two(e);
    }
    if (scaled || p.decay != Decay::none)
      multiply(state, (turn.opens(b) ? b.whole().load(turn.chunk_parity()) : 1.0f) * weights_shrunk);
    SIMT_NO_UNROLL
    for (int t = 0; t < chunk; t += 16) {
      add_columns<false>(b, state, values, columns, t, weights_shrunk);
      // without weights, nothing is rounded
      if (p.exact_state && is_weighted(p)) add_columns<true>(b, state, values, columns, t, weights_shrunk);
    }
    if constexpr (scaled) multiply(state, grown);
  }

  SIMT_DEVICE static void multiply(State& state, float factor) {
    SIMT_UNROLL
    for (int m = 0; m < state_tiles; ++m) {
      SIMT_UNROLL
      for (int n = 0; n < 2 * depth_tiles; ++n) {
        SIMT_UNROLL
        for (int i = 0; i < Sum::count; ++i) state.at[m][n].set(i, state.at[m][n].get(i) * factor);
      }
    }
  }

  SIMT_DEVICE static void update_z(const Block& b, const Turn& turn) {
    const Params& p = b.p;
    const float whole = turn.opens(b) ? b.whole().load(turn.chunk_parity()) : 1.0f;
    if (p.key_sum) {
      const auto columns = b.columns(turn.columns_parity(b));
      SIMT_NO_UNROLL
      for (int d = simt::thread(); d < depth; d += max_threads) {
        float sum = 0;
        for (int t = 0; t < chunk; ++t)
          sum = simt::fma(b.weight().load(t), simt::to_float(columns.load(place<depth>(t, d))), sum);
        b.z().store(d, simt::fma(whole, b.z().load(d), sum));
      }
    } else if (p.value_sum) {
      simt::warp_barrier();  // from_state has read it
      if (simt::lane() < own) {
        const auto values = b.values(turn.columns_parity(b));
        const int d = simt::warp() * own + simt::lane();
        float sum = 0;
        for (int t = 0; t < chunk; ++t) {
          float w = p.column_factor * b.decay(turn.chunk_parity(), 2).load(t);
          if (p.reverse) w = p.query_add ? w * b.query(turn.step_parity, 1).load(t) : 0.0f;
          sum = simt::fma(w, simt::to_float(values.load(place<tile>(t, d))), sum);
        }
        b.z().store(d, simt::fma(whole, b.z().load(d), sum));
      }
    }
  }

  // What the state has given to each row, times the same row of `with`.
  SIMT_DEVICE static void dot_rows(const Block& b, const Out& out, const Turn& turn) {
    const Params& p = b.p;
    const int c = turn.chunk_of(b), r = b.row_of_group(turn.head);
    const Index first = b.first_of(c);
    const auto with = p.with.data.template as<E>();
    const int with_head = b.head(p.with, r);
    SIMT_UNROLL
    for (int rt = 0; rt < row_share; ++rt) {
      SIMT_UNROLL
      for (int h = 0; h < 2; ++h) {
        const int row = out.first + rt * 16 + simt::opaque(simt::lane()) / 4 + 8 * h;
        float dot = 0;
        if (b.decay(turn.chunk_parity(), 3).load(row) != 0.0f) {
          const Index base = p.with.at(b.batch(), first + row, with_head);
          SIMT_UNROLL
          for (int n = 0; n < own_tiles; ++n) {
            SIMT_UNROLL
            for (int k = 0; k < 2; ++k) {
              const int at =
                  b.tile_number() * tile + simt::warp() * own + n * 8 + simt::opaque(simt::lane()) % 4 * 2 + k;
              if (at < p.width)
                dot = simt::fma(out.at[rt][n].get(2 * h + k), simt::to_float(with.load(base + at * p.with.stride[3])),
                                dot);
            }
          }
        }
        dot += simt::shuffle_xor(dot, 1);
        dot += simt::shuffle_xor(dot, 2);
        if (simt::lane() % 4 == 0) b.dots().store(simt::warp() * chunk + row, dot);
      }
    }
  }

  SIMT_DEVICE static void store_dots(const Block& b, const Turn& turn) {
    const Params& p = b.p;
    const int c = turn.chunk_of(b);
    simt::barrier();
    if (simt::thread() < b.count_of(c)) {
      float sum = 0;
      for (int w = 0; w < warps; ++w) sum += b.dots().load(w * chunk + simt::thread());
      p.dots.store(row_of(p.segments, p.out.heads, b.tile_number() * p.segments.batch + b.batch(),
                          b.out_head(turn.head), b.first_of(c) + simt::thread()),
                   p.out_factor * sum);
    }
  }

  // Divides, multiplies and stores a chunk's rows of out.
  SIMT_DEVICE static void finish(const Block& b, Out& out, const Turn& turn) {
    const Params& p = b.p;
    const int c = turn.chunk_of(b), count = b.count_of(c), head = b.out_head(turn.head);
    const Index first = b.first_of(c);
    const int column = b.tile_number() * tile + simt::warp() * own;
    SIMT_UNROLL
    for (int rt = 0; rt < row_share; ++rt) {
      SIMT_UNROLL
      for (int h = 0; h < 2; ++h) {
        const int row = out.first + rt * 16 + simt::opaque(simt::lane()) / 4 + 8 * h;
        float factor = p.out_factor;
        const bool live = b.decay(turn.chunk_parity(), 3).load(row) != 0.0f;
        if (p.normalize) {
          float sum = 0;
          SIMT_UNROLL
          for (int k = 0; k < parts; ++k) sum += b.denominator().load(k * chunk + row);
          const float d = live ? p.out_factor * sum + p.eps : 1.0f;
          factor /= d;
          if (b.tile_number() == 0 && simt::warp() == 0 && simt::lane() % 4 == 0 && row < count)
            p.denominator.store(row_of(p.segments, p.query_heads, b.batch(), b.query_head(turn.head), first + row), d);
        }
        SIMT_UNROLL
        for (int n = 0; n < own_tiles; ++n) {
          SIMT_UNROLL
          for (int k = 0; k < 2; ++k) out.at[rt][n].set(2 * h + k, live ? out.at[rt][n].get(2 * h + k) * factor : 0.0f);
        }
      }
    }
    const Index base = p.out.at(b.batch(), first, head);
    if (p.out.dtype == Dtype::float32) {
      store_floats(b, out, base, count, column);
      return;
    }
    // p.out, and after it p.rest
    SIMT_NO_UNROLL
    for (int pass = 0; pass < (p.rest.data ? 2 : 1); ++pass) {
      if (pass == 1) keep_rest(out);
      store_halves(pass == 0 ? p.out : p.rest, out, pass == 0 ? base : p.rest.at(b.batch(), first, head), count,
                   column);
    }
  }

  SIMT_DEVICE static void keep_rest(Out& out) {
    SIMT_UNROLL
    for (int r = 0; r < row_share; ++r) {
      SIMT_UNROLL
      for (int n = 0; n < own_tiles; ++n) {
        SIMT_UNROLL
        for (int i = 0; i < Sum::count; ++i) {
          const float x = out.at[r][n].get(i);
          out.at[r][n].set(i, x - simt::to_float(simt::from_float<E>(x)));
        }
      }
    }
  }

  SIMT_DEVICE static void store_floats(const Block& b, const Out& out, Index base, int count, int column) {
    const Output& to = b.p.out;
    const auto data = to.data.template as<float>();
    SIMT_UNROLL
    for (int rt = 0; rt < row_share; ++rt) {
      SIMT_UNROLL
      for (int n = 0; n < own_tiles; ++n) {
        SIMT_UNROLL
        for (int h = 0; h < 2; ++h) {
          const int row = out.first + rt * 16 + Sum::row(2 * h), at = column + n * 8 + Sum::col(0);
          if (row >= count) continue;
          SIMT_UNROLL
          for (int k = 0; k < 2; ++k)
            if (at + k < b.p.width)
              data.store(base + row * to.stride[1] + (at + k) * to.stride[3], out.at[rt][n].get(2 * h + k));
        }
      }
    }
  }

  // The four lanes that hold a row's eight columns in pairs exchange them, so that each stores 16 bytes.
  SIMT_DEVICE static void store_halves(const Output& to, const Out& out, Index base, int count, int column) {
    const auto data = to.data.template as<E>();
    const int q = simt::opaque(simt::lane()) % 4;
    SIMT_UNROLL
    for (int rt = 0; rt < row_share; ++rt) {
      SIMT_UNROLL
      for (int group = 0; group < own_tiles / 2; ++group) {
        // items 0..3: eight columns of a row each; lane q ends with item q
        const auto half_of = [&](int item) { return own_tiles == 2 ? item / 2 : group; };
        const auto tile_of = [&](int item) { return own_tiles == 2 ? item % 2 : item; };
        unsigned word[4];
        SIMT_UNROLL
        for (int item = 0; item < 4; ++item) {
          simt::pack<E, 2> x;
          SIMT_UNROLL
          for (int k = 0; k < 2; ++k) x[k] = simt::from_float<E>(out.at[rt][tile_of(item)].get(2 * half_of(item) + k));
          word[item] = simt::bits_as<unsigned>(x);
        }
        SIMT_UNROLL
        for (int item = 0; item < 4; item += 2) {
          const unsigned other = simt::shuffle_xor(q % 2 ? word[item] : word[item + 1], 1);
          word[item] = q % 2 ? other : word[item];
          word[item + 1] = q % 2 ? word[item + 1] : other;
        }
        SIMT_UNROLL
        for (int item = 0; item < 2; ++item) {
          const unsigned other = simt::shuffle_xor(q / 2 ? word[item] : word[item + 2], 2);
          word[item] = q / 2 ? other : word[item];
          word[item + 2] = q / 2 ? word[item + 2] : other;
        }
        const int row = out.first + rt * 16 + simt::lane() / 4 + 8 * half_of(q), at = column + 8 * tile_of(q);
        const Index i = base + row * to.stride[1] + at * to.stride[3];
        if (row >= count || at >= to.width) continue;
        simt::pack<E, 8> x;
        SIMT_UNROLL
        for (int item = 0; item < 4; ++item) {
          const auto pair = simt::bits_as<simt::pack<E, 2>>(word[item]);
          x[2 * item] = pair[0];
          x[2 * item + 1] = pair[1];
        }
        if (to.pieces) {
          data.store_vector(i, x);
        } else {
          SIMT_UNROLL
          for (int e = 0; e < 8; ++e)
            if (at + e < to.width) data.store(i + e * to.stride[3], x[e]);
        }
      }
    }
  }

  // Calls f(accumulator, element of it, depth, column of the tile) for a lane's part of the state that exists.
  template <class F>
  SIMT_DEVICE static void each_of_state(const Block& b, const F& f) {
    SIMT_UNROLL
    for (int m = 0; m < state_tiles; ++m) {
      SIMT_UNROLL
      for (int n = 0; n < 2 * depth_tiles; ++n) {
        if (n % 8 == 0) simt::warp_barrier();  // that no more loads are in flight than registers wait for them
        SIMT_UNROLL
        for (int i = 0; i < Sum::count; ++i) {
          const int d = n * 8 + Sum::col(i);
          const int column = b.tile_number() * tile + simt::warp() * own + m * 16 + Sum::row(i);
          if (d < b.p.depth && column < b.p.width) f(m, n, i, d, column);
        }
      }
    }
  }

  SIMT_DEVICE static void load_state(const Block& b, State& state) {
    const auto& from = b.p.initial_state;
    SIMT_UNROLL
    for (int m = 0; m < state_tiles; ++m) {
      SIMT_UNROLL
      for (int n = 0; n < 2 * depth_tiles; ++n) state.at[m][n].fill(0.0f);
    }
    if (from.data) {
      const Index base = from.at(b.state_index(), b.state_head());
      each_of_state(b, [&](int m, int n, int i, int d, int column) {
        state.at[m][n].set(i, from.data.load(base + d * from.stride[2] + column * from.stride[3]));
      });
    }
    if (!b.p.key_sum && !b.p.value_sum) return;
    const auto& z = b.p.initial_z;
    const int first = b.p.key_sum ? 0 : b.tile_number() * tile, size = b.p.key_sum ? b.p.depth : b.p.width;
    for (int d = simt::thread(); d < (b.p.key_sum ? depth : tile); d += max_threads)
      b.z().store(d, z.data && first + d < size
                         ? z.data.load(z.at(b.state_index(), b.state_head()) + (first + d) * z.stride[2])
                         : 0.0f);
  }

  SIMT_DEVICE static void store_state(const Block& b, const State& state) {
    const Params& p = b.p;
    if (b.row_block() != 0) return;
    if (p.final_state.data) {
      const Index base = p.final_state.at(b.state_index(), b.state_head());
      each_of_state(b, [&](int m, int n, int i, int d, int column) {
        p.final_state.data.store(base + d * p.final_state.stride[2] + column * p.final_state.stride[3],
                                 state.at[m][n].get(i));
      });
    }
    if (p.final_z.data) {
      simt::barrier();
      const Index base = p.final_z.at(b.state_index(), b.state_head());
      const int first = p.key_sum ? 0 : b.tile_number() * tile;
      int size = p.key_sum ? p.depth : (p.width - first < tile ? p.width - first : tile);
      if (p.key_sum && b.tile_number() != 0) size = 0;
      for (int d = simt::thread(); d < size; d += max_threads)
        p.final_z.data.store(base + (first + d) * p.final_z.stride[2], b.z().load(d));
    }
  }

  SIMT_DEVICE static void run(const Params& p) {
    const Place where = place_of(p);
    const Segment segment = segment_of(p.segments, where.slot);
    if (segment.poisoned) {
      poison(p, where, segment, tile);
      return;
    }
    if (segment.sequence < 0) return;
    const int rows_left = p.row_heads - where.row_block * p.rows_per_block;
    const int rows_here = rows_left < p.rows_per_block ? rows_left : p.rows_per_block;
    const Block b{p};
    b.remember(where, segment, static_cast<int>((segment.count + chunk - 1) / chunk),
               b.columns_vary() ? p.column_heads
               : p.states_only  ? 1
                                : rows_here);
    simt::barrier();
    State state;
    load_state(b, state);
    Turn turn;
    if (b.chunks() > 0) {
      if (p.exact_scores) prefetch_rows(b, turn);
      prefetch(b, turn);
    }
    SIMT_NO_UNROLL
    while (turn.number < b.chunks()) {
      simt::copy_wait<0>();
      if (turn.head == 0 && simt::warp() == 0) spread_decays(b, turn.chunk_parity());
      simt::barrier();
      const Turn next = turn.next(b);
      if (next.number < b.chunks()) prefetch(b, next);
      weigh(b, turn);
      if constexpr (maps) {
        if (p.map.fragments) {
          move_waiting(b, state, true);
          map(b, turn);
          move_waiting(b, state, false);
          simt::barrier();
        }
      }
      if (!p.states_only) score(b, turn);
      simt::barrier();
      if (!p.states_only) {
        Out out;
        SIMT_NO_UNROLL
        for (out.first = 0; out.first < chunk; out.first += shape.rows) {
          if (turn.opens(b)) {
            from_state(b, state, out, turn);
            if (p.dots) dot_rows(b, out, turn);
          } else {
            move_parked(b, out, false);
          }
          from_scores(b, out, turn);
          if (b.columns_vary() && !turn.last(b)) {
            move_parked(b, out, true);
          } else {
            finish(b, out, turn);
          }
        }
        if (p.dots && turn.opens(b)) store_dots(b, turn);
        if (p.exact_scores) {
          simt::barrier();
          if (const Turn next = turn.next(b); next.number < b.chunks()) prefetch_rows(b, next);
          simt::copy_commit();
        }
      }
      if (b.columns_vary() || turn.last(b)) {
        update_state(b, state, turn);
        update_z(b, turn);
      }
      turn = next;
    }
    store_state(b, state);
    if (p.segment_decay && b.tile_number() == 0 && b.row_block() == 0 && simt::thread() == 0)
      p.segment_decay.store(b.slot() * p.state_heads + b.state_head(), b.total_decay().load(0));
  }

  // Accumulators of the state that make room for features.
  SIMT_DEVICE static void move_waiting(const Block& b, State& state, bool away) {
    const auto place = b.waiting_room();
    SIMT_UNROLL
    for (int n = 0; n < waiting; ++n) {
      SIMT_UNROLL
      for (int i = 0; i < Sum::count; ++i) {
        const int at = (n * Sum::count + i) * max_threads + simt::thread();
        if (away) {
          place.store(at, state.at[0][n].get(i));
        } else {
          state.at[0][n].set(i, place.load(at));
        }
      }
    }
  }

  // Accumulators that wait for the next head's turn in shared memory, where registers would not do.
  SIMT_DEVICE static void move_parked(const Block& b, Out& out, bool away) {
    const auto place = b.parked();
    SIMT_UNROLL
    for (int r = 0; r < row_share; ++r) {
      SIMT_UNROLL
      for (int n = 0; n < own_tiles; ++n) {
        SIMT_UNROLL
        for (int i = 0; i < Sum::count; ++i) {
          const int at = (((out.first / 16 + r) * own_tiles + n) * Sum::count + i) * max_threads + simt::thread();
          if (away) {
            place.store(at, out.at[r][n].get(i));
          } else {
            out.at[r][n].set(i, place.load(at));
          }
        }
      }
    }
  }
};

template <class E, int Shape, class Queue>
void enqueue_scan_mma_as(const DevicePlan::Scan& scan, const ScanParams<float>& p, Queue& queue) {
  queue.template launch<ScanMma<E, Shape>>({scan.blocks, scan.threads, scan.shared_bytes}, p);
}

template <class E, class Queue>
void enqueue_scan_mma(int shape, const DevicePlan::Scan& scan, const ScanParams<float>& p, Queue& queue) {
  switch (shape) {
    case 0: enqueue_scan_mma_as<E, 0>(scan, p, queue); break;
    case 1: enqueue_scan_mma_as<E, 1>(scan, p, queue); break;
    default: enqueue_scan_mma_as<E, 2>(scan, p, queue); break;
  }
}

}  // namespace freqrank::linear_attention::device
