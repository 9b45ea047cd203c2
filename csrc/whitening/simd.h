#pragma once
// Vectors of the instruction set that the including file is compiled for. Only for the files that are compiled once for
// each instruction set.

#include <cstdint>

#if FREQRANK_ISA_avx2 || FREQRANK_ISA_avx512
#include <immintrin.h>
#endif

namespace freqrank::whitening::FREQRANK_ISA {

#if FREQRANK_ISA_avx512
constexpr int kVectorBytes = 64;
#elif FREQRANK_ISA_avx2
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <class T>
struct Simd;
template <>
struct Simd<float> {
  typedef float Vector __attribute__((vector_size(kVectorBytes)));
};
template <>
struct Simd<double> {
  typedef double Vector __attribute__((vector_size(kVectorBytes)));
};
template <class T>
using Vector = typename Simd<T>::Vector;
template <class T>
constexpr int kWidth = kVectorBytes / static_cast<int>(sizeof(T));

template <class T>
Vector<T> load(const T* p) {
  Vector<T> v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

template <class T>
void store(T* p, Vector<T> v) {
  __builtin_memcpy(p, &v, sizeof v);
}

static inline double root(double x) { return __builtin_sqrt(x); }
static inline float root(float x) { return __builtin_sqrtf(x); }

}  // namespace freqrank::whitening::FREQRANK_ISA
