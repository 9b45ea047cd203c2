#include "whitening/cholesky.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>

#include "whitening/kernels.h"
#include "whitening/panels.h"

namespace freqrank::whitening {

namespace {

constexpr std::int64_t kSlots = 64;
constexpr std::int64_t kShareAlways = 1024;  // from this order on the threads share each matrix
constexpr std::int64_t kFew = 8;             // and all that are too large for panels if there are fewer than this
// Up to this order a matrix is factored in panels in the second cache, and up to kLanesFit as many as a vector has
// lanes.
constexpr std::int64_t kPanelsFit = 512;
constexpr std::int64_t kSpaceBytes = 16 << 20;
constexpr std::int64_t kMostSolved = 512;  // right-hand sides of a matrix that one thread solves beside its factor
constexpr double kWorthThreads = 4e5;      // multiplications, reading and writing an element counted as 5
constexpr std::int64_t kMostLanes = lanes_of(Dtype::float32);

std::int64_t block_rows(const CholeskyPlan& plan) { return round_up(std::min(plan.n, kBlock), kRowPadding); }
std::int64_t block_ld(const CholeskyPlan& plan) { return round_up(std::min(plan.n, kBlock), kColumnPadding); }
std::int64_t tile_ld(const CholeskyPlan& plan) { return round_up(std::min(plan.n, kTile), kColumnPadding); }

// A slot holds the panels, or the diagonal block, a tile to the right of it, and packing space.
std::int64_t slot_elements(const CholeskyPlan& plan) {
  return block_rows(plan) * (block_ld(plan) + tile_ld(plan)) +
         round_up(packed_elements(block_rows(plan), tile_ld(plan)), 16);
}
std::int64_t slot_bytes(const CholeskyPlan& plan) {
  if (!plan.panels) return slot_elements(plan) * bytes_of(plan.dtype);
  const std::int64_t columns = columns_bytes(plan.n, plan.dtype);
  const std::int64_t lanes = plan.lanes > 1 ? lanes_bytes(plan.n) : 0;
  if (!plan.solve_panels) return std::max(columns, lanes);
  return std::max(columns + sides_bytes(plan.n, plan.dtype, false),
                  lanes > 0 ? lanes + sides_bytes(plan.n, plan.dtype, true) : 0);
}

template <class T, class In>
T at(const Source<In>& a, std::int64_t i, std::int64_t j) {
  return static_cast<T>(a.data[i * a.row_stride + j * a.column_stride]) * static_cast<T>(a.scale);
}

// A tile of the upper triangle, zeros below the diagonal.
template <class T, class In>
void read(const Source<In>& a, std::int64_t row, std::int64_t column, std::int64_t rows, std::int64_t columns, T* tile,
          std::int64_t ld) {
  const bool diagonal = row == column;
  if (a.row_stride == 1 && a.column_stride != 1) {
    for (std::int64_t j = 0; j < columns; ++j) {
      const std::int64_t last = diagonal ? j + 1 : rows;
      for (std::int64_t i = 0; i < last; ++i) tile[i * ld + j] = at<T>(a, row + i, column + j);
      for (std::int64_t i = last; i < rows; ++i) tile[i * ld + j] = 0;
    }
  } else {
    for (std::int64_t i = 0; i < rows; ++i) {
      const std::int64_t first = diagonal ? i : 0;
      std::fill_n(tile + i * ld, first, T(0));
      for (std::int64_t j = first; j < columns; ++j) tile[i * ld + j] = at<T>(a, row + i, column + j);
    }
  }
  if (!diagonal || a.damping == 0) return;
  for (std::int64_t i = 0; i < rows; ++i) {
    T& value = tile[i * ld + i];
    value += static_cast<T>(a.damping * (value != 0 ? static_cast<double>(value) : a.mean));
  }
}

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

// What a factor that failed holds beyond its leading minor is A's own, whichever way it was made.
template <class T, class In>
void keep_leading_minor(const Source<In>& a, std::int64_t n, std::int64_t minor, T* u) {
  for (std::int64_t i = 0; i < n; ++i) {
    const std::int64_t known = std::max(minor - 1, i);
    if (i >= minor - 1) std::fill_n(u + i * n, i, T(0));
    for (std::int64_t j = known; j < n; ++j) u[i * n + j] = at<T>(a, i, j);
  }
}

// Factors up to plan.lanes matrices, of the same strides.
template <class T, class In>
void factor_some(const CholeskyPlan& plan, const Source<In>* a, std::int64_t count, T* const* u, Outcome* outcomes,
                 RightSides<T> sides, T* space, const ParallelFor& parallel_for, std::int64_t slots) {
  if (count >= std::max<std::int64_t>(plan.lanes / 2, 2)) {
    FREQRANK_DISPATCH(factor_lanes, a, count, plan.n, u, outcomes, sides, space);
  } else if (plan.panels) {  // as fast for so few, and the same bits
    for (std::int64_t l = 0; l < count; ++l, ++sides.b, ++sides.x)
      outcomes[l] = FREQRANK_DISPATCH(factor_columns, a[l], plan.n, u[l], sides, space);
  } else {
    *outcomes = factor_matrix(plan, *a, *u, space, parallel_for, slots);
  }
}

// Calls body(first, count, space, parallel_for, slots) for groups of plan.lanes matrices, either all threads on each or
// each thread on its own.
template <class T, class Body>
void each_group(const CholeskyPlan& plan, void* workspace, const ParallelFor& parallel_for, const Body& body) {
  T* const space = static_cast<T*>(workspace);
  const std::int64_t count = plan.batch.count();
  if (plan.share_matrix) {
    for (std::int64_t b = 0; b < count; ++b) body(b, std::int64_t{1}, space, parallel_for, plan.slots);
    return;
  }
  const auto in_slots = [&](std::int64_t begin, std::int64_t end) {
    T* const mine = space + begin * (slot_bytes(plan) / bytes_of(plan.dtype));  // one for all, as it is in the caches
    for (std::int64_t slot = begin; slot < end; ++slot) {
      for (std::int64_t b = slot * plan.lanes; b < count; b += plan.slots * plan.lanes) {
        body(b, std::min(plan.lanes, count - b), mine, parallel_for, 1);
      }
    }
  };
  if (plan.slots > 1) {
    parallel_for(plan.slots, 1, std::ref(in_slots));
  } else {
    in_slots(0, plan.slots);
  }
}

template <class In>
Source<In> source(const CholeskyPlan& plan, const MatrixBatch& a, std::int64_t b) {
  return {static_cast<const In*>(a.data) + plan.batch.offset(b, a.batch_strides), a.row_stride, a.column_stride};
}

// NaN in a factor's upper triangle: whoever goes on with it will notice.
template <class T>
void spoil(std::int64_t n, T* u) {
  for (std::int64_t i = 0; i < n; ++i) {
    std::fill_n(u + i * n, i, T(0));
    std::fill_n(u + i * n + i, n - i, std::numeric_limits<T>::quiet_NaN());
  }
}

template <class T>
void run_cholesky(const CholeskyPlan& plan, const CholeskyArguments& arguments, void* workspace,
                  const ParallelFor& parallel_for) {
  const std::int64_t n = plan.n;
  const MatrixBatch &b = arguments.b, &x = arguments.x;
  each_group<T>(plan, workspace, parallel_for,
                [&](std::int64_t first, std::int64_t count, T* space, const ParallelFor& inner, std::int64_t slots) {
                  Source<T> a[kMostLanes];
                  T* u[kMostLanes] = {};
                  Outcome outcomes[kMostLanes];
                  const T* from[kMostLanes] = {};
                  T* to[kMostLanes] = {};
                  RightSides<T> sides{from, to};
                  for (std::int64_t l = 0; l < count; ++l) {
                    a[l] = source<T>(plan, arguments.a, first + l);
                    u[l] = static_cast<T*>(arguments.factor) + (first + l) * n * n;
                  }
                  if (plan.solve_panels) {
                    sides = {from, to, plan.right_sides, b.row_stride, b.column_stride, x.row_stride, x.column_stride};
                    for (std::int64_t l = 0; l < count; ++l) {
                      from[l] = static_cast<const T*>(b.data) + plan.batch.offset(first + l, b.batch_strides);
                      to[l] = static_cast<T*>(x.data) + plan.batch.offset(first + l, x.batch_strides);
                    }
                  }
                  factor_some(plan, a, count, u, outcomes, sides, space, inner, slots);
                  for (std::int64_t l = 0; l < count; ++l) {
                    arguments.info[first + l] = static_cast<std::int32_t>(outcomes[l].minor);
                    if (outcomes[l].minor == 0) continue;
                    if (plan.right_sides == kNoRightSides) {
                      keep_leading_minor(a[l], n, outcomes[l].minor, u[l]);
                      continue;
                    }
                    spoil(n, u[l]);
                    for (std::int64_t i = 0; i < (plan.solve_panels ? n : 0); ++i) {
                      for (std::int64_t j = 0; j < plan.right_sides; ++j)
                        to[l][i * x.row_stride + j * x.column_stride] = std::numeric_limits<T>::quiet_NaN();
                    }
                  }
                });
  if (plan.right_sides <= 0 || plan.solve_panels) return;
  const FactorSolves solves(plan.batch, n, arguments);
  for (const auto& solve : solves.each) run(plan.solve, solve, workspace, parallel_for);
}

template <class In>
void run_whiten(const CholeskyPlan& plan, const WhitenArguments& arguments, void* workspace,
                const ParallelFor& parallel_for) {
  const std::int64_t n = plan.n;
  each_group<double>(
      plan, workspace, parallel_for,
      [&](std::int64_t first, std::int64_t count, double* space, const ParallelFor& inner, std::int64_t slots) {
        Source<In> a[kMostLanes];
        double* u[kMostLanes] = {};
        std::int64_t index[kMostLanes];  // of those that no level has factored yet
        Outcome outcomes[kMostLanes];
        for (std::int64_t l = 0; l < count; ++l) {
          index[l] = first + l;
          a[l] = source<In>(plan, arguments.gram, index[l]);
          u[l] = arguments.factor + index[l] * n * n;
          if (arguments.scale) a[l].scale = arguments.scale[index[l]];
          for (std::int64_t i = 0; i < n; ++i) a[l].mean += at<double>(a[l], i, i) / static_cast<double>(n);
        }
        std::int64_t open = count;
        for (const double level : kDampingLevels) {
          for (std::int64_t l = 0; l < open; ++l) a[l].damping = level;
          factor_some(plan, a, open, u, outcomes, RightSides<double>{}, space, inner, slots);
          std::int64_t failed = 0;
          for (std::int64_t l = 0; l < open; ++l) {
            arguments.damping[index[l]] = level;
            arguments.info[index[l]] = static_cast<std::int32_t>(outcomes[l].minor);
            if (outcomes[l].minor == 0) continue;
            if (level == kDampingLevels[kDampingLevelCount - 1] || outcomes[l].not_a_number) {
              spoil(n, u[l]);
              continue;
            }
            a[failed] = a[l], u[failed] = u[l], index[failed] = index[l];
            ++failed;
          }
          open = failed;
          if (open == 0) break;
        }
      });
}

}  // namespace

CholeskyPlan plan_cholesky(BatchSizes batch, std::int64_t n, Dtype dtype, std::int64_t right_sides) {
  CholeskyPlan plan;
  plan.batch = std::move(batch);
  plan.n = n;
  plan.dtype = dtype;
  const std::int64_t count = plan.batch.count();
  plan.panels = n <= kPanelsFit;
  plan.lanes = n <= kLanesFit ? lanes_of(dtype) : 1;
  plan.share_matrix = n >= kShareAlways || (!plan.panels && count < kFew);
  plan.right_sides = right_sides;
  plan.solve_panels = right_sides > 0 && plan.panels && right_sides <= kMostSolved;
  if (right_sides > 0 && !plan.solve_panels) plan.solve = plan_triangular(plan.batch, n, right_sides, dtype);
  const double order = static_cast<double>(n), solved = plan.solve_panels ? static_cast<double>(right_sides) : 0;
  const double work = static_cast<double>(count) * order * (order * (order / 6 + 5) + solved * (order + 5));
  if (plan.share_matrix) {
    plan.slots = std::min(kSlots, ceil_div(n, kTile));
  } else {
    const std::int64_t groups = ceil_div(count, plan.lanes);
    const std::int64_t fit = plan.panels ? std::max<std::int64_t>(kSpaceBytes / slot_bytes(plan), 1) : kSlots;
    plan.slots = work < kWorthThreads ? std::min<std::int64_t>(groups, 1) : std::min({kSlots, fit, groups});
  }
  return plan;
}

std::int64_t workspace_bytes(const CholeskyPlan& plan) {
  const bool solves = plan.right_sides > 0 && !plan.solve_panels;
  return std::max(plan.slots * slot_bytes(plan), solves ? workspace_bytes(plan.solve) : 0);
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
