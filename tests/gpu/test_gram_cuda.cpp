// The Gram kernels on CUDA, in double and by integers, on whole numbers, whose products sum up exactly in any order.
#include <cmath>
#include <random>

#include "cuda_test.h"
#include "whitening/gram_launch.h"

namespace freqrank::whitening {

namespace {

using namespace cuda_test;
using Sizes = std::vector<std::int64_t>;

// A tensor [batch, rows, columns] of some strides, filled with whole numbers.
struct Operand {
  Dtype dtype;
  Sizes sizes, strides;
  std::vector<char> bytes;  // NaN where no element lies
  Guarded memory;

  Operand(Dtype dtype, const Sizes& sizes, const Sizes& strides, int seed, int shift)
      : dtype(dtype),
        sizes(sizes),
        strides(strides),
        bytes(length(), static_cast<char>(kPaint)),
        memory(bytes.size(), shift) {
    std::mt19937 random(seed);
    std::uniform_int_distribution<int> number(-100, 100);
    each_offset(sizes, strides, [&](std::int64_t i) { put(dtype, bytes, i, number(random)); });
    memory.fill(bytes);
  }
  std::size_t length() const {
    std::int64_t last = 0;
    for (std::size_t d = 0; d < sizes.size(); ++d) {
      if (sizes[d] == 0) return 0;
      last += (sizes[d] - 1) * strides[d];
    }
    return static_cast<std::size_t>((last + 1) * size_of(dtype));
  }
  double at(std::int64_t b, std::int64_t i, std::int64_t j) const {
    return get(dtype, bytes, b * strides[0] + i * strides[1] + j * strides[2]);
  }
  MatrixBatch view() const { return {memory.data(), dtype, strides[1], strides[2], strides.data()}; }
};

struct Problem {
  std::int64_t batch, tokens, n, m;  // m = 0: Y is X
  Dtype x, y;
  bool weighted, accumulate, by_columns;
  int shift;  // elements by which everything is off its alignment
};

Sizes strides_of(const Sizes& sizes, bool by_columns) {
  return by_columns ? Sizes{sizes[1] * sizes[2], 1, sizes[1]} : Sizes{sizes[1] * sizes[2], sizes[2], 1};
}

std::string words(const Problem& p) {
  return "gram " + std::to_string(p.batch) + " x " + std::to_string(p.tokens) + " x " + std::to_string(p.n) +
         (p.m ? " by " + std::to_string(p.m) + " " + dtype_name(static_cast<int>(p.y)) : "") + " " +
         dtype_name(static_cast<int>(p.x)) + (p.weighted ? ", weighted" : "") + (p.accumulate ? ", added" : "") +
         (p.by_columns ? ", by columns" : "") + (p.shift ? ", shifted" : "");
}

class Tester {
 public:
  // In double and by integers, whichever this GPU would choose.
  void test(const Problem& p) {
    for (const int float_per_double : {2, 64}) {
      GpuLimits limits = limits_;
      limits.float_per_double = float_per_double;
      test(p, limits);
    }
  }
  int finish() const { return tally_.finish("Gram matrices"); }

 private:
  void test(const Problem& p, const GpuLimits& limits) {
    GramDeviceProblem problem;
    problem.batch = {{p.batch}};
    problem.tokens = p.tokens, problem.rows = p.n, problem.columns = p.m ? p.m : p.n;
    problem.x = p.x, problem.y = p.m ? p.y : p.x;
    problem.symmetric = p.m == 0, problem.weighted = p.weighted, problem.accumulate = p.accumulate;
    const GramDevicePlan plan = plan_gram_device(problem, limits);
    tally_.test(words(p), [&] { return fault(p, plan); }, [&] { return describe(plan) + "\n"; });
  }
  std::string fault(const Problem& p, const GramDevicePlan& plan) {
    const Sizes xs{p.batch, p.tokens, p.n}, ys{p.batch, p.tokens, plan.problem.columns};
    const Sizes outs{p.batch, p.n, plan.problem.columns};
    const Operand x(p.x, xs, strides_of(xs, p.by_columns), 1, p.shift * size_of(p.x));
    const Operand y(plan.problem.y, ys, strides_of(ys, p.by_columns), 2, p.shift * size_of(plan.problem.y));
    const Operand weight(Dtype::float64, {p.batch, p.tokens, 1}, {p.tokens, 1, 1}, 3, p.shift * 8);
    const Operand before(Dtype::float64, outs, strides_of(outs, p.by_columns), 4, p.shift * 8);
    const Guarded workspace(workspace_bytes(plan), 0);
    GramArguments a;
    a.x = x.view(), a.y = y.view(), a.out = before.view();
    a.accumulate = p.accumulate;
    if (p.weighted) {
      a.weight = static_cast<const double*>(weight.memory.data());
      a.weight_stride = 1;
      a.weight_batch_strides = weight.strides.data();
    }
    const auto enqueue = [&] { run_gram(plan, a, workspace.data(), stream_); };
    run_once(stream_, enqueue);
    const std::vector<char> got = before.memory.read();
    before.memory.fill(before.bytes);
    run_captured(stream_, enqueue);
    if (got != before.memory.read()) return "a captured graph gives something else";
    if (!workspace.intact() || !before.memory.intact() || !x.memory.intact() || !y.memory.intact())
      return "memory around the tensors was written";
    const Operand& other = p.m ? y : x;
    for (std::int64_t b = 0; b < p.batch; ++b)
      for (std::int64_t i = 0; i < p.n; ++i)
        for (std::int64_t j = 0; j < outs[2]; ++j) {
          double sum = p.accumulate ? before.at(b, i, j) : 0;
          for (std::int64_t t = 0; t < p.tokens; ++t)
            sum += (p.weighted ? weight.at(b, t, 0) : 1) * x.at(b, t, i) * other.at(b, t, j);
          const double found =
              get(Dtype::float64, got, b * before.strides[0] + i * before.strides[1] + j * before.strides[2]);
          // exact but for what weights, of which integers take roots, are rounded by
          const double slack = plan.integers && p.weighted ? 1e-12 * 1e6 * static_cast<double>(p.tokens) : 0;
          if (!(std::fabs(found - sum) <= slack))
            return "element " + std::to_string(b) + ", " + std::to_string(i) + ", " + std::to_string(j) + " is " +
                   std::to_string(found) + ", not " + std::to_string(sum);
        }
    return "";
  }

  GpuLimits limits_ = current_gpu_limits();
  Stream stream_;
  Tally tally_;
};

void test_everything(Tester& tester, bool small) {
  using D = Dtype;
  for (const D dtype : {D::float16, D::bfloat16, D::float32, D::float64})
    for (const bool weighted : {false, true}) {
      tester.test({1, 1, 1, 0, dtype, dtype, weighted, false, false, 0});
      tester.test({3, 70, 33, 0, dtype, dtype, weighted, true, false, 1});
      tester.test({2, 40, 128, 64, dtype, dtype, weighted, false, false, 0});
      tester.test({1, 40, 65, 130, dtype, D::float32, weighted, true, true, 0});
      tester.test({2, 33, 24, 0, dtype, dtype, weighted, false, true, 1});
      tester.test({1, 600, 64, 0, dtype, dtype, weighted, true, false, 0});
      tester.test({1, 600, 130, 7, dtype, dtype, weighted, false, false, 0});
      tester.test({1, 0, 5, 3, dtype, dtype, weighted, false, false, 0});
      tester.test({0, 5, 5, 3, dtype, dtype, weighted, false, false, 0});
      if (small) continue;
      tester.test({1, 30, 384, 0, dtype, dtype, weighted, false, false, 0});
      tester.test({1, 3000, 128, 0, dtype, dtype, weighted, true, false, 0});
      tester.test({300, 50, 40, 0, dtype, dtype, weighted, false, false, 0});
      tester.test({40, 9000, 3, 0, dtype, dtype, weighted, true, false, 0});
    }
}

}  // namespace

}  // namespace freqrank::whitening

int main(int argc, char** argv) {
  return freqrank::cuda_test::run_program(argc, argv, [](bool small) {
    freqrank::whitening::Tester tester;
    freqrank::whitening::test_everything(tester, small);
    return tester.finish();
  });
}
