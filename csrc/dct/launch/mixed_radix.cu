#include "dct/device/mixed_radix.h"

namespace freqrank::dct::device {

template void enqueue_mixed_radix(const Step&, const StepPointers&, simt::Queue&);

}  // namespace freqrank::dct::device
