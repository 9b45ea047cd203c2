#include "linear_attention/device/pairs_fma.h"
#include "linear_attention/device/pairs_mma.h"

namespace freqrank::linear_attention::device {

template void enqueue_pairs_mma<bfloat16>(int, const PairsParams<float>&, simt::Queue&);
template void enqueue_pairs_mma<float16>(int, const PairsParams<float>&, simt::Queue&);
template void enqueue_pairs_fma<float>(const PairsParams<float>&, simt::Queue&);
template void enqueue_pairs_fma<double>(const PairsParams<double>&, simt::Queue&);

}  // namespace freqrank::linear_attention::device
