#include "whitening/device/gram_mma.h"

namespace freqrank::whitening::device {

template void enqueue_gram_mma(const GramDevicePlan&, const GramParams&, simt::Queue&);

}  // namespace freqrank::whitening::device
