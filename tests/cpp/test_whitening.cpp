#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <new>
#include <random>
#include <type_traits>
#include <utility>
#include <vector>

#include "common/half.h"
#include "common/parallel.h"
#include "whitening/cholesky.h"
#include "whitening/gram.h"
#include "whitening/triangular.h"

namespace freqrank::whitening {

namespace {

using std::int64_t;

// Exactly as large as the plan says, so that the address sanitizer sees a byte too many, and full of NaN.
class Workspace {
 public:
  explicit Workspace(int64_t bytes)
      : memory_(static_cast<std::byte*>(::operator new(static_cast<std::size_t>(bytes), std::align_val_t(64)))) {
    std::memset(memory_, 0xff, static_cast<std::size_t>(bytes));
  }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  ~Workspace() { ::operator delete(memory_, std::align_val_t(64)); }
  void* get() const { return memory_; }

 private:
  std::byte* memory_;
};

template <class T>
std::vector<T> random_values(int64_t count, unsigned seed) {
  std::mt19937 generator(seed);
  std::normal_distribution<double> normal;
  std::vector<T> values(static_cast<std::size_t>(count));
  for (auto& value : values) {
    if constexpr (sizeof(T) == 2) {
      value = from_float<T>(static_cast<float>(normal(generator)));
    } else {
      value = static_cast<T>(normal(generator));
    }
  }
  return values;
}

template <class T>
constexpr Dtype dtype_of() {
  return std::is_same_v<T, float16>    ? Dtype::float16
         : std::is_same_v<T, bfloat16> ? Dtype::bfloat16
         : std::is_same_v<T, float>    ? Dtype::float32
                                       : Dtype::float64;
}

template <class T>
MatrixBatch view(std::vector<T>& values, int64_t row_stride, int64_t column_stride, const int64_t* batch_strides) {
  return {values.data(), dtype_of<T>(), row_stride, column_stride, batch_strides};
}

// A symmetric positive definite batch, row-major.
template <class T>
std::vector<T> positive_definite(int64_t batch, int64_t n) {
  const auto x = random_values<double>(batch * n * n, 7);
  std::vector<T> a(static_cast<std::size_t>(batch * n * n));
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t j = 0; j < n; ++j) {
        double sum = i == j ? 0.1 : 0.0;
        for (int64_t t = 0; t < n; ++t) sum += x[(b * n + t) * n + i] * x[(b * n + t) * n + j] / static_cast<double>(n);
        a[(b * n + i) * n + j] = static_cast<T>(sum);
      }
    }
  }
  return a;
}

template <class T>
class GramOf : public testing::Test {};
using InputTypes = testing::Types<float16, bfloat16, float, double>;
TYPED_TEST_SUITE(GramOf, InputTypes);

TYPED_TEST(GramOf, EverySizeAndLayout) {
  struct Case {
    int64_t batch, tokens, n, m;
  };
  for (const auto& [batch, tokens, n, m] : {Case{1, 0, 3, 2}, Case{0, 4, 3, 2}, Case{2, 1, 1, 1}, Case{3, 5, 7, 13},
                                            Case{1, 97, 49, 50}, Case{2, 100, 193, 5}, Case{1, 2100, 9, 3}}) {
    auto x = random_values<TypeParam>(batch * tokens * n, 1), y = random_values<TypeParam>(batch * tokens * m, 2);
    auto weight = random_values<double>(batch * tokens, 3);
    for (const bool by_columns : {false, true}) {
      for (const bool symmetric : {false, true}) {
        for (const bool weighted : {false, true}) {
          const int64_t columns = symmetric ? n : m;
          const int64_t x_batch = tokens * n, y_batch = tokens * m, weight_batch = tokens, out_batch = n * columns;
          std::vector<double> out(static_cast<std::size_t>(batch * n * columns), 0.5);
          GramArguments arguments;
          arguments.x = by_columns ? view(x, 1, tokens, &x_batch) : view(x, n, 1, &x_batch);
          arguments.y = by_columns ? view(y, 1, tokens, &y_batch) : view(y, m, 1, &y_batch);
          arguments.out = view(out, columns, 1, &out_batch);
          arguments.accumulate = true;
          if (weighted) {
            arguments.weight = weight.data();
            arguments.weight_stride = 1;
            arguments.weight_batch_strides = &weight_batch;
          }
          const auto plan = plan_gram({{batch}}, tokens, n, columns, symmetric);
          const Workspace workspace(workspace_bytes(plan));
          run(plan, arguments, workspace.get(), thread_pool(2));
          const auto& other = symmetric ? x : y;
          for (int64_t b = 0; b < batch; ++b) {
            for (int64_t i = 0; i < n; ++i) {
              for (int64_t j = 0; j < columns; ++j) {
                double sum = 0.5;
                for (int64_t t = 0; t < tokens; ++t) {
                  const auto xt = by_columns ? x[b * x_batch + i * tokens + t] : x[b * x_batch + t * n + i];
                  const auto yt = by_columns ? other[b * tokens * columns + j * tokens + t]
                                             : other[b * tokens * columns + t * columns + j];
                  sum += (weighted ? weight[b * tokens + t] : 1.0) * static_cast<double>(to_float(xt)) *
                         static_cast<double>(to_float(yt));
                }
                ASSERT_NEAR(out[(b * n + i) * columns + j], sum, 1e-10);
              }
            }
          }
        }
      }
    }
  }
}

TEST(Gram, TheSameOnAnyNumberOfThreads) {
  for (const auto& [tokens, n] : {std::pair<int64_t, int64_t>{9000, 11}, {500, 300}}) {
    auto x = random_values<float>(tokens * n, 4);
    std::vector<std::vector<double>> results;
    for (const auto& parallel_for : {serial(), thread_pool(2), thread_pool(5)}) {
      std::vector<double> out(static_cast<std::size_t>(n * n));
      GramArguments arguments;
      arguments.x = view(x, n, 1, nullptr);
      arguments.out = view(out, n, 1, nullptr);
      const auto plan = plan_gram({{}}, tokens, n, n, true);
      const Workspace workspace(workspace_bytes(plan));
      run(plan, arguments, workspace.get(), parallel_for);
      results.push_back(out);
    }
    EXPECT_EQ(results[0], results[1]);
    EXPECT_EQ(results[0], results[2]);
  }
}

template <class T>
class CholeskyOf : public testing::Test {};
using SolverTypes = testing::Types<float, double>;
TYPED_TEST_SUITE(CholeskyOf, SolverTypes);

// A x = b in the call that factors gives the factor u too. b lies by rows, x by columns.
template <class T>
void solves_with_it(std::vector<T>& a, const std::vector<T>& u, int64_t batch, int64_t n) {
  const int64_t stride = n * n;
  for (const int64_t k : {1, 6, 19, 515}) {
    std::vector<T> b = random_values<T>(batch * n * k, 7), x(b.size()), factor(u.size());
    std::vector<std::int32_t> info(static_cast<std::size_t>(batch), -1);
    const int64_t strides = n * k;
    const auto plan = plan_cholesky({{batch}}, n, dtype_of<T>(), k);
    const Workspace workspace(workspace_bytes(plan));
    run(plan,
        CholeskyArguments{view(a, n, 1, &stride), factor.data(), info.data(), view(b, k, 1, &strides),
                          view(x, 1, n, &strides)},
        workspace.get(), thread_pool(2));
    EXPECT_EQ(factor, u);
    for (int64_t m = 0; m < batch; ++m) {
      for (int64_t i = 0; i < n; ++i) {
        for (int64_t j = 0; j < k; ++j) {
          double sum = 0, size = 1;
          for (int64_t t = 0; t < n; ++t) {
            const double element = a[(m * n + std::min(i, t)) * n + std::max(i, t)];
            const double term = element * x[m * strides + j * n + t];
            sum += term, size += std::abs(term);
          }
          ASSERT_NEAR(sum, b[m * strides + i * k + j],
                      std::numeric_limits<T>::epsilon() * static_cast<double>(n + 8) * size);
        }
      }
    }
  }
}

TYPED_TEST(CholeskyOf, FactorsAndSolves) {
  using T = TypeParam;
  const double eps = std::numeric_limits<T>::epsilon();
  for (const auto& [batch, n] :
       {std::pair<int64_t, int64_t>{0, 3}, {2, 0}, {3, 1}, {3, 13}, {2, 64}, {2, 65}, {9, 70}, {1, 130}, {1, 300}}) {
    auto a = positive_definite<T>(batch, n);
    for (int64_t b = 0; b < batch; ++b) {  // only the upper triangle may be read
      for (int64_t i = 0; i < n; ++i) {
        for (int64_t j = 0; j < i; ++j) a[(b * n + i) * n + j] = std::numeric_limits<T>::quiet_NaN();
      }
    }
    const int64_t stride = n * n;
    std::vector<T> u(a.size());
    std::vector<std::int32_t> info(static_cast<std::size_t>(batch), -1);
    const auto plan = plan_cholesky({{batch}}, n, dtype_of<T>());
    const Workspace workspace(workspace_bytes(plan));
    run(plan, CholeskyArguments{view(a, n, 1, &stride), u.data(), info.data()}, workspace.get(), thread_pool(2));
    for (int64_t b = 0; b < batch; ++b) {
      EXPECT_EQ(info[b], 0);
      for (int64_t i = 0; i < n; ++i) {
        for (int64_t j = 0; j < n; ++j) {
          if (j < i) {
            ASSERT_EQ(u[(b * n + i) * n + j], T(0));
          } else {
            double sum = 0;
            for (int64_t t = 0; t <= i; ++t)
              sum += static_cast<double>(u[(b * n + t) * n + i]) * u[(b * n + t) * n + j];
            ASSERT_NEAR(sum, a[(b * n + i) * n + j], 20 * eps * static_cast<double>(n));
          }
        }
      }
    }
    solves_with_it(a, u, batch, n);
    // solve with it: from the left and the right, as upper and (transposed) as lower
    const int64_t k = 5;
    for (const bool left : {false, true}) {
      for (const bool transposed : {false, true}) {
        auto right_hand_sides = random_values<T>(batch * n * k, 9);
        std::vector<T> x(right_hand_sides.size());
        const int64_t strides = n * k, row = left ? k : n;
        TriangularArguments arguments;
        arguments.a = transposed ? view(u, 1, n, &stride) : view(u, n, 1, &stride);
        arguments.b = view(right_hand_sides, row, 1, &strides);
        arguments.x = view(x, row, 1, &strides);
        arguments.upper = !transposed;
        arguments.left = left;
        const auto solve_plan = plan_triangular({{batch}}, n, k, dtype_of<T>());
        const Workspace space(workspace_bytes(solve_plan));
        run(solve_plan, arguments, space.get(), thread_pool(2));
        for (int64_t b = 0; b < batch; ++b) {
          const auto factor = [&](int64_t i, int64_t j) {
            return static_cast<double>(transposed ? u[(b * n + j) * n + i] : u[(b * n + i) * n + j]);
          };
          for (int64_t i = 0; i < n; ++i) {
            for (int64_t j = 0; j < k; ++j) {
              double sum = 0, size = 0;
              for (int64_t t = 0; t < n; ++t) {
                const double term =
                    left ? factor(i, t) * x[b * strides + t * k + j] : x[b * strides + j * n + t] * factor(t, i);
                sum += term;
                size += std::abs(term);
              }
              ASSERT_NEAR(sum, right_hand_sides[b * strides + (left ? i * k + j : j * n + i)],
                          eps * static_cast<double>(n + 4) * (size + 1));
            }
          }
        }
      }
    }
  }
}

template <class T>
struct Factors {
  std::vector<T> u;
  std::vector<std::int32_t> info;

  bool operator==(const Factors& other) const {  // bit by bit, NaN included
    return info == other.info && u.size() == other.u.size() &&
           std::memcmp(u.data(), other.u.data(), u.size() * sizeof(T)) == 0;
  }
};

template <class T>
Factors<T> factors(const MatrixBatch& a, int64_t batch, int64_t n, const ParallelFor& parallel_for) {
  Factors<T> result{std::vector<T>(static_cast<std::size_t>(batch * n * n), T(7)),
                    std::vector<std::int32_t>(static_cast<std::size_t>(batch), -1)};
  const auto plan = plan_cholesky({{batch}}, n, dtype_of<T>());
  const Workspace workspace(workspace_bytes(plan));
  run(plan, CholeskyArguments{a, result.u.data(), result.info.data()}, workspace.get(), parallel_for);
  return result;
}

// One matrix after the other, each in a call of its own.
template <class T>
Factors<T> one_by_one(std::vector<T>& a, int64_t batch, int64_t n) {
  Factors<T> all;
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t stride = n * n;
    const MatrixBatch one{a.data() + b * stride, dtype_of<T>(), n, 1, &stride};
    const auto result = factors<T>(one, 1, n, serial());
    all.u.insert(all.u.end(), result.u.begin(), result.u.end());
    all.info.push_back(result.info[0]);
  }
  return all;
}

TYPED_TEST(CholeskyOf, TheSameBitsInAnyBatchLayoutAndNumberOfThreads) {
  using T = TypeParam;
  std::vector<int64_t> orders{83, 97, 127, 128, 129, 130, 131, 255, 256, 257};
  for (int64_t n = 1; n <= 70; ++n) orders.push_back(n);
  for (const int64_t n : orders) {
    const int64_t batch = n <= 70 ? 21 : 3, stride = n * n;  // 21 fills no whole number of vectors, nor half of one
    const auto plain = positive_definite<T>(batch, n);
    auto upper = plain;
    std::vector<T> lower(plain.size()), spaced(static_cast<std::size_t>(batch * stride * 6));
    const T nan = std::numeric_limits<T>::quiet_NaN();
    std::fill(spaced.begin(), spaced.end(), nan);
    for (int64_t b = 0; b < batch; ++b) {
      for (int64_t i = 0; i < n; ++i) {
        for (int64_t j = 0; j < n; ++j) {
          T& value = upper[b * stride + i * n + j];
          if (j < i) value = nan;
          lower[b * stride + j * n + i] = value;
          spaced[((b * n + i) * n * 2 + j * 2) * 3] = value;
        }
      }
    }
    const auto expected = one_by_one(upper, batch, n);
    ASSERT_EQ(expected.info, std::vector<std::int32_t>(static_cast<std::size_t>(batch), 0));
    for (int64_t b = 0; b < batch; ++b) {
      double error = 0, norm = 0;
      for (int64_t i = 0; i < n; ++i) {
        for (int64_t j = 0; j < n; ++j) {
          if (j < i) {
            ASSERT_EQ(expected.u[b * stride + i * n + j], T(0));
          }
          double sum = 0;
          for (int64_t t = 0; t <= std::min(i, j); ++t) {
            sum += static_cast<double>(expected.u[b * stride + t * n + i]) * expected.u[b * stride + t * n + j];
          }
          const double value = plain[b * stride + i * n + j];
          error += (sum - value) * (sum - value), norm += value * value;
        }
      }
      ASSERT_LE(std::sqrt(error), 5 * static_cast<double>(n) * std::numeric_limits<T>::epsilon() * std::sqrt(norm));
    }
    for (const int threads : {1, 2, 3}) {
      const auto parallel_for = thread_pool(threads);
      EXPECT_TRUE(factors<T>(view(upper, n, 1, &stride), batch, n, parallel_for) == expected) << n;
      EXPECT_TRUE(factors<T>(view(lower, 1, n, &stride), batch, n, parallel_for) == expected) << n;
    }
    const int64_t far = stride * 6;
    EXPECT_TRUE(factors<T>(view(spaced, n * 6, 6, &far), batch, n, serial()) == expected) << n;
    const int64_t none = 0;  // the first matrix again and again
    const auto repeated = factors<T>(view(upper, n, 1, &none), batch, n, serial());
    for (int64_t b = 0; b < batch; ++b) {
      ASSERT_TRUE(std::equal(expected.u.begin(), expected.u.begin() + stride, repeated.u.begin() + b * stride));
    }
  }
}

TYPED_TEST(CholeskyOf, AFailureInOneLaneStaysThere) {
  using T = TypeParam;
  for (const int64_t n : {1, 2, 7, 16, 33, 64, 65, 100, 300, 520}) {
    const int64_t batch = n <= 65 ? 37 : 7, stride = n * n;
    const auto good = positive_definite<T>(batch, n);
    auto a = good;
    std::vector<std::int32_t> info(static_cast<std::size_t>(batch), 0);
    for (int64_t b = 0; b < batch; b += 2) {
      const int64_t bad = (b * 5 + n - 1) % n;
      const T values[] = {T(-1), T(0), std::numeric_limits<T>::quiet_NaN(), -std::numeric_limits<T>::infinity()};
      a[b * stride + bad * n + bad] = values[b / 2 % 4];
      info[static_cast<std::size_t>(b)] = static_cast<std::int32_t>(bad) + 1;
    }
    auto clean = good;
    const auto alone = one_by_one(a, batch, n), before = one_by_one(clean, batch, n);
    EXPECT_EQ(alone.info, info);
    EXPECT_TRUE(factors<T>(view(a, n, 1, &stride), batch, n, serial()) == alone) << n;
    EXPECT_TRUE(factors<T>(view(a, n, 1, &stride), batch, n, thread_pool(2)) == alone) << n;
    for (int64_t b = 0; b < batch; ++b) {
      const int64_t known = info[static_cast<std::size_t>(b)] == 0 ? n : info[static_cast<std::size_t>(b)] - 1;
      for (int64_t i = 0; i < n; ++i) {
        for (int64_t j = 0; j < n; ++j) {
          const int64_t at = b * stride + i * n + j;
          if (j < known || j < i) {
            ASSERT_EQ(alone.u[at], j < i ? T(0) : before.u[at]) << n << " " << b << " " << i << " " << j;
          } else {  // what was not reached is A's own
            ASSERT_EQ(std::memcmp(&alone.u[at], &a[at], sizeof(T)), 0);
          }
        }
      }
    }
  }
}

TYPED_TEST(CholeskyOf, NamesTheFailingMinorAndSparesTheOthers) {
  using T = TypeParam;
  const int64_t n = 150, stride = n * n;
  for (const int64_t bad : {0, 1, 63, 64, 149}) {
    auto a = positive_definite<T>(3, n);
    std::vector<T> before(a.size()), after(a.size());
    std::vector<std::int32_t> info(3);
    const auto plan = plan_cholesky({{3}}, n, dtype_of<T>());
    const Workspace workspace(workspace_bytes(plan));
    run(plan, CholeskyArguments{view(a, n, 1, &stride), before.data(), info.data()}, workspace.get(), serial());
    EXPECT_EQ(info, (std::vector<std::int32_t>{0, 0, 0}));
    a[bad * n + bad] = -1;
    a[2 * stride + bad * n + bad] = std::numeric_limits<T>::quiet_NaN();
    run(plan, CholeskyArguments{view(a, n, 1, &stride), after.data(), info.data()}, workspace.get(), thread_pool(2));
    EXPECT_EQ(info,
              (std::vector<std::int32_t>{static_cast<std::int32_t>(bad) + 1, 0, static_cast<std::int32_t>(bad) + 1}));
    EXPECT_TRUE(std::equal(before.begin() + stride, before.begin() + 2 * stride, after.begin() + stride));
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t j = 0; j < i; ++j) ASSERT_EQ(after[i * n + j], T(0));
    }
  }
}

TEST(Whiten, ClimbsTheLadder) {
  const int64_t n = 70, stride = n * n;
  std::vector<double> grams;
  for (const int64_t tokens : {100, 40}) {  // full rank, and not
    auto x = random_values<double>(tokens * n, 5);
    for (int64_t t = 0; t < tokens; ++t) x[t * n + 3] = tokens == 40 ? 0 : x[t * n + 3];  // a dead channel
    std::vector<double> g(static_cast<std::size_t>(n * n));
    GramArguments arguments;
    arguments.x = view(x, n, 1, nullptr);
    arguments.out = view(g, n, 1, nullptr);
    const auto plan = plan_gram({{}}, tokens, n, n, true);
    const Workspace workspace(workspace_bytes(plan));
    run(plan, arguments, workspace.get(), serial());
    grams.insert(grams.end(), g.begin(), g.end());
  }
  grams.resize(static_cast<std::size_t>(4 * stride), 0.0);  // the third is zero
  std::fill(grams.begin() + 3 * stride, grams.end(), std::numeric_limits<double>::quiet_NaN());
  std::vector<double> factor(grams.size()), damping(4);
  std::vector<std::int32_t> info(4);
  const std::vector<double> scale{0.5, 2, 1, 1};
  const auto plan = plan_cholesky({{4}}, n, Dtype::float64);
  const Workspace workspace(workspace_bytes(plan));
  WhitenArguments arguments;
  arguments.gram = view(grams, n, 1, &stride);
  arguments.scale = scale.data();
  arguments.factor = factor.data();
  arguments.damping = damping.data();
  arguments.info = info.data();
  run(plan, arguments, workspace.get(), thread_pool(2));
  EXPECT_EQ(info[0], 0);
  EXPECT_EQ(damping[0], 0);
  EXPECT_EQ(info[1], 0);
  EXPECT_GT(damping[1], 0);
  EXPECT_LE(damping[1], 1e-10);
  EXPECT_EQ(info[2], 1);
  EXPECT_EQ(damping[2], 1e-6);
  EXPECT_EQ(info[3], 1);
  for (int64_t b = 0; b < 4; ++b) {
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t j = 0; j < n; ++j) {
        const double value = factor[b * stride + i * n + j];
        if (j < i) {
          ASSERT_EQ(value, 0);
        } else if (b >= 2) {
          ASSERT_TRUE(std::isnan(value));
        } else {
          double sum = 0;
          for (int64_t t = 0; t <= i; ++t) sum += factor[b * stride + t * n + i] * factor[b * stride + t * n + j];
          ASSERT_NEAR(sum, scale[b] * grams[b * stride + i * n + j], b == 0 ? 1e-12 : 1e-8);
        }
      }
    }
  }
}

template <class T>
class WhitenFrom : public testing::Test {};
TYPED_TEST_SUITE(WhitenFrom, SolverTypes);

TYPED_TEST(WhitenFrom, ClimbsTheLadderOfEachLaneAlone) {
  using T = TypeParam;
  const int64_t n = 30, stride = n * n, batch = 27;
  std::vector<T> grams(static_cast<std::size_t>(batch * stride));
  for (int64_t b = 0; b < batch; ++b) {  // of rank 10 to 36, so that some need damping and some do not
    const auto x = random_values<double>((10 + b) * n, static_cast<unsigned>(b));
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t j = 0; j < n; ++j) {
        double sum = 0;
        for (int64_t t = 0; t < 10 + b; ++t) sum += x[t * n + i] * x[t * n + j];
        grams[b * stride + i * n + j] = static_cast<T>(sum);
      }
    }
  }
  grams[4 * stride + 5 * n + 5] = std::numeric_limits<T>::quiet_NaN();
  std::fill_n(grams.begin() + 5 * stride, stride, T(0));
  const auto scale = [&] {
    auto values = random_values<double>(batch, 99);
    for (auto& value : values) value = 0.1 + value * value;
    return values;
  }();
  struct Result {
    std::vector<double> factor, damping;
    std::vector<std::int32_t> info;
  };
  const auto whiten = [&](int64_t first, int64_t count) {
    const auto size = static_cast<std::size_t>(count);
    Result result{std::vector<double>(size * stride), std::vector<double>(size), std::vector<std::int32_t>(size)};
    const auto plan = plan_cholesky({{count}}, n, Dtype::float64);
    const Workspace workspace(workspace_bytes(plan));
    WhitenArguments arguments;
    arguments.gram = {grams.data() + first * stride, dtype_of<T>(), n, 1, &stride};
    arguments.scale = scale.data() + first;
    arguments.factor = result.factor.data();
    arguments.damping = result.damping.data();
    arguments.info = result.info.data();
    run(plan, arguments, workspace.get(), thread_pool(2));
    return result;
  };
  const Result all = whiten(0, batch);
  int64_t damped = 0, plain = 0;
  for (int64_t b = 0; b < batch; ++b) {
    const Result one = whiten(b, 1);
    EXPECT_EQ(one.info[0], all.info[b]);
    EXPECT_EQ(one.damping[0], all.damping[b]);
    EXPECT_EQ(std::memcmp(one.factor.data(), &all.factor[b * stride], static_cast<std::size_t>(stride) * 8), 0) << b;
    if (all.info[b] == 0) ++(all.damping[b] > 0 ? damped : plain);
  }
  EXPECT_GT(damped, 0);
  EXPECT_GT(plain, 4);
  EXPECT_EQ(all.info[4], 6);
  EXPECT_EQ(all.damping[4], 0);
  EXPECT_TRUE(std::isnan(all.factor[4 * stride]));
  EXPECT_EQ(all.info[5], 1);
  EXPECT_EQ(all.damping[5], 1e-6);
}

TEST(Plan, WorkspaceDoesNotGrowWithTheProblem) {
  EXPECT_LT(workspace_bytes(plan_gram({{}}, int64_t{1} << 40, 20000, 20000, true)), int64_t{64} << 20);
  EXPECT_LT(workspace_bytes(plan_gram({{1 << 20}}, 100, 3, 3, true)), int64_t{4} << 20);
  EXPECT_LT(workspace_bytes(plan_cholesky({{}}, 20000, Dtype::float64)), int64_t{64} << 20);
  for (const int64_t n : {1, 64, 65, 512, 513}) {
    EXPECT_LT(workspace_bytes(plan_cholesky({{1 << 20}}, n, Dtype::float64)), int64_t{32} << 20);
  }
  EXPECT_LT(workspace_bytes(plan_triangular({{}}, 20000, 1 << 20, Dtype::float64)), int64_t{64} << 20);
}

}  // namespace

}  // namespace freqrank::whitening
