#pragma once
// Tiles of 16-bit tensors in shared memory, and the decay inside a chunk: what the tensor-core kernels share.

#include "linear_attention/device/params.h"

namespace freqrank::linear_attention::device {

// Where an element of a tile lies. Rows are permuted by 16-byte pieces, so that no eight rows below each other meet in
// the banks.
template <int Width>
SIMT_DEVICE int swizzled(int row, int column) {
  constexpr int pieces = Width / 8;
  static_assert(pieces % 4 == 0);
  const int turn = pieces >= 8 ? row % 8 : row / 2 % 4;
  return row * Width + (column / 8 ^ turn) * 8 + column % 8;
}

// 2^e as a float, for -126 <= e <= 127, and the e with 2^e <= x < 2^(e + 1); for what is no number or 0, 0.
SIMT_DEVICE float power_of_two(int e) { return simt::bits_as<float>(static_cast<unsigned>(e + 127) << 23); }
SIMT_DEVICE int exponent_of(float x) {
  const int e = static_cast<int>(simt::bits_as<unsigned>(x) >> 23 & 0xffu);
  return e == 0 || e == 255 ? 0 : e - 127;
}
// A power of two by which what is at most x stays below 2^12, well inside float16.
SIMT_DEVICE int shrink(float x) {
  const int e = exponent_of(x) - 11;
  return e < -100 ? -100 : e > 100 ? 100 : e;
}

// Rows of a chunk, `Width` columns from `column` on, by asynchronous copies where their alignment allows; what is
// masked or outside becomes 0 and is not read.
template <int Chunk, int Width, int Threads, class E>
SIMT_DEVICE void fetch_rows(const TokenParams<float>& p, const Matrix& m, simt::shared<E> to, Index batch, Index first,
                            int count, int head, int column) {
  const auto from = m.data.template as<E>();
  constexpr int pieces = Width / 8, step = Threads / pieces;
  static_assert(Threads % pieces == 0 && Chunk % step == 0);
  const int thread = simt::opaque(simt::thread());
  const int at = thread % pieces * 8, width = m.width - column;
  int row = thread / pieces;
  Index i = m.at(batch, first + row, head) + (column + at) * m.stride[3];
  if (m.pieces) {
    SIMT_UNROLL
    for (int k = 0; k < Chunk / step; ++k) {
      bool valid = row < count && at < width;
      if (p.mask && valid) valid = is_live(p, batch, first + row);
      simt::copy_async<16>(to, swizzled<Width>(row, at), from, i, valid);
      row += step;
      i += step * m.stride[1];
    }
  } else {
    SIMT_NO_UNROLL
    for (int k = 0; k < Chunk / step; ++k) {
      const bool valid = row < count && is_live(p, batch, first + row);
      simt::pack<E, 8> x;
      SIMT_UNROLL
      for (int e = 0; e < 8; ++e) x[e] = valid && at + e < width ? from.load(i + e * m.stride[3]) : E{0};
      to.store_vector(swizzled<Width>(row, at), x);
      row += step;
      i += step * m.stride[1];
    }
  }
}

// The log decays of a chunk's tokens, by one warp, `each` in a row with each lane.
template <int Chunk>
struct ChunkDecays {
  static constexpr int each = Chunk / 32;
  using Numbers = simt::pack<float, each>;

  SIMT_DEVICE static int token(int k) { return simt::lane() * each + k; }

  // Starts to bring them into shared memory, and says there which tokens live.
  SIMT_DEVICE static void fetch(const TokenParams<float>& p, simt::shared<float> decays, simt::shared<float> live,
                                Index batch, Index first, int count, int state_head) {
    Numbers lives;
    SIMT_UNROLL
    for (int k = 0; k < each; ++k) {
      const int t = token(k);
      const bool lives_here = t < count && is_live(p, batch, first + t);
      lives[k] = lives_here ? 1.0f : 0.0f;
      if (p.decay == Decay::per_token)
        simt::copy_async<4>(
            decays, t, p.log_decay,
            batch * p.decay_stride[0] + (first + t) * p.decay_stride[1] + state_head * p.decay_stride[2], lives_here);
    }
    live.store_vector(token(0), lives);
  }

  // Sums up to and including each token, once they are there; which of them live.
  SIMT_DEVICE static Numbers sum_up(const TokenParams<float>& p, simt::shared<float> decays, simt::shared<float> live,
                                    int state_head, Numbers& lives) {
    lives = live.template load_vector<each>(token(0));
    Numbers sums;
    float sum = 0;
    SIMT_UNROLL
    for (int k = 0; k < each; ++k) {
      float g = 0;
      if (p.decay == Decay::per_token) g = decays.load(token(k));
      if (p.decay == Decay::per_head) g = p.log_decay.load(state_head * p.decay_stride[2]);
      sum += lives[k] != 0.0f ? bounded_log_decay(g) : 0.0f;
      sums[k] = sum;
    }
    SIMT_UNROLL
    for (int step = 1; step < 32; step *= 2) {
      const float other = simt::shuffle_up(sum, step);
      if (simt::lane() >= step) sum += other;
    }
    sum = simt::shuffle_up(sum, 1);
    SIMT_UNROLL
    for (int k = 0; k < each; ++k) sums[k] += simt::lane() == 0 ? 0.0f : sum;
    return sums;
  }
};

}  // namespace freqrank::linear_attention::device
