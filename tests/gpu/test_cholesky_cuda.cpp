// The Cholesky, whitening and triangular kernels on CUDA, against the CPU's.
#include <cmath>
#include <limits>
#include <random>

#include "common/parallel.h"
#include "cuda_test.h"
#include "whitening/cholesky_cuda.h"

namespace freqrank::whitening {

namespace {

using namespace cuda_test;
using Sizes = std::vector<std::int64_t>;

void in_this_thread(std::int64_t n, std::int64_t, const RangeBody& body) { body(0, n); }

// Matrices [batch, rows, columns] that follow each other, by rows or by columns, on the host and the GPU.
struct Matrices {
  Dtype dtype;
  std::int64_t batch, rows, columns;
  bool by_columns;
  Sizes strides;
  std::vector<char> bytes;
  Guarded memory;

  Matrices(Dtype dtype, std::int64_t batch, std::int64_t rows, std::int64_t columns, bool by_columns)
      : dtype(dtype),
        batch(batch),
        rows(rows),
        columns(columns),
        by_columns(by_columns),
        strides{rows * columns},
        bytes(static_cast<std::size_t>(batch * rows * columns * size_of(dtype)), static_cast<char>(kPaint)),
        memory(bytes.size(), size_of(dtype)) {}
  std::int64_t at(std::int64_t b, std::int64_t i, std::int64_t j) const {
    return b * rows * columns + (by_columns ? j * rows + i : i * columns + j);
  }
  MatrixBatch view(void* data) const {
    return {data, dtype, by_columns ? 1 : columns, by_columns ? rows : 1, strides.data()};
  }
  MatrixBatch on_host() { return view(bytes.data()); }
  MatrixBatch on_gpu() const { return view(memory.data()); }

  template <class F>
  void fill(F value) {
    for (std::int64_t b = 0; b < batch; ++b)
      for (std::int64_t i = 0; i < rows; ++i)
        for (std::int64_t j = 0; j < columns; ++j) put(dtype, bytes, at(b, i, j), value(b, i, j));
    memory.fill(bytes);
  }
  // The largest difference to what is on the GPU, of the leading rows and columns of a matrix.
  double difference(const std::vector<char>& got, std::int64_t b, std::int64_t some) const {
    double most = 0;
    for (std::int64_t i = 0; i < std::min(rows, some); ++i)
      for (std::int64_t j = 0; j < std::min(columns, some); ++j) {
        const double d = std::fabs(get(dtype, got, at(b, i, j)) - get(dtype, bytes, at(b, i, j)));
        most = d <= most ? most : d;  // NaN counts
      }
    return most;
  }
};

struct Problem {
  std::int64_t batch, n, columns;  // columns > 0: triangular systems
  Dtype dtype;
  bool ladder, option;  // by columns, and of triangular systems the other side and triangle
  GpuLimits limits;
  std::int64_t solved = kNoRightSides;  // right-hand sides that are solved with a factor
};

std::string words(const Problem& p) {
  return std::to_string(p.batch) + " x " + std::to_string(p.n) + " rows" +
         (p.columns       ? ", " + std::to_string(p.columns) + " right-hand sides"
          : p.ladder      ? ", whitened"
          : p.solved >= 0 ? ", factored and solved for " + std::to_string(p.solved) + " right-hand sides"
                          : "") +
         " " + dtype_name(static_cast<int>(p.dtype)) + (p.option ? ", the other way" : "");
}

class Tester {
 public:
  void test(Problem p) {
    // less shared memory: panels begin earlier, and have fewer rows
    for (const int shared : {limits_.shared_bytes, 73728}) {
      p.limits = limits_;
      p.limits.shared_bytes = shared;
      if (p.columns > 0) {
        const auto plan = plan_device_triangular({{p.batch}}, p.n, p.columns, p.dtype, p.limits);
        tally_.test(words(p), [&] { return triangular_fault(p, plan); }, [&] { return describe(plan) + "\n"; });
      } else {
        const auto plan = plan_device_cholesky({{p.batch}}, p.n, p.dtype, p.ladder, p.limits, p.solved);
        tally_.test(words(p), [&] { return cholesky_fault(p, plan); }, [&] { return describe(plan) + "\n"; });
      }
    }
  }
  int finish() const { return tally_.finish("Cholesky factors and triangular systems"); }

 private:
  // Some matrices fail: the second at its last pivot, the third because of a NaN.
  std::string cholesky_fault(const Problem& p, const DeviceCholeskyPlan& plan) {
    std::mt19937 random(static_cast<unsigned>(p.n));
    std::uniform_real_distribution<double> number(-1, 1);
    Matrices a(p.dtype, p.batch, p.n, p.n, p.option);
    a.fill([&](std::int64_t b, std::int64_t i, std::int64_t j) {
      if (b == 1 && i == p.n - 1 && j == i) return -1.0;
      if (b == 2 && i == 0 && j == p.n - 1) return std::numeric_limits<double>::quiet_NaN();
      return number(random) / static_cast<double>(p.n) + (i == j ? 2.0 : 0.0);
    });
    const auto count = static_cast<std::size_t>(p.batch);
    Matrices factor(p.dtype, p.batch, p.n, p.n, false);
    const std::int64_t solved = std::max<std::int64_t>(p.solved, 0);
    Matrices b(p.dtype, p.batch, p.n, solved, p.option), x(p.dtype, p.batch, p.n, solved, !p.option);
    b.fill([&](std::int64_t, std::int64_t, std::int64_t) { return number(random); });
    std::vector<std::int32_t> info(count);
    std::vector<double> damping(count);
    const Guarded device_info(4 * count, 4), device_damping(8 * count, 8), workspace(workspace_bytes(plan), 0);
    const auto host_plan = plan_cholesky({{p.batch}}, p.n, p.dtype, p.solved);
    std::vector<char> space(static_cast<std::size_t>(workspace_bytes(host_plan)) + 64);
    void* const aligned = reinterpret_cast<void*>((reinterpret_cast<std::uintptr_t>(space.data()) + 63) / 64 * 64);
    std::function<void()> enqueue;
    if (p.ladder) {
      const auto arguments = [&](const MatrixBatch& gram, void* to, double* level, std::int32_t* order) {
        return WhitenArguments{gram, nullptr, static_cast<double*>(to), level, order};
      };
      run(host_plan, arguments(a.on_host(), factor.bytes.data(), damping.data(), info.data()), aligned, in_this_thread);
      enqueue = [&, arguments] {
        run(plan,
            arguments(a.on_gpu(), factor.memory.data(), static_cast<double*>(device_damping.data()),
                      static_cast<std::int32_t*>(device_info.data())),
            workspace.data(), stream_);
      };
    } else {
      run(host_plan, CholeskyArguments{a.on_host(), factor.bytes.data(), info.data(), b.on_host(), x.on_host()},
          aligned, in_this_thread);
      enqueue = [&] {
        run(plan,
            CholeskyArguments{a.on_gpu(), factor.memory.data(), static_cast<std::int32_t*>(device_info.data()),
                              b.on_gpu(), x.on_gpu()},
            workspace.data(), stream_);
      };
    }
    run_once(stream_, enqueue);
    const auto got = factor.memory.read(), solution = x.memory.read();
    factor.memory.paint(), x.memory.paint();
    run_captured(stream_, enqueue);
    if (got != factor.memory.read() || solution != x.memory.read()) return "a captured graph gives something else";
    if (!factor.memory.intact() || !a.memory.intact() || !device_info.intact() || !workspace.intact() ||
        !b.memory.intact() || !x.memory.intact())
      return "memory around the matrices was written";
    const auto infos = device_info.read(), levels = device_damping.read();
    for (std::size_t m = 0; m < count; ++m) {
      std::int32_t order;
      std::memcpy(&order, infos.data() + 4 * m, 4);
      if (order != info[m])
        return "info of matrix " + std::to_string(m) + " is " + std::to_string(order) + ", not " +
               std::to_string(info[m]);
      if (p.ladder && std::memcmp(levels.data() + 8 * m, &damping[m], 8) != 0)
        return "the damping of matrix " + std::to_string(m) + " differs";
      if (order != 0 && (p.ladder || p.solved > 0)) {
        if (p.solved > 0 && !std::isnan(get(p.dtype, solution, x.at(static_cast<std::int64_t>(m), 0, 0))))
          return "matrix " + std::to_string(m) + " has a solution although it has no factor";
        continue;
      }
      const double bound = (p.dtype == Dtype::float64 ? 2e-15 : 1e-6) * std::sqrt(static_cast<double>(p.n));
      const double most = factor.difference(got, static_cast<std::int64_t>(m), order == 0 ? p.n : order - 1);
      if (!(most <= bound)) return "matrix " + std::to_string(m) + " differs by " + std::to_string(most);
      const double off = x.difference(solution, static_cast<std::int64_t>(m), std::max(p.n, p.solved));
      if (!(off <= bound)) return "the solution of matrix " + std::to_string(m) + " differs by " + std::to_string(off);
    }
    return "";
  }

  std::string triangular_fault(const Problem& p, const DeviceTriangularPlan& plan) {
    std::mt19937 random(static_cast<unsigned>(p.n));
    std::uniform_real_distribution<double> number(-1, 1);
    Matrices a(p.dtype, p.batch, p.n, p.n, p.option);
    a.fill([&](std::int64_t, std::int64_t i, std::int64_t j) {
      if (p.option ? i > j : i < j) return std::numeric_limits<double>::quiet_NaN();  // not read
      return number(random) / static_cast<double>(p.n) + (i == j ? 2.0 : 0.0);
    });
    Matrices b(p.dtype, p.batch, p.option ? p.columns : p.n, p.option ? p.n : p.columns, p.option);
    b.fill([&](std::int64_t, std::int64_t, std::int64_t) { return number(random); });
    Matrices x(p.dtype, p.batch, b.rows, b.columns, false);
    const auto host_plan = plan_triangular({{p.batch}}, p.n, p.columns, p.dtype);
    std::vector<char> space(static_cast<std::size_t>(workspace_bytes(host_plan)) + 64);
    void* const aligned = reinterpret_cast<void*>((reinterpret_cast<std::uintptr_t>(space.data()) + 63) / 64 * 64);
    run(host_plan, TriangularArguments{a.on_host(), b.on_host(), x.on_host(), p.option, !p.option, false}, aligned,
        in_this_thread);
    const auto enqueue = [&] {
      run(plan, TriangularArguments{a.on_gpu(), b.on_gpu(), x.on_gpu(), p.option, !p.option, false}, stream_);
    };
    run_once(stream_, enqueue);
    const auto got = x.memory.read();
    x.memory.paint();
    run_captured(stream_, enqueue);
    if (got != x.memory.read()) return "a captured graph gives something else";
    if (!x.memory.intact() || !a.memory.intact() || !b.memory.intact()) return "memory around the matrices was written";
    const double bound = (p.dtype == Dtype::float64 ? 2e-15 : 1e-6) * std::sqrt(static_cast<double>(p.n));
    for (std::int64_t matrix = 0; matrix < p.batch; ++matrix) {
      const double most = x.difference(got, matrix, std::max(x.rows, x.columns));
      if (!(most <= bound)) return "matrix " + std::to_string(matrix) + " differs by " + std::to_string(most);
    }
    return "";
  }

  GpuLimits limits_ = current_gpu_limits();
  Stream stream_;
  Tally tally_;
};

void test_everything(Tester& tester, bool small) {
  using D = Dtype;
  for (const D dtype : {D::float32, D::float64})
    for (const bool option : {false, true}) {
      for (const std::int64_t n : {1, 5, 8, 9, 16, 30, 32, 33, 64, 100, 161}) {
        tester.test({4, n, 0, dtype, false, option, {}});
        if (dtype == D::float64) tester.test({3, n, 0, dtype, true, option, {}});
        tester.test({2, n, 3, dtype, false, option, {}});
        for (const std::int64_t solved : {1, 37}) tester.test({4, n, 0, dtype, false, option, {}, solved});
      }
      tester.test({0, 5, 0, dtype, false, option, {}});
      tester.test({1, 70, 70, dtype, false, option, {}});
      if (small) continue;
      for (const std::int64_t n : {128, 224, 225, 300, 515}) {
        tester.test({3, n, 0, dtype, false, option, {}});
        if (dtype == D::float64) tester.test({3, n, 0, dtype, true, option, {}});
        tester.test({2, n, 200, dtype, false, option, {}});
        tester.test({3, n, 0, dtype, false, option, {}, 150});
      }
      tester.test({3000, 20, 0, dtype, false, option, {}});
      tester.test({500, 60, 0, dtype, false, option, {}});
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
