#pragma once
// One token of a decoding: the state is read, decayed, added to, multiplied by the queries and written back in one go.
//
// A block has some columns of a state, all of its depth, and the query heads that share it; 8 threads side by side have
// 128 bytes of a row. The denominator needs all of z, which somebody has to overwrite: with `normalize` one block has a
// whole state, for no block may read what another one writes.

#include "linear_attention/device/pieces.h"
#include "linear_attention/device/views.h"

namespace freqrank::linear_attention::device {

template <class A>
struct StepKernel {
  static constexpr const char* name = sizeof(A) == 8 ? "linear_attention_step_double" : "linear_attention_step";
  static constexpr int max_threads = 128, min_blocks = 5;
  static constexpr int V = 16 / sizeof(A);      // elements of a piece
  static constexpr int columns = 8 * V;         // of a tile
  static constexpr int rows = max_threads / 8;  // of the state that threads have at the same time
  static constexpr int warps = max_threads / simt::warp_size;
  static constexpr int pass = 4;   // query heads at a time; the state is read again for others
  static constexpr int batch = 4;  // pieces of a thread that are under way
  using Piece = simt::pack<A, V>;

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
  };

  // Elements of shared memory: keys [depth], queries [pass, depth], parts of o [warps, pass, columns] and of the
  // denominators [warps, pass].
  SIMT_BOTH static int parts_at(int depth) { return ((1 + pass) * depth + V - 1) / V * V; }
  static int shared_bytes(int depth) {
    return (parts_at(depth) + warps * pass * (columns + 1)) * static_cast<int>(sizeof(A));
  }

  struct Shared {
    simt::shared<A> keys, queries, parts, denominators;
    SIMT_DEVICE explicit Shared(int depth) {
      constexpr int size = sizeof(A);
      const int at = parts_at(depth), count = warps * pass * columns;
      keys = simt::shared_array<A>(0, depth);
      queries = simt::shared_array<A>(depth * size, pass * depth);
      parts = simt::shared_array<A>(at * size, count);
      denominators = simt::shared_array<A>((at + count) * size, warps * pass);
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
    const Shared s(p.depth);
    const A decay = decay_of(p, at);
    SIMT_NO_UNROLL
    for (int d = simt::thread(); d < p.depth; d += max_threads) {
      s.keys.store(d, value_at(p.k, at.row, p.k.head(at.head, p.state_heads, 0), d));
    }
    SIMT_NO_UNROLL
    for (at.first = 0; at.first < heads; at.first += pass) {
      at.count = heads - at.first < pass ? heads - at.first : pass;
      SIMT_NO_UNROLL
      for (int e = simt::thread(); e < at.count * p.depth; e += max_threads) {
        const int r = e / p.depth, d = e - r * p.depth;
        s.queries.store(e, p.scale * value_at(p.q, at.row, p.q.head(at.head, p.state_heads, at.first + r), d));
      }
      SIMT_NO_UNROLL
      for (int tile = first_tile; tile < p.tiles; tile += p.blocks_per_state) {
        const int column = tile * columns + simt::thread() % 8 * V;
        Piece x[batch];
        const Piece value = load_value(p, at, column);
        load_rows(p, at, simt::thread() / 8, column, x);  // under way while keys and queries arrive
        if (tile == first_tile) simt::barrier();
        A sums[pass][V] = {};
        update_state(p, s, at, decay, column, value, x, sums);
        add_up(s, at, sums);
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
                                       const Piece& value, Piece (&x)[batch], A (&sums)[pass][V]) {
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

  // The sums over a warp's rows.
  SIMT_DEVICE static void add_up(const Shared& s, const Place& at, A (&sums)[pass][V]) {
    SIMT_UNROLL
    for (int r = 0; r < pass; ++r) {
      if (r >= at.count) break;
      Piece x;
      SIMT_UNROLL
      for (int v = 0; v < V; ++v) {
        x[v] = sums[r][v] + simt::shuffle_xor(sums[r][v], 8);
        x[v] += simt::shuffle_xor(x[v], 16);
      }
      if (simt::lane() < 8) {
        s.parts.template store_vector<V>((simt::warp() * pass + r) * columns + simt::lane() * V, x);
      }
    }
  }

  SIMT_DEVICE static void write_o(const Params& p, const Shared& s, const Place& at, int tile) {
    SIMT_NO_UNROLL
    for (int e = simt::thread(); e < at.count * columns; e += max_threads) {
      A sum = 0, denominator = p.eps;
      for (int w = 0; w < warps; ++w) sum += s.parts.load(w * pass * columns + e);
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

  SIMT_DEVICE static A value_at(const Matrix& m, int row, int head, int column) {
    A x = 0;
    with_dtype<A>(m.dtype, [&](auto element) {
      using S = decltype(element);
      x = static_cast<A>(simt::to_float(m.data.template as<S>().load(m.at(row, 0, head) + column * m.stride[3])));
    });
    return x;
  }
};

template <class A, class Queue>
void enqueue_step_as(const Sizes& sizes, const StepArguments& args, Queue& queue) {
  using Kernel = StepKernel<A>;
  const Index batch = sizes.batch;
  typename Kernel::Params p{};
  p.state_heads = static_cast<int>(sizes.state_heads);
  p.depth = static_cast<int>(sizes.key_dim), p.width = static_cast<int>(sizes.value_dim);
  p.tiles = (p.width + Kernel::columns - 1) / Kernel::columns;
  p.blocks_per_state = sizes.normalize ? 1 : p.tiles;
  p.q = matrix_of(args.q, batch, 1, sizes.heads, sizes.key_dim, queue);
  p.k = matrix_of(args.k, batch, 1, sizes.key_heads, sizes.key_dim, queue);
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
  const Index blocks = batch * sizes.state_heads * p.blocks_per_state;
  queue.template launch<Kernel>({blocks, Kernel::max_threads, Kernel::shared_bytes(p.depth)}, p);
}

template <class Queue>
void enqueue_step(const Sizes& sizes, const StepArguments& args, Queue& queue) {
  if (sizes.double_precision) {
    enqueue_step_as<double>(sizes, args, queue);
  } else {
    enqueue_step_as<float>(sizes, args, queue);
  }
}

}  // namespace freqrank::linear_attention::device
