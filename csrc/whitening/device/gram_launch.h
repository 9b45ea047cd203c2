#pragma once
// Runs a plan of gram_device.h on a queue: a CUDA stream or the host executor. Allocates nothing, waits for nothing.

#include <cstdint>

#include "whitening/device/gram_params.h"

namespace freqrank::whitening::device {

template <class Queue>
class GramCall {
 public:
  GramCall(const GramDevicePlan& plan, const GramArguments& arguments, void* workspace, Queue& queue)
      : plan_(plan), problem_(plan.problem), arguments_(arguments), workspace_(workspace), queue_(queue) {}

  void run() {
    const GramDeviceProblem& s = problem_;
    if (plan_.blocks == 0) return;
    GramParams p;
    keep(s.batch.sizes.data(), p.batch_sizes);
    for (const auto size : s.batch.sizes) p.batch_dims += size != 1;
    p.x = operand(arguments_.x, s.rows);
    p.y = s.symmetric ? p.x : operand(arguments_.y, s.columns);
    p.symmetric = s.symmetric;
    if (arguments_.weight != nullptr) {
      keep(arguments_.weight_batch_strides, p.weight_batch_strides);
      p.weight_stride = arguments_.weight_stride;
      const Extent e = extent(arguments_.weight_batch_strides, s.tokens, p.weight_stride, 1, 0);
      p.weight = queue_.view(arguments_.weight, e.begin, e.end);
    }
    const MatrixBatch& out = arguments_.out;
    keep(out.batch_strides, p.out_batch_strides);
    p.out_row_stride = out.row_stride, p.out_column_stride = out.column_stride;
    const Extent e = extent(out.batch_strides, s.rows, out.row_stride, s.columns, out.column_stride);
    p.out = queue_.view(static_cast<double*>(out.data), e.begin, e.end);
    p.accumulate = arguments_.accumulate;
    p.tokens = s.tokens, p.split_tokens = plan_.split_tokens;
    p.splits = static_cast<int>(plan_.splits);
    p.tiles = plan_.tiles, p.tiles_across = static_cast<int>(plan_.tiles_across);
    if (plan_.splits > 1)
      p.parts = queue_.view(static_cast<double*>(workspace_), 0,
                            plan_.blocks * (Index{plan_.tile.rows} * plan_.tile.columns));
    if (!plan_.integers) return enqueue_gram_mma(plan_, p, queue_);
    p.chunks = plan_.chunks;
    p.x_exponents = exponents(plan_.x_exponents_at, s.rows);
    p.y_exponents = s.symmetric ? p.x_exponents : exponents(plan_.y_exponents_at, s.columns);
    enqueue_gram_integers(plan_, p, queue_);
  }

 private:
  // The elements that a tensor may touch, from its first one.
  struct Extent {
    Index begin = 0, end = 0;
  };
  Extent extent(const std::int64_t* strides, Index rows, Index row_stride, Index columns, Index column_stride) const {
    if (rows == 0 || columns == 0 || problem_.batch.count() == 0) return {};
    Extent e{0, 1};
    const auto add = [&](Index size, Index stride) { (stride < 0 ? e.begin : e.end) += (size - 1) * stride; };
    for (std::size_t d = 0; d < problem_.batch.sizes.size(); ++d) add(problem_.batch.sizes[d], strides[d]);
    add(rows, row_stride), add(columns, column_stride);
    return e;
  }

  // What belongs to the batch dimensions that are not 1.
  void keep(const std::int64_t* from, Index (&to)[kGramBatchSizes]) const {
    int kept = 0;
    for (std::size_t d = 0; d < problem_.batch.sizes.size(); ++d)
      if (problem_.batch.sizes[d] != 1) to[kept++] = from[d];
  }

  // Whether every row begins at a multiple of `count` elements.
  bool aligned(const MatrixBatch& m, Index rows, Index count) const {
    const auto bytes = static_cast<std::uintptr_t>(count * bytes_of(m.dtype));
    bool whole = reinterpret_cast<std::uintptr_t>(m.data) % bytes == 0 && (rows <= 1 || m.row_stride % count == 0);
    for (std::size_t d = 0; d < problem_.batch.sizes.size(); ++d)
      whole = whole && (problem_.batch.sizes[d] <= 1 || m.batch_strides[d] % count == 0);
    return whole;
  }

  simt::global<int> exponents(std::size_t at, Index columns) const {
    return queue_.view(reinterpret_cast<int*>(static_cast<char*>(workspace_) + at), 0,
                       problem_.batch.count() * plan_.chunks * columns);
  }

  GramOperand operand(const MatrixBatch& m, Index columns) const {
    GramOperand o;
    const Index bytes = bytes_of(m.dtype);
    const Extent e = extent(m.batch_strides, problem_.tokens, m.row_stride, columns, m.column_stride);
    o.data = queue_.view_bytes(static_cast<const void*>(m.data), e.begin * bytes, e.end * bytes);
    o.token_stride = m.row_stride, o.column_stride = m.column_stride;
    keep(m.batch_strides, o.batch_strides);
    o.dtype = m.dtype;
    o.columns = columns;
    o.pieces = m.dtype == plan_.element && m.column_stride == 1 && columns % (16 / bytes) == 0 &&
               aligned(m, problem_.tokens, 16 / bytes);
    return o;
  }

  const GramDevicePlan& plan_;
  const GramDeviceProblem& problem_;
  const GramArguments& arguments_;
  void* workspace_;
  Queue& queue_;
};

template <class Queue>
void run_device_gram(const GramDevicePlan& plan, const GramArguments& arguments, void* workspace, Queue& queue) {
  GramCall<Queue>(plan, arguments, workspace, queue).run();
}

}  // namespace freqrank::whitening::device
