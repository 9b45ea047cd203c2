#include <algorithm>
#include <cstdint>

#include "common/isa.h"
#include "dct/dct.h"
#include "dct/kernels.h"

namespace freqrank::dct {

void run(const Plan& plan, const Pointers& pointers, void* workspace, const ParallelFor& parallel_for) {
  const auto address = reinterpret_cast<std::uintptr_t>(workspace);
  char* const work = reinterpret_cast<char*>((address + 63) / 64 * 64);
  char* const scratch = work + plan.work_bytes;
  for (const Pass& pass : plan.passes) {
    Work job;
    job.pass = &pass;
    job.row = &plan.rows[static_cast<std::size_t>(pass.row)];
    job.table = pointers.tables[pass.row];
    job.in = pass.from == Buffer::in ? pointers.in : pass.from == Buffer::out ? pointers.out : work;
    job.out = pass.to == Buffer::out ? pointers.out : work;
    const std::int64_t base = pass.groups / pass.slots, rest = pass.groups % pass.slots;
    const auto part = [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t slot = begin; slot < end; ++slot) {
        const std::int64_t first = slot * base + std::min(slot, rest);
        const std::int64_t after = first + base + (slot < rest ? 1 : 0);
        char* const own = scratch + static_cast<std::size_t>(slot) * pass.scratch_bytes;
        FREQRANK_DISPATCH(run_groups, job, first, after, own);
      }
    };
    if (pass.slots == 1) {
      part(0, 1);
    } else {
      parallel_for(pass.slots, 1, part);
    }
  }
}

}  // namespace freqrank::dct
