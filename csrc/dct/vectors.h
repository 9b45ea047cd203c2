#pragma once
// Vectors of the instruction set that the including file is compiled for: reorderings, and loads and stores
// that convert. Only for the files that are compiled once for each instruction set.

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "common/half.h"
#include "common/transpose.h"
#include "dct/arithmetic.h"

namespace freqrank::dct::FREQRANK_ISA {

using Index = std::int64_t;

#if FREQRANK_ISA_avx512
#define FREQRANK_VECTOR_BYTES 64
#elif FREQRANK_ISA_avx2
#define FREQRANK_VECTOR_BYTES 32
#else
#define FREQRANK_VECTOR_BYTES 16
#endif
#define FREQRANK_HALF_VECTOR_BYTES (FREQRANK_VECTOR_BYTES < 32 ? FREQRANK_VECTOR_BYTES : 32)
typedef float Floats __attribute__((vector_size(FREQRANK_VECTOR_BYTES), may_alias));
typedef double Doubles __attribute__((vector_size(FREQRANK_VECTOR_BYTES), may_alias));
// for one row: of at most 32 bytes, since its first stage stores by squares of that size
typedef float ShortFloats __attribute__((vector_size(FREQRANK_HALF_VECTOR_BYTES), may_alias));
typedef double ShortDoubles __attribute__((vector_size(FREQRANK_HALF_VECTOR_BYTES), may_alias));

template <int W, int... l>
constexpr auto reversed_order(std::integer_sequence<int, l...>) {
  return std::integer_sequence<int, (W - 1 - l)...>{};
}

template <class V>
FREQRANK_INLINE V reversed(V a) {
  constexpr int W = width<V>;
  return shuffle(a, a, decltype(reversed_order<W>(std::make_integer_sequence<int, W>{})){});
}

// G vectors of consecutive elements to vectors of every G-th, and back; G = 1, 2, 4.
template <int odd, int... l>
constexpr auto alternate_order(std::integer_sequence<int, l...>) {
  return std::integer_sequence<int, (2 * l + odd)...>{};
}
template <int W, bool upper, int... l>
constexpr auto riffle_order(std::integer_sequence<int, l...>) {
  return std::integer_sequence<int, ((l + (upper ? W : 0)) / 2 + (l % 2 ? W : 0))...>{};
}

template <int G, class V>
FREQRANK_INLINE void deal(V* a) {
  constexpr int W = width<V>;
  if constexpr (G == 1 || W == 1) {
  } else if constexpr (G == 2) {
    using Lanes = std::make_integer_sequence<int, W>;
    const V b = a[0], c = a[1];
    a[0] = shuffle(b, c, decltype(alternate_order<0>(Lanes{})){});
    a[1] = shuffle(b, c, decltype(alternate_order<1>(Lanes{})){});
  } else {
    deal<2>(a);
    deal<2>(a + 2);
    V even[2] = {a[0], a[2]}, odd[2] = {a[1], a[3]};
    deal<2>(even);
    deal<2>(odd);
    a[0] = even[0];
    a[1] = odd[0];
    a[2] = even[1];
    a[3] = odd[1];
  }
}

template <int G, class V>
FREQRANK_INLINE void riffle(V* a) {
  constexpr int W = width<V>;
  if constexpr (G == 1 || W == 1) {
  } else if constexpr (G == 2) {
    using Lanes = std::make_integer_sequence<int, W>;
    const V b = a[0], c = a[1];
    a[0] = shuffle(b, c, decltype(riffle_order<W, false>(Lanes{})){});
    a[1] = shuffle(b, c, decltype(riffle_order<W, true>(Lanes{})){});
  } else {
    V even[2] = {a[0], a[2]}, odd[2] = {a[1], a[3]};
    riffle<2>(even);
    riffle<2>(odd);
    a[0] = even[0];
    a[1] = odd[0];
    a[2] = even[1];
    a[3] = odd[1];
    riffle<2>(a);
    riffle<2>(a + 2);
  }
}

// --- memory ---------------------------------------------------------------------------------------------------------

template <class To, class From>
FREQRANK_INLINE To bits(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "sizes differ");
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

template <class V>
struct __attribute__((packed, may_alias)) Unaligned {
  V v;
};

template <class T, int W>
struct Unsigned {
  typedef T type __attribute__((vector_size(sizeof(T) * W)));
};

template <class To, class From>
FREQRANK_INLINE To convert(From from) {
  To to{};
  for (unsigned l = 0; l < sizeof(To) / sizeof(to[0]); ++l) to[l] = static_cast<Lane<To>>(from[l]);
  return to;
}

// W consecutive elements of storage type S, as V.
template <class V, class S>
FREQRANK_INLINE V load_as(const S* from) {
  constexpr int W = width<V>;
  if constexpr (std::is_same_v<S, Lane<V>>) {
    return reinterpret_cast<const Unaligned<V>*>(from)->v;
  } else if constexpr (W == 1) {
#ifdef __F16C__
    if constexpr (std::is_same_v<S, float16>) return _cvtsh_ss(from->bits);
#endif
    return to_float(*from);
  } else if constexpr (std::is_same_v<S, bfloat16>) {
    using Narrow = typename Unsigned<std::uint16_t, W>::type;
    using Wide = typename Unsigned<std::uint32_t, W>::type;
    Narrow narrow;
    std::memcpy(&narrow, from, sizeof(narrow));
    return bits<V>(convert<Wide>(narrow) << 16);
  } else {
#ifdef __F16C__
    if constexpr (W == 8) return (V)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#endif
#ifdef __AVX512F__
    if constexpr (W == 16)
      return (V)_mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#endif
    V v{};
    for (int l = 0; l < W; ++l) v[l] = to_float(from[l]);
    return v;
  }
}

template <class S, class V>
FREQRANK_INLINE void store_as(S* to, V v) {
  constexpr int W = width<V>;
  if constexpr (std::is_same_v<S, Lane<V>>) {
    reinterpret_cast<Unaligned<V>*>(to)->v = v;
  } else if constexpr (W == 1) {
#ifdef __F16C__
    if constexpr (std::is_same_v<S, float16>) {
      to->bits = static_cast<std::uint16_t>(_cvtss_sh(v, 0));
      return;
    }
#endif
    *to = from_float<S>(v);
  } else if constexpr (std::is_same_v<S, bfloat16>) {
    using Narrow = typename Unsigned<std::uint16_t, W>::type;
    using Wide = typename Unsigned<std::uint32_t, W>::type;
    const Wide x = bits<Wide>(v);
    const Wide upper = x >> 16;
    const Wide rounded = (x + 0x7fffu + (upper & 1u)) >> 16;
    const Narrow narrow = convert<Narrow>((x & 0x7fffffffu) > 0x7f800000u ? upper | 0x40u : rounded);
    std::memcpy(to, &narrow, sizeof(narrow));
  } else {
#ifdef __F16C__
    if constexpr (W == 8) {
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph((__m256)v, 0));
      return;
    }
#endif
#ifdef __AVX512F__
    if constexpr (W == 16) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_maskz_cvtps_ph(0xffff, (__m512)v, 0));
      return;
    }
#endif
    for (int l = 0; l < W; ++l) to[l] = from_float<S>(v[l]);
  }
}

// The same past the caches, where the instruction set can: `to` is a multiple of the vector's bytes.
template <class V>
FREQRANK_INLINE void stream(Lane<V>* to, V v) {
#ifdef __AVX512F__
  if constexpr (sizeof(V) == 64) return _mm512_stream_ps(reinterpret_cast<float*>(to), (__m512)v);
#endif
#ifdef __AVX2__
  if constexpr (sizeof(V) == 32) return _mm256_stream_ps(reinterpret_cast<float*>(to), (__m256)v);
#endif
  store_as(to, v);
}

// Other threads may read what was streamed after this.
FREQRANK_INLINE void finish_streaming() {
#ifdef __AVX2__
  _mm_sfence();
#endif
}

// --- how a vector lies in an array ----------------------------------------------------------------------------------
// An array of n elements for W rows side by side takes n W numbers, element i of row l at [i W + l]; that of one row
// alone n. The same loop body serves both: Side<V> makes vectors of one element of all rows, Along<V> of W consecutive
// elements of one row, so that every element goes through the same operations.

template <class V_>
struct Side {
  using V = V_;
  using T = Lane<V>;
  static constexpr int unit = width<V>, step = 1;
  FREQRANK_INLINE V load(const T* a, Index i) { return *reinterpret_cast<const V*>(a + i * unit); }
  FREQRANK_INLINE V load_mirrored(const T* a, Index i) { return load(a, i); }
  FREQRANK_INLINE void store(T* a, Index i, V v) { *reinterpret_cast<V*>(a + i * unit) = v; }
  FREQRANK_INLINE void store_mirrored(T* a, Index i, V v) { store(a, i, v); }
  FREQRANK_INLINE V factor(const T* a, Index i) { return spread<V>(a[i]); }
  FREQRANK_INLINE V factor_mirrored(const T* a, Index i) { return factor(a, i); }
};

template <class V_>
struct Along {  // mirrored: elements i, i - 1, ..
  using V = V_;
  using T = Lane<V>;
  static constexpr int unit = 1, step = width<V>;
  FREQRANK_INLINE V load(const T* a, Index i) { return load_as<V>(a + i); }
  FREQRANK_INLINE V load_mirrored(const T* a, Index i) { return reversed(load_as<V>(a + i - (step - 1))); }
  FREQRANK_INLINE void store(T* a, Index i, V v) { store_as(a + i, v); }
  FREQRANK_INLINE void store_mirrored(T* a, Index i, V v) { store_as(a + i - (step - 1), reversed(v)); }
  FREQRANK_INLINE V factor(const T* a, Index i) { return load(a, i); }
  FREQRANK_INLINE V factor_mirrored(const T* a, Index i) { return load_mirrored(a, i); }
};

template <class V>
struct SideBySide {
  using Body = Side<V>;
  using Tail = Side<V>;
  using T = Lane<V>;
  static constexpr int unit = Body::unit;
};

template <class V>
struct OneRow {
  using Body = Along<V>;
  using Tail = Side<Lane<V>>;
  using T = Lane<V>;
  static constexpr int unit = 1;
};

// body(Body or Tail, i) over begin <= i < end.
template <class L, class F>
FREQRANK_INLINE void each(Index begin, Index end, const F& body) {
  Index i = begin;
  for (; i + L::Body::step <= end; i += L::Body::step) body(typename L::Body{}, i);
  if constexpr (L::Body::step > 1) {
    for (; i < end; ++i) body(typename L::Tail{}, i);
  }
}

}  // namespace freqrank::dct::FREQRANK_ISA
