#pragma once
// For the gradient of the decay, the pairs of tokens inside each chunk of the scan: with A(i, j) = score x dscore,
//
//   pairs_t = sum over j <= t of A(t, j) - sum over i >= t of A(i, t)
//
// whose sums from t to the chunk's end are what log_decay_t gets from pairs j < t <= i. Rows and columns sum the same
// float numbers, so that pairs which do not cross t cancel exactly; q . dq and k . dk, rounded apart, would leave an
// error that grows with the chunk.

#include "linear_attention/device/params.h"

namespace freqrank::linear_attention::device {

template <class A>
struct PairsParams : TokenParams<A> {
  Segments segments;
  int chunks = 1;  // of a segment
  int state_heads = 1, query_heads = 1;
  Matrix q, k, v, grad_o;
  A scale = 1;
  simt::global<const A> query_scale, query_add;  // [B,H,T], may be null
  simt::global<A> pairs;                         // [B,Hs,T]
};

struct PairsPlace {
  Index slot;
  int chunk, state_head;
};
template <class A>
SIMT_DEVICE PairsPlace pairs_place(const PairsParams<A>& p) {
  Index b = simt::block();
  PairsPlace at;
  at.state_head = static_cast<int>(b % p.state_heads);
  b /= p.state_heads;
  at.chunk = static_cast<int>(b % p.chunks);
  at.slot = b / p.chunks;
  return at;
}

}  // namespace freqrank::linear_attention::device
