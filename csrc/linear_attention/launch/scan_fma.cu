#include "linear_attention/device/scan_fma.h"

namespace freqrank::linear_attention::device {

template void enqueue_scan_fma(const DevicePlan::Scan&, const ScanParams<float>&, simt::Queue&);
template void enqueue_scan_fma(const DevicePlan::Scan&, const ScanParams<double>&, simt::Queue&);

}  // namespace freqrank::linear_attention::device
