#pragma once
// The host back end's tensor-core operations. Included by host.h.

namespace freqrank::simt {
inline namespace host {

inline tf32 to_tf32(float x) {
  const auto bits = std::bit_cast<std::uint32_t>(x);
  if ((bits & 0x7f800000u) == 0x7f800000u) return {bits};
  return {(bits + 0x1000u) & ~0x1fffu};
}
inline float to_float(tf32 x) { return std::bit_cast<float>(x.bits); }

[[noreturn]] void fail_fragment(Role role, int i, int count, Location at);
[[noreturn]] void fail_fragment_place(Role role, int i, int row, int col, int said_row, int said_col, Location at);
[[noreturn]] void fail_fragment_not_given(Role role, int i, int row, int col, Location at);

// A lane's part of a matrix, which knows what it has been given. set_at and get_at state the place that the caller
// takes element i to have; here that is checked.
template <class E, Role R>
class Fragment {
 public:
  using Place = Layout<E, R>;
  using Element = typename Place::Element;
  static constexpr int count = Place::count;
  static constexpr int packed = sizeof(Element) < 4 ? 4 / static_cast<int>(sizeof(Element)) : 1;

  Fragment() = default;
  explicit Fragment(Element value) { fill(value); }
  static int row(int i, Location at = Location::current()) { return Place::row(lane(at), i); }
  static int col(int i, Location at = Location::current()) { return Place::col(lane(at), i); }

  void set(int i, Element value, Location at = Location::current()) {
    check(i, at);
    elements_[i] = value;
    given_ |= 1u << i;
  }
  Element get(int i, Location at = Location::current()) const {
    check(i, at);
    if (!(given_ >> i & 1)) fail_not_given(i, at);
    return elements_[i];
  }
  void set_at(int i, int row, int col, Element value, Location at = Location::current()) {
    check_place(i, row, col, at);
    set(i, value, at);
  }
  Element get_at(int i, int row, int col, Location at = Location::current()) const {
    check_place(i, row, col, at);
    return get(i, at);
  }
  void set_pack(int i, pack<Element, packed> values, Location at = Location::current()) {
    if (i % packed != 0) fail(at, "set_pack: the element does not begin a register");
    for (int k = 0; k < packed; ++k) set(i + k, values[k], at);
  }
  void set_register(int j, unsigned bits, Location at = Location::current()) {
    static_assert(sizeof(Element) <= 4);
    pack<Element, packed> values;
    std::memcpy(&values, &bits, 4);
    set_pack(j * packed, values, at);
  }
  void fill(Element value, Location at = Location::current()) {
    for (int i = 0; i < count; ++i) set(i, value, at);
  }

  // For mma.
  void require_given(Location at) const {
    for (int i = 0; i < count; ++i)
      if (!(given_ >> i & 1)) fail_not_given(i, at);
  }
  const Element* elements() const { return elements_; }
  Element& for_mma(int i) { return elements_[i]; }

 private:
  static void check(int i, Location at) {
    if (i < 0 || i >= count) fail_fragment(R, i, count, at);
  }
  static void check_place(int i, int r, int c, Location at) {
    check(i, at);
    if (r != row(i, at) || c != col(i, at)) fail_fragment_place(R, i, row(i, at), col(i, at), r, c, at);
  }
  [[noreturn]] static void fail_not_given(int i, Location at) {
    fail_fragment_not_given(R, i, row(i, at), col(i, at), at);
  }

  Element elements_[count] = {};
  std::uint32_t given_ = 0;
};
template <class E>
using FragmentA = Fragment<E, Role::a>;
template <class E>
using FragmentB = Fragment<E, Role::b>;
template <class E>
using Accumulator = Fragment<E, Role::accumulator>;

template <int Count, bool Transposed, class E>
pack<unsigned, Count> load_matrices(shared<E> from, int i, Location at = Location::current()) {
  static_assert(Count == 1 || Count == 2 || Count == 4);
  static_assert(!Transposed || sizeof(E) == 2, "transposed matrices have 2-byte elements");
  struct Mine {
    const void* row;
    pack<unsigned, Count> result;
  } mine{};
  if (lane(at) < 8 * Count) mine.row = from.template check<16 / sizeof(E)>(i, Access::read, at);
  meet(
      Meeting::matrix_load,
      [](void* const lanes[32], Location) {
        for (int l = 0; l < warp_size; ++l)
          for (int j = 0; j < Count; ++j) {
            const auto bytes = [&](int row) {
              return static_cast<const char*>(static_cast<const Mine*>(lanes[8 * j + row])->row);
            };
            unsigned& out = static_cast<Mine*>(lanes[l])->result[j];
            if constexpr (Transposed) {
              for (int k = 0; k < 2; ++k)
                std::memcpy(reinterpret_cast<char*>(&out) + 2 * k, bytes(l % 4 * 2 + k) + l / 4 * 2, 2);
            } else {
              std::memcpy(&out, bytes(l / 4) + l % 4 * 4, 4);
            }
          }
      },
      &mine, at);
  return mine.result;
}

// The model of a tensor core's sum: products are exact; addends, the accumulator among them, are cut off (towards zero)
// below 2^-24 of the power of two that the largest reaches; the sum is cut off to float. `width` products at a time.
float truncating_sum(float sum, const double* products, int n, int width);

inline double operand(bfloat16 x) { return to_float(x); }
inline double operand(float16 x) { return to_float(x); }
inline double operand(tf32 x) { return std::bit_cast<float>(x.bits & ~0x1fffu); }

// sum += a b.
template <class E>
void mma(Fragment<E, Role::accumulator>& sum, const Fragment<E, Role::a>& a, const Fragment<E, Role::b>& b,
         Location at = Location::current()) {
  sum.require_given(at);
  a.require_given(at);
  b.require_given(at);
  struct Mine {
    Fragment<E, Role::accumulator>* sum;
    const Fragment<E, Role::a>* a;
    const Fragment<E, Role::b>* b;
  } mine{&sum, &a, &b};
  meet(
      Meeting::mma,
      [](void* const lanes[32], Location) {
        using Shape = MmaShape<E>;
        constexpr bool is_float = std::is_same_v<typename Shape::Accumulator, float>;
        using Wide = std::conditional_t<is_float, double, typename Shape::Accumulator>;
        const auto widen = [](E x) -> Wide {
          if constexpr (is_float)
            return operand(x);
          else
            return x;
        };
        Wide a[Shape::m][Shape::k], b[Shape::n][Shape::k];
        for (int l = 0; l < warp_size; ++l) {
          const Mine& m = *static_cast<const Mine*>(lanes[l]);
          for (int i = 0; i < m.a->count; ++i)
            a[Layout<E, Role::a>::row(l, i)][Layout<E, Role::a>::col(l, i)] = widen(m.a->elements()[i]);
          for (int i = 0; i < m.b->count; ++i)
            b[Layout<E, Role::b>::col(l, i)][Layout<E, Role::b>::row(l, i)] = widen(m.b->elements()[i]);
        }
        for (int l = 0; l < warp_size; ++l) {
          Fragment<E, Role::accumulator>& d = *static_cast<const Mine*>(lanes[l])->sum;
          for (int i = 0; i < d.count; ++i) {
            const Wide* x = a[Layout<E, Role::accumulator>::row(l, i)];
            const Wide* y = b[Layout<E, Role::accumulator>::col(l, i)];
            auto& out = d.for_mma(i);
            if constexpr (is_float) {
              double products[Shape::k];
              for (int k = 0; k < Shape::k; ++k) products[k] = x[k] * y[k];
              out = truncating_sum(out, products, Shape::k, sizeof(E) == 4 ? 4 : 8);
            } else if constexpr (std::is_same_v<E, double>) {
              for (int k = 0; k < Shape::k; ++k) out = std::fma(x[k], y[k], out);
            } else {  // wraps around
              auto bits = static_cast<std::uint32_t>(out);
              for (int k = 0; k < Shape::k; ++k) bits += static_cast<std::uint32_t>(x[k] * y[k]);
              out = static_cast<std::int32_t>(bits);
            }
          }
        }
      },
      &mine, at);
}
// Sixteen rows and Steps times four of depth at once.
template <int Steps>
void mma(Accumulator<double> (&sum)[2], const FragmentA<double> (&a)[Steps][2], const FragmentB<double> (&b)[Steps],
         Location at = Location::current()) {
  static_assert(Steps == 1 || Steps == 2 || Steps == 4);
  for (int s = 0; s < Steps; ++s)
    for (int h = 0; h < 2; ++h) mma(sum[h], a[s][h], b[s], at);
}

}  // namespace host
}  // namespace freqrank::simt
