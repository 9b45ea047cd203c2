#pragma once
// How a CPU kernel is given threads: the caller passes a ParallelFor, the kernel never starts a thread itself.

#include <cstdint>
#include <functional>

namespace freqrank {

// body(begin, end) is called for disjoint ranges that cover [0, n), concurrently, none shorter than `grain` but the
// last. It must not throw.
using RangeBody = std::function<void(std::int64_t begin, std::int64_t end)>;
using ParallelFor = std::function<void(std::int64_t n, std::int64_t grain, const RangeBody& body)>;

// Everything on the calling thread.
ParallelFor serial();

// A pool of `threads` threads (the calling one among them), for programs without a pool of their own.
// `threads` <= 0 means as many as the machine has. Calls from within a body run serially.
ParallelFor thread_pool(int threads = 0);

}  // namespace freqrank
