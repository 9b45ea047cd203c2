#pragma once
// The scan (params.h) on ordinary FMA units, for what tensor cores do not take: float32, float64, mixed dtypes, any
// depth. A block keeps its tile of the state in shared memory and goes through the tokens chunk by chunk:
//
//   scores = rows columns^T          rows and columns come in slices of the depth,
//   out    = rows state              the two products share what they read of rows
//   out   += decayed scores values
//   state  = decayed state + columns^T values
//
// A thread has 4 rows of a product and 4 columns of scores or 16 bytes of a row of `out` and `state`. The lanes of a
// warp lie 8 along columns and 4 along rows, so that 8 lanes read 128 bytes in a row, or all the same 16.

#include "linear_attention/device/fma_layout.h"
#include "linear_attention/device/params.h"
#include "linear_attention/device/pieces.h"

namespace freqrank::linear_attention::device {

template <class A>
struct ScanFma {
  static constexpr const char* name = sizeof(A) == 8 ? "linear_attention_scan_double" : "linear_attention_scan_fma";
  static constexpr int max_threads = kFmaThreads, min_blocks = sizeof(A) == 8 ? 1 : 2;
  struct Params {
    ScanParams<A> scan;
    FmaLayout layout;
  };

  static constexpr int V = 16 / sizeof(A);  // elements of a piece
  static constexpr int chunk = kFmaChunk, pitch = fma_pitch(sizeof(A) == 8);
  static constexpr int parts = kFmaThreads / chunk;  // threads that sum over a row together
  using Piece = simt::pack<A, V>;

  // The tokens [first, first + count) of a chunk.
  struct Chunk {
    Index batch, first;
    int count;
    // Rows after the last one are 0, so that sums over tokens may end at an even number.
    SIMT_DEVICE int even() const { return (count + 1) / 2 * 2; }
  };

  // Where a thread stands in products that have the chunk's rows: rows 4 * row on, columns `column` + 16 m of scores,
  // piece `column` of `out`.
  struct Lane {
    int row, column;
    int first_block, last_block;  // of 16 columns, those that the causal triangle leaves this warp
    bool in_tile;
    // Made anew in each product: kept from one to the next it would cost registers.
    SIMT_DEVICE Lane(bool reverse, int tile) {
      const int thread = simt::opaque(simt::thread()), lane = thread % simt::warp_size, warp = thread / simt::warp_size;
      row = lane / 8 + 4 * (warp / 2);
      column = lane % 8 + 8 * (warp % 2);
      first_block = reverse ? warp / 2 : 0;
      last_block = reverse ? 3 : warp / 2;
      in_tile = column * V < tile;
    }
  };

  struct Shared {
    simt::shared<A> rows, scores;  // the same memory; scores transposed: [column's token, row's token]
    simt::shared<A> columns, values, state, z;
    simt::shared<double> log_decay;  // sums over the chunk's tokens up to each
    simt::shared<int> live;          // 0: masked, or past the segment's end
    // What the state's part of out is multiplied by, and what is added to the state; 0 at masked tokens.
    simt::shared<A> row_factor, column_factor;
    simt::shared<A> scale, add;  // of the query's token; 0 where it is masked
    simt::shared<A> partial;
    SIMT_DEVICE explicit Shared(const FmaLayout& l) {
      rows = simt::shared_array<A>(l.rows_at, chunk * pitch);
      scores = simt::shared_array<A>(l.rows_at, chunk * pitch);
      columns = simt::shared_array<A>(l.columns_at, chunk * pitch);
      values = simt::shared_array<A>(l.values_at, chunk * l.tile);
      state = simt::shared_array<A>(l.state_at, l.depth * l.tile);
      z = simt::shared_array<A>(l.z_at, l.depth > l.tile ? l.depth : l.tile);
      log_decay = simt::shared_array<double>(l.log_decay_at, chunk);
      live = simt::shared_array<int>(l.live_at, chunk);
      row_factor = simt::shared_array<A>(l.row_factor_at, chunk);
      column_factor = simt::shared_array<A>(l.column_factor_at, chunk);
      scale = simt::shared_array<A>(l.scale_at, chunk);
      add = simt::shared_array<A>(l.add_at, chunk);
      partial = simt::shared_array<A>(l.partial_at, (parts + 2) * chunk);
    }
  };

  // Of the depth in a slice, a multiple of 16.
  SIMT_DEVICE static int size_of(const FmaLayout& l, int slice) {
    const int left = l.depth - slice * kFmaSlice;
    return left < kFmaSlice ? left : kFmaSlice;
  }

  SIMT_DEVICE static void run(const Params& params) {
    const ScanParams<A>& p = params.scan;
    const FmaLayout& l = params.layout;
    const Place place = place_of(p);
    const Segment segment = segment_of(p.segments, place.slot);
    if (segment.poisoned) {
      poison(p, place, segment, l.tile);
      return;
    }
    if (segment.sequence < 0) return;
    const Shared s(l);
    const int from = place.tile * l.tile;  // this tile's first column
    const Index n = p.by_slot ? place.slot : segment.sequence;
    load_state(p, l, s, n, place.state_head, from);

    const int first_row = place.row_block * p.rows_per_block;
    const int rows_left = p.row_heads - first_row;
    const int row_heads = p.states_only ? 1 : rows_left < p.rows_per_block ? rows_left : p.rows_per_block;
    const int rounds = p.column_heads > 1 ? p.column_heads : row_heads;
    const int query_head = place.state_head * p.query_heads / p.state_heads + (p.reverse ? 0 : first_row);
    const int chunks = static_cast<int>((segment.count + chunk - 1) / chunk);
    double total = 0;
    SIMT_NO_UNROLL
    for (int c = 0; c < chunks; ++c) {
      const Index start = Index{chunk} * (p.reverse ? chunks - 1 - c : c);
      const Index left = segment.count - start;
      const Chunk at{segment.batch, segment.first + start, static_cast<int>(left < chunk ? left : chunk)};
      if (simt::warp() == 0) total += make_factors(p, s, at, place.state_head);
      A out[4][V];
      SIMT_NO_UNROLL
      for (int round = 0; round < rounds; ++round) {
        // Either the rows have several heads or the columns and values do.
        const int row = p.column_heads > 1 ? 0 : first_row + round, column = p.column_heads > 1 ? round : 0;
        const bool first = round == 0, last = round + 1 == rounds;
        const bool new_values = first || p.column_heads > 1, new_rows = first || p.column_heads == 1;
        make_query_factors(p, s, at, query_head + round);
        if (new_values) {
          load_tile(p, p.values, at, p.values.head(place.state_head, p.state_heads, column), from, l.tile, s.values,
                    l.tile);
        }
        const int column_head = p.columns.head(place.state_head, p.state_heads, column);
        int resident = new_values ? -1 : l.slices - 1;  // the slice that `columns` holds
        if (!p.states_only) {
          A scores[4][4] = {};
          if (new_rows) {
            SIMT_UNROLL
            for (int a = 0; a < 4; ++a) {
              SIMT_UNROLL
              for (int v = 0; v < V; ++v) out[a][v] = 0;
            }
          }
          A row_z = 0;
          SIMT_NO_UNROLL
          for (int slice = 0; slice < l.slices; ++slice) {
            const int begin = slice * kFmaSlice, size = size_of(l, slice);
            if (slice > 0) simt::barrier();
            load_tile(p, p.rows, at, p.rows.head(place.state_head, p.state_heads, row), begin, size, s.rows, pitch);
            if (resident != slice) load_tile(p, p.columns, at, column_head, begin, size, s.columns, pitch);
            resident = slice;
            simt::barrier();
            multiply_rows(p, l, s, slice, new_rows, scores, out);
            if (p.normalize) row_z += rows_times_z(l, s, slice);
          }
          simt::barrier();
          store_scores(p, l, s, scores);
          simt::barrier();
          if (p.normalize) sum_rows(s, row_z);
          if (new_rows) {
            finish_state_part(p, l, s, out);
            if (p.dots) dot_rows(p, l, s, at, place, row, from, out);
          }
          add_scores_times_values(p, l, s, at, out);
          if (p.normalize) simt::barrier();
          if (p.column_heads == 1 || last) {
            write_out(p, l, s, at, place, row, query_head + round, from, out);
          }
        }
        if (p.column_heads > 1 || last) {
          simt::barrier();
          update_state(p, l, s, at, column_head, resident, first || p.column_heads == 1);
        }
        simt::barrier();
      }
    }
    if (place.row_block == 0) store_state(p, l, s, n, place, from);
    if (p.segment_decay && place.tile == 0 && place.row_block == 0 && simt::thread() == 0) {
      p.segment_decay.store(place.slot * p.state_heads + place.state_head, total);
    }
  }

  // --- the state ---

  // f(row, column) for all of a block's state; neighbouring lanes have 8 numbers that lie together in memory `like`.
  template <class T, class F>
  SIMT_DEVICE static void for_state(const States<T>& like, const FmaLayout& l, const F& f) {
    const bool down = like.stride[2] == 1 && like.stride[3] != 1;
    for (int e = simt::thread(); e < l.depth * l.tile; e += simt::threads()) {
      if (down) {
        f(e % 8 + e / (8 * l.tile) * 8, e / 8 % l.tile);
      } else {
        f(e / l.tile, e % l.tile);
      }
    }
  }

  SIMT_DEVICE static void load_state(const ScanParams<A>& p, const FmaLayout& l, const Shared& s, Index n, int head,
                                     int from) {
    const auto& x = p.initial_state;
    for_state(x, l, [&](int d, int c) {
      const bool inside = x.data && d < p.depth && from + c < p.width;
      s.state.store(d * l.tile + c,
                    inside ? x.data.load(x.at(n, head) + d * x.stride[2] + (from + c) * x.stride[3]) : A(0));
    });
    const auto& z = p.initial_z;
    const int first = p.key_sum ? 0 : from, end = p.key_sum ? p.depth : p.width;
    for (int i = simt::thread(); i < (p.key_sum ? l.depth : l.tile); i += simt::threads()) {
      const bool inside = z.data && first + i < end;
      s.z.store(i, inside ? z.data.load(z.at(n, head) + (first + i) * z.stride[2]) : A(0));
    }
  }

  SIMT_DEVICE static void store_state(const ScanParams<A>& p, const FmaLayout& l, const Shared& s, Index n,
                                      const Place& place, int from) {
    simt::barrier();
    const auto& x = p.final_state;
    if (x.data) {
      for_state(x, l, [&](int d, int c) {
        if (d >= p.depth || from + c >= p.width) return;
        x.data.store(x.at(n, place.state_head) + d * x.stride[2] + (from + c) * x.stride[3],
                     s.state.load(d * l.tile + c));
      });
    }
    const auto& z = p.final_z;
    if (z.data && (place.tile == 0 || !p.key_sum)) {
      const int first = p.key_sum ? 0 : from, end = p.key_sum ? p.depth : p.width;
      for (int i = simt::thread(); i < (p.key_sum ? l.depth : l.tile); i += simt::threads()) {
        if (first + i < end) z.data.store(z.at(n, place.state_head) + (first + i) * z.stride[2], s.z.load(i));
      }
    }
  }

  // Adds the chunk's columns^T values with their factors to the state, which `decays` before that; z alike. `resident`
  // is the slice of the columns that is in shared memory, -1: none. The caller has barriers before and after.
  SIMT_DEVICE static void update_state(const ScanParams<A>& p, const FmaLayout& l, const Shared& s, const Chunk& at,
                                       int column_head, int resident, bool decays) {
    const A whole = decays ? simt::exp(static_cast<A>(s.log_decay.load(chunk - 1))) : A(1);
    if (p.value_sum) {
      for (int e = simt::thread(); e < l.tile; e += simt::threads()) {
        A sum = 0;
        for (int j = 0; j < at.count; ++j) {
          const A weight = s.column_factor.load(j) * (p.reverse ? s.add.load(j) : A(1));
          sum = simt::fma(weight, s.values.load(j * l.tile + e), sum);
        }
        s.z.store(e, simt::fma(whole, s.z.load(e), p.column_factor * sum));
      }
      simt::barrier();
    }
    for (int e = simt::thread() * V; e < chunk * l.tile; e += kFmaThreads * V) {
      const int j = e / l.tile;
      const A weight = p.column_factor * s.column_factor.load(j) * (p.reverse ? s.scale.load(j) : A(1));
      Piece x = s.values.template load_vector<V>(e);
      SIMT_UNROLL
      for (int v = 0; v < V; ++v) x[v] *= weight;
      s.values.template store_vector<V>(e, x);
    }
    // 8 lanes along the tile, which has 8 pieces or 16, and the rest of the threads down the depth, 4 rows each.
    const int across = l.tile / (8 * V);
    const int thread = simt::opaque(simt::thread()), lane = thread % simt::warp_size, warp = thread / simt::warp_size;
    const int column = (lane % 8 + 8 * (warp % across)) * V;
    const int first = 4 * (lane / 8 + 4 * (warp / across)), step = kFmaThreads / (2 * across);
    SIMT_NO_UNROLL
    for (int i = 0; i < l.slices; ++i) {
      const int slice = l.slices - 1 - i, begin = slice * kFmaSlice, size = size_of(l, slice);
      if (slice != resident) {
        if (i > 0) simt::barrier();
        load_tile(p, p.columns, at, column_head, begin, size, s.columns, pitch);
      }
      simt::barrier();
      for (int d = first; d < size; d += step) {
        const int to = (begin + d) * l.tile + column;
        A sum[4][V];
        SIMT_UNROLL
        for (int a = 0; a < 4; ++a) {
          const Piece old = s.state.template load_vector<V>(to + a * l.tile);
          SIMT_UNROLL
          for (int v = 0; v < V; ++v) sum[a][v] = whole * old[v];
        }
        add_outer(s.columns + d, pitch, s.values + column, l.tile, 0, at.even(), sum);
        SIMT_UNROLL
        for (int a = 0; a < 4; ++a) {
          Piece x;
          SIMT_UNROLL
          for (int v = 0; v < V; ++v) x[v] = sum[a][v];
          s.state.template store_vector<V>(to + a * l.tile, x);
        }
      }
      if (p.key_sum) {
        for (int d = simt::thread(); d < size; d += simt::threads()) {
          A sum = 0;
          for (int j = 0; j < at.count; ++j) {
            sum = simt::fma(s.column_factor.load(j), s.columns.load(j * pitch + d), sum);
          }
          const int z = begin + d;
          s.z.store(z, simt::fma(whole, s.z.load(z), p.column_factor * sum));
        }
      }
    }
  }

  // --- factors of the tokens ---

  // By one warp, two tokens a lane. Returns the sum of the chunk's log decay.
  SIMT_DEVICE static double make_factors(const ScanParams<A>& p, const Shared& s, const Chunk& at, int state_head) {
    double sum[2];
    bool live[2];
    SIMT_UNROLL
    for (int h = 0; h < 2; ++h) {
      const int t = 2 * simt::lane() + h;
      live[h] = t < at.count && is_live(p, at.batch, at.first + t);
      sum[h] = live[h] ? static_cast<double>(log_decay_of(p, at.batch, at.first + t, state_head)) : 0;
    }
    sum[1] += sum[0];
    double upto = sum[1];
    SIMT_UNROLL
    for (int step = 1; step < simt::warp_size; step *= 2) {
      const double other = simt::shuffle_up(upto, step);
      if (simt::lane() >= step) upto += other;
    }
    const double total = simt::shuffle(upto, simt::warp_size - 1);
    const double other = simt::shuffle_up(upto, 1), before = simt::lane() == 0 ? 0 : other;
    simt::pack<double, 2> here;
    simt::pack<int, 2> is_here;
    simt::pack<A, 2> from_start, to_end;
    SIMT_UNROLL
    for (int h = 0; h < 2; ++h) {
      here[h] = before + sum[h];
      is_here[h] = live[h] ? 1 : 0;
      from_start[h] = live[h] ? simt::exp(static_cast<A>(here[h])) : A(0);
      to_end[h] = live[h] ? simt::exp(static_cast<A>(total - here[h])) : A(0);
    }
    const int t = 2 * simt::lane();
    s.log_decay.template store_vector<2>(t, here);
    s.live.template store_vector<2>(t, is_here);
    s.row_factor.template store_vector<2>(t, p.reverse ? to_end : from_start);
    s.column_factor.template store_vector<2>(t, p.reverse ? from_start : to_end);
    return total;
  }

  SIMT_DEVICE static void make_query_factors(const ScanParams<A>& p, const Shared& s, const Chunk& at, int query_head) {
    const int t = simt::thread();
    if (t >= chunk) return;
    const bool live = t < at.count && is_live(p, at.batch, at.first + t);
    const Index i = row_of(p.segments, p.query_heads, at.batch, query_head, at.first + t);
    s.scale.store(t, !live ? A(0) : p.query_scale ? p.query_scale.load(i) : A(1));
    s.add.store(t, live && p.query_add ? p.query_add.load(i) : A(0));
  }

  // --- tiles ---

  // Columns [from, from + columns) of a chunk's rows; 0 at masked tokens, which are not read, and beyond the end.
  SIMT_DEVICE static void load_tile(const ScanParams<A>& p, const Matrix& m, const Chunk& at, int head, int from,
                                    int columns, simt::shared<A> to, int to_pitch) {
    constexpr int rows = chunk / (kFmaThreads / 8), batch = 2;  // of a thread; pieces of a row that are under way
    const int thread = simt::opaque(simt::thread()), piece = thread % 8 * V, row = thread / 8;
    bool live[rows];
    Index start[rows];
    SIMT_UNROLL
    for (int n = 0; n < rows; ++n) {
      const int t = row + n * (kFmaThreads / 8);
      live[n] = t < at.count && is_live(p, at.batch, at.first + t);
      start[n] = m.at(at.batch, at.first + t, head);
    }
    with_dtype<A>(m.dtype, [&](auto element) {
      using S = decltype(element);
      const auto data = m.data.template as<S>();
      SIMT_NO_UNROLL
      for (int i = piece; i < columns; i += batch * 8 * V) {
        Piece x[batch][rows] = {};
        SIMT_UNROLL
        for (int h = 0; h < batch; ++h) {
          SIMT_UNROLL
          for (int n = 0; n < rows; ++n) {
            if (live[n] && i + h * 8 * V < columns) {
              x[h][n] = load_piece<V, A, S>(m, data, start[n], from + i + h * 8 * V);
            }
          }
        }
        SIMT_UNROLL
        for (int h = 0; h < batch; ++h) {
          SIMT_UNROLL
          for (int n = 0; n < rows; ++n) {
            if (i + h * 8 * V < columns) {
              to.template store_vector<V>((row + n * (kFmaThreads / 8)) * to_pitch + i + h * 8 * V, x[h][n]);
            }
          }
        }
      }
    });
  }

  // sum += left^T right over rows [begin, end), an even number, of both: 4 columns of left and V of right.
  SIMT_DEVICE static void add_outer(simt::shared<A> left, int left_pitch, simt::shared<A> right, int right_pitch,
                                    int begin, int end, A (&sum)[4][V]) {
    SIMT_NO_UNROLL
    for (int first = begin; first < end; first += 2) {
      SIMT_UNROLL
      for (int j = first; j < first + 2; ++j) {
        const Piece y = right.template load_vector<V>(j * right_pitch);
        SIMT_UNROLL
        for (int h = 0; h < 4 / V; ++h) {
          const Piece x = left.template load_vector<V>(j * left_pitch + h * V);
          SIMT_UNROLL
          for (int a = 0; a < V; ++a) {
            SIMT_UNROLL
            for (int v = 0; v < V; ++v) sum[h * V + a][v] = simt::fma(x[a], y[v], sum[h * V + a][v]);
          }
        }
      }
    }
  }

  // A slice's part of scores and, `with_state`, of rows times the state.
  SIMT_DEVICE static void multiply_rows(const ScanParams<A>& p, const FmaLayout& l, const Shared& s, int slice,
                                        bool with_state, A (&scores)[4][4], A (&out)[4][V]) {
    const Lane lane(p.reverse, l.tile);
    const auto rows = s.rows + 4 * lane.row * pitch;
    const auto columns = s.columns + lane.column * pitch;
    const auto state = s.state + slice * kFmaSlice * l.tile + lane.column * V;
    with_state = with_state && lane.in_tile;
    const int size = size_of(l, slice);
    SIMT_NO_UNROLL
    for (int k = 0; k < size; k += V) {
      Piece x[4];
      SIMT_UNROLL
      for (int a = 0; a < 4; ++a) x[a] = rows.template load_vector<V>(a * pitch + k);
      SIMT_UNROLL
      for (int m = 0; m < 4; ++m) {
        if (m < lane.first_block || m > lane.last_block) continue;
        const Piece y = columns.template load_vector<V>(16 * m * pitch + k);
        SIMT_UNROLL
        for (int a = 0; a < 4; ++a) {
          SIMT_UNROLL
          for (int v = 0; v < V; ++v) scores[a][m] = simt::fma(x[a][v], y[v], scores[a][m]);
        }
      }
      if (!with_state) continue;
      SIMT_UNROLL
      for (int w = 0; w < V; ++w) {
        const Piece y = state.template load_vector<V>((k + w) * l.tile);
        SIMT_UNROLL
        for (int a = 0; a < 4; ++a) {
          SIMT_UNROLL
          for (int v = 0; v < V; ++v) out[a][v] = simt::fma(x[a][w], y[v], out[a][v]);
        }
      }
    }
  }

  // A part of each row's product with z; thread() % chunk is the row.
  SIMT_DEVICE static A rows_times_z(const FmaLayout& l, const Shared& s, int slice) {
    const int count = size_of(l, slice) / parts, first = simt::thread() / chunk * count;
    A sum = 0;
    for (int k = first; k < first + count; k += V) {
      const Piece x = s.rows.template load_vector<V>(simt::thread() % chunk * pitch + k);
      const Piece z = s.z.template load_vector<V>(slice * kFmaSlice + k);
      SIMT_UNROLL
      for (int v = 0; v < V; ++v) sum = simt::fma(x[v], z[v], sum);
    }
    return sum;
  }

  // P with the decay, where the triangle has it. Other blocks of 16 tokens are neither written nor read.
  SIMT_DEVICE static void store_scores(const ScanParams<A>& p, const FmaLayout& l, const Shared& s,
                                       const A (&scores)[4][4]) {
    const Lane lane(p.reverse, l.tile);
    SIMT_UNROLL
    for (int m = 0; m < 4; ++m) {
      if (m < lane.first_block || m > lane.last_block) continue;
      const int j = lane.column + 16 * m;
      const bool live = s.live.load(j) != 0;
      A x[4];
      SIMT_UNROLL
      for (int a = 0; a < 4; ++a) {
        const int i = 4 * lane.row + a, query = p.reverse ? j : i;
        x[a] = p.column_factor * simt::fma(s.scale.load(query), scores[a][m], s.add.load(query));
        if (p.decay != Decay::none) {
          const double sum = s.log_decay.load(i) - s.log_decay.load(j);
          x[a] *= simt::exp(static_cast<A>(p.reverse ? -sum : sum));
        }
        if (!live || (p.reverse ? j < i : j > i)) x[a] = 0;
      }
      SIMT_UNROLL
      for (int h = 0; h < 4 / V; ++h) {
        Piece piece;
        SIMT_UNROLL
        for (int v = 0; v < V; ++v) piece[v] = x[h * V + v];
        s.scores.template store_vector<V>(j * pitch + 4 * lane.row + h * V, piece);
      }
    }
  }

  // --- out ---

  // Parts of the sum over P, decayed, of each row, up to the segment's start.
  SIMT_DEVICE static void sum_rows(const Shared& s, A row_z) {
    constexpr int count = chunk / parts;
    const int i = simt::thread() % chunk, part = simt::thread() / chunk;
    A sum = s.row_factor.load(i) * s.scale.load(i) * row_z;
    if (part * count <= i) {
      for (int j = part * count; j < (part + 1) * count; ++j) sum += s.scores.load(j * pitch + i);
    }
    s.partial.store(part * chunk + i, sum);
  }

  // What the state and z before the chunk contribute.
  SIMT_DEVICE static void finish_state_part(const ScanParams<A>& p, const FmaLayout& l, const Shared& s,
                                            A (&out)[4][V]) {
    const Lane lane(p.reverse, l.tile);
    if (!lane.in_tile) return;
    const bool with_z = p.value_sum && (p.reverse || p.query_add);
    SIMT_UNROLL
    for (int a = 0; a < 4; ++a) {
      const int i = 4 * lane.row + a;
      const A factor = s.row_factor.load(i), scale = p.reverse ? A(1) : s.scale.load(i);
      SIMT_UNROLL
      for (int v = 0; v < V; ++v) out[a][v] *= factor * scale;
      if (with_z) {
        const A add = factor * (p.reverse ? A(1) : s.add.load(i));
        const Piece z = s.z.template load_vector<V>(lane.column * V);
        SIMT_UNROLL
        for (int v = 0; v < V; ++v) out[a][v] = simt::fma(add, z[v], out[a][v]);
      }
    }
  }

  // What the state has given to each row, times the same row of `with`.
  SIMT_DEVICE static void dot_rows(const ScanParams<A>& p, const FmaLayout& l, const Shared& s, const Chunk& at,
                                   const Place& place, int row, int from, const A (&out)[4][V]) {
    const int head = p.with.head(place.state_head, p.state_heads, row);
    const Lane lane(p.reverse, l.tile);
    SIMT_UNROLL
    for (int a = 0; a < 4; ++a) {
      const int t = 4 * lane.row + a;
      A dot = 0;
      if (lane.in_tile && s.live.load(t) != 0) {
        with_dtype<A>(p.with.dtype, [&](auto element) {
          using S = decltype(element);
          const Piece w = load_piece<V, A, S>(p.with, p.with.data.template as<S>(),
                                              p.with.at(at.batch, at.first + t, head), from + lane.column * V);
          SIMT_UNROLL
          for (int v = 0; v < V; ++v) dot = simt::fma(out[a][v], w[v], dot);
        });
      }
      SIMT_UNROLL
      for (int step = 1; step < 8; step *= 2) dot += simt::shuffle_xor(dot, step);
      if (simt::lane() % 8 == 0) s.partial.store((parts + simt::warp() % 2) * chunk + t, dot);
    }
    simt::barrier();
    const int t = simt::thread();
    if (t < at.count) {
      const A dot = s.partial.load(parts * chunk + t) + s.partial.load((parts + 1) * chunk + t);
      p.dots.store(row_of(p.segments, p.out.heads, place.tile * p.segments.batch + at.batch,
                          p.out.head(place.state_head, p.state_heads, row), at.first + t),
                   p.out_factor * dot);
    }
  }

  SIMT_DEVICE static void add_scores_times_values(const ScanParams<A>& p, const FmaLayout& l, const Shared& s,
                                                  const Chunk& at, A (&out)[4][V]) {
    const Lane lane(p.reverse, l.tile);
    if (!lane.in_tile) return;
    const int diagonal = 4 * lane.row;
    const int last = p.reverse || diagonal + 4 > at.even() ? at.even() : diagonal + 4;
    add_outer(s.scores + diagonal, pitch, s.values + lane.column * V, l.tile, p.reverse ? diagonal : 0, last, out);
  }

  SIMT_DEVICE static void write_out(const ScanParams<A>& p, const FmaLayout& l, const Shared& s, const Chunk& at,
                                    const Place& place, int row, int query_head, int from, const A (&sums)[4][V]) {
    const int head = p.out.head(place.state_head, p.state_heads, row);
    const Lane lane(p.reverse, l.tile);
    const int i = from + lane.column * V;
    SIMT_UNROLL
    for (int a = 0; a < 4; ++a) {
      const int t = 4 * lane.row + a;
      const bool live = s.live.load(t) != 0;
      A factor = p.out_factor, denominator = 1;
      if (p.normalize) {
        A sum = 0;
        SIMT_UNROLL
        for (int part = 0; part < parts; ++part) sum += s.partial.load(part * chunk + t);
        denominator = p.out_factor * sum + p.eps;
        factor /= denominator;
      }
      Piece x;
      SIMT_UNROLL
      for (int v = 0; v < V; ++v) x[v] = live ? factor * sums[a][v] : A(0);
      if (t < at.count && lane.in_tile) {
        with_dtype<A>(p.out.dtype, [&](auto element) {
          using S = decltype(element);
          store_piece<V, A, S>(p.out, p.out.data.template as<S>(), p.out.at(at.batch, at.first + t, head), i, x);
          if (!p.rest.data) return;
          Piece rest;
          SIMT_UNROLL
          for (int v = 0; v < V; ++v) rest[v] = x[v] - static_cast<A>(simt::to_float(simt::from_float<S>(x[v])));
          store_piece<V, A, S>(p.rest, p.rest.data.template as<S>(), p.rest.at(at.batch, at.first + t, head), i, rest);
        });
      }
      if (p.normalize && place.tile == 0 && lane.column == 0 && t < at.count) {
        p.denominator.store(row_of(p.segments, p.query_heads, at.batch, query_head, at.first + t),
                            live ? denominator : A(1));
      }
    }
  }
};

template <class A, class Queue>
void enqueue_scan_fma(const DevicePlan::Scan& scan, const ScanParams<A>& p, Queue& queue) {
  const FmaLayout layout = fma_layout_for_tile(scan.depth, scan.tile, sizeof(A) == 8);
  queue.template launch<ScanFma<A>>({scan.blocks, layout.threads, layout.shared_bytes}, {p, layout});
}

}  // namespace freqrank::linear_attention::device
