#include "linear_attention/device/segments.h"

namespace freqrank::linear_attention::device {

template void enqueue_offsets(const OffsetsKernel::Params&, simt::Queue&);
template void enqueue_carry<float>(CarryKernel<float>::Params, simt::Queue&);
template void enqueue_carry<double>(CarryKernel<double>::Params, simt::Queue&);

}  // namespace freqrank::linear_attention::device
