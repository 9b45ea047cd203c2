#include "linear_attention/device/step.h"

namespace freqrank::linear_attention::device {

template void enqueue_step(const Sizes&, const StepArguments&, simt::Queue&);

}  // namespace freqrank::linear_attention::device
