#pragma once
// What a GNU vector is made of. A number counts as a vector of one.

#include <type_traits>
#include <utility>

namespace freqrank {

template <class V, bool = std::is_arithmetic_v<V>>
struct LaneOf {
  using type = V;
};
template <class V>
struct LaneOf<V, false> {
  using type = std::remove_cv_t<std::remove_reference_t<decltype(std::declval<V&>()[0])>>;
};
// The number type of a vector's lanes.
template <class V>
using Lane = typename LaneOf<V>::type;

template <class V>
constexpr int width = static_cast<int>(sizeof(V) / sizeof(Lane<V>));

}  // namespace freqrank
