#include "whitening/cholesky.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>

#include "whitening/kernels.h"

namespace freqrank::whitening {

namespace {

constexpr std::int64_t kSlots = 64;
constexpr std::int64_t kShareAlways = 1024;  // from this order on the threads share each matrix
constexpr std::int64_t kShareFew = 256;      // and from this one on if there are fewer matrices than kFew
constexpr std::int64_t kFew = 8;
constexpr double kWorthThreads = 1e5;

std::int64_t block_rows(const CholeskyPlan& plan) { return round_up(std::min(plan.n, kBlock), kRowPadding); }
std::int64_t block_ld(const CholeskyPlan& plan) { return round_up(std::min(plan.n, kBlock), kColumnPadding); }
std::int64_t tile_ld(const CholeskyPlan& plan) { return round_up(std::min(plan.n, kTile), kColumnPadding); }

// A slot holds the diagonal block, a tile to the right of it, and packing space.
std::int64_t slot_elements(const CholeskyPlan& plan) {
  return block_rows(plan) * (block_ld(plan) + tile_ld(plan)) +
         round_up(packed_elements(block_rows(plan), tile_ld(plan)), 16);
}

// One matrix as the factorisation reads it: scaled and with its diagonal raised.
template <class In>
struct Source {
  const In* data;
  std::int64_t row_stride, column_stride;
  double scale = 1, damping = 0, mean = 0;

  template <class T>
  T at(std::int64_t i, std::int64_t j) const {
    return static_cast<T>(data[i * row_stride + j * column_stride]) * static_cast<T>(scale);
  }
};

// A tile of the upper triangle, zeros below the diagonal.
template <class T, class In>
void read(const Source<In>& a, std::int64_t row, std::int64_t column, std::int64_t rows, std::int64_t columns, T* tile,
          std::int64_t ld) {
  const bool diagonal = row == column;
  if (a.row_stride == 1 && a.column_stride != 1) {
    for (std::int64_t j = 0; j < columns; ++j) {
      const std::int64_t last = diagonal ? j + 1 : rows;
      for (std::int64_t i = 0; i < last; ++i) tile[i * ld + j] = a.template at<T>(row + i, column + j);
      for (std::int64_t i = last; i < rows; ++i) tile[i * ld + j] = 0;
    }
  } else {
    for (std::int64_t i = 0; i < rows; ++i) {
      const std::int64_t first = diagonal ? i : 0;
      std::fill_n(tile + i * ld, first, T(0));
      for (std::int64_t j = first; j < columns; ++j) tile[i * ld + j] = a.template at<T>(row + i, column + j);
    }
  }
  if (!diagonal || a.damping == 0) return;
  for (std::int64_t i = 0; i < rows; ++i) {
    T& value = tile[i * ld + i];
    value += static_cast<T>(a.damping * (value != 0 ? static_cast<double>(value) : a.mean));
  }
}

struct Outcome {
  std::int64_t minor = 0;     // the order of the leading minor that failed, or 0
  bool not_a_number = false;  // its pivot was NaN, which no damping cures
};

// Left-looking, a block row of U at a time: the block row of A minus the product of what is known of U, then the
// diagonal block factored, then the rest solved against it.
template <class T, class In>
Outcome factor_matrix(const CholeskyPlan& plan, const Source<In>& a, T* u, T* space, const ParallelFor& parallel_for,
                      std::int64_t slots) {
  const std::int64_t n = plan.n, ld = block_ld(plan), wide = tile_ld(plan);
  T* const diagonal = space;
  for (std::int64_t k = 0; k < n; k += kBlock) {
    const std::int64_t rows = std::min(kBlock, n - k);
    const auto subtract_known = [&](std::int64_t column, std::int64_t columns, bool upper_only, T* tile,
                                    std::int64_t tile_stride, T* packed) {
      constexpr Dtype dtype = sizeof(T) == 4 ? Dtype::float32 : Dtype::float64;
      const Product p{{u + k, dtype, n, 1}, {u + column, dtype, n, 1}, nullptr, 0, k, rows, columns, upper_only};
      FREQRANK_DISPATCH(product, p, T(-1), tile, tile_stride, packed);
    };
    T* const packed = space + block_rows(plan) * (ld + wide);
    read(a, k, k, rows, rows, diagonal, ld);
    subtract_known(k, rows, true, diagonal, ld, packed);
    const std::int64_t minor = FREQRANK_DISPATCH(factor, diagonal, rows, ld);
    for (std::int64_t i = 0; i < rows; ++i) {
      T* const row = u + (k + i) * n;
      std::fill_n(row, k + i, T(0));
      std::copy_n(diagonal + i * ld + i, rows - i, row + k + i);
    }
    if (minor > 0) return {k + minor, std::isnan(diagonal[(minor - 1) * ld + minor - 1])};

    const std::int64_t right = k + rows, tiles = ceil_div(n - right, kTile), used = std::min(slots, tiles);
    const auto in_slots = [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t slot = begin; slot < end; ++slot) {
        T* const tile = space + slot * slot_elements(plan) + block_rows(plan) * ld;
        for (std::int64_t index = slot; index < tiles; index += used) {
          const std::int64_t column = right + index * kTile, columns = std::min(kTile, n - column);
          read(a, k, column, rows, columns, tile, wide);
          subtract_known(column, columns, false, tile, wide, tile + block_rows(plan) * wide);
          FREQRANK_DISPATCH(solve, static_cast<const T*>(diagonal), ld, tile, rows, columns, wide);
          for (std::int64_t i = 0; i < rows; ++i) std::copy_n(tile + i * wide, columns, u + (k + i) * n + column);
        }
      }
    };
    if (used > 1) {
      parallel_for(used, 1, std::ref(in_slots));
    } else {
      in_slots(0, used);
    }
  }
  return {};
}

// Calls body(matrix, space, parallel_for, slots) for every matrix of the batch, either all threads on each or each
// thread on its own.
template <class T, class Body>
void each_matrix(const CholeskyPlan& plan, void* workspace, const ParallelFor& parallel_for, const Body& body) {
  T* const space = static_cast<T*>(workspace);
  const std::int64_t count = plan.batch.count();
  if (plan.share_matrix) {
    for (std::int64_t b = 0; b < count; ++b) body(b, space, parallel_for, plan.slots);
    return;
  }
  const auto in_slots = [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t slot = begin; slot < end; ++slot) {
      for (std::int64_t b = slot; b < count; b += plan.slots) {
        body(b, space + slot * slot_elements(plan), parallel_for, 1);
      }
    }
  };
  if (plan.slots > 1) {
    parallel_for(plan.slots, 1, std::ref(in_slots));
  } else {
    in_slots(0, plan.slots);
  }
}

template <class T>
void run_cholesky(const CholeskyPlan& plan, const CholeskyArguments& arguments, void* workspace,
                  const ParallelFor& parallel_for) {
  const std::int64_t n = plan.n;
  each_matrix<T>(
      plan, workspace, parallel_for, [&](std::int64_t b, T* space, const ParallelFor& inner, std::int64_t slots) {
        const Source<T> a{static_cast<const T*>(arguments.a.data) + plan.batch.offset(b, arguments.a.batch_strides),
                          arguments.a.row_stride, arguments.a.column_stride};
        T* const u = static_cast<T*>(arguments.factor) + b * n * n;
        const Outcome outcome = factor_matrix(plan, a, u, space, inner, slots);
        arguments.info[b] = static_cast<std::int32_t>(outcome.minor);
        if (outcome.minor == 0) return;
        // What was not reached is A's own, as after LAPACK, so that no uninitialised memory is returned.
        const std::int64_t block = (outcome.minor - 1) / kBlock * kBlock;
        for (std::int64_t i = block; i < n; ++i) {
          const std::int64_t known = i < block + kBlock ? std::min(block + kBlock, n) : i;
          if (known == i) std::fill_n(u + i * n, i, T(0));
          for (std::int64_t j = known; j < n; ++j) u[i * n + j] = a.template at<T>(i, j);
        }
      });
}

template <class In>
void run_whiten(const CholeskyPlan& plan, const WhitenArguments& arguments, void* workspace,
                const ParallelFor& parallel_for) {
  const std::int64_t n = plan.n;
  each_matrix<double>(
      plan, workspace, parallel_for, [&](std::int64_t b, double* space, const ParallelFor& inner, std::int64_t slots) {
        Source<In> a{static_cast<const In*>(arguments.gram.data) + plan.batch.offset(b, arguments.gram.batch_strides),
                     arguments.gram.row_stride, arguments.gram.column_stride};
        if (arguments.scale) a.scale = arguments.scale[b];
        for (std::int64_t i = 0; i < n; ++i) a.mean += a.template at<double>(i, i) / static_cast<double>(n);
        double* const u = arguments.factor + b * n * n;
        Outcome outcome;
        for (const double level : kDampingLevels) {
          a.damping = level;
          outcome = factor_matrix(plan, a, u, space, inner, slots);
          if (outcome.minor == 0 || outcome.not_a_number) break;
        }
        arguments.damping[b] = a.damping;
        arguments.info[b] = static_cast<std::int32_t>(outcome.minor);
        if (outcome.minor == 0) return;
        for (std::int64_t i = 0; i < n; ++i) {
          std::fill_n(u + i * n, i, 0.0);
          std::fill_n(u + i * n + i, n - i, std::numeric_limits<double>::quiet_NaN());
        }
      });
}

}  // namespace

CholeskyPlan plan_cholesky(BatchSizes batch, std::int64_t n, Dtype dtype) {
  CholeskyPlan plan;
  plan.batch = std::move(batch);
  plan.n = n;
  plan.dtype = dtype;
  const std::int64_t count = plan.batch.count();
  plan.share_matrix = n >= kShareAlways || (n >= kShareFew && count < kFew);
  const double order = static_cast<double>(n), work = static_cast<double>(count) * order * order * order / 6;
  if (plan.share_matrix) {
    plan.slots = std::min(kSlots, ceil_div(n, kTile));
  } else {
    plan.slots = work < kWorthThreads ? std::min<std::int64_t>(count, 1) : std::min(kSlots, count);
  }
  return plan;
}

std::int64_t workspace_bytes(const CholeskyPlan& plan) {
  return plan.slots * slot_elements(plan) * bytes_of(plan.dtype);
}

void run(const CholeskyPlan& plan, const CholeskyArguments& arguments, void* workspace,
         const ParallelFor& parallel_for) {
  if (plan.dtype == Dtype::float32) {
    run_cholesky<float>(plan, arguments, workspace, parallel_for);
  } else {
    run_cholesky<double>(plan, arguments, workspace, parallel_for);
  }
}

void run(const CholeskyPlan& plan, const WhitenArguments& arguments, void* workspace, const ParallelFor& parallel_for) {
  if (arguments.gram.dtype == Dtype::float32) {
    run_whiten<float>(plan, arguments, workspace, parallel_for);
  } else {
    run_whiten<double>(plan, arguments, workspace, parallel_for);
  }
}

}  // namespace freqrank::whitening
