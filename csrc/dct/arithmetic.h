#pragma once
// Arithmetic that is written once for a number (a GPU thread's or the CPU's) and for a GNU vector of numbers.
// Where the CPU's instruction set has a fused multiply-add, a number and every vector take it at the same places: the
// same bits whatever the width. On a GPU the compiler contracts.

#include <type_traits>

#include "common/inline.h"
#include "common/lane.h"
#if defined(__FMA__) && !defined(__CUDACC__)
#include <immintrin.h>
#endif

namespace freqrank::dct {

// The same number in every lane.
template <class V>
FREQRANK_INLINE V spread(Lane<V> x) {
  if constexpr (std::is_arithmetic_v<V>) {
    return x;
  } else {
    return x - V{};
  }
}

// a b + c
template <class V>
FREQRANK_INLINE V multiply_add(V a, V b, V c) {
#if defined(__FMA__) && !defined(__CUDACC__)
  constexpr bool wide = sizeof(Lane<V>) == 8;
  if constexpr (std::is_arithmetic_v<V>) {
    return wide ? static_cast<V>(__builtin_fma(a, b, c)) : static_cast<V>(__builtin_fmaf(a, b, c));
  } else if constexpr (sizeof(V) == 16) {
    if constexpr (wide) return (V)_mm_fmadd_pd((__m128d)a, (__m128d)b, (__m128d)c);
    if constexpr (!wide) return (V)_mm_fmadd_ps((__m128)a, (__m128)b, (__m128)c);
  } else if constexpr (sizeof(V) == 32) {
    if constexpr (wide) return (V)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
    if constexpr (!wide) return (V)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
  }
#ifdef __AVX512F__
  else {
    if constexpr (wide) return (V)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
    if constexpr (!wide) return (V)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
  }
#endif
#else
  return a * b + c;
#endif
}

// c - a b
template <class V>
FREQRANK_INLINE V multiply_subtract(V a, V b, V c) {
#if defined(__FMA__) && !defined(__CUDACC__)
  constexpr bool wide = sizeof(Lane<V>) == 8;
  if constexpr (std::is_arithmetic_v<V>) {
    return multiply_add(-a, b, c);
  } else if constexpr (sizeof(V) == 16) {
    if constexpr (wide) return (V)_mm_fnmadd_pd((__m128d)a, (__m128d)b, (__m128d)c);
    if constexpr (!wide) return (V)_mm_fnmadd_ps((__m128)a, (__m128)b, (__m128)c);
  } else if constexpr (sizeof(V) == 32) {
    if constexpr (wide) return (V)_mm256_fnmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
    if constexpr (!wide) return (V)_mm256_fnmadd_ps((__m256)a, (__m256)b, (__m256)c);
  }
#ifdef __AVX512F__
  else {
    if constexpr (wide) return (V)_mm512_fnmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
    if constexpr (!wide) return (V)_mm512_fnmadd_ps((__m512)a, (__m512)b, (__m512)c);
  }
#endif
#else
  return c - a * b;
#endif
}

template <class V>
struct Complex {
  V re, im;
};

template <class V>
FREQRANK_INLINE Complex<V> operator+(const Complex<V>& a, const Complex<V>& b) {
  return {a.re + b.re, a.im + b.im};
}

template <class V>
FREQRANK_INLINE Complex<V> operator-(const Complex<V>& a, const Complex<V>& b) {
  return {a.re - b.re, a.im - b.im};
}

template <class V>
FREQRANK_INLINE Complex<V> operator*(const Complex<V>& a, const Complex<V>& b) {
  return {multiply_subtract(a.im, b.im, a.re * b.re), multiply_add(a.im, b.re, a.re * b.im)};
}

}  // namespace freqrank::dct
