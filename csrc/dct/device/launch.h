#pragma once
// Runs a plan on a queue: a CUDA stream or the host executor. Allocates nothing, waits for nothing.

#include "dct/device/bluestein.h"
#include "dct/device/mixed_radix.h"
#include "dct/device/passes.h"
#include "dct/device/power_of_two.h"
#include "dct/device/tables.h"
#include "dct/device/tile2d.h"

namespace freqrank::dct::device {

template <class Queue>
void run_device(const DevicePlan& plan, const DevicePointers& pointers, void* workspace, Queue& queue) {
  char* const base = static_cast<char*>(workspace);
  const auto place = [&](Buffer b) -> void* {
    return b == Buffer::out ? pointers.out : static_cast<void*>(base + plan.work_at);
  };
  for (const Step& step : plan.steps) {
    const StepPointers at{step.from == Buffer::in ? pointers.in : place(step.from), place(step.to), base,
                          base + plan.scratch_at};
    switch (step.algorithm) {
      case Algorithm::tables: enqueue_tables(step, at, queue); break;
      case Algorithm::power_of_two: enqueue_power_of_two(step, at, queue); break;
      case Algorithm::mixed_radix: enqueue_mixed_radix(step, at, queue); break;
      case Algorithm::bluestein: enqueue_bluestein(step, at, queue); break;
      case Algorithm::multi_pass: enqueue_multi_pass(step, at, queue); break;
      case Algorithm::tile_2d: enqueue_tile_2d(step, at, queue); break;
    }
  }
}

}  // namespace freqrank::dct::device
