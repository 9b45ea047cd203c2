// The DCT's CUDA kernels against the CPU back end in float64.
#include <cmath>
#include <random>
#include <set>

#include "cuda_test.h"
#include "dct/dct.h"
#include "dct/launch.h"

namespace freqrank::dct {

namespace {

using Sizes = std::vector<std::int64_t>;

using namespace cuda_test;

// --- problems -----------------------------------------------------------------------------------------------------

std::int64_t contiguous(const Sizes& sizes, Sizes& strides) {
  strides.assign(sizes.size(), 0);
  std::int64_t stride = 1;
  for (std::size_t d = sizes.size(); d-- > 0; stride *= sizes[d]) strides[d] = stride;
  return stride;
}

Problem problem(Dtype dtype, int type, const Sizes& sizes, const std::vector<int>& dims, const Sizes& lengths,
                const Sizes& out_sizes) {
  Problem p;
  p.dtype = dtype;
  p.type = type;
  p.norm = 1;
  p.in_ends = type == 1 || type == 3 ? 1 : 0;
  p.out_ends = type <= 2 ? 1 : 0;
  p.in_sizes = sizes;
  p.out_sizes = out_sizes;
  p.dims = dims;
  p.lengths = lengths;
  contiguous(p.in_sizes, p.in_strides);
  contiguous(p.out_sizes, p.out_strides);
  return p;
}

Problem rows(Dtype dtype, int type, std::int64_t count, std::int64_t n) {
  return problem(dtype, type, {count, n}, {1}, {n}, {count, n});
}

Problem columns(Dtype dtype, int type, std::int64_t n, std::int64_t count) {
  return problem(dtype, type, {n, count}, {0}, {n}, {n, count});
}

std::vector<double> on_the_cpu(Problem p, const std::vector<double>& in) {
  p.dtype = Dtype::float64;
  contiguous(p.in_sizes, p.in_strides);
  std::vector<double> out(static_cast<std::size_t>(contiguous(p.out_sizes, p.out_strides)));
  const Plan made = plan(p);
  std::vector<std::vector<char>> tables;
  std::vector<const void*> pointers;
  for (const Row& row : made.rows) {
    tables.emplace_back(row.table_bytes());
    fill_table(row, tables.back().data());
    pointers.push_back(tables.back().data());
  }
  std::vector<char> workspace(workspace_bytes(made));
  run(made, {in.data(), out.data(), pointers.data()}, workspace.data(), serial());
  return out;
}

double tolerance(const Problem& p) {
  double logs = 0;
  for (const std::int64_t n : p.lengths) logs += std::max(1.0, std::log2(static_cast<double>(n)));
  switch (p.dtype) {
    case Dtype::float16: return 4e-7 * logs + 0x1p-11;
    case Dtype::bfloat16: return 4e-7 * logs + 0x1p-8;
    case Dtype::float32: return 4e-7 * logs;
    default: return 1e-15 * logs;
  }
}

std::string words(const Problem& p) {
  std::string text = std::string(dtype_name(static_cast<int>(p.dtype))) + " type " + std::to_string(p.type) + " [";
  for (const std::int64_t size : p.in_sizes) text += std::to_string(size) + " ";
  text += "] dims";
  for (std::size_t i = 0; i < p.dims.size(); ++i) {
    text += " " + std::to_string(p.dims[i]) + ":" + std::to_string(p.lengths[i]);
  }
  return text;
}

// --- the test -----------------------------------------------------------------------------------------------------

class Tester {
 public:
  // Input and output start `shift` elements behind where vectors can be loaded from.
  void test(const Problem& p, int shift = 0) {
    tally_.test(words(p), [&] { return fault_of(p, shift); }, [&] { return describe(plan_device(p, limits_)); });
  }

  int finish() {
    std::string names;
    for (const std::string& algorithm : algorithms_) names += (names.empty() ? "" : ", ") + algorithm;
    return tally_.finish("algorithms: " + names);
  }

 private:
  std::string fault_of(const Problem& p, int shift) {
    const DevicePlan made = plan_device(p, limits_);
    for (const Step& step : made.steps) algorithms_.insert(name(step.algorithm));

    std::int64_t in_elements = 1, out_elements = 1;
    for (std::size_t d = 0; d < p.in_sizes.size(); ++d) {
      in_elements += std::max<std::int64_t>(0, p.in_sizes[d] - 1) * p.in_strides[d];
      out_elements *= p.out_sizes[d];
    }
    const int bytes = bytes_of(p.dtype);
    std::vector<char> packed(static_cast<std::size_t>(in_elements * bytes), static_cast<char>(kPaint));
    std::vector<double> values;
    std::mt19937_64 random(static_cast<std::uint64_t>(tally_.problems()));
    std::normal_distribution<double> normal;
    each_offset(p.in_sizes, p.in_strides, [&](std::int64_t offset) {
      put(p.dtype, packed, offset, normal(random));
      values.push_back(get(p.dtype, packed, offset));
    });

    const Guarded in(packed.size(), shift * bytes), out(static_cast<std::size_t>(out_elements * bytes), shift * bytes),
        workspace(workspace_bytes(made), 0);
    in.fill(packed);
    const auto enqueue = [&] { run(made, {in.data(), out.data()}, workspace.data(), stream_); };
    run_once(stream_, enqueue);
    const std::vector<char> first = out.read();
    workspace.paint();
    out.paint();
    run_captured(stream_, enqueue);
    if (out.read() != first) return "the captured graph gives other bits";

    if (!in.intact() || in.read() != packed) return "the input was written to";
    if (!out.intact()) return "a write beyond the output";
    if (!workspace.intact()) return "a write beyond the workspace";

    const std::vector<double> want = on_the_cpu(p, values);
    double difference = 0, norm = 0;
    for (std::size_t i = 0; i < want.size(); ++i) {
      const double d = get(p.dtype, first, static_cast<std::int64_t>(i)) - want[i];
      difference += d * d;
      norm += want[i] * want[i];
    }
    const double error = std::sqrt(difference / std::max(norm, 1e-300));
    if (!(error <= tolerance(p))) {
      char text[80];
      std::snprintf(text, sizeof text, "relative error %.3g, allowed %.3g", error, tolerance(p));
      return text;
    }
    return "";
  }

  const DeviceLimits limits_ = current_gpu_limits();
  const Stream stream_;
  Tally tally_;
  std::set<std::string> algorithms_;
};

void test_everything(Tester& tester, bool small) {
  using D = Dtype;
  const std::vector<D> dtypes = {D::float16, D::bfloat16, D::float32, D::float64};
  const Sizes lengths = small
                            ? Sizes{2, 8, 30, 34, 64, 1000, 1024, 4097}
                            : Sizes{1,    2,    3,    4,    5,    7,    8,    15,   16,   17,   30,    31,   32,   60,
                                    64,   96,   97,   100,  121,  128,  210,  256,  343,  360,  512,   997,  1000, 1009,
                                    1024, 1025, 2000, 2048, 3125, 4096, 4097, 6000, 8192, 8193, 10007, 16384};
  for (const std::int64_t n : lengths) {
    for (int type = 1; type <= 4; ++type) {
      if (type == 1 && n < 2) continue;
      for (const D dtype : dtypes) {
        if (small && (dtype == D::bfloat16 || (dtype == D::float64 && type != 2))) continue;
        const std::int64_t many = std::max<std::int64_t>(2, (small ? 2000 : 20000) / n);
        tester.test(rows(dtype, type, 1, n));
        tester.test(rows(dtype, type, many + 1, n));
        if (!small || type == 2) tester.test(columns(dtype, type, n, 7));
        if (!small) tester.test(columns(dtype, type, n, std::max<std::int64_t>(1, many / 2)));
      }
    }
    tester.test(problem(D::float32, 2, {5, n}, {1}, {n + 3}, {5, n + 3}));  // padded
    tester.test(problem(D::float32, 3, {5, n + 2}, {1}, {n}, {5, n}));      // cropped
    tester.test(problem(D::bfloat16, 4, {3, n, 5}, {1}, {n}, {3, std::max<std::int64_t>(1, n / 2), 5}));
    Problem gaps = rows(D::float32, 2, 5, n);
    gaps.in_strides = {n + 1, 1};
    tester.test(gaps);
    gaps.in_strides = {2 * n, 2};
    tester.test(gaps);
    for (const D dtype : dtypes) tester.test(rows(dtype, 2, 5, n), 1);
  }
  const std::vector<std::pair<std::int64_t, std::int64_t>> tiles =
      small ? std::vector<std::pair<std::int64_t, std::int64_t>>{{8, 8}, {64, 32}, {31, 30}}
            : std::vector<std::pair<std::int64_t, std::int64_t>>{{1, 1},   {2, 3},    {8, 8},     {7, 64},   {32, 32},
                                                                 {31, 33}, {64, 64},  {100, 60},  {128, 64}, {128, 128},
                                                                 {97, 61}, {130, 64}, {256, 256}, {3, 2000}};
  for (const auto& [a, b] : tiles) {
    for (const D dtype : dtypes) {
      for (int type = 1; type <= 4; ++type) {
        if (type == 1 && a < 2) continue;
        tester.test(problem(dtype, type, {3, a, b}, {1, 2}, {a, b}, {3, a, b}));
        if (!small) tester.test(problem(dtype, type, {a, b, 3}, {0, 1}, {a, b}, {a, b, 3}));
      }
    }
    tester.test(problem(D::float32, 2, {2, a, b}, {1, 2}, {a + 1, b + 2}, {2, a + 1, b + 2}));
    tester.test(problem(D::float16, 2, {2, a + 1, b + 2}, {1, 2}, {a, b}, {2, a, b}));
  }
  tester.test(problem(D::float32, 2, {9, 10, 11}, {0, 1, 2}, {9, 10, 11}, {9, 10, 11}));
  tester.test(problem(D::float32, 2, {0, 10}, {1}, {10}, {0, 10}));
  tester.test(problem(D::float32, 2, {10, 0}, {1}, {6}, {10, 6}));
  if (small) return;
  for (const std::int64_t n : {32768, 65536, 65537, 100003, 1 << 20, 1000003}) {
    for (int type = 1; type <= 4; ++type) {
      tester.test(rows(D::float32, type, 2, n));
      if (n <= 100003) tester.test(rows(D::float64, type, 1, n));
    }
    tester.test(columns(D::float32, 2, n, 3));
  }
  tester.test(rows(D::float32, 2, 300000, 32));
  tester.test(rows(D::float16, 2, 100001, 60));
}

}  // namespace

}  // namespace freqrank::dct

int main(int argc, char** argv) {
  return freqrank::cuda_test::run_program(argc, argv, [](bool small) {
    freqrank::dct::Tester tester;
    freqrank::dct::test_everything(tester, small);
    return tester.finish();
  });
}
