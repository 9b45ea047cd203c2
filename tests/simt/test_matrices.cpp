// Matrix fragments, ldmatrix and mma: element ownership as the PTX ISA tables give it, products against plain loops.

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "machine_kernels.h"

namespace freqrank::machine_tests {
namespace {

template <class E>
E element(double x) {
  if constexpr (std::is_same_v<E, tf32>)
    return to_tf32(static_cast<float>(x));
  else if constexpr (std::is_same_v<E, std::int8_t>)
    return static_cast<std::int8_t>(x);
  else
    return simt::from_float<E>(x);
}
template <class E>
double value(E x) {
  if constexpr (std::is_same_v<E, std::int8_t>)
    return x;
  else
    return simt::to_float(x);
}

template <class E>
struct Case {
  using P = Product<E>;
  std::vector<E> a = std::vector<E>(P::m * P::k), b = std::vector<E>(P::k * P::n);
  std::vector<typename P::Sum> c = std::vector<typename P::Sum>(P::m * P::n), d = c;

  explicit Case(double range, bool whole, unsigned seed = 5) {
    std::mt19937 random(seed);
    std::uniform_real_distribution<double> uniform(-range, range);
    const auto draw = [&] { return whole ? std::round(uniform(random)) : uniform(random); };
    for (E& x : a) x = element<E>(draw());
    for (E& x : b) x = element<E>(draw());
    for (auto& x : c) x = static_cast<typename P::Sum>(draw());
  }
  void run(Queue& queue, From from = From::global, Fault fault = Fault::none,
           int pitch = P::k + 16 / static_cast<int>(sizeof(E))) {
    queue.launch<P>({1, 32, 4096},
                    {queue.view<const E>(a.data(), 0, P::m * P::k), queue.view<const E>(b.data(), 0, P::k * P::n),
                     queue.view<const typename P::Sum>(c.data(), 0, P::m * P::n), queue.view(d.data(), 0, P::m * P::n),
                     from, pitch, fault});
  }
  // |d - (a b + c)| relative to |a| |b| + |c|, the worst element.
  double error() const {
    double worst = 0;
    for (int i = 0; i < P::m; ++i)
      for (int j = 0; j < P::n; ++j) {
        double sum = static_cast<double>(c[i * P::n + j]), size = std::fabs(sum);
        for (int l = 0; l < P::k; ++l) {
          const double product = value(a[i * P::k + l]) * value(b[l * P::n + j]);
          sum += product;
          size += std::fabs(product);
        }
        worst = std::max(worst, std::fabs(static_cast<double>(d[i * P::n + j]) - sum) / (size + 1e-300));
      }
    return worst;
  }
};

template <class E>
void check_products(double tolerance, std::vector<From> ways) {
  for (From from : ways)
    for (std::uint64_t seed : {1, 2, 3}) {
      Executor executor(seed);
      Queue queue(executor);
      Case<E> whole(60, true);
      whole.run(queue, from);
      EXPECT_EQ(whole.error(), 0);
      if (tolerance > 0) {
        Case<E> real(3, false, static_cast<unsigned>(seed));
        real.run(queue, from);
        EXPECT_LT(real.error(), tolerance);
        EXPECT_GT(real.error(), 0);
      }
      EXPECT_EQ(executor.counters().at("test_product").total.mma, tolerance > 0 ? 2u : 1u);
      if (from == From::shared_natural) {
        const auto& lines = executor.counters().at("test_product").lines;
        std::uint64_t loads = 0, conflicts = 0;
        for (const auto& [line, counts] : lines)
          if (counts.matrix_loads) {
            loads += counts.matrix_loads;
            conflicts += counts.bank_conflicts;
          }
        EXPECT_EQ(loads, tolerance > 0 ? 4u : 2u);
        EXPECT_EQ(conflicts, 0u);
      }
    }
}

TEST(Matrices, products) {
  check_products<bfloat16>(0x1p-21, {From::global, From::shared_natural, From::shared_other});
  check_products<float16>(0x1p-21, {From::global, From::shared_natural, From::shared_other});
  check_products<tf32>(0x1p-21, {From::global, From::shared_natural});
  check_products<double>(0x1p-50, {From::global});
  check_products<std::int8_t>(0, {From::global, From::shared_natural});
}

TEST(Matrices, sums_of_integers_wrap_around) {
  Case<std::int8_t> x(127, true);
  for (auto& c : x.c) c = 2147483647;
  x.a.assign(x.a.size(), 1);
  x.b.assign(x.b.size(), 1);
  Executor executor;
  Queue queue(executor);
  x.run(queue);
  for (auto d : x.d) EXPECT_EQ(d, -2147483648 + 31);
}

// What is below 2^-24 of the largest addend's power of two is cut off towards zero, 8 products at a time.
TEST(Matrices, sums_truncate) {
  Case<bfloat16> x(0, true);
  Executor executor;
  Queue queue(executor);
  x.c.assign(x.c.size(), 1.f);
  x.a.assign(x.a.size(), element<bfloat16>(-0x1.ep-13));
  x.b.assign(x.b.size(), element<bfloat16>(0x1p-12));
  x.run(queue);
  for (float d : x.d) EXPECT_EQ(d, 1.f);
  x.b.assign(x.b.size(), element<bfloat16>(0x1p-11));
  // Each product is -1.875 x 2^-24: at first cut to 1 x 2^-24; below 1 the unit is 2^-25, and 3 of 3.75 remain.
  x.run(queue);
  for (float d : x.d) EXPECT_EQ(d, 1.f - 8 * 0x1p-24f - 8 * 3 * 0x1p-25f);
  x.a.assign(x.a.size(), element<bfloat16>(HUGE_VAL));
  x.run(queue);
  for (float d : x.d) EXPECT_EQ(d, HUGE_VALF);
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

TEST(Matrices, loads) {
  std::vector<float16> x(256), rows(256), columns(256);
  std::vector<unsigned> single(32), transposed(32);
  for (int i = 0; i < 256; ++i) x[i].bits = static_cast<std::uint16_t>(i * 7);
  Executor executor(3);
  Queue queue(executor);
  queue.launch<MatrixLoads>({1, 32, 1024}, {queue.view<const float16>(x.data(), 0, 256),
                                            queue.view(rows.data(), 0, 256), queue.view(columns.data(), 0, 256),
                                            queue.view(single.data(), 0, 32), queue.view(transposed.data(), 0, 32)});
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < 16; ++j) {
      ASSERT_EQ(rows[i * 16 + j].bits, x[i * 16 + j].bits);
      ASSERT_EQ(columns[i * 16 + j].bits, x[j * 16 + i].bits);
    }
  for (int l = 0; l < 32; ++l)
    for (unsigned k = 0; k < 2; ++k) {
      EXPECT_EQ(single[l] >> 16 * k & 0xffff, x[l / 4 * 16 + l % 4 * 2 + k].bits);
      EXPECT_EQ(transposed[l] >> 16 * k & 0xffff, x[(l % 4 * 2 + k) * 16 + l / 4].bits);
    }
  EXPECT_EQ(executor.counters().at("test_matrix_loads").total.matrix_loads, 4u);
}

TEST(Matrices, tf32_rounds_ties_away_from_zero) {
  EXPECT_EQ(simt::to_float(to_tf32(1.f + 0x1p-11f)), 1.f + 0x1p-10f);
  EXPECT_EQ(simt::to_float(to_tf32(-1.f - 0x1p-11f)), -1.f - 0x1p-10f);
  EXPECT_EQ(simt::to_float(to_tf32(1.f + 0x1.8p-12f)), 1.f);
  EXPECT_TRUE(std::isinf(simt::to_float(to_tf32(HUGE_VALF))));
}

template <class F>
std::string error_of(F f) {
  Executor executor;
  Queue queue(executor);
  try {
    f(queue);
  } catch (const Error& e) {
    return e.what();
  }
  return "";
}

TEST(Matrices, wrong_fragments_are_errors) {
  const std::string place =
      error_of([](Queue& q) { Case<bfloat16>(1, true).run(q, From::global, Fault::wrong_place); });
  EXPECT_NE(place.find("kernel test_product"), std::string::npos) << place;
  EXPECT_NE(place.find("fragment A: lane"), std::string::npos) << place;
  EXPECT_NE(place.find("holds (row, col)"), std::string::npos) << place;
  const std::string given = error_of([](Queue& q) { Case<tf32>(1, true).run(q, From::global, Fault::not_given); });
  EXPECT_NE(given.find("fragment A: element 3, (row, col) (10, 5), was never given"), std::string::npos) << given;
  EXPECT_NE(given.find("thread 9"), std::string::npos) << given;
  const std::string skew =
      error_of([](Queue& q) { Case<float16>(1, true).run(q, From::shared_natural, Fault::misaligned_matrix); });
  EXPECT_NE(skew.find("misaligned access of 16 bytes"), std::string::npos) << skew;
  const std::string conflict = error_of([](Queue& q) {
    Case<float16>(1, true).run(q, From::shared_natural, Fault::none, 16);
    q.executor().require_no_bank_conflicts();
  });
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
