#include "linear_attention/device/gradients.h"

namespace freqrank::linear_attention::device {

template void enqueue_normalizer<float>(const NormalizerKernel<float>::Params&, simt::Queue&);
template void enqueue_normalizer<double>(const NormalizerKernel<double>::Params&, simt::Queue&);
template void enqueue_decay_gradient<float>(const DecayGradientKernel<float>::Params&, simt::Queue&);
template void enqueue_decay_gradient<double>(const DecayGradientKernel<double>::Params&, simt::Queue&);
template void enqueue_sum_slots<float>(const SumSlotsKernel<float>::Params&, simt::Queue&);
template void enqueue_sum_slots<double>(const SumSlotsKernel<double>::Params&, simt::Queue&);
template void enqueue_sum_heads<float>(const SumHeadsKernel<float>::Params&, simt::Queue&);
template void enqueue_sum_heads<double>(const SumHeadsKernel<double>::Params&, simt::Queue&);

}  // namespace freqrank::linear_attention::device
