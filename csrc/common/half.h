#pragma once
// 16-bit storage types. Arithmetic is done in float: convert on load, round to nearest even on store.

#include <cstdint>
#include <cstring>

#include "common/inline.h"

namespace freqrank {

struct bfloat16 {
  std::uint16_t bits;
};

struct float16 {
  std::uint16_t bits;
};

FREQRANK_INLINE float to_float(float x) { return x; }
FREQRANK_INLINE double to_float(double x) { return x; }

FREQRANK_INLINE float to_float(bfloat16 x) {
  const std::uint32_t wide = static_cast<std::uint32_t>(x.bits) << 16;
  float out;
  std::memcpy(&out, &wide, 4);
  return out;
}

FREQRANK_INLINE float to_float(float16 x) {
  const std::uint32_t sign = static_cast<std::uint32_t>(x.bits & 0x8000u) << 16;
  const std::uint32_t magnitude = x.bits & 0x7fffu;
  std::uint32_t wide;
  float out;
  if (magnitude >= 0x7c00u) {  // Inf, NaN
    wide = sign | 0x7f800000u | ((magnitude & 0x3ffu) << 13);
  } else if (magnitude >= 0x0400u) {
    wide = sign | ((magnitude << 13) + 0x38000000u);
  } else {  // subnormal: magnitude * 2^-24, exact in float
    out = static_cast<float>(magnitude) * 5.9604644775390625e-8f;
    std::memcpy(&wide, &out, 4);
    wide |= sign;
  }
  std::memcpy(&out, &wide, 4);
  return out;
}

template <class T>
FREQRANK_INLINE T from_float(float x) {
  return static_cast<T>(x);
}

template <>
FREQRANK_FORCED_INLINE bfloat16 from_float<bfloat16>(float x) {
  std::uint32_t wide;
  std::memcpy(&wide, &x, 4);
  if ((wide & 0x7fffffffu) > 0x7f800000u) return {static_cast<std::uint16_t>((wide >> 16) | 0x40u)};
  return {static_cast<std::uint16_t>((wide + 0x7fffu + ((wide >> 16) & 1u)) >> 16)};
}

template <>
FREQRANK_FORCED_INLINE float16 from_float<float16>(float x) {
  std::uint32_t wide;
  std::memcpy(&wide, &x, 4);
  const std::uint16_t sign = static_cast<std::uint16_t>((wide >> 16) & 0x8000u);
  const std::uint32_t magnitude = wide & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return {static_cast<std::uint16_t>(sign | 0x7e00u)};
  if (magnitude >= 0x477ff000u) return {static_cast<std::uint16_t>(sign | 0x7c00u)};  // rounds to 2^16 or beyond
  if (magnitude < 0x38800000u) {  // subnormal or zero: let float addition round at 2^-24
    float a;
    std::memcpy(&a, &magnitude, 4);
    a += 0.5f;
    std::uint32_t rounded;
    std::memcpy(&rounded, &a, 4);
    return {static_cast<std::uint16_t>(sign | (rounded - 0x3f000000u))};
  }
  const std::uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
  return {static_cast<std::uint16_t>(sign | ((rounded - 0x38000000u) >> 13))};
}

}  // namespace freqrank
