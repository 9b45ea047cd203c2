#include "dct/dct.h"

#include <gtest/gtest.h>
#include <sys/mman.h>

#include <cmath>
#include <complex>
#include <limits>
#include <numeric>
#include <random>
#include <stdexcept>
#include <utility>
#include <vector>

#include "common/half.h"
#include "dct/codelets.h"

namespace freqrank::dct {

namespace {

using Sizes = std::vector<std::int64_t>;

Sizes contiguous(const Sizes& sizes) {
  Sizes strides(sizes.size());
  std::int64_t stride = 1;
  for (std::size_t d = sizes.size(); d-- > 0; stride *= sizes[d]) strides[d] = stride;
  return strides;
}

std::int64_t product(const Sizes& sizes) {
  return std::accumulate(sizes.begin(), sizes.end(), std::int64_t{1}, std::multiplies<>());
}

Problem problem(Dtype dtype, int type, const Sizes& in_sizes, const std::vector<int>& dims, const Sizes& lengths,
                const Sizes& out_sizes) {
  Problem p;
  p.dtype = dtype;
  p.type = type;
  p.in_sizes = in_sizes;
  p.in_strides = contiguous(in_sizes);
  p.out_sizes = out_sizes;
  p.out_strides = contiguous(out_sizes);
  p.dims = dims;
  p.lengths = lengths;
  return p;
}

// Through the public API; the workspace is exactly as long as asked for and deliberately misaligned.
void transform(const Problem& p, const void* in, void* out, const ParallelFor& parallel_for = serial()) {
  const Plan made = plan(p);
  std::vector<std::vector<char>> tables;
  std::vector<const void*> pointers;
  for (const Row& row : made.rows) {
    tables.emplace_back(row.table_bytes());
    fill_table(row, tables.back().data());
    pointers.push_back(tables.back().data());
  }
  std::vector<char> workspace(workspace_bytes(made) + 1, '\xff');
  run(made, {in, out, pointers.data()}, workspace.data() + 1, parallel_for);
}

// The matrix 2 cos(angle) of a type, angles reduced as exact integers.
class Kernel {
 public:
  Kernel(int type, std::int64_t n) : type_(type), period_(type == 1 ? 2 * (n - 1) : type == 4 ? 8 * n : 4 * n) {
    for (std::int64_t i = 0; i < period_; ++i) {
      const long double angle =
          6.283185307179586476925L * static_cast<long double>(i) / static_cast<long double>(period_);
      cosines_.push_back(static_cast<double>(2 * std::cos(angle)));
    }
  }

  double operator()(std::int64_t k, std::int64_t j) const {
    const std::int64_t row = type_ == 1 || type_ == 2 ? k : 2 * k + 1, column = type_ % 2 ? j : 2 * j + 1;
    return cosines_[static_cast<std::size_t>(row * column % period_)];
  }

 private:
  int type_;
  std::int64_t period_;
  std::vector<double> cosines_;
};

std::vector<double> direct(const Problem& p, std::vector<double> x) {
  const std::int64_t n = p.lengths[0];
  const auto ends = [&](std::vector<double>& v, int halves) {
    v.front() *= std::pow(0.5, 0.5 * halves);
    if (p.type == 1) v.back() *= std::pow(0.5, 0.5 * halves);
  };
  x.resize(static_cast<std::size_t>(n));
  ends(x, p.in_ends);
  const Kernel kernel(p.type, n);
  std::vector<double> y(x.size());
  for (std::int64_t k = 0; k < n; ++k) {
    for (std::int64_t j = 0; j < n; ++j) {
      y[static_cast<std::size_t>(k)] += kernel(k, j) * x[static_cast<std::size_t>(j)];
    }
    y[static_cast<std::size_t>(k)] *= std::pow(2.0 * static_cast<double>(p.type == 1 ? n - 1 : n), -0.5 * p.norm);
  }
  ends(y, p.out_ends);
  y.resize(static_cast<std::size_t>(p.out_sizes[0]));
  return y;
}

std::vector<double> random_row(std::int64_t n) {
  std::mt19937_64 engine(static_cast<std::uint64_t>(n));
  std::normal_distribution<double> normal;
  std::vector<double> x(static_cast<std::size_t>(n));
  for (double& value : x) value = normal(engine);
  return x;
}

double relative_error(const std::vector<double>& got, const std::vector<double>& want) {
  double difference = 0, norm = 0;
  for (std::size_t i = 0; i < want.size(); ++i) {
    difference += (got[i] - want[i]) * (got[i] - want[i]);
    norm += want[i] * want[i];
  }
  return std::sqrt(difference / std::max(norm, 1e-300));
}

}  // namespace

template <int R, class V>
void check_codelet() {
  Complex<V> a[R];
  std::vector<std::complex<double>> x;
  const auto lane = [](const V& v) {
    if constexpr (std::is_arithmetic_v<V>) return v;
    if constexpr (!std::is_arithmetic_v<V>) return v[1];
  };
  for (int i = 0; i < R; ++i) {
    a[i] = {spread<V>(static_cast<Lane<V>>(std::sin(3 * i + 1))), spread<V>(static_cast<Lane<V>>(std::cos(7 * i)))};
    x.emplace_back(lane(a[i].re), lane(a[i].im));
  }
  butterfly<R>(a);
  for (int k = 0; k < R; ++k) {
    std::complex<double> sum = 0;
    for (int i = 0; i < R; ++i) {
      sum += x[static_cast<std::size_t>(i)] * std::polar(1.0, -6.283185307179586477 * (i * k % R) / R);
    }
    const double bound = sizeof(Lane<V>) == 8 ? 4e-15 : 1e-6;
    EXPECT_LE(std::abs(sum - std::complex<double>(lane(a[k].re), lane(a[k].im))), bound) << R << ", " << k;
  }
}

template <class V>
void check_codelets() {
  check_codelet<2, V>();
  check_codelet<3, V>();
  check_codelet<4, V>();
  check_codelet<5, V>();
  check_codelet<7, V>();
  check_codelet<8, V>();
  check_codelet<11, V>();
  check_codelet<13, V>();
  check_codelet<16, V>();
}

TEST(Dct, CodeletsMatchTheSumOnNumbersAndVectors) {
  typedef float Floats __attribute__((vector_size(16)));
  typedef double Doubles __attribute__((vector_size(16)));
  check_codelets<float>();
  check_codelets<double>();
  check_codelets<Floats>();
  check_codelets<Doubles>();
}

TEST(Dct, MatchesTheSum) {
  for (std::int64_t n = 1; n <= 72; ++n) {
    for (int type = n < 2 ? 2 : 1; type <= 4; ++type) {
      for (int variant = 0; variant < 3; ++variant) {
        for (std::int64_t out : {n, n + 3, (n + 1) / 2}) {
          Problem p = problem(Dtype::float64, type, {n}, {0}, {n}, {out});
          p.norm = variant;
          if (type == 1 || type == 3) p.in_ends = 2 - variant;
          if (type <= 2) p.out_ends = variant;
          const std::vector<double> x = random_row(n);
          std::vector<double> y(static_cast<std::size_t>(out), NAN);
          transform(p, x.data(), y.data());
          EXPECT_LE(relative_error(y, direct(p, x)), 1e-14) << "type " << type << ", n " << n << ", out " << out;
        }
      }
    }
  }
}

TEST(Dct, LongPrimesAndSmoothLengths) {
  // 323 and 867: two large primes; 509 and 1018: a convolution with zeros between; 1459: one of length 1458 / 2
  for (std::int64_t n : {257, 323, 509, 867, 997, 1009, 1018, 1024, 1331, 1459, 1890, 2018, 2048, 2197}) {
    for (int type = 1; type <= 4; ++type) {
      const Problem p = problem(Dtype::float64, type, {n}, {0}, {n}, {n});
      const std::vector<double> x = random_row(n);
      std::vector<double> y(x.size());
      transform(p, x.data(), y.data());
      EXPECT_LE(relative_error(y, direct(p, x)), 2e-14) << "type " << type << ", n " << n;
    }
  }
}

TEST(Dct, CropsAndPadsTheInput) {
  for (std::int64_t size : {0, 3, 9, 20}) {
    const Problem p = problem(Dtype::float64, 2, {size}, {0}, {9}, {9});
    std::vector<double> x = random_row(size), y(9, NAN);
    transform(p, x.data(), y.data());
    EXPECT_LE(relative_error(y, direct(p, x)), 1e-14) << size;
  }
}

TEST(Dct, RowsHaveTheSameBitsAloneTogetherStridedAndThreaded) {
  // 33 and 37: the last group has one row, which goes alone, or five
  for (const auto& [n, count] : std::vector<std::pair<std::int64_t, std::int64_t>>{
           {2, 37}, {5, 33}, {34, 37}, {51, 33}, {64, 33}, {105, 37}, {323, 37}, {360, 33}, {1009, 37}, {1024, 33}}) {
    for (int type = 1; type <= 4; ++type) {
      std::vector<float> x(static_cast<std::size_t>(count * n));
      for (std::size_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>(std::sin(0.37 * static_cast<double>(i)));
      std::vector<float> alone(x.size()), together(x.size());
      for (std::int64_t row = 0; row < count; ++row) {
        transform(problem(Dtype::float32, type, {n}, {0}, {n}, {n}), x.data() + row * n, alone.data() + row * n);
      }
      Problem p = problem(Dtype::float32, type, {count, n}, {1}, {n}, {count, n});
      transform(p, x.data(), together.data());
      EXPECT_EQ(alone, together);
      for (int threads : {2, 3, 8}) {
        p.threads = threads;
        transform(p, x.data(), together.data(), thread_pool(threads));
        EXPECT_EQ(alone, together);
      }
      p.out_strides = {1, count};  // written transposed, then read back so
      transform(p, x.data(), together.data(), thread_pool(2));
      for (std::int64_t row = 0; row < count; ++row) {
        for (std::int64_t i = 0; i < n; ++i) {
          EXPECT_EQ(together[static_cast<std::size_t>(i * count + row)], alone[static_cast<std::size_t>(row * n + i)]);
        }
      }
    }
  }
}

TEST(Dct, RowsBeyondTheCachesHaveTheBitsOfRowsWithin) {
  for (std::int64_t n : {48, 64, 100, 256, 576, 1024}) {
    for (std::int64_t shift : {0, 5}) {  // 5: not a multiple of a cache line
      const std::int64_t count = (std::int64_t{9} << 20) / (8 * n) + 3;
      std::vector<float> x(static_cast<std::size_t>(count * n + shift)), y(x.size() + 16, 9.0f), want(x.size());
      for (std::size_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>(i * i % 1021) - 500.0f;
      const auto address = reinterpret_cast<std::uintptr_t>(y.data());
      float* const out = reinterpret_cast<float*>((address + 63) / 64 * 64) + (shift ? 1 : 0);
      Problem p = problem(Dtype::float32, 2, {count, n}, {1}, {n}, {count, n});
      EXPECT_GT(plan(p).passes[0].lines_ahead, 0);
      EXPECT_GT(plan(p).passes[0].streamed_lines, 0);
      p.threads = 2;
      transform(p, x.data() + shift, out, thread_pool(2));
      const std::int64_t part = count / 16;
      for (std::int64_t row = 0; row < count; row += part) {
        const std::int64_t rows = std::min(part, count - row);
        const Problem few = problem(Dtype::float32, 2, {rows, n}, {1}, {n}, {rows, n});
        EXPECT_EQ(plan(few).passes[0].streamed_lines, 0);
        transform(few, x.data() + shift + row * n, want.data() + row * n);
      }
      EXPECT_TRUE(std::equal(want.begin(), want.begin() + count * n, out)) << n << ", " << shift;
    }
  }
}

TEST(Dct, ManyDimensionsGrowAndShrinkThroughTheWorkspace) {
  const Sizes sizes{4, 7, 6};
  const Kernel first(2, 3), last(2, 8);
  std::vector<double> x(static_cast<std::size_t>(product(sizes)));
  for (std::size_t i = 0; i < x.size(); ++i) x[i] = std::cos(static_cast<double>(i * i));
  for (const Sizes& out : {Sizes{4, 7, 6}, Sizes{2, 7, 9}, Sizes{5, 7, 1}}) {
    const Sizes lengths{3, 8};
    const Problem p = problem(Dtype::float64, 2, sizes, {0, 2}, lengths, out);
    std::vector<double> y(static_cast<std::size_t>(product(out)), NAN);
    transform(p, x.data(), y.data(), thread_pool(2));
    for (std::int64_t a = 0; a < out[0]; ++a) {
      for (std::int64_t b = 0; b < out[1]; ++b) {
        for (std::int64_t c = 0; c < out[2]; ++c) {
          double want = 0;
          for (std::int64_t i = 0; a < 3 && c < 8 && i < 3; ++i) {
            for (std::int64_t j = 0; j < 6; ++j) {
              want += first(a, i) * last(c, j) * x[static_cast<std::size_t>((i * 7 + b) * 6 + j)];
            }
          }
          EXPECT_NEAR(y[static_cast<std::size_t>((a * out[1] + b) * out[2] + c)], want, 1e-12);
        }
      }
    }
  }
}

template <class S>
void check_rounding(Dtype dtype, const Sizes& sizes, const std::vector<int>& dims) {
  std::vector<S> x(static_cast<std::size_t>(product(sizes))), y(x.size());
  std::vector<float> wide(x.size()), want(x.size());
  Sizes lengths;
  for (const int d : dims) lengths.push_back(sizes[static_cast<std::size_t>(d)]);
  for (std::size_t i = 0; i < x.size(); ++i) {
    // from subnormal to beyond the largest number, and one not a number
    const float scale = i % 5 == 0 ? 1e-7f : i % 7 == 0 ? 3e4f : 1.0f;
    x[i] = from_float<S>(i == 3 ? std::numeric_limits<float>::quiet_NaN() : scale * std::sin(static_cast<float>(i)));
    wide[i] = to_float(x[i]);
  }
  transform(problem(dtype, 2, sizes, dims, lengths, sizes), x.data(), y.data());
  transform(problem(Dtype::float32, 2, sizes, dims, lengths, sizes), wide.data(), want.data());
  for (std::size_t i = 0; i < x.size(); ++i) {
    if (std::isnan(want[i])) {
      EXPECT_TRUE(std::isnan(to_float(y[i])));
    } else {
      EXPECT_EQ(y[i].bits, from_float<S>(want[i]).bits) << want[i];
    }
  }
}

TEST(Dct, SixteenBitsAreRoundedOnce) {
  check_rounding<bfloat16>(Dtype::bfloat16, {18, 33}, {0, 1});
  check_rounding<float16>(Dtype::float16, {18, 33}, {0, 1});
  for (const Sizes& sizes : {Sizes{1, 130}, Sizes{19, 130}, Sizes{8, 64}}) {
    check_rounding<bfloat16>(Dtype::bfloat16, sizes, {1});
    check_rounding<float16>(Dtype::float16, sizes, {1});
    check_rounding<float16>(Dtype::float16, sizes, {0});
  }
}

TEST(Dct, ANotANumberStaysInItsRow) {
  const Sizes sizes{19, 30};
  std::vector<float> x(19 * 30, 1.0f), y(x.size());
  x[5 * 30 + 7] = std::numeric_limits<float>::quiet_NaN();
  transform(problem(Dtype::float32, 4, sizes, {1}, {30}, sizes), x.data(), y.data());
  for (std::size_t i = 0; i < y.size(); ++i) EXPECT_EQ(std::isnan(y[i]), i / 30 == 5) << i;
}

TEST(Dct, OffsetsBeyondTwoToThe31) {
  const std::int64_t far = (std::int64_t{1} << 31) + 16;
  const std::size_t bytes = static_cast<std::size_t>(2 * far + 64) * sizeof(float);
  void* memory = mmap(nullptr, 2 * bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) GTEST_SKIP() << "no address space";
  float* in = static_cast<float*>(memory);
  float* out = in + 2 * far + 64;
  Problem p = problem(Dtype::float32, 2, {3, 20}, {1}, {20}, {3, 20});
  std::vector<float> x(60), want(60);
  for (std::size_t i = 0; i < x.size(); ++i) {
    x[i] = std::sin(static_cast<float>(i));
    in[static_cast<std::int64_t>(i / 20) * far + static_cast<std::int64_t>(i % 20)] = x[i];
  }
  transform(p, x.data(), want.data());
  p.in_strides = p.out_strides = {far, 1};
  transform(p, in, out);
  for (std::size_t i = 0; i < x.size(); ++i) {
    EXPECT_EQ(out[static_cast<std::int64_t>(i / 20) * far + static_cast<std::int64_t>(i % 20)], want[i]);
  }
  munmap(memory, 2 * bytes);
}

TEST(Dct, NothingToDo) {
  const Plan empty = plan(problem(Dtype::float32, 2, {0, 8}, {1}, {8}, {0, 8}));
  EXPECT_TRUE(empty.passes.empty());
  EXPECT_EQ(workspace_bytes(empty), 0u);
}

TEST(Dct, RefusesWhatItCannotDo) {
  EXPECT_THROW(plan(problem(Dtype::float32, 5, {8}, {0}, {8}, {8})), std::invalid_argument);
  EXPECT_THROW(plan(problem(Dtype::float32, 1, {8}, {0}, {1}, {1})), std::invalid_argument);
  EXPECT_THROW(plan(problem(Dtype::float32, 2, {8}, {1}, {8}, {8})), std::invalid_argument);
  EXPECT_THROW(plan(problem(Dtype::float32, 2, {8, 8}, {0, 0}, {8, 8}, {8, 8})), std::invalid_argument);
  EXPECT_THROW(plan(problem(Dtype::float32, 2, {8, 8}, {0}, {8}, {8, 9})), std::invalid_argument);
  const std::int64_t far = (std::int64_t{1} << 32) + 1;
  EXPECT_THROW(plan(problem(Dtype::float32, 2, {8}, {0}, {far}, {8})), std::invalid_argument);
  Problem ends = problem(Dtype::float32, 4, {8}, {0}, {8}, {8});
  ends.in_ends = 1;
  EXPECT_THROW(plan(ends), std::invalid_argument);
}

}  // namespace freqrank::dct
