#pragma once
// Sums and maxima over a warp or a block, associated in one fixed order: every lane gets the same bits, every time.

namespace freqrank::simt {

template <class T>
SIMT_DEVICE T warp_sum(T v SIMT_CALLER) {
  SIMT_UNROLL
  for (int step = warp_size / 2; step > 0; step /= 2) v += shuffle_xor(v, step, warp_size SIMT_PASS);
  return v;
}

template <class T>
SIMT_DEVICE T warp_max(T v SIMT_CALLER) {
  SIMT_UNROLL
  for (int step = warp_size / 2; step > 0; step /= 2) {
    const T other = shuffle_xor(v, step, warp_size SIMT_PASS);
    v = other > v ? other : v;
  }
  return v;
}

// `scratch` has an element for each warp of the block, and may be used again at once.
template <class T>
SIMT_DEVICE T block_sum(T v, shared<T> scratch SIMT_CALLER) {
  v = warp_sum(v SIMT_PASS);
  barrier(SIMT_PASS_ALONE);
  if (lane() == 0) scratch.store(warp(), v SIMT_PASS);
  barrier(SIMT_PASS_ALONE);
  T total = scratch.load(0 SIMT_PASS);
  for (int w = 1; w < threads() / warp_size; ++w) total += scratch.load(w SIMT_PASS);
  return total;
}

template <class T>
SIMT_DEVICE T block_max(T v, shared<T> scratch SIMT_CALLER) {
  v = warp_max(v SIMT_PASS);
  barrier(SIMT_PASS_ALONE);
  if (lane() == 0) scratch.store(warp(), v SIMT_PASS);
  barrier(SIMT_PASS_ALONE);
  T most = scratch.load(0 SIMT_PASS);
  for (int w = 1; w < threads() / warp_size; ++w) {
    const T other = scratch.load(w SIMT_PASS);
    most = other > most ? other : most;
  }
  return most;
}

}  // namespace freqrank::simt
