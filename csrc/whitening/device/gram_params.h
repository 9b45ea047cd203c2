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
};

// Defined in gram_mma.h and compiled in a file of its own (whitening/launch/).
template <class Queue>
void enqueue_gram(const GramDevicePlan& plan, const GramParams& p, Queue& queue);

}  // namespace freqrank::whitening::device
