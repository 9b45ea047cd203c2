#include "dct/device/tile2d.h"

namespace freqrank::dct::device {

template void enqueue_tile_2d(const Step&, const StepPointers&, simt::Queue&);

}  // namespace freqrank::dct::device
