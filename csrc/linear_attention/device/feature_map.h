#pragma once
// Feature maps on tensor cores: phi(x) = feature(x projection) * weights, for the tokens of a tile in shared memory.
//
// The projection lies in memory as the fragments that a product needs, each number as its 16-bit rounding and what that
// takes from it: two mma a fragment, which give 16 bits of it (22 for float16). A warp makes `own` features of all
// tokens of the tile; for a softmax the warps tell each other the largest product and the sum of each token.

#include <limits>

#include "linear_attention/device/tiles.h"

namespace freqrank::linear_attention::device {

template <class E, int Chunk, int Depth, int Warps>
struct FeatureTile {
  static constexpr int own = Depth / Warps, own_tiles = own / 8, row_tiles = Chunk / 16;
  static constexpr int exchange = 2 * Chunk * Warps;  // floats: largest products, and sums
  using Sum = simt::Accumulator<E>;
  struct Products {
    Sum at[row_tiles][own_tiles];
  };

  // The row that a lane has as its `half` of 16 rows, and the feature.
  SIMT_DEVICE static int row_of(int r, int half) { return r * 16 + simt::opaque(simt::lane()) / 4 + 8 * half; }
  SIMT_DEVICE static int feature_of(int n, int side) {
    return simt::warp() * own + n * 8 + simt::opaque(simt::lane()) % 4 * 2 + side;
  }

  // y = tile projection, for a map of p.heads.
  SIMT_DEVICE static void multiply(const MapParams& p, int head, simt::shared<E> tile, Products& y) {
    SIMT_UNROLL
    for (int r = 0; r < row_tiles; ++r) {
      SIMT_UNROLL
      for (int n = 0; n < own_tiles; ++n) y.at[r][n].fill(0.0f);
    }
    const auto fragments = p.fragments.template as<E>();
    const int here = simt::opaque(0);
    SIMT_NO_UNROLL
    for (int d = 0; d < p.channel_tiles; ++d) {
      const Index from = fragment_at(head, d, simt::warp() * own_tiles);
      simt::pack<E, 8> numbers[own_tiles];
      SIMT_UNROLL
      for (int n = 0; n < own_tiles; ++n) numbers[n] = fragments.template load_vector<8>(from + n * 32 * 8);
      SIMT_UNROLL
      for (int r = 0; r < row_tiles; ++r) {
        simt::FragmentA<E> left;
        simt::load_matrix_rows(left, tile,
                               [&](int i, int c) { return swizzled<Depth>(r * 16 + i + here, d * 16 + c); });
        SIMT_UNROLL
        for (int n = 0; n < own_tiles; ++n) {
          simt::mma(y.at[r][n], left, fragment(numbers[n], 0));
          simt::mma(y.at[r][n], left, fragment(numbers[n], 4));
        }
      }
    }
  }

  // Where a lane's part of a fragment of the projection begins: rows 16 d of it, columns 8 n.
  SIMT_DEVICE static Index fragment_at(int head, int d, int n) {
    return ((Index{head} * (Depth / 16) + d) * (Depth / 8) + n) * 32 * 8 + simt::lane() * 8;
  }
  // The rounded numbers (first = 0), or what rounding takes from them (4).
  SIMT_DEVICE static simt::FragmentB<E> fragment(const simt::pack<E, 8>& numbers, int first) {
    simt::FragmentB<E> b;
    SIMT_UNROLL
    for (int i = 0; i < 4; i += 2) {
      simt::pack<E, 2> x;
      x[0] = numbers[first + i];
      x[1] = numbers[first + i + 1];
      b.set_pack(i, x);
    }
    return b;
  }

  // Where a warp's number for a row is, those of four warps together.
  SIMT_DEVICE static int exchanged(int which, int row, int warp) {
    return ((which * (Warps / 4) + warp / 4) * Chunk + row) * 4 + warp % 4;
  }

  // y becomes exp(y - the largest of the warp's own features of the token). A barrier has to follow.
  SIMT_DEVICE static void exponentiate(const MapParams& p, Products& y, simt::shared<float> exchange) {
    SIMT_UNROLL
    for (int r = 0; r < row_tiles; ++r) {
      SIMT_UNROLL
      for (int h = 0; h < 2; ++h) {
        float most = p.feature == Feature::exp ? 0.0f : -std::numeric_limits<float>::infinity();
        if (p.feature != Feature::exp) {
          SIMT_UNROLL
          for (int n = 0; n < own_tiles; ++n) {
            SIMT_UNROLL
            for (int k = 0; k < 2; ++k) {
              const float x = y.at[r][n].get(2 * h + k);
              if (feature_of(n, k) < p.features && x > most) most = x;
            }
          }
          SIMT_UNROLL
          for (int step = 1; step < 4; step *= 2) {
            const float other = simt::shuffle_xor(most, step);
            most = other > most ? other : most;
          }
        }
        // where all are -inf, their exp is to be 0
        const float from = most < -std::numeric_limits<float>::max() ? 0.0f : most;
        float sum = 0;
        SIMT_UNROLL
        for (int n = 0; n < own_tiles; ++n) {
          SIMT_UNROLL
          for (int k = 0; k < 2; ++k) {
            const float x = feature_of(n, k) < p.features ? simt::exp(y.at[r][n].get(2 * h + k) - from) : 0.0f;
            y.at[r][n].set(2 * h + k, x);
            sum += x;
          }
        }
        if (p.feature == Feature::exp) continue;
        sum += simt::shuffle_xor(sum, 1);
        sum += simt::shuffle_xor(sum, 2);
        if (simt::lane() % 4 == 0) {
          exchange.store(exchanged(0, row_of(r, h), simt::warp()), most);
          exchange.store(exchanged(1, row_of(r, h), simt::warp()), sum);
        }
      }
    }
  }

  // What a token's exp() of this warp is to be multiplied by; the four lanes that have the row share the work.
  SIMT_DEVICE static float factor(const MapParams& p, simt::shared<float> exchange, int row) {
    if (p.feature == Feature::exp) return 1.0f;
    const int lane = simt::opaque(simt::lane());
    float largest[Warps / 4], most = -std::numeric_limits<float>::infinity(), sum = 0;
    SIMT_UNROLL
    for (int i = 0; i < Warps / 4; ++i) {
      largest[i] = exchange.load(exchanged(0, row, 4 * i + lane % 4));
      most = largest[i] > most ? largest[i] : most;
    }
    SIMT_UNROLL
    for (int step = 1; step < 4; step *= 2) {
      const float other = simt::shuffle_xor(most, step);
      most = other > most ? other : most;
    }
    SIMT_UNROLL
    for (int i = 0; i < Warps / 4; ++i)
      sum = simt::fma(exchange.load(exchanged(1, row, 4 * i + lane % 4)), simt::exp(largest[i] - most), sum);
    sum += simt::shuffle_xor(sum, 1);
    sum += simt::shuffle_xor(sum, 2);
    return simt::exp(exchange.load(exchanged(0, row, simt::warp())) - most) / sum;
  }

  // Of a lane's features of 8.
  SIMT_DEVICE static simt::pack<float, 2> weights(const MapParams& p, int key_head, int n) {
    if (p.weights) return p.weights.template load_vector<2>(key_head * Depth + feature_of(n, 0));
    simt::pack<float, 2> one;
    one[0] = one[1] = 1.0f;
    return one;
  }
};

// What tensor cores need of a map: the projection [heads, channels, products] as fragments, and its transpose; the
// weights, to the depth. For softmax_pm the features are the products and after them their negatives. A thread makes
// what a lane has of a fragment.
struct PrepareMapKernel {
  static constexpr const char* name = "linear_attention_prepare_map";
  static constexpr int max_threads = 256, min_blocks = 4;
  struct Params {
    simt::global<const float> projection, weights;  // weights [key heads, features] may be null
    Index projection_stride[3], weights_stride[2];
    int heads, key_heads, channels, products, features, depth;
    bool is_float16;
    simt::global_bytes fragments, transposed;  // transposed may be null
    simt::global<float> padded_weights;        // [key heads, depth]

    SIMT_BOTH Index pieces() const { return Index{heads} * depth * depth / 4; }  // of one direction
    Index items() const { return pieces() * (transposed ? 2 : 1) + (weights ? Index{key_heads} * depth : 0); }
  };

  SIMT_DEVICE static void run(const Params& p) {
    Index i = simt::block() * max_threads + simt::thread();
    for (int direction = 0; direction < (p.transposed ? 2 : 1); ++direction) {
      if (i < p.pieces()) {
        if (p.is_float16) {
          store<float16>(p, direction == 1, i);
        } else {
          store<bfloat16>(p, direction == 1, i);
        }
        return;
      }
      i -= p.pieces();
    }
    if (!p.weights || i >= Index{p.key_heads} * p.depth) return;
    const Index head = i / p.depth, feature = i - head * p.depth;
    p.padded_weights.store(
        i, feature < p.features ? p.weights.load(head * p.weights_stride[0] + feature * p.weights_stride[1]) : 0.0f);
  }

  template <class E>
  SIMT_DEVICE static void store(const Params& p, bool transposed, Index i) {
    const int lane = static_cast<int>(i % 32), tiles = p.depth / 8;
    const int column = static_cast<int>(i / 32 % tiles) * 8 + lane / 4;
    const int row = static_cast<int>(i / 32 / tiles % (tiles / 2)) * 16 + lane % 4 * 2;
    const Index head = i / (32 * tiles * (tiles / 2));
    simt::pack<E, 8> out;
    SIMT_UNROLL
    for (int e = 0; e < 4; ++e) {
      const int here = row + e % 2 + e / 2 * 8;
      const float x = transposed ? number(p, head, column, here) : number(p, head, here, column);
      out[e] = simt::from_float<E>(x);
      out[4 + e] = simt::from_float<E>(x - simt::to_float(out[e]));
    }
    (transposed ? p.transposed : p.fragments).template as<E>().template store_vector<8>(8 * i, out);
  }

  SIMT_DEVICE static float number(const Params& p, Index head, int channel, int feature) {
    if (channel >= p.channels || feature >= p.features) return 0.0f;
    const int product = feature < p.products ? feature : feature - p.products;
    const float x = p.projection.load(head * p.projection_stride[0] + channel * p.projection_stride[1] +
                                      product * p.projection_stride[2]);
    return feature < p.products ? x : -x;
  }
};

template <class Queue>
void enqueue_prepare_map(const PrepareMapKernel::Params& p, Queue& queue) {
  const Index threads = PrepareMapKernel::max_threads;
  queue.template launch<PrepareMapKernel>({(p.items() + threads - 1) / threads, static_cast<int>(threads), 0}, p);
}

}  // namespace freqrank::linear_attention::device
