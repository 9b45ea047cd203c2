#pragma once
// One token of a decoding: the state is read, decayed, added to, multiplied by the queries and written back in one go.
//
// A block has some columns of a state, all of its depth, and the query heads that share it; 8 threads side by side have
// 128 bytes of a row. The denominator needs all of z, which somebody has to overwrite: with `normalize` one block has a
// whole state, for no block may read what another one writes.
//
// With a feature map a block makes the features of the key and of the queries itself, where these would be in shared
// memory: products with the projection as those with the state, then a warp finishes each row.

#include <limits>
#include <type_traits>

#include "linear_attention/device/pieces.h"
#include "linear_attention/device/views.h"

namespace freqrank::linear_attention::device {

template <class A, bool Mapped>
struct StepKernel {
  static constexpr const char* name =
      Mapped ? (sizeof(A) == 8 ? "feature_map_attention_step_double" : "feature_map_attention_step")
             : (sizeof(A) == 8 ? "linear_attention_step_double" : "linear_attention_step");
  static constexpr int max_threads = 128, min_blocks = 5;
  static constexpr int V = 16 / sizeof(A);      // elements of a piece
  static constexpr int columns = 8 * V;         // of a tile
  static constexpr int rows = max_threads / 8;  // of the state that threads have at the same time
  static constexpr int warps = max_threads / simt::warp_size;
  static constexpr int pass = 4;   // query heads at a time; the state is read again for others
  static constexpr int batch = 4;  // pieces of a thread that are under way
  static constexpr int part_rows = Mapped ? 1 + pass : pass;  // sums at a time: with a map those of the key too
  using Piece = simt::pack<A, V>;

  struct Map {
    Feature feature;
    int channels, columns;
    Matrix projection, weights;  // [1,channels,key heads,columns], [1,1,key heads,depth]; the weights may be absent
    bool weighted;
  };
  struct NoMap {};
  struct Params {
    int state_heads, depth, width, tiles;
    int blocks_per_state;  // each of them has tiles; 1 with `normalize`
    Matrix q, k, v;        // [B,1,heads,..]
    Output o;
    simt::global<const unsigned char> mask;
    Index mask_stride;
    simt::global<const A> log_decay;
    Index decay_stride[2];
    States<A> kv, z;
    bool kv_pieces, normalize;
    A scale, eps;
    std::conditional_t<Mapped, Map, NoMap> map;
  };

  // Elements of shared memory: keys [depth], queries [pass, depth], parts of sums [warps, part_rows, columns] and of
  // the denominators [warps, pass]; with a map what features are made of, [part_rows, channels].
  SIMT_BOTH static int parts_at(int depth) { return ((1 + pass) * depth + V - 1) / V * V; }
  static int shared_bytes(int depth, int channels) {
    const int sums = warps * (part_rows * columns + pass);
    return (parts_at(depth) + sums + (Mapped ? part_rows * channels : 0)) * static_cast<int>(sizeof(A));
  }

  struct Shared {
    simt::shared<A> keys, queries, parts, denominators;
    simt::shared<A> features, inputs;  // with a map; features [part_rows, depth] are the keys and the queries
    SIMT_DEVICE explicit Shared(const Params& p) {
      constexpr int size = sizeof(A);
      const int at = parts_at(p.depth), count = warps * part_rows * columns;
      keys = simt::shared_array<A>(0, p.depth);
      queries = simt::shared_array<A>(p.depth * size, pass * p.depth);
      parts = simt::shared_array<A>(at * size, count);
      denominators = simt::shared_array<A>((at + count) * size, warps * pass);
      if constexpr (Mapped) {
        features = simt::shared_array<A>(0, part_rows * p.depth);
        inputs = simt::shared_array<A>((at + count + warps * pass) * size, part_rows * p.map.channels);
      }
    }
  };

  // Which state a block works on, and the query heads [first, first + count) that it has come to.
  struct Place {
    int row, head, first, count;
  };

  SIMT_DEVICE static void run(const Params& p) {
    const int block = static_cast<int>(simt::block()), state = block / p.blocks_per_state;
    const int first_tile = block - state * p.blocks_per_state;
    Place at{state / p.state_heads, state % p.state_heads, 0, 0};
    const int heads = p.q.heads / p.state_heads;
    if (p.mask && p.mask.load(at.row * p.mask_stride) == 0) {
      for (int tile = first_tile; tile < p.tiles; tile += p.blocks_per_state) {
        SIMT_NO_UNROLL
        for (int e = simt::thread(); e < heads * columns; e += max_threads) {
          store_o(p, at, e / columns, tile * columns + e % columns, A(0));
        }
      }
      return;
    }
    const Shared s(p);
    const A decay = decay_of(p, at);
    if constexpr (!Mapped) {
      SIMT_NO_UNROLL
      for (int d = simt::thread(); d < p.depth; d += max_threads) s.keys.store(d, key_at(p, at, d));
    }
    SIMT_NO_UNROLL
    for (at.first = 0; at.first < heads; at.first += pass) {
      at.count = heads - at.first < pass ? heads - at.first : pass;
      if constexpr (Mapped) {
        make_features(p, s, at);
      } else {
        SIMT_NO_UNROLL
        for (int e = simt::thread(); e < at.count * p.depth; e += max_threads) {
          const int r = e / p.depth, d = e - r * p.depth;
          s.queries.store(e, p.scale * query_at(p, at, r, d));
        }
      }
      SIMT_NO_UNROLL
      for (int tile = first_tile; tile < p.tiles; tile += p.blocks_per_state) {
        const int column = tile * columns + simt::thread() % 8 * V;
        Piece x[batch];
        const Piece value = load_value(p, at, column);
        load_rows(p, at, simt::thread() / 8, column, x);  // under way while keys and queries arrive
        if (tile == first_tile) simt::barrier();
        A sums[part_rows][V] = {};
        update_state(p, s, at, decay, column, value, x, sums);
        add_up(s, 0, at.count, sums);
        if (tile == 0 && p.z.data) update_z(p, s, at, decay);
        simt::barrier();
        write_o(p, s, at, tile);
        simt::barrier();
      }
    }
  }

  SIMT_DEVICE static A decay_of(const Params& p, const Place& at) {
    if (!p.log_decay) return A(1);
    const A g = p.log_decay.load(at.row * p.decay_stride[0] + at.head * p.decay_stride[1]);
    return g > A(0) ? not_a_number<A>() : simt::exp(g);
  }

  // z, of which each thread has its own elements, and its products with the queries.
  SIMT_DEVICE static void update_z(const Params& p, const Shared& s, const Place& at, A decay) {
    A dots[pass] = {};
    SIMT_NO_UNROLL
    for (int d = simt::thread(); d < p.depth; d += max_threads) {
      const Index i = p.z.at(at.row, at.head) + d * p.z.stride[2];
      A z = p.z.data.load(i);
      if (at.first == 0) {
        z = simt::fma(decay, z, s.keys.load(d));
        p.z.data.store(i, z);
      }
      SIMT_UNROLL
      for (int r = 0; r < pass; ++r) {
        if (p.normalize && r < at.count) dots[r] = simt::fma(s.queries.load(r * p.depth + d), z, dots[r]);
      }
    }
    if (!p.normalize) return;
    SIMT_UNROLL
    for (int r = 0; r < pass; ++r) {
      if (r >= at.count) break;
      dots[r] = simt::warp_sum(dots[r]);
      if (simt::lane() == 0) s.denominators.store(simt::warp() * pass + r, dots[r]);
    }
  }

  SIMT_DEVICE static Piece load_value(const Params& p, const Place& at, int column) {
    Piece value = {};
    if (column < p.width) {
      with_dtype<A>(p.v.dtype, [&](auto element) {
        using S = decltype(element);
        const Index row = p.v.at(at.row, 0, p.v.head(at.head, p.state_heads, 0));
        value = load_piece<V, A, S>(p.v, p.v.data.template as<S>(), row, column);
      });
    }
    return value;
  }

  // Columns [column, column + V) of the state's rows `first`, `first` + rows and so on.
  SIMT_DEVICE static void load_rows(const Params& p, const Place& at, int first, int column, Piece (&x)[batch]) {
    if (column >= p.width) return;
    const auto state = p.kv.data + (p.kv.at(at.row, at.head) + column * p.kv.stride[3]);
    SIMT_UNROLL
    for (int n = 0; n < batch; ++n) {
      if (first + n * rows < p.depth) x[n] = load_state(p, state, first + n * rows, column);
    }
  }

  // The same columns of every rows-th row, of which the first are in x, and what they add to the queries' sums.
  SIMT_DEVICE static void update_state(const Params& p, const Shared& s, const Place& at, A decay, int column,
                                       const Piece& value, Piece (&x)[batch], A (&sums)[part_rows][V]) {
    if (column >= p.width) return;
    const auto state = p.kv.data + (p.kv.at(at.row, at.head) + column * p.kv.stride[3]);
    SIMT_NO_UNROLL
    for (int first = simt::thread() / 8; first < p.depth; first += batch * rows) {
      if (first >= rows) load_rows(p, at, first, column, x);
      SIMT_UNROLL
      for (int n = 0; n < batch; ++n) {
        const int d = first + n * rows;
        if (d >= p.depth) break;
        if (at.first == 0) {
          const A key = s.keys.load(d);
          SIMT_UNROLL
          for (int v = 0; v < V; ++v) x[n][v] = simt::fma(decay, x[n][v], key * value[v]);
          store_state(p, state, d, column, x[n]);
        }
        SIMT_UNROLL
        for (int r = 0; r < pass; ++r) {
          if (r >= at.count) break;
          const A query = s.queries.load(r * p.depth + d);
          SIMT_UNROLL
          for (int v = 0; v < V; ++v) sums[r][v] = simt::fma(query, x[n][v], sums[r][v]);
        }
      }
    }
  }

  SIMT_DEVICE static Piece load_state(const Params& p, simt::global<A> state, int d, int column) {
    const Index row = d * p.kv.stride[2];
    if (p.kv_pieces) return state.template load_vector<V>(row);
    Piece x;
    SIMT_UNROLL
    for (int v = 0; v < V; ++v) x[v] = column + v < p.width ? state.load(row + v * p.kv.stride[3]) : A(0);
    return x;
  }
  SIMT_DEVICE static void store_state(const Params& p, simt::global<A> state, int d, int column, Piece x) {
    const Index row = d * p.kv.stride[2];
    if (p.kv_pieces) {
      state.template store_vector<V>(row, x);
      return;
    }
    SIMT_UNROLL
    for (int v = 0; v < V; ++v) {
      if (column + v < p.width) state.store(row + v * p.kv.stride[3], x[v]);
    }
  }

  // The sums [from, to) over a warp's rows.
  SIMT_DEVICE static void add_up(const Shared& s, int from, int to, A (&sums)[part_rows][V]) {
    SIMT_UNROLL
    for (int r = 0; r < part_rows; ++r) {
      if (r < from) continue;
      if (r >= to) break;
      Piece x;
      SIMT_UNROLL
      for (int v = 0; v < V; ++v) {
        x[v] = sums[r][v] + simt::shuffle_xor(sums[r][v], 8);
        x[v] += simt::shuffle_xor(x[v], 16);
      }
      if (simt::lane() < 8) {
        s.parts.template store_vector<V>((simt::warp() * part_rows + r) * columns + simt::lane() * V, x);
      }
    }
  }

  SIMT_DEVICE static void write_o(const Params& p, const Shared& s, const Place& at, int tile) {
    SIMT_NO_UNROLL
    for (int e = simt::thread(); e < at.count * columns; e += max_threads) {
      A sum = 0, denominator = p.eps;
      for (int w = 0; w < warps; ++w) sum += s.parts.load(w * part_rows * columns + e);
      if (p.normalize) {
        for (int w = 0; w < warps; ++w) denominator += s.denominators.load(w * pass + e / columns);
        sum /= denominator;
      }
      store_o(p, at, at.first + e / columns, tile * columns + e % columns, sum);
    }
  }

  SIMT_DEVICE static void store_o(const Params& p, const Place& at, int r, int column, A x) {
    if (column >= p.width) return;
    const Index i = p.o.at(at.row, 0, p.o.head(at.head, p.state_heads, r)) + column * p.o.stride[3];
    with_dtype<A>(p.o.dtype, [&](auto element) {
      using S = decltype(element);
      p.o.data.template as<S>().store(i, simt::from_float<S>(x));
    });
  }

  // The features of the key, in the first pass, and of the queries of this one.
  SIMT_DEVICE static void make_features(const Params& p, const Shared& s, const Place& at) {
    const int channels = p.map.channels, from = at.first == 0 ? 0 : 1, to = 1 + at.count;
    const int key_head = p.k.head(at.head, p.state_heads, 0);
    SIMT_NO_UNROLL
    for (int e = from * channels + simt::thread(); e < to * channels; e += max_threads) {
      const int r = e / channels, c = e - r * channels;
      s.inputs.store(e, r == 0 ? key_at(p, at, c) : query_at(p, at, r - 1, c));
    }
    simt::barrier();
    SIMT_NO_UNROLL
    for (int tile = 0; tile < p.map.columns; tile += columns) {
      A sums[part_rows][V] = {};
      multiply_projection(p, s, from, to, key_head, tile + simt::thread() % 8 * V, sums);
      add_up(s, from, to, sums);
      simt::barrier();
      SIMT_NO_UNROLL
      for (int e = from * columns + simt::thread(); e < to * columns; e += max_threads) {
        const int column = tile + e % columns;
        if (column >= p.map.columns) continue;
        A sum = 0;
        for (int w = 0; w < warps; ++w) sum += s.parts.load(w * part_rows * columns + e);
        s.features.store(e / columns * p.depth + column, sum);
      }
      simt::barrier();
    }
    SIMT_NO_UNROLL
    for (int r = from + simt::warp(); r < to; r += warps) finish_features(p, s.features + r * p.depth, r, key_head);
  }

  // What every rows-th channel adds to columns [column, column + V) of the products of the rows [from, to).
  SIMT_DEVICE static void multiply_projection(const Params& p, const Shared& s, int from, int to, int key_head,
                                              int column, A (&sums)[part_rows][V]) {
    const Matrix& m = p.map.projection;
    if (column >= m.width) return;
    const auto data = m.data.template as<A>();
    SIMT_NO_UNROLL
    for (int first = simt::thread() / 8; first < p.map.channels; first += batch * rows) {
      Piece x[batch];
      SIMT_UNROLL
      for (int n = 0; n < batch; ++n) {
        const int c = first + n * rows;
        if (c < p.map.channels) x[n] = load_piece<V, A, A>(m, data, m.at(0, c, key_head), column);
      }
      SIMT_UNROLL
      for (int n = 0; n < batch; ++n) {
        const int c = first + n * rows;
        if (c >= p.map.channels) break;
        SIMT_UNROLL
        for (int r = 0; r < part_rows; ++r) {
          if (r < from) continue;
          if (r >= to) break;
          const A input = s.inputs.load(r * p.map.channels + c);
          SIMT_UNROLL
          for (int v = 0; v < V; ++v) sums[r][v] = simt::fma(input, x[n][v], sums[r][v]);
        }
      }
    }
  }

  // A row's products into its features, by a warp: each lane has its own columns.
  SIMT_DEVICE static void finish_features(const Params& p, simt::shared<A> row, int r, int key_head) {
    const bool exp_only = p.map.feature == Feature::exp, both = p.map.feature == Feature::softmax_pm;
    A most = 0, total = 0;
    if (!exp_only) {
      most = -std::numeric_limits<A>::infinity();
      SIMT_NO_UNROLL
      for (int m = simt::lane(); m < p.map.columns; m += simt::warp_size) {
        const A product = row.load(m), x = both && product < A(0) ? -product : product;
        most = x > most ? x : most;
      }
      most = simt::warp_max(most);
    }
    SIMT_NO_UNROLL
    for (int m = simt::lane(); m < p.map.columns; m += simt::warp_size) {
      const A product = row.load(m), x = simt::exp(product - most);
      row.store(m, x);
      total += x;
      if (both) {
        const A y = simt::exp(-product - most);
        row.store(p.map.columns + m, y);
        total += y;
      }
    }
    A factor = r == 0 ? A(1) : p.scale;
    if (!exp_only) factor /= simt::warp_sum(total);
    SIMT_NO_UNROLL
    for (int m = simt::lane(); m < p.map.columns; m += simt::warp_size) {
      for (int f = m; f < p.depth; f += p.map.columns) {
        const A weight = p.map.weighted ? value_at(p.map.weights, 0, key_head, f) : A(1);
        row.store(f, row.load(f) * factor * weight);
      }
    }
  }

  SIMT_DEVICE static A key_at(const Params& p, const Place& at, int column) {
    return value_at(p.k, at.row, p.k.head(at.head, p.state_heads, 0), column);
  }
  // Of the r-th query of a pass.
  SIMT_DEVICE static A query_at(const Params& p, const Place& at, int r, int column) {
    return value_at(p.q, at.row, p.q.head(at.head, p.state_heads, at.first + r), column);
  }
  SIMT_DEVICE static A value_at(const Matrix& m, int row, int head, int column) {
    A x = 0;
    with_dtype<A>(m.dtype, [&](auto element) {
      using S = decltype(element);
      x = static_cast<A>(simt::to_float(m.data.template as<S>().load(m.at(row, 0, head) + column * m.stride[3])));
    });
    return x;
  }
};

// With a map each block of a state makes all features again: there are only so many as keep a large GPU busy.
constexpr Index busy_blocks = 512;

template <class A, bool Mapped, class Queue>
void enqueue_step_as(const Sizes& sizes, const StepArguments& args, Queue& queue) {
  using Kernel = StepKernel<A, Mapped>;
  const Index batch = sizes.batch, states = batch * sizes.state_heads;
  const Index inputs = Mapped ? sizes.channels : sizes.key_dim;  // of a query and a key
  typename Kernel::Params p{};
  p.state_heads = static_cast<int>(sizes.state_heads);
  p.depth = static_cast<int>(sizes.key_dim), p.width = static_cast<int>(sizes.value_dim);
  p.tiles = (p.width + Kernel::columns - 1) / Kernel::columns;
  p.blocks_per_state = sizes.normalize ? 1 : p.tiles;
  if (Mapped && states > 0) {
    const int wanted = static_cast<int>(std::min<Index>(p.blocks_per_state, (busy_blocks + states - 1) / states));
    const int tiles_each = (p.tiles + wanted - 1) / wanted;
    p.blocks_per_state = (p.tiles + tiles_each - 1) / tiles_each;
  }
  p.q = matrix_of(args.q, batch, 1, sizes.heads, inputs, queue);
  p.k = matrix_of(args.k, batch, 1, sizes.key_heads, inputs, queue);
  p.v = matrix_of(args.v, batch, 1, sizes.key_heads, sizes.value_dim, queue);
  p.o = output_of(args.o, batch, 1, sizes.heads, sizes.value_dim, queue);
  if (args.mask) {
    const Extent e = extent_of(args.mask, {batch, 1, 1, 1});
    p.mask = queue.view(static_cast<const unsigned char*>(args.mask.data), e.begin, e.end);
    p.mask_stride = args.mask.stride[0];
  }
  if (sizes.decay != Decay::none) {
    const Index rows = sizes.decay == Decay::per_head ? 1 : batch;
    const Extent e = extent_of(args.log_decay, {rows, 1, sizes.state_heads, 1});
    p.log_decay = queue.view(static_cast<const A*>(args.log_decay.data), e.begin, e.end);
    p.decay_stride[0] = sizes.decay == Decay::per_head ? 0 : args.log_decay.stride[0];
    p.decay_stride[1] = args.log_decay.stride[2];
  }
  const Index kv[4] = {batch, sizes.state_heads, sizes.key_dim, sizes.value_dim};
  p.kv = states_of<A>(args.kv, kv, queue);
  p.z = states_of<A>(args.z, {batch, sizes.state_heads, sizes.key_dim, 1}, queue);
  p.kv_pieces = in_pieces(args.kv, kv);
  p.normalize = sizes.normalize;
  p.scale = static_cast<A>(args.scale), p.eps = static_cast<A>(args.eps);
  if constexpr (Mapped) {
    const Index columns = sizes.feature == Feature::softmax_pm ? sizes.key_dim / 2 : sizes.key_dim;
    p.map.feature = sizes.feature;
    p.map.channels = static_cast<int>(inputs), p.map.columns = static_cast<int>(columns);
    const auto as_tensor = [](View x, Index channel, Index column) {  // [Hk,..] as [1,..,Hk,columns]
      const Index strides[4] = {0, channel, x.stride[0], column};
      std::copy(strides, strides + 4, x.stride);
      return x;
    };
    const View projection = as_tensor(args.projection, args.projection.stride[1], args.projection.stride[2]);
    p.map.projection = matrix_of(projection, 1, inputs, sizes.key_heads, columns, queue);
    p.map.weighted = static_cast<bool>(args.weights);
    if (p.map.weighted) {
      const View weights = as_tensor(args.weights, 0, args.weights.stride[1]);
      p.map.weights = matrix_of(weights, 1, 1, sizes.key_heads, sizes.key_dim, queue);
    }
  }
  const Index blocks = states * p.blocks_per_state;
  queue.template launch<Kernel>({blocks, Kernel::max_threads, Kernel::shared_bytes(p.depth, static_cast<int>(inputs))},
                                p);
}

template <class Queue>
void enqueue_step(const Sizes& sizes, const StepArguments& args, Queue& queue) {
  const bool mapped = sizes.feature != Feature::none;
  if (sizes.double_precision) {
    mapped ? enqueue_step_as<double, true>(sizes, args, queue) : enqueue_step_as<double, false>(sizes, args, queue);
  } else {
    mapped ? enqueue_step_as<float, true>(sizes, args, queue) : enqueue_step_as<float, false>(sizes, args, queue);
  }
}

}  // namespace freqrank::linear_attention::device
