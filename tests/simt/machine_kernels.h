#pragma once
// Kernels for the executor's own tests: right ones that, by a run-time switch, go wrong in one place. A comment [tag]
// marks the line that must be reported. Compiled by nvcc as well.

#include "simt/simt.h"

namespace freqrank::machine_tests {

using namespace simt;

enum class Fault {
  none,
  missing_barrier,
  divergent_barrier,
  early_end,
  two_barriers,
  shared_bound,
  global_bound,
  unwritten_output,
  unwritten_shared,
  misaligned,
  misaligned_shared,
  overwritten_too_early,
  no_wait,
  no_commit,
  lax_wait,
  no_barrier_after_wait,
  overwrite_in_flight,
  ends_in_flight,
  no_padding,
  no_warp_barrier,
  shuffle_is_no_barrier,
  divergent_shuffle,
  two_shuffles,
  blocks_overlap,
  block_reads_block,
  block_overwrites_read,
  atomic_then_plain_read,
  wrong_place,
  not_given,
  misaligned_matrix,
};

// y[b, i] = x[b, n - 1 - i] through shared memory.
template <class T>
struct Reverse {
  struct Params {
    global<const T> x;
    global<T> y;
    int n;
    Fault fault;
  };
  static constexpr const char* name = "test_reverse";
  static constexpr int max_threads = 256, min_blocks = 2;
  SIMT_DEVICE static void run(const Params& p) {
    const auto tile = shared_array<float>(0, p.n);
    const auto x = p.x + block() * p.n;
    const auto y = p.y + block() * p.n;
    if (p.fault == Fault::early_end && thread() == 33) return;
    for (int i = thread(); i < p.n; i += threads())
      if (!(p.fault == Fault::unwritten_shared && i == 5))
        tile.store(i, simt::to_float(x.load(i)));  // [reverse writes]
    if (p.fault == Fault::two_barriers && warp() == 1) {
      barrier();  // [other barrier]
    } else if (p.fault != Fault::missing_barrier) {
      barrier();  // [reverse barrier]
    }
    const int count = p.fault == Fault::global_bound && block() == blocks() - 1 ? p.n + 1 : p.n;
    for (int i = thread(); i < count; i += threads()) {
      const int from = p.fault == Fault::shared_bound ? p.n - i : (2 * p.n - 1 - i) % p.n;
      const float v = tile.load(from);  // [reverse reads]
      if (!(p.fault == Fault::unwritten_output && block() == 1 && i == 7))
        y.store(i, simt::from_float<T>(v));  // [reverse stores]
    }
    if (p.fault == Fault::misaligned && thread() == 0) y.template store_vector<4>(2, {});       // [misaligned]
    if (p.fault == Fault::misaligned_shared && thread() == 0) tile.template load_vector<2>(1);  // [misaligned shared]
    if (!(p.fault == Fault::divergent_barrier && thread() == 40)) barrier();                    // [last barrier]
    if (p.fault == Fault::overwritten_too_early && warp() == 0 && lane() == 0) tile.load(33);
    if (p.fault == Fault::overwritten_too_early && warp() == 1 && lane() == 1) tile.store(33, 0.f);  // [too early]
  }
};

// y = sum over chunks of x, the chunks prefetched by asynchronous copies into two buffers.
struct Pipeline {
  struct Params {
    global<const float> x;
    global<float> y;
    int chunks;
    Fault fault;
  };
  static constexpr const char* name = "test_pipeline";
  static constexpr int max_threads = 64, min_blocks = 1;
  static constexpr int chunk = 4 * max_threads;
  SIMT_DEVICE static void fetch(const Params& p, shared<float> buffers, int c) {
    if (c < p.chunks) copy_async<16>(buffers, c % 2 * chunk + 4 * thread(), p.x, c * chunk + 4 * thread());  // [copy]
    if (p.fault != Fault::no_commit) copy_commit();
  }
  SIMT_DEVICE static void run(const Params& p) {
    const auto buffers = shared_array<float>(0, 2 * chunk);
    pack<float, 4> sum{};
    fetch(p, buffers, 0);
    for (int c = 0; c < p.chunks; ++c) {
      fetch(p, buffers, c + 1);
      if (p.fault == Fault::overwrite_in_flight && c == 1) buffers.store(4 * thread(), 1.f);  // [overwrites in flight]
      if (p.fault == Fault::lax_wait)
        copy_wait<2>();
      else if (p.fault != Fault::no_wait)
        copy_wait<1>();
      if (p.fault != Fault::no_barrier_after_wait) barrier();
      const int other = threads() - 1 - thread();                        // so that what another thread copied is read
      const auto v = buffers.load_vector<4>(c % 2 * chunk + 4 * other);  // [reads the copy]
      SIMT_UNROLL
      for (int k = 0; k < 4; ++k) sum[k] += v[k];
      barrier();
    }
    if (p.fault == Fault::ends_in_flight) copy_async<4>(buffers, thread(), p.x, thread());  // [ends in flight]
    p.y.store_vector<4>(4 * thread(), sum);
  }
};

// y = x^T for a 32x32 tile; a row of padding keeps the columns off one bank.
struct Transpose {
  struct Params {
    global<const float> x;
    global<float> y;
    Fault fault;
  };
  static constexpr const char* name = "test_transpose";
  static constexpr int max_threads = 256, min_blocks = 1;
  SIMT_DEVICE static void run(const Params& p) {
    const int pitch = p.fault == Fault::no_padding ? 32 : 33;
    const auto tile = shared_array<float>(0, 32 * pitch);
    for (int row = warp(); row < 32; row += threads() / warp_size)
      tile.store(row * pitch + lane(), p.x.load(row * 32 + lane()));
    barrier();
    for (int row = warp(); row < 32; row += threads() / warp_size)
      p.y.store(row * 32 + lane(), tile.load(lane() * pitch + row));  // [column]
  }
};

// Between the lanes of a warp: y[i] = x[i] + x of its neighbour, through shared memory, and the warp's sum.
struct Neighbours {
  struct Params {
    global<const float> x;
    global<float> y;
    Fault fault;
  };
  static constexpr const char* name = "test_neighbours";
  static constexpr int max_threads = 128, min_blocks = 1;
  SIMT_DEVICE static void run(const Params& p) {
    const auto mine = shared_array<float>(0, threads()) + 32 * warp();
    const float v = p.x.load(thread());
    mine.store(lane(), v);  // [neighbour writes]
    if (p.fault == Fault::shuffle_is_no_barrier)
      shuffle(v, 0);
    else if (p.fault != Fault::no_warp_barrier)
      warp_barrier();
    const float other = mine.load((lane() + 1) % 32);  // [neighbour reads]
    float sum = warp_sum(v);
    if (p.fault == Fault::divergent_shuffle && lane() < 16) sum += shuffle_xor(v, 1);  // [half a shuffle]
    if (p.fault == Fault::two_shuffles) {
      if (lane() < 16)
        sum += shuffle_xor(v, 1);
      else
        sum += shuffle_xor(v, 2);
    }
    p.y.store(thread(), v + other + 1000 * sum);
  }
};

// Blocks of one launch, and atomics. counts[v] of the values in x; total[0] the largest.
struct Histogram {
  struct Params {
    global<const int> x;
    global<int> counts, most;
    global<int> scratch;
    Fault fault;
  };
  static constexpr const char* name = "test_histogram";
  static constexpr int max_threads = 64, min_blocks = 1;
  SIMT_DEVICE static void run(const Params& p) {
    const Index i = block() * threads() + thread();
    const int v = p.x.load(i);
    atomic_add(p.counts, v, 1);  // [atomic]
    atomic_max(p.most, 0, v);
    if (p.fault == Fault::atomic_then_plain_read) p.counts.load(v);  // [plain read]
    if (thread() == 0) {
      if (p.fault == Fault::blocks_overlap) p.scratch.store(0, v);                         // [overlap]
      if (p.fault == Fault::block_reads_block) p.scratch.load(1 - block());                // [reads another's]
      if (p.fault == Fault::block_reads_block) p.scratch.store(block(), v);                // [and writes]
      if (p.fault == Fault::block_overwrites_read && block() == 0) p.scratch.load(0);      // [is read]
      if (p.fault == Fault::block_overwrites_read && block() == 1) p.scratch.store(0, 1);  // [is overwritten]
    }
  }
};

// Block-wide sums, fused multiply-adds and every width of shuffle.
struct Sums {
  struct Params {
    global<const float> x;
    global<float> y;
  };
  static constexpr const char* name = "test_sums";
  static constexpr int max_threads = 256, min_blocks = 1;
  SIMT_DEVICE static void run(const Params& p) {
    const auto scratch = shared_array<float>(0, threads() / warp_size);
    const float v = p.x.load(thread());
    float out = block_sum(v, scratch) + block_max(v, scratch);
    for (int width = 1; width <= 32; width *= 2)
      out = fma(shuffle(v, 3, width), 1.5f, out) + shuffle_up(v, 2, width) - shuffle_down(v, 5, width) * 0.25f;
    if (any(v > 0.5f)) out += static_cast<float>(ballot(v > 0.25f) & 0xffu);
    p.y.store(thread(), out);
  }
};

// D = A B + C by one warp. A, B and C are row-major in global memory; `from_shared` brings A and B to shared memory,
// row by row or column by column, and loads the fragments from there by ldmatrix.
enum class From { global, shared_natural, shared_other };
template <class E>
struct Product {
  using Shape = MmaShape<E>;
  using Sum = typename Shape::Accumulator;
  static constexpr int m = Shape::m, n = Shape::n, k = Shape::k;
  struct Params {
    global<const E> a, b;
    global<const Sum> c;
    global<Sum> d;
    From from;
    int pitch;  // of the natural layout
    Fault fault;
  };
  static constexpr const char* name = "test_product";
  static constexpr int max_threads = 32, min_blocks = 1;
  SIMT_DEVICE static void run(const Params& p) {
    FragmentA<E> a;
    FragmentB<E> b;
    Accumulator<E> sum;
    SIMT_UNROLL
    for (int i = 0; i < sum.count; ++i) sum.set(i, p.c.load(sum.row(i) * n + sum.col(i)));
    if (p.from == From::global) {
      SIMT_UNROLL
      for (int i = 0; i < a.count; ++i) {
        if (p.fault == Fault::not_given && i == a.count - 1 && lane() == 9) continue;
        const int row = p.fault == Fault::wrong_place ? lane() % 4 : a.row(i);
        a.set_at(i, row, a.col(i), p.a.load(row * k + a.col(i)));  // [wrong place]
      }
      SIMT_UNROLL
      for (int i = 0; i < b.count; ++i) b.set_at(i, b.row(i), b.col(i), p.b.load(b.row(i) * n + b.col(i)));
    }
    if constexpr (sizeof(E) <= 4) {
      if (p.from == From::shared_natural) {
        const auto x = shared_array<E>(0, m * p.pitch), y = shared_array<E>(2048, n * p.pitch);
        for (int i = lane(); i < m * k; i += warp_size) x.store(i / k * p.pitch + i % k, p.a.load(i));
        for (int i = lane(); i < k * n; i += warp_size) y.store(i % n * p.pitch + i / n, p.b.load(i));
        warp_barrier();
        const int pitch = p.pitch, skew = p.fault == Fault::misaligned_matrix;
        load_matrix_rows(a, x, [=](int row, int col) { return row * pitch + col + skew; });  // [matrix load]
        load_matrix_columns(b, y, [=](int row, int col) { return col * pitch + row; });
      }
    }
    if constexpr (sizeof(E) == 2) {
      if (p.from == From::shared_other) {
        const auto x = shared_array<E>(0, k * 24), y = shared_array<E>(2048, k * 24);
        for (int i = lane(); i < m * k; i += warp_size) x.store(i % k * 24 + i / k, p.a.load(i));
        for (int i = lane(); i < k * n; i += warp_size) y.store(i / n * 24 + i % n, p.b.load(i));
        warp_barrier();
        load_matrix_columns(a, x, [](int row, int col) { return col * 24 + row; });
        load_matrix_rows(b, y, [](int row, int col) { return row * 24 + col; });
      }
    }
    mma(sum, a, b);  // [mma]
    SIMT_UNROLL
    for (int i = 0; i < sum.count; ++i) p.d.store(sum.row(i) * n + sum.col(i), sum.get(i));
  }
};

// D = A B + C in double for sixteen rows and Steps times four of depth, by one call of mma.
template <int Steps>
struct WideProduct {
  static constexpr int m = 16, n = 8, k = 4 * Steps;
  struct Params {
    global<const double> a, b, c;  // row-major
    global<double> d;
  };
  static constexpr const char* name = "test_wide_product";
  static constexpr int max_threads = 32, min_blocks = 1;
  SIMT_DEVICE static void run(const Params& p) {
    FragmentA<double> a[Steps][2];
    FragmentB<double> b[Steps];
    Accumulator<double> sum[2];
    SIMT_UNROLL
    for (int s = 0; s < Steps; ++s) {
      b[s].set(0, p.b.load((4 * s + b[s].row(0)) * n + b[s].col(0)));
      SIMT_UNROLL
      for (int h = 0; h < 2; ++h) a[s][h].set(0, p.a.load((8 * h + a[s][h].row(0)) * k + 4 * s + a[s][h].col(0)));
    }
    SIMT_UNROLL
    for (int h = 0; h < 2; ++h) {
      SIMT_UNROLL
      for (int i = 0; i < 2; ++i) sum[h].set(i, p.c.load((8 * h + sum[h].row(i)) * n + sum[h].col(i)));
    }
    mma(sum, a, b);
    SIMT_UNROLL
    for (int h = 0; h < 2; ++h) {
      SIMT_UNROLL
      for (int i = 0; i < 2; ++i) p.d.store((8 * h + sum[h].row(i)) * n + sum[h].col(i), sum[h].get(i));
    }
  }
};

// Two fragments of B by one load, x1 and x2 loads, elements by registers, tf32: everything that Product leaves out.
struct MatrixLoads {
  struct Params {
    global<const float16> x;  // 16 x 16
    global<float16> rows, columns;
    global<unsigned> single, single_transposed;  // 32 registers each
  };
  static constexpr const char* name = "test_matrix_loads";
  static constexpr int max_threads = 32, min_blocks = 1;
  SIMT_DEVICE static void run(const Params& p) {
    const auto x = shared_array<float16>(0, 16 * 24);
    for (int i = lane(); i < 256; i += warp_size) x.store(i / 16 * 24 + i % 16, p.x.load(i));
    warp_barrier();
    FragmentB<float16> left, right;
    load_matrix_rows(left, right, x, [](int row, int col) { return row * 24 + col; });
    SIMT_UNROLL
    for (int i = 0; i < left.count; ++i) {
      p.rows.store(left.row(i) * 16 + left.col(i), left.get(i));
      p.rows.store(right.row(i) * 16 + 8 + right.col(i), right.get(i));
    }
    load_matrix_columns(left, right, x, [](int row, int col) { return col * 24 + row; });
    SIMT_UNROLL
    for (int i = 0; i < left.count; ++i) {
      p.columns.store(left.row(i) * 16 + left.col(i), left.get(i));
      p.columns.store(right.row(i) * 16 + 8 + right.col(i), right.get(i));
    }
    p.single.store(lane(), load_matrices<1, false>(x, lane() % 8 * 24)[0]);
    p.single_transposed.store(lane(), load_matrices<1, true>(x, lane() % 8 * 24)[0]);
  }
};

}  // namespace freqrank::machine_tests
