#pragma once
// The language that CUDA kernels of this library are written in (docs/simt.md). A kernel is a struct with `Params`,
// `name`, `max_threads`, `min_blocks` and `run(const Params&)`; it touches memory, other threads and the tensor cores
// through what this header declares and nothing else, so the same source runs on a GPU (cuda.h: the only place with
// intrinsics and PTX) and, checked and counted, on the host (host.h, executor.h).

#include <cstdint>

#if defined(__CUDACC__)
#define SIMT_DEVICE __device__ __forceinline__
#define SIMT_BOTH __host__ __device__ __forceinline__
#define SIMT_UNROLL _Pragma("unroll")
#define SIMT_NO_UNROLL _Pragma("unroll 1")
#define SIMT_CONSTANT static __device__ constexpr
#define SIMT_CALLER
#define SIMT_PASS
#define SIMT_PASS_ALONE
#elif defined(FREQRANK_SIMT_HOST)
#define SIMT_DEVICE inline
#define SIMT_BOTH inline
#define SIMT_UNROLL
#define SIMT_NO_UNROLL
#define SIMT_CONSTANT inline constexpr
#define SIMT_CALLER , ::freqrank::simt::Location at = ::freqrank::simt::Location::current()
#define SIMT_PASS , at
#define SIMT_PASS_ALONE at
#else
#error "simt/simt.h: compile kernels with nvcc, or for the host executor with -DFREQRANK_SIMT_HOST"
#endif

#include "common/half.h"

// SIMT_DEVICE stands before every function that a kernel calls, SIMT_UNROLL before a loop to unroll in full.
// A function that should be reported at the line of its caller ends its parameters with SIMT_CALLER (no comma) and the
// arguments of the operations in it with SIMT_PASS (SIMT_PASS_ALONE where there is no other).

namespace freqrank::simt {

using Index = std::int64_t;

constexpr int warp_size = 32;

// A launch: blocks and threads are one-dimensional, threads a multiple of 32. No block means no launch.
struct Grid {
  Index blocks;
  int threads;
  int shared_bytes;
};

// V elements that are loaded and stored by one instruction.
template <class T, int V>
struct alignas(V * sizeof(T)) pack {
  static_assert(V * sizeof(T) >= 1 && V * sizeof(T) <= 16 && (V & (V - 1)) == 0, "a pack has 1 to 16 bytes");
  T at[V];
  SIMT_BOTH T& operator[](int i) { return at[i]; }
  SIMT_BOTH const T& operator[](int i) const { return at[i]; }
};

}  // namespace freqrank::simt

#include "simt/fragments.h"
#if defined(__CUDACC__)
#include "simt/cuda.h"
#include "simt/cuda_mma.h"
#else
#include "simt/host.h"
#include "simt/host_mma.h"
#endif
#include "simt/collectives.h"
#include "simt/matrix_loads.h"
