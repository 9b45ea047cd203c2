#pragma once
// What the host executor counts. "Instruction" means one operation of one warp, as a GPU would issue it.

#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace freqrank::simt {
inline namespace host {

struct Counts {
  // Global memory. A sector is 32 aligned bytes; sectors are counted for each instruction, so full coalescing means
  // that 32 * sectors equals bytes. Unique bytes are those that the launch touches at all.
  std::uint64_t global_reads = 0, global_read_bytes = 0, global_read_sectors = 0, global_read_unique_bytes = 0;
  std::uint64_t global_writes = 0, global_written_bytes = 0, global_written_sectors = 0,
                global_written_unique_bytes = 0;
  // Shared memory: instructions, the passes over the 32 banks that they take, and those beyond the least possible.
  std::uint64_t shared_reads = 0, shared_writes = 0, shared_passes = 0, bank_conflicts = 0;
  std::uint64_t barriers = 0;  // of blocks
  std::uint64_t warp_barriers = 0, shuffles = 0, votes = 0, copies = 0, atomics = 0, matrix_loads = 0, mma = 0;

  void add(const Counts& other);
};

// The members of Counts by name.
struct CountName {
  const char* name;
  std::uint64_t Counts::* member;
};
const std::vector<CountName>& count_names();

struct KernelCounts {
  std::uint64_t launches = 0, blocks = 0, threads = 0;
  int shared_bytes = 0;  // of the last launch
  Counts total;
  std::map<std::string, Counts> lines;  // "file:line"
};

}  // namespace host
}  // namespace freqrank::simt
