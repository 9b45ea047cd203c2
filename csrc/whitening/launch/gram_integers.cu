#include "whitening/device/gram_integers.h"

namespace freqrank::whitening::device {

template void enqueue_gram_integers(const GramDevicePlan&, const GramParams&, simt::Queue&);

}  // namespace freqrank::whitening::device
