#pragma once
// Functions that host files of several instruction sets and device code share. They are inlined by force: a copy shared
// between files compiled for different instruction sets could hold instructions that the processor lacks.

#ifdef __CUDACC__
#define FREQRANK_FORCED_INLINE __host__ __device__ __forceinline__
#else
#define FREQRANK_FORCED_INLINE inline __attribute__((always_inline))
#endif
#define FREQRANK_INLINE static FREQRANK_FORCED_INLINE  // specialisations may not repeat `static`

// Before a short loop that must be unrolled in full.
#ifdef __CUDA_ARCH__
#define FREQRANK_UNROLL _Pragma("unroll")
#elif defined(__CUDACC__)
#define FREQRANK_UNROLL
#else
#define FREQRANK_UNROLL _Pragma("GCC unroll 16")
#endif
