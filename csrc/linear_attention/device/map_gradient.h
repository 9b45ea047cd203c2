#pragma once
// From the gradient of features to that of the channels, and of the map itself. With s the features without weights w,
// g the gradient of phi = s w:
//
//   softmax   dy = s (w g - sum of s w g)      exp   dy = s w g      dx = dy projection^T
//   d projection = sum of x^T dy               d weights = sum of s g
//
// A block takes tiles of 64 tokens of one head, a warp 16 features, and for dx 16 channels, of all tokens of a tile.

#include "linear_attention/device/feature_map.h"

namespace freqrank::linear_attention::device {

struct MapGradientParams : TokenParams<float> {
  Index batch, time;
  int heads, parts;  // a head's tiles are dealt out to so many blocks
  MapParams map;
  simt::const_global_bytes transposed;  // fragments of the projection's transpose
  Matrix x;
  simt::global<const float> gradient;  // [batch, time, heads, features]
  Output dx;
  // What each block adds up, [slots, channels, features] and [slots, features]; null where nobody asks. A slot is
  // `first_slot` + part, after those of the key head's other queries.
  simt::global<float> projection_sums, weight_sums;
  int group, slots_per_key_head, first_slot;
};

template <class E, int Depth>
struct MapGradient {
  using Params = MapGradientParams;
  static constexpr int chunk = 64, warps = Depth / 16, max_threads = 32 * warps;
  static constexpr int min_blocks = Depth == 64 ? 3 : 1;
  static constexpr bool scaled = std::is_same_v<E, float16>;
  static constexpr const char* names[2][2] = {
      {"linear_attention_map_gradient_bfloat16_64", "linear_attention_map_gradient_bfloat16_128"},
      {"linear_attention_map_gradient_float16_64", "linear_attention_map_gradient_float16_128"}};
  static constexpr const char* name = names[scaled][Depth == 128];

  using Features = FeatureTile<E, chunk, Depth, warps>;
  using Sum = simt::Accumulator<E>;
  static constexpr int row_tiles = chunk / 16, own_tiles = Features::own_tiles, channel_tiles = Depth / 16;
  static_assert(Features::own == 16);

  static constexpr int tile_bytes = chunk * Depth * 2, exchange_at = 3 * tile_bytes;
  static constexpr int dots_at = exchange_at + Features::exchange * 4, largest_at = dots_at + warps * chunk * 4;
  static constexpr int shared_bytes = largest_at + warps * 4;

  SIMT_DEVICE static simt::shared<E> tile(int i) { return simt::shared_array<E>(i * tile_bytes, chunk * Depth); }
  SIMT_DEVICE static simt::shared<E> x() { return tile(0); }
  // dy, rounded, and what rounding takes from it; float16's range is too small for it: divided by a power of two.
  SIMT_DEVICE static simt::shared<E> dy(bool rest) { return tile(rest ? 2 : 1); }
  SIMT_DEVICE static simt::shared<float> exchange() {
    return simt::shared_array<float>(exchange_at, Features::exchange);
  }
  SIMT_DEVICE static simt::shared<float> dots() { return simt::shared_array<float>(dots_at, warps * chunk); }
  SIMT_DEVICE static simt::shared<float> largest() { return simt::shared_array<float>(largest_at, warps); }

  struct Tokens {
    Index batch, first;
    int head, key_head, count;
  };
  // What a thread adds up over its tiles.
  struct Totals {
    Sum projection[channel_tiles][own_tiles];
    float weights[own_tiles][2];
  };

  SIMT_DEVICE static void run(const Params& p) {
    const int part = static_cast<int>(simt::block() % p.parts);
    Tokens at;
    at.head = static_cast<int>(simt::block() / p.parts);
    at.key_head = p.map.key_head(at.head, p.heads);
    Totals totals;
    SIMT_UNROLL
    for (int n = 0; n < own_tiles; ++n) {
      SIMT_UNROLL
      for (int c = 0; c < channel_tiles; ++c) totals.projection[c][n].fill(0.0f);
      totals.weights[n][0] = totals.weights[n][1] = 0;
    }
    const Index tiles = (p.time + chunk - 1) / chunk;
    SIMT_NO_UNROLL
    for (Index i = part; i < p.batch * tiles; i += p.parts) {
      at.batch = i / tiles;
      at.first = (i - at.batch * tiles) * chunk;
      at.count = p.time - at.first < chunk ? static_cast<int>(p.time - at.first) : chunk;
      fetch_rows<chunk, Depth, max_threads>(p, p.x, x(), at.batch, at.first, at.count, at.head, 0);
      simt::copy_commit();
      simt::copy_wait<0>();
      simt::barrier();
      const float grown = make_dy(p, at, totals);
      simt::barrier();
      Sum dx[row_tiles][own_tiles];
      multiply_back(p, at, dx);
      if (p.projection_sums) add_products(p, totals, grown);
      simt::barrier();
      store_dx(p, at, dx, grown);
      simt::barrier();
    }
    store_totals(p, at, part, totals);
  }

  // Returns what dy was divided by.
  SIMT_DEVICE static float make_dy(const Params& p, const Tokens& at, Totals& totals) {
    typename Features::Products y;
    Features::multiply(p.map, p.map.head(at.head, p.heads), x(), y);
    Features::exponentiate(p.map, y, exchange());
    simt::barrier();
    const unsigned live = live_rows(p, at);
    const bool centred = p.map.feature != Feature::exp;
    SIMT_UNROLL
    for (int r = 0; r < row_tiles; ++r) {
      SIMT_UNROLL
      for (int h = 0; h < 2; ++h) {
        const int row = Features::row_of(r, h);
        const float factor = Features::factor(p.map, exchange(), row);
        float dot = 0;
        SIMT_UNROLL
        for (int n = 0; n < own_tiles; ++n) {
          const auto g = gradient(p, at, row, live >> (2 * r + h) & 1, n);
          const auto w = Features::weights(p.map, at.key_head, n);
          SIMT_UNROLL
          for (int k = 0; k < 2; ++k) {
            const float s = live >> (2 * r + h) & 1 ? y.at[r][n].get(2 * h + k) * factor : 0.0f;
            y.at[r][n].set(2 * h + k, s);
            totals.weights[n][k] = simt::fma(s, g[k], totals.weights[n][k]);
            dot = simt::fma(s * w[k], g[k], dot);
          }
        }
        dot += simt::shuffle_xor(dot, 1);
        dot += simt::shuffle_xor(dot, 2);
        if (simt::lane() % 4 == 0) dots().store(simt::warp() * chunk + row, dot);
      }
    }
    simt::barrier();
    float most = 0;
    SIMT_UNROLL
    for (int r = 0; r < row_tiles; ++r) {
      SIMT_UNROLL
      for (int h = 0; h < 2; ++h) {
        const int row = Features::row_of(r, h);
        float dot = 0;
        SIMT_UNROLL
        for (int w = 0; w < warps; ++w) dot += centred ? dots().load(w * chunk + row) : 0.0f;
        SIMT_UNROLL
        for (int n = 0; n < own_tiles; ++n) {
          const auto g = gradient(p, at, row, live >> (2 * r + h) & 1, n);  // again: registers would not do
          const auto w = Features::weights(p.map, at.key_head, n);
          SIMT_UNROLL
          for (int k = 0; k < 2; ++k) {
            const float d = y.at[r][n].get(2 * h + k) * (w[k] * g[k] - dot);
            y.at[r][n].set(2 * h + k, d);
            const float size = d < 0 ? -d : d;
            most = size > most ? size : most;
          }
        }
      }
    }
    int exponent = 0;
    if constexpr (scaled) {
      most = simt::warp_max(most);
      if (simt::lane() == 0) largest().store(simt::warp(), most);
      simt::barrier();
      SIMT_UNROLL
      for (int w = 0; w < warps; ++w) {
        const float other = largest().load(w);
        most = other > most ? other : most;
      }
      exponent = shrink(most);
    }
    const float shrunk = power_of_two(-exponent);
    SIMT_UNROLL
    for (int r = 0; r < row_tiles; ++r) {
      SIMT_UNROLL
      for (int h = 0; h < 2; ++h) {
        SIMT_UNROLL
        for (int n = 0; n < own_tiles; ++n) {
          simt::pack<E, 2> d, rest;
          SIMT_UNROLL
          for (int k = 0; k < 2; ++k) {
            const float x = y.at[r][n].get(2 * h + k) * shrunk;
            d[k] = simt::from_float<E>(x);
            rest[k] = simt::from_float<E>(x - simt::to_float(d[k]));
          }
          const int to = swizzled<Depth>(Features::row_of(r, h), Features::feature_of(n, 0));
          dy(false).store_vector(to, d);
          dy(true).store_vector(to, rest);
        }
      }
    }
    return power_of_two(exponent);
  }

  // A bit for each of a lane's rows.
  SIMT_DEVICE static unsigned live_rows(const Params& p, const Tokens& at) {
    unsigned live = 0;
    SIMT_UNROLL
    for (int i = 0; i < 2 * row_tiles; ++i) {
      const int row = Features::row_of(i / 2, i % 2);
      if (row < at.count && is_live(p, at.batch, at.first + row)) live |= 1u << i;
    }
    return live;
  }

  SIMT_DEVICE static simt::pack<float, 2> gradient(const Params& p, const Tokens& at, int row, bool live, int n) {
    simt::pack<float, 2> g = {};
    const int feature = Features::feature_of(n, 0);
    const auto from = p.gradient + ((at.batch * p.time + at.first) * p.heads + at.head) * p.map.features;
    const int at_row = row * (p.heads * p.map.features) + feature;
    if (live && feature < p.map.features) {
      if (p.map.features % 2 == 0) return from.template load_vector<2>(at_row);
      g[0] = from.load(at_row);
      if (feature + 1 < p.map.features) g[1] = from.load(at_row + 1);
    }
    return g;
  }

  // dx = dy projection^T, still divided by the power of two: 16 channels a warp.
  SIMT_DEVICE static void multiply_back(const Params& p, const Tokens& at, Sum (&dx)[row_tiles][own_tiles]) {
    SIMT_UNROLL
    for (int r = 0; r < row_tiles; ++r) {
      SIMT_UNROLL
      for (int n = 0; n < own_tiles; ++n) dx[r][n].fill(0.0f);
    }
    const auto fragments = p.transposed.template as<E>();
    const int here = simt::opaque(0);
    SIMT_NO_UNROLL
    for (int d = 0; d < (p.map.features + 15) / 16; ++d) {
      const Index from = Features::fragment_at(p.map.head(at.head, p.heads), d, simt::warp() * own_tiles);
      simt::pack<E, 8> numbers[own_tiles];
      SIMT_UNROLL
      for (int n = 0; n < own_tiles; ++n) numbers[n] = fragments.template load_vector<8>(from + n * 32 * 8);
      SIMT_UNROLL
      for (int r = 0; r < row_tiles; ++r) {
        const auto place = [&](int i, int c) { return swizzled<Depth>(r * 16 + i + here, d * 16 + c); };
        simt::FragmentA<E> left, rest;
        simt::load_matrix_rows(left, dy(false), place);
        simt::load_matrix_rows(rest, dy(true), place);
        SIMT_UNROLL
        for (int n = 0; n < own_tiles; ++n) {
          simt::mma(dx[r][n], left, Features::fragment(numbers[n], 0));
          simt::mma(dx[r][n], left, Features::fragment(numbers[n], 4));
          simt::mma(dx[r][n], rest, Features::fragment(numbers[n], 0));
        }
      }
    }
  }

  // x^T dy: the warp's features of all channels.
  SIMT_DEVICE static void add_products(const Params& p, Totals& totals, float grown) {
    const int here = simt::opaque(0);
    SIMT_UNROLL
    for (int c = 0; c < channel_tiles; ++c) {
      if (c >= p.map.channel_tiles) break;
      Sum sum[own_tiles];
      SIMT_UNROLL
      for (int n = 0; n < own_tiles; ++n) sum[n].fill(0.0f);
      SIMT_NO_UNROLL
      for (int t = 0; t < chunk; t += 16) {
        simt::FragmentA<E> left;
        simt::load_matrix_columns(left, x(), [&](int i, int k) { return swizzled<Depth>(t + k + here, c * 16 + i); });
        SIMT_UNROLL
        for (int rest = 0; rest < 2; ++rest) {
          simt::FragmentB<E> right[own_tiles];
          simt::load_matrix_rows(right[0], right[1], dy(rest != 0), [&](int i, int k) {
            return swizzled<Depth>(t + i + here, simt::warp() * Features::own + k);
          });
          SIMT_UNROLL
          for (int n = 0; n < own_tiles; ++n) simt::mma(sum[n], left, right[n]);
        }
      }
      SIMT_UNROLL
      for (int n = 0; n < own_tiles; ++n) {
        SIMT_UNROLL
        for (int i = 0; i < Sum::count; ++i)
          totals.projection[c][n].set(i, simt::fma(sum[n].get(i), grown, totals.projection[c][n].get(i)));
      }
    }
  }

  // By way of shared memory, for whole pieces of rows.
  SIMT_DEVICE static void store_dx(const Params& p, const Tokens& at, const Sum (&dx)[row_tiles][own_tiles],
                                   float grown) {
    SIMT_UNROLL
    for (int r = 0; r < row_tiles; ++r) {
      SIMT_UNROLL
      for (int h = 0; h < 2; ++h) {
        SIMT_UNROLL
        for (int n = 0; n < own_tiles; ++n) {
          simt::pack<E, 2> out;
          SIMT_UNROLL
          for (int k = 0; k < 2; ++k) out[k] = simt::from_float<E>(dx[r][n].get(2 * h + k) * grown);
          x().store_vector(swizzled<Depth>(Features::row_of(r, h), Features::feature_of(n, 0)), out);
        }
      }
    }
    simt::barrier();
    const auto to = p.dx.data.template as<E>();
    SIMT_NO_UNROLL
    for (int i = simt::thread(); i < chunk * (Depth / 8); i += max_threads) {
      const int row = i / (Depth / 8), channel = i % (Depth / 8) * 8;
      if (row >= at.count || channel >= p.dx.width) continue;
      const auto out = x().template load_vector<8>(swizzled<Depth>(row, channel));
      const Index begin = p.dx.at(at.batch, at.first + row, at.head) + channel * p.dx.stride[3];
      if (p.dx.pieces) {
        to.store_vector(begin, out);
      } else {
        SIMT_UNROLL
        for (int e = 0; e < 8; ++e)
          if (channel + e < p.dx.width) to.store(begin + e * p.dx.stride[3], out[e]);
      }
    }
  }

  SIMT_DEVICE static void store_totals(const Params& p, const Tokens& at, int part, const Totals& totals) {
    const Index slot = Index{at.key_head} * p.slots_per_key_head + p.first_slot + at.head % p.group * p.parts + part;
    const int features = p.map.features, channels = p.x.width;
    SIMT_UNROLL
    for (int n = 0; n < own_tiles; ++n) {
      if (p.projection_sums) {
        SIMT_UNROLL
        for (int c = 0; c < channel_tiles; ++c) {
          SIMT_UNROLL
          for (int i = 0; i < Sum::count; ++i) {
            const int channel = c * 16 + Sum::row(i), feature = Features::feature_of(n, 0) + i % 2;
            if (channel < channels && feature < features)
              p.projection_sums.store((slot * channels + channel) * features + feature, totals.projection[c][n].get(i));
          }
        }
      }
      if (!p.weight_sums) continue;
      SIMT_UNROLL
      for (int k = 0; k < 2; ++k) {
        float sum = totals.weights[n][k];
        SIMT_UNROLL
        for (int step = 4; step < 32; step *= 2) sum += simt::shuffle_xor(sum, step);
        const int feature = Features::feature_of(n, k);
        if (simt::lane() < 4 && feature < features) p.weight_sums.store(slot * features + feature, sum);
      }
    }
  }
};

// The gradients of the projection and of the weights, from all blocks' sums.
struct MapSumKernel {
  static constexpr const char* name = "linear_attention_map_sum";
  static constexpr int max_threads = 256, min_blocks = 4;
  struct Params {
    int key_heads, slots;  // slots of a key head
    int channels, products, features;
    int projection_heads, weight_heads;  // 1, for all key heads together, or key_heads; 0 where there are no weights
    simt::global<const float> projection_sums, weight_sums;
    simt::global<float> projection, weights;
    Index projection_stride[3], weights_stride[2];
  };

  SIMT_DEVICE static void run(const Params& p) {
    Index i = simt::block() * max_threads + simt::thread();
    const Index of_projection = Index{p.projection_heads} * p.channels * p.products;
    if (i < of_projection) {
      const int product = static_cast<int>(i % p.products), channel = static_cast<int>(i / p.products % p.channels);
      const int head = static_cast<int>(i / p.products / p.channels), at = channel * p.features + product;
      const Index size = Index{p.channels} * p.features;
      double sum = total(p, p.projection_sums, p.projection_heads, head, size, at);
      // products come back negated
      if (p.features > p.products) sum -= total(p, p.projection_sums, p.projection_heads, head, size, at + p.products);
      p.projection.store(
          head * p.projection_stride[0] + channel * p.projection_stride[1] + product * p.projection_stride[2],
          static_cast<float>(sum));
      return;
    }
    i -= of_projection;
    if (i >= Index{p.weight_heads} * p.features) return;
    const int head = static_cast<int>(i / p.features), feature = static_cast<int>(i % p.features);
    p.weights.store(head * p.weights_stride[0] + feature * p.weights_stride[1],
                    static_cast<float>(total(p, p.weight_sums, p.weight_heads, head, p.features, feature)));
  }

  SIMT_DEVICE static double total(const Params& p, simt::global<const float> sums, int heads, int head, Index size,
                                  Index at) {
    const Index first = heads == 1 ? 0 : Index{head} * p.slots;
    const Index count = heads == 1 ? Index{p.key_heads} * p.slots : p.slots;
    double sum = 0;
    for (Index s = first; s < first + count; ++s) sum += static_cast<double>(sums.load(s * size + at));
    return sum;
  }
};

template <class E, class Queue>
void enqueue_map_gradient(int depth, const MapGradientParams& p, Queue& queue) {
  const Index blocks = Index{p.heads} * p.parts;
  if (depth == 64) {
    using Kernel = MapGradient<E, 64>;
    queue.template launch<Kernel>({blocks, Kernel::max_threads, Kernel::shared_bytes}, p);
  } else {
    using Kernel = MapGradient<E, 128>;
    queue.template launch<Kernel>({blocks, Kernel::max_threads, Kernel::shared_bytes}, p);
  }
}

template <class Queue>
void enqueue_map_sum(const MapSumKernel::Params& p, Queue& queue) {
  const Index items = Index{p.projection_heads} * p.channels * p.products + Index{p.weight_heads} * p.features;
  const Index threads = MapSumKernel::max_threads;
  queue.template launch<MapSumKernel>({(items + threads - 1) / threads, static_cast<int>(threads), 0}, p);
}

}  // namespace freqrank::linear_attention::device
