#pragma once
// What the Gram kernels are given.

#include "simt/simt.h"
#include "whitening/gram_device.h"

namespace freqrank::whitening::device {

using simt::Index;

// A batch of tensors [tokens, columns], in elements.
struct GramOperand {
  simt::const_global_bytes data;
  Index token_stride = 0, column_stride = 0, batch_strides[kGramBatchSizes] = {};
  Dtype dtype = Dtype::float32;
  Index columns = 0;
  bool pieces = false;  // every 16 bytes of a token from a multiple of 16 bytes on lie together, aligned
};

struct GramParams {
  GramOperand x, y;
  bool symmetric = false;             // Y is X
  simt::global<const double> weight;  // may be null
  Index weight_stride = 0, weight_batch_strides[kGramBatchSizes] = {};
  simt::global<double> out;
  Index out_row_stride = 0, out_column_stride = 0, out_batch_strides[kGramBatchSizes] = {};
  bool accumulate = false;
  Index batch_sizes[kGramBatchSizes] = {};
  int batch_dims = 0;
  Index tokens = 0, split_tokens = 0;
  int splits = 1, tiles_across = 0;
  Index tiles = 0;             // of one matrix
  simt::global<double> parts;  // [batch, splits, tiles, tile] if the tokens are split
  // Sums of integers only: exponents of each column's numbers, [batch, chunks, columns]; those of Y are X's if it is X.
  Index chunks = 0;
  simt::global<int> x_exponents, y_exponents;
};

// Where a batch's matrix begins.
SIMT_DEVICE Index gram_offset(const GramParams& p, Index batch, const Index (&strides)[kGramBatchSizes]) {
  Index offset = 0;
  SIMT_NO_UNROLL
  for (int d = p.batch_dims - 1; d >= 0; --d) {
    offset += batch % p.batch_sizes[d] * strides[d];
    batch /= p.batch_sizes[d];
  }
  return offset;
}

// Which tile of which matrix. Of the tiles of Y = X, `Ratio` of which lie side by side where one lies below another,
// only those are counted that reach the diagonal or lie below it.
struct GramPlace {
  int batch, down, across;  // there are fewer tiles than a grid has blocks
};
template <int Ratio>
SIMT_DEVICE GramPlace gram_place(const GramParams& p, Index task) {
  const int batch = static_cast<int>(task / p.tiles);
  const int tile = static_cast<int>(task - batch * p.tiles);
  if (!p.symmetric) return {batch, tile / p.tiles_across, tile % p.tiles_across};
  // Ratio * i (i + 1) / 2 tiles lie above those that are i down
  int i = static_cast<int>((simt::sqrt(8.0f * static_cast<float>(tile / Ratio) + 1.0f) - 1.0f) * 0.5f);
  while (Ratio * (i * (i + 1) / 2) > tile) --i;
  while (Ratio * ((i + 1) * (i + 2) / 2) <= tile) ++i;
  return {batch, i, tile - Ratio * (i * (i + 1) / 2)};
}

// Defined in gram_mma.h and gram_integers.h and compiled in files of their own (whitening/launch/).
template <class Queue>
void enqueue_gram_mma(const GramDevicePlan& plan, const GramParams& p, Queue& queue);
template <class Queue>
void enqueue_gram_integers(const GramDevicePlan& plan, const GramParams& p, Queue& queue);

}  // namespace freqrank::whitening::device
