#include "dct/device/bluestein.h"

namespace freqrank::dct::device {

template void enqueue_bluestein(const Step&, const StepPointers&, simt::Queue&);

}  // namespace freqrank::dct::device
