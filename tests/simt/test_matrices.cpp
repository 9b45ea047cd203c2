// Matrix fragments, ldmatrix and mma: element ownership as the PTX ISA tables give it, products against plain loops.

#include <gtest/gtest.h>

#include <cmath>
#include <string>
#include <vector>

#include "host_device.h"

namespace freqrank::machine_tests {
namespace {

TEST(Matrices, sums_of_integers_wrap_around) {
  Operands<std::int8_t> x(0, true);
  for (auto& c : x.c) c = 2147483647;
  x.a.assign(x.a.size(), 1);
  x.b.assign(x.b.size(), 1);
  HostDevice device;
  for (auto d : x.run(device)) EXPECT_EQ(d, -2147483648 + 31);
}

// What is below 2^-24 of the largest addend's power of two is cut off towards zero, 8 products at a time.
TEST(Matrices, sums_truncate) {
  Operands<bfloat16> x(0, true);
  HostDevice device;
  x.c.assign(x.c.size(), 1.f);
  x.a.assign(x.a.size(), element<bfloat16>(-0x1.ep-13));
  x.b.assign(x.b.size(), element<bfloat16>(0x1p-12));
  for (float d : x.run(device)) EXPECT_EQ(d, 1.f);
  x.b.assign(x.b.size(), element<bfloat16>(0x1p-11));
  // Each product is -1.875 x 2^-24: at first cut to 1 x 2^-24; below 1 the unit is 2^-25, and 3 of 3.75 remain.
  for (float d : x.run(device)) EXPECT_EQ(d, 1.f - 8 * 0x1p-24f - 8 * 3 * 0x1p-25f);
  x.a.assign(x.a.size(), element<bfloat16>(HUGE_VAL));
  for (float d : x.run(device)) EXPECT_EQ(d, HUGE_VALF);
}

TEST(Matrices, loads_and_products_are_counted) {
  HostDevice device;
  Operands<bfloat16>(1, true).run(device, From::shared_natural);
  const KernelCounts& counts = device.executor.counters().at("test_product");
  EXPECT_EQ(counts.total.mma, 1u);
  EXPECT_EQ(counts.total.matrix_loads, 2u);
  for (const auto& [line, c] : counts.lines) {
    if (c.matrix_loads) {
      EXPECT_EQ(c.bank_conflicts, 0u) << line;
    }
  }
}

// The tables of the PTX ISA, written down as they stand there: g = lane / 4, t = lane % 4.
template <class L, class Row, class Col>
void check_layout(int count, Row row, Col col) {
  ASSERT_EQ(L::count, count);
  std::vector<int> owners(L::rows * L::cols);
  for (int lane = 0; lane < 32; ++lane)
    for (int i = 0; i < count; ++i) {
      ASSERT_EQ(L::row(lane, i), row(lane / 4, lane % 4, i));
      ASSERT_EQ(L::col(lane, i), col(lane / 4, lane % 4, i));
      ++owners[L::row(lane, i) * L::cols + L::col(lane, i)];
    }
  for (int n : owners) ASSERT_EQ(n, 1);
}

TEST(Matrices, element_ownership) {
  const auto c_row = [](int g, int, int i) { return i < 2 ? g : g + 8; };
  const auto c_col = [](int, int t, int i) { return t * 2 + (i & 1); };
  // m16n8k16
  check_layout<Layout<bfloat16, Role::a>>(
      8, [](int g, int, int i) { return (0 <= i && i < 2) || (4 <= i && i < 6) ? g : g + 8; },
      [](int, int t, int i) { return i < 4 ? t * 2 + (i & 1) : t * 2 + (i & 1) + 8; });
  check_layout<Layout<bfloat16, Role::b>>(
      4, [](int, int t, int i) { return i < 2 ? t * 2 + (i & 1) : t * 2 + (i & 1) + 8; },
      [](int g, int, int) { return g; });
  check_layout<Layout<bfloat16, Role::accumulator>>(4, c_row, c_col);
  // m16n8k8 tf32
  check_layout<Layout<tf32, Role::a>>(
      4, [](int g, int, int i) { return i == 0 || i == 2 ? g : g + 8; },
      [](int, int t, int i) { return i < 2 ? t : t + 4; });
  check_layout<Layout<tf32, Role::b>>(
      2, [](int, int t, int i) { return i == 0 ? t : t + 4; }, [](int g, int, int) { return g; });
  check_layout<Layout<tf32, Role::accumulator>>(4, c_row, c_col);
  // m8n8k4 f64
  check_layout<Layout<double, Role::a>>(1, [](int g, int, int) { return g; }, [](int, int t, int) { return t; });
  check_layout<Layout<double, Role::b>>(1, [](int, int t, int) { return t; }, [](int g, int, int) { return g; });
  check_layout<Layout<double, Role::accumulator>>(2, [](int g, int, int) { return g; }, c_col);
  // m16n8k32 s8
  check_layout<Layout<std::int8_t, Role::a>>(
      16, [](int g, int, int i) { return (0 <= i && i < 4) || (8 <= i && i < 12) ? g : g + 8; },
      [](int, int t, int i) { return i < 8 ? t * 4 + (i & 3) : t * 4 + (i & 3) + 16; });
  check_layout<Layout<std::int8_t, Role::b>>(
      8, [](int, int t, int i) { return i < 4 ? t * 4 + (i & 3) : t * 4 + (i & 3) + 16; },
      [](int g, int, int) { return g; });
  check_layout<Layout<std::int8_t, Role::accumulator>>(4, c_row, c_col);
}

TEST(Matrices, tf32_rounds_ties_away_from_zero) {
  EXPECT_EQ(simt::to_float(to_tf32(1.f + 0x1p-11f)), 1.f + 0x1p-10f);
  EXPECT_EQ(simt::to_float(to_tf32(-1.f - 0x1p-11f)), -1.f - 0x1p-10f);
  EXPECT_EQ(simt::to_float(to_tf32(1.f + 0x1.8p-12f)), 1.f);
  EXPECT_TRUE(std::isinf(simt::to_float(to_tf32(HUGE_VALF))));
}

template <class E>
std::string error_of(From from, Fault fault, int pitch = 24) {
  HostDevice device;
  try {
    Operands<E>(1, true).run(device, from, fault, pitch);
    device.executor.require_no_bank_conflicts();
  } catch (const Error& e) {
    return e.what();
  }
  return "";
}

TEST(Matrices, wrong_fragments_are_errors) {
  const std::string place = error_of<bfloat16>(From::global, Fault::wrong_place);
  EXPECT_NE(place.find("kernel test_product"), std::string::npos) << place;
  EXPECT_NE(place.find("fragment A: lane"), std::string::npos) << place;
  EXPECT_NE(place.find("holds (row, col)"), std::string::npos) << place;
  EXPECT_NE(place.find("machine_kernels.h:"), std::string::npos) << place;
  const std::string given = error_of<tf32>(From::global, Fault::not_given);
  EXPECT_NE(given.find("fragment A: element 3, (row, col) (10, 5), was never given"), std::string::npos) << given;
  EXPECT_NE(given.find("thread 9"), std::string::npos) << given;
  const std::string skew = error_of<float16>(From::shared_natural, Fault::misaligned_matrix);
  EXPECT_NE(skew.find("misaligned access of 16 bytes"), std::string::npos) << skew;
  const std::string conflict = error_of<float16>(From::shared_natural, Fault::none, 16);
  EXPECT_NE(conflict.find("bank conflicts"), std::string::npos) << conflict;
}

// A fragment in the wrong role does not compile.
template <class X, class Y, class Z, class = void>
constexpr bool can_multiply = false;
template <class X, class Y, class Z>
constexpr bool
    can_multiply<X, Y, Z, std::void_t<decltype(mma(std::declval<X&>(), std::declval<Y&>(), std::declval<Z&>()))>> =
        true;
static_assert(can_multiply<Accumulator<bfloat16>, FragmentA<bfloat16>, FragmentB<bfloat16>>);
static_assert(!can_multiply<Accumulator<bfloat16>, FragmentB<bfloat16>, FragmentA<bfloat16>>);
static_assert(!can_multiply<Accumulator<bfloat16>, FragmentA<bfloat16>, FragmentB<float16>>);
static_assert(!can_multiply<FragmentA<bfloat16>, FragmentA<bfloat16>, FragmentB<bfloat16>>);

}  // namespace
}  // namespace freqrank::machine_tests
