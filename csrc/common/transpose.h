#pragma once
// Shuffles and transposes of GNU vectors. Only for the files that are compiled once for each instruction set.

#include <cstdint>
#include <type_traits>
#include <utility>

#include "common/inline.h"
#include "common/lane.h"

namespace freqrank {

template <class V>
struct IntegersOf {
  using Integer = std::conditional_t<sizeof(Lane<V>) == 8, std::int64_t, std::int32_t>;
  typedef Integer type __attribute__((vector_size(sizeof(V))));
};

// Lanes of a and b, those of b numbered from W on, in the order that `order` gives.
template <class V, int... order>
FREQRANK_INLINE V shuffle(V a, V b, std::integer_sequence<int, order...>) {
#ifdef __clang__
  return __builtin_shufflevector(a, b, order...);
#else
  return __builtin_shuffle(a, b, typename IntegersOf<V>::type{order...});
#endif
}

// Lanes from a and b in turn, within each block of 16 bytes: the block's lower or upper lanes.
template <int W, int L, bool upper, int... l>
constexpr auto zip_order(std::integer_sequence<int, l...>) {
  return std::integer_sequence<int, (l / L * L + l % L / 2 + (upper ? L / 2 : 0) + (l % 2 ? W : 0))...>{};
}

// Exchange of off-diagonal blocks of D x D lanes: what a, and what b, becomes.
template <int W, int D, bool upper, int... l>
constexpr auto exchange_order(std::integer_sequence<int, l...>) {
  return std::integer_sequence<int, (upper ? (l & D ? W + l : l + D) : (l & D ? W + l - D : l))...>{};
}

template <class V, int D>
FREQRANK_INLINE void exchange_blocks(V* a) {
  constexpr int W = width<V>;
  if constexpr (D < W) {
    using Lanes = std::make_integer_sequence<int, W>;
    FREQRANK_UNROLL
    for (int i = 0; i < W; ++i) {
      if (i & D) continue;
      const V b = a[i], c = a[i + D];
      a[i] = shuffle(b, c, decltype(exchange_order<W, D, false>(Lanes{})){});
      a[i + D] = shuffle(b, c, decltype(exchange_order<W, D, true>(Lanes{})){});
    }
    exchange_blocks<V, 2 * D>(a);
  }
}

// The transpose of the square a[0 .. W), in place.
template <class V>
FREQRANK_INLINE void transpose(V* a) {
  constexpr int W = width<V>, L = static_cast<int>(16 / sizeof(Lane<V>));
  using Lanes = std::make_integer_sequence<int, W>;
  using Lower = decltype(zip_order<W, L, false>(Lanes{}));
  using Upper = decltype(zip_order<W, L, true>(Lanes{}));
  FREQRANK_UNROLL
  for (int i = 0; i < W; i += L) {  // squares of L x L lanes
    if constexpr (L == 2) {
      const V b = a[i], c = a[i + 1];
      a[i] = shuffle(b, c, Lower{});
      a[i + 1] = shuffle(b, c, Upper{});
    } else {
      const V b = shuffle(a[i], a[i + 2], Lower{}), c = shuffle(a[i], a[i + 2], Upper{});
      const V d = shuffle(a[i + 1], a[i + 3], Lower{}), e = shuffle(a[i + 1], a[i + 3], Upper{});
      a[i] = shuffle(b, d, Lower{});
      a[i + 1] = shuffle(b, d, Upper{});
      a[i + 2] = shuffle(c, e, Lower{});
      a[i + 3] = shuffle(c, e, Upper{});
    }
  }
  exchange_blocks<V, L>(a);
}

}  // namespace freqrank
