#pragma once
// Rows of tensors of any dtype and strides, some elements at a time.

#include "linear_attention/device/params.h"

namespace freqrank::linear_attention::device {

// Elements [i, i + V) of the row that starts at `row`; those beyond its end are 0.
template <int V, class A, class S>
SIMT_DEVICE simt::pack<A, V> load_piece(const Matrix& m, simt::global<const S> data, Index row, int i) {
  simt::pack<A, V> out;
  if (m.pieces && i + V <= m.width) {
    const auto x = data.template load_vector<V>(row + i);
    SIMT_UNROLL
    for (int v = 0; v < V; ++v) out[v] = static_cast<A>(simt::to_float(x[v]));
  } else {
    SIMT_UNROLL
    for (int v = 0; v < V; ++v) {
      out[v] = i + v < m.width ? static_cast<A>(simt::to_float(data.load(row + (i + v) * m.stride[3]))) : A(0);
    }
  }
  return out;
}

template <int V, class A, class S>
SIMT_DEVICE void store_piece(const Output& m, simt::global<S> data, Index row, int i, simt::pack<A, V> x) {
  if (m.pieces && i + V <= m.width) {
    simt::pack<S, V> out;
    SIMT_UNROLL
    for (int v = 0; v < V; ++v) out[v] = simt::from_float<S>(x[v]);
    data.template store_vector<V>(row + i, out);
  } else {
    SIMT_UNROLL
    for (int v = 0; v < V; ++v) {
      if (i + v < m.width) data.store(row + (i + v) * m.stride[3], simt::from_float<S>(x[v]));
    }
  }
}

}  // namespace freqrank::linear_attention::device
