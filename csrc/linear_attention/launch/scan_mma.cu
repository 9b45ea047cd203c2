#include "linear_attention/device/scan_mma.h"

namespace freqrank::linear_attention::device {

template void enqueue_scan_mma<bfloat16>(int, const DevicePlan::Scan&, const ScanParams<float>&, simt::Queue&);
template void enqueue_scan_mma<float16>(int, const DevicePlan::Scan&, const ScanParams<float>&, simt::Queue&);

}  // namespace freqrank::linear_attention::device
