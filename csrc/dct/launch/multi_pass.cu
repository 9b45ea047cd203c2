#include "dct/device/passes.h"
#include "dct/device/tables.h"

namespace freqrank::dct::device {

template void enqueue_tables(const Step&, const StepPointers&, simt::Queue&);
template void enqueue_multi_pass(const Step&, const StepPointers&, simt::Queue&);

}  // namespace freqrank::dct::device
