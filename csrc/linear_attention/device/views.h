#pragma once
// Tensors as kernels get them, from the views of linear_attention.h.

#include <algorithm>
#include <cstdint>
#include <utility>

#include "linear_attention/device/params.h"

namespace freqrank::linear_attention::device {

// The elements that a tensor may touch, from its first one.
struct Extent {
  Index begin = 0, end = 0;
};
inline Extent extent_of(const View& x, const Index (&sizes)[4]) {
  Extent e{0, 1};
  for (int d = 0; d < 4; ++d) {
    if (sizes[d] == 0) return {0, 0};
    const Index last = (sizes[d] - 1) * x.stride[d];
    (last < 0 ? e.begin : e.end) += last;
  }
  return e;
}
inline int bytes_of(Dtype dtype) { return dtype == Dtype::float64 ? 8 : dtype == Dtype::float32 ? 4 : 2; }

// 16 bytes at a time: aligned, and whole within a row.
inline bool in_pieces(const View& x, const Index (&sizes)[4]) {
  const int count = 16 / bytes_of(x.dtype);
  bool whole = x.stride[3] == 1 && sizes[3] % count == 0 && reinterpret_cast<std::uintptr_t>(x.data) % 16 == 0;
  for (int d = 0; d < 3; ++d) whole = whole && (sizes[d] <= 1 || x.stride[d] % count == 0);
  return whole;
}

template <class Queue>
Matrix matrix_of(const View& x, Index batch, Index time, Index heads, Index width, const Queue& queue) {
  Matrix m;
  const Index sizes[4] = {batch, time, heads, width};
  const Extent e = extent_of(x, sizes);
  m.data = queue.view_bytes(static_cast<const void*>(x.data), e.begin * bytes_of(x.dtype), e.end * bytes_of(x.dtype));
  std::copy(x.stride, x.stride + 4, m.stride);
  m.heads = static_cast<int>(heads), m.width = static_cast<int>(width);
  m.dtype = x.dtype;
  m.pieces = in_pieces(x, sizes);
  return m;
}
template <class Queue>
Output output_of(const View& x, Index batch, Index time, Index heads, Index width, const Queue& queue) {
  Output m;
  const Index sizes[4] = {batch, time, heads, width};
  const Extent e = extent_of(x, sizes);
  m.data = queue.view_bytes(x.data, e.begin * bytes_of(x.dtype), e.end * bytes_of(x.dtype));
  std::copy(x.stride, x.stride + 4, m.stride);
  m.heads = static_cast<int>(heads), m.width = static_cast<int>(width);
  m.dtype = x.dtype;
  m.pieces = in_pieces(x, sizes);
  return m;
}
template <class T, class Queue>
States<T> states_of(const View& x, const Index (&sizes)[4], const Queue& queue, bool transposed = false) {
  States<T> s;
  if (!x) return s;
  const Extent e = extent_of(x, sizes);
  s.data = queue.view(static_cast<T*>(x.data), e.begin, e.end);
  std::copy(x.stride, x.stride + 4, s.stride);
  if (transposed) std::swap(s.stride[2], s.stride[3]);
  return s;
}

}  // namespace freqrank::linear_attention::device
