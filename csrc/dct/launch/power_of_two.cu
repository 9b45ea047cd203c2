#include "dct/device/power_of_two.h"

namespace freqrank::dct::device {

template void enqueue_power_of_two(const Step&, const StepPointers&, simt::Queue&);

}  // namespace freqrank::dct::device
