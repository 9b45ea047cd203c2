#include "linear_attention/device/map_gradient.h"

namespace freqrank::linear_attention::device {

template void enqueue_prepare_map(const PrepareMapKernel::Params&, simt::Queue&);
template void enqueue_map_gradient<bfloat16>(int, const MapGradientParams&, simt::Queue&);
template void enqueue_map_gradient<float16>(int, const MapGradientParams&, simt::Queue&);
template void enqueue_map_sum(const MapSumKernel::Params&, simt::Queue&);

}  // namespace freqrank::linear_attention::device
