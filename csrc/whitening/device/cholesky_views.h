#pragma once
// Batches of matrices as the Cholesky and triangular kernels get them.

#include <stdexcept>

#include "simt/simt.h"
#include "whitening/matrix.h"

namespace freqrank::whitening::device {

using simt::Index;

// Where the matrices of a batch begin, the dimension that runs fastest first.
struct BatchIndex {
  static constexpr int max_dims = 8;
  int dims = 0;
  Index sizes[max_dims] = {}, strides[max_dims] = {};

  SIMT_BOTH Index at(Index matrix) const {
    Index elements = 0;
    for (int d = 0; d < dims; ++d) {
      const Index next = d + 1 < dims ? matrix / sizes[d] : 0;
      elements += (matrix - next * sizes[d]) * strides[d];
      matrix = next;
    }
    return elements;
  }
};

// Dimensions that follow each other in memory are one.
inline BatchIndex batch_index(const BatchSizes& batch, const std::int64_t* strides) {
  BatchIndex index;
  for (auto d = batch.sizes.size(); d-- > 0;) {
    if (batch.sizes[d] == 1) continue;
    const int last = index.dims - 1;
    if (index.dims > 0 && strides[d] == index.sizes[last] * index.strides[last]) {
      index.sizes[last] *= batch.sizes[d];
      continue;
    }
    if (index.dims == BatchIndex::max_dims)
      throw std::invalid_argument(
          "whitening: on a GPU at most 8 batch dimensions that do not follow each other in "
          "memory are allowed; make the tensor contiguous");
    index.sizes[index.dims] = batch.sizes[d];
    index.strides[index.dims++] = strides[d];
  }
  return index;
}

struct Placement {
  Index row = 0, column = 0;  // strides
  BatchIndex batch;

  SIMT_BOTH Index at(Index matrix, Index i, Index j) const { return batch.at(matrix) + i * row + j * column; }
  // Whether neighbours in a column lie closer together than those in a row.
  SIMT_BOTH bool down_columns() const { return (row < 0 ? -row : row) < (column < 0 ? -column : column); }
};

template <class T>
struct Matrices : Placement {
  simt::global<T> data;
};

// Read only, in float or double.
struct AnyMatrices : Placement {
  simt::const_global_bytes data;
  bool wide;

  // f(data) with the type of the elements; T is that of the arithmetic, and float only of float.
  template <class T, class F>
  SIMT_DEVICE void with(F f) const {
    if constexpr (sizeof(T) == 8) {
      if (wide) {
        f(data.as<const double>());
        return;
      }
    }
    f(data.as<const float>());
  }
};

// The elements that a batch of rows x columns matrices may touch, from its first one.
struct Extent {
  Index begin = 0, end = 0;
};
inline Extent extent_of(const Placement& x, Index count, Index rows, Index columns) {
  Extent e{0, 1};
  if (count == 0 || rows == 0 || columns == 0) return {0, 0};
  const auto add = [&](Index last) { (last < 0 ? e.begin : e.end) += last; };
  add((rows - 1) * x.row), add((columns - 1) * x.column);
  for (int d = 0; d < x.batch.dims; ++d) add((x.batch.sizes[d] - 1) * x.batch.strides[d]);
  return e;
}

inline Placement placement_of(const MatrixBatch& x, const BatchSizes& batch) {
  Placement p;
  p.row = x.row_stride, p.column = x.column_stride;
  p.batch = batch_index(batch, x.batch_strides);
  return p;
}

template <class T, class Queue>
Matrices<T> matrices_of(const MatrixBatch& x, const BatchSizes& batch, Index rows, Index columns, const Queue& queue) {
  Matrices<T> m;
  static_cast<Placement&>(m) = placement_of(x, batch);
  const Extent e = extent_of(m, batch.count(), rows, columns);
  m.data = queue.view(static_cast<T*>(x.data), e.begin, e.end);
  return m;
}

template <class Queue>
AnyMatrices any_matrices_of(const MatrixBatch& x, const BatchSizes& batch, Index rows, Index columns,
                            const Queue& queue) {
  AnyMatrices m;
  static_cast<Placement&>(m) = placement_of(x, batch);
  const Extent e = extent_of(m, batch.count(), rows, columns);
  const Index bytes = bytes_of(x.dtype);
  m.data = queue.view_bytes(static_cast<const void*>(x.data), e.begin * bytes, e.end * bytes);
  m.wide = x.dtype == Dtype::float64;
  return m;
}

}  // namespace freqrank::whitening::device
