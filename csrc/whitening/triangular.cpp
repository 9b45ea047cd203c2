#include "whitening/triangular.h"

#include <algorithm>
#include <functional>
#include <utility>

#include "whitening/kernels.h"

namespace freqrank::whitening {

namespace {

constexpr std::int64_t kSlots = 64;
constexpr double kWorthThreads = 2e5;

std::int64_t block_rows(const TriangularPlan& plan) { return round_up(std::min(plan.n, kBlock), kRowPadding); }
std::int64_t block_ld(const TriangularPlan& plan) { return round_up(std::min(plan.n, kBlock), kColumnPadding); }
std::int64_t tile_ld(const TriangularPlan& plan) { return round_up(std::min(plan.columns, kTile), kColumnPadding); }

std::int64_t slot_elements(const TriangularPlan& plan) {
  return block_rows(plan) * (block_ld(plan) + tile_ld(plan)) +
         round_up(packed_elements(block_rows(plan), tile_ld(plan)), 16);
}

template <class T>
struct View {
  T* data;
  std::int64_t row_stride, column_stride;

  T& at(std::int64_t i, std::int64_t j) const { return data[i * row_stride + j * column_stride]; }
  View transposed() const { return {data, column_stride, row_stride}; }
  View rows_reversed(std::int64_t rows) const { return {&at(rows - 1, 0), -row_stride, column_stride}; }
};

template <class T>
View<T> view_of(const TriangularPlan& plan, const MatrixBatch& matrix, std::int64_t batch) {
  return {static_cast<T*>(matrix.data) + plan.batch.offset(batch, matrix.batch_strides), matrix.row_stride,
          matrix.column_stride};
}

// Forward substitution, a block row at a time, for the right-hand sides [column, column + columns).
template <class T>
void solve_lower(const TriangularPlan& plan, View<const T> a, View<const T> b, View<T> x, bool unit_triangular,
                 std::int64_t column, std::int64_t columns, T* space) {
  constexpr Dtype dtype = sizeof(T) == 4 ? Dtype::float32 : Dtype::float64;
  const std::int64_t ld = block_ld(plan), wide = tile_ld(plan);
  T* const triangle = space;  // transposed: upper, as the kernel wants it
  T* const tile = triangle + block_rows(plan) * ld;
  T* const packed = tile + block_rows(plan) * wide;
  for (std::int64_t k = 0; k < plan.n; k += kBlock) {
    const std::int64_t rows = std::min(kBlock, plan.n - k);
    for (std::int64_t i = 0; i < rows; ++i) {
      for (std::int64_t j = 0; j < i; ++j) triangle[j * ld + i] = a.at(k + i, k + j);
      triangle[i * ld + i] = unit_triangular ? T(1) : a.at(k + i, k + i);
    }
    for (std::int64_t i = 0; i < rows; ++i) {
      for (std::int64_t j = 0; j < columns; ++j) tile[i * wide + j] = b.at(k + i, column + j);
    }
    const Product p{{&a.at(k, 0), dtype, a.column_stride, a.row_stride},
                    {&x.at(0, column), dtype, x.row_stride, x.column_stride},
                    nullptr,
                    0,
                    k,
                    rows,
                    columns,
                    false};
    FREQRANK_DISPATCH(product, p, T(-1), tile, wide, packed);
    FREQRANK_DISPATCH(solve, static_cast<const T*>(triangle), ld, tile, rows, columns, wide);
    for (std::int64_t i = 0; i < rows; ++i) {
      for (std::int64_t j = 0; j < columns; ++j) x.at(k + i, column + j) = tile[i * wide + j];
    }
  }
}

template <class T>
void run_typed(const TriangularPlan& plan, const TriangularArguments& arguments, void* workspace,
               const ParallelFor& parallel_for) {
  const std::int64_t tasks = plan.n > 0 ? plan.batch.count() * plan.tiles : 0;
  const auto in_slots = [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t slot = begin; slot < end; ++slot) {
      for (std::int64_t task = slot; task < tasks; task += plan.slots) {
        View<const T> a = view_of<const T>(plan, arguments.a, task / plan.tiles);
        View<const T> b = view_of<const T>(plan, arguments.b, task / plan.tiles);
        View<T> x = view_of<T>(plan, arguments.x, task / plan.tiles);
        bool upper = arguments.upper;
        if (!arguments.left) {  // X A = B is A^T X^T = B^T
          a = a.transposed(), b = b.transposed(), x = x.transposed();
          upper = !upper;
        }
        if (upper) {  // from the last unknown to the first, an upper triangle is a lower one
          a = a.rows_reversed(plan.n).transposed().rows_reversed(plan.n).transposed();
          b = b.rows_reversed(plan.n), x = x.rows_reversed(plan.n);
        }
        const std::int64_t column = task % plan.tiles * kTile;
        solve_lower(plan, a, b, x, arguments.unit_triangular, column, std::min(kTile, plan.columns - column),
                    static_cast<T*>(workspace) + slot * slot_elements(plan));
      }
    }
  };
  if (plan.slots > 1) {
    parallel_for(plan.slots, 1, std::ref(in_slots));
  } else {
    in_slots(0, plan.slots);
  }
}

}  // namespace

TriangularPlan plan_triangular(BatchSizes batch, std::int64_t n, std::int64_t columns, Dtype dtype) {
  TriangularPlan plan;
  plan.batch = std::move(batch);
  plan.n = n;
  plan.columns = columns;
  plan.dtype = dtype;
  plan.tiles = ceil_div(columns, kTile);
  const std::int64_t tasks = plan.batch.count() * plan.tiles;
  const double order = static_cast<double>(n);
  const double work = static_cast<double>(plan.batch.count()) * order * order * static_cast<double>(columns) / 2;
  plan.slots = std::min(work < kWorthThreads ? 1 : kSlots, tasks);
  return plan;
}

std::int64_t workspace_bytes(const TriangularPlan& plan) {
  return plan.slots * slot_elements(plan) * bytes_of(plan.dtype);
}

void run(const TriangularPlan& plan, const TriangularArguments& arguments, void* workspace,
         const ParallelFor& parallel_for) {
  if (plan.dtype == Dtype::float32) {
    run_typed<float>(plan, arguments, workspace, parallel_for);
  } else {
    run_typed<double>(plan, arguments, workspace, parallel_for);
  }
}

}  // namespace freqrank::whitening
