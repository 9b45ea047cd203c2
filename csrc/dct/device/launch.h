#pragma once
// Runs a plan on a queue: a CUDA stream or the host executor. Allocates nothing, waits for nothing.

#include "dct/device/params.h"

namespace freqrank::dct::device {

// Each is defined in its algorithm's header and compiled in a file of its own (dct/launch/), all of them at a time.
template <class Queue>
void enqueue_tables(const Step& step, const StepPointers& pointers, Queue& queue);
template <class Queue>
void enqueue_power_of_two(const Step& step, const StepPointers& pointers, Queue& queue);
template <class Queue>
void enqueue_mixed_radix(const Step& step, const StepPointers& pointers, Queue& queue);
template <class Queue>
void enqueue_bluestein(const Step& step, const StepPointers& pointers, Queue& queue);
template <class Queue>
void enqueue_multi_pass(const Step& step, const StepPointers& pointers, Queue& queue);
template <class Queue>
void enqueue_tile_2d(const Step& step, const StepPointers& pointers, Queue& queue);

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
