#include "whitening/gram.h"

#include <algorithm>
#include <functional>
#include <numeric>

#include "whitening/kernels.h"

namespace freqrank::whitening {

namespace {

constexpr std::int64_t kSlots = 64;          // more threads than this find nothing to do in one call
constexpr std::int64_t kWantedTasks = 16;    // below this many tiles the tokens are split too
constexpr std::int64_t kLeastTokens = 1024;  // a part shorter than this is not worth a tile of its own
constexpr double kWorthThreads = 2e5;        // multiplications below which waking threads costs more than it saves

std::int64_t tile_elements(const GramPlan& plan) {
  return round_up(plan.tile_rows, kRowPadding) * round_up(plan.tile_columns, kColumnPadding);
}

std::int64_t slot_elements(const GramPlan& plan) {
  return round_up(packed_elements(plan.tile_rows, plan.tile_columns), 8) + (plan.splits == 1 ? tile_elements(plan) : 0);
}

// Tiles differ in their work, and threads get neighbouring slots. The k-th part is number k * step modulo all of them,
// with a step near the golden section of their number: any run of slots then has its share of every kind of tile.
std::int64_t step_of(std::int64_t parts) {
  auto step = std::max<std::int64_t>(1, static_cast<std::int64_t>(0.618 * static_cast<double>(parts)));
  while (std::gcd(step, parts) != 1) ++step;
  return step;
}

struct Tile {
  std::int64_t row, column, rows, columns;
};

Tile tile_of(const GramPlan& plan, std::int64_t index) {
  const std::int64_t across = ceil_div(plan.columns, plan.tile_columns);
  std::int64_t i = 0, j = index;
  if (plan.symmetric) {
    for (; j >= across - i; ++i) j -= across - i;
    j += i;
  } else {
    i = index / across;
    j = index % across;
  }
  const std::int64_t row = i * plan.tile_rows, column = j * plan.tile_columns;
  return {row, column, std::min(plan.tile_rows, plan.rows - row), std::min(plan.tile_columns, plan.columns - column)};
}

Operand operand_of(const GramPlan& plan, const MatrixBatch& matrix, std::int64_t batch, std::int64_t token,
                   std::int64_t column) {
  const std::int64_t offset =
      plan.batch.offset(batch, matrix.batch_strides) + token * matrix.row_stride + column * matrix.column_stride;
  return {static_cast<const char*>(matrix.data) + offset * bytes_of(matrix.dtype), matrix.dtype, matrix.row_stride,
          matrix.column_stride};
}

void multiply(const GramPlan& plan, const GramArguments& a, std::int64_t batch, std::int64_t split, const Tile& tile,
              double* sums, double* packed) {
  const std::int64_t ld = round_up(plan.tile_columns, kColumnPadding);
  std::fill_n(sums, tile_elements(plan), 0.0);
  const std::int64_t begin = split * plan.split_tokens;
  Product p;
  p.x = operand_of(plan, a.x, batch, begin, tile.row);
  p.y = operand_of(plan, plan.symmetric ? a.x : a.y, batch, begin, tile.column);
  p.weight = a.weight ? a.weight + plan.batch.offset(batch, a.weight_batch_strides) + begin * a.weight_stride : nullptr;
  p.weight_stride = a.weight_stride;
  p.depth = std::min(plan.split_tokens, plan.tokens - begin);
  p.rows = tile.rows;
  p.columns = tile.columns;
  p.upper_only = plan.symmetric && tile.row == tile.column;
  FREQRANK_DISPATCH(product, p, 1.0, sums, ld, packed);
}

void write(const GramPlan& plan, const GramArguments& a, std::int64_t batch, const Tile& tile, const double* sums) {
  const std::int64_t ld = round_up(plan.tile_columns, kColumnPadding);
  const std::int64_t si = a.out.row_stride, sj = a.out.column_stride;
  double* out = static_cast<double*>(a.out.data) + plan.batch.offset(batch, a.out.batch_strides);
  const auto put = [&](std::int64_t i, std::int64_t j, double value) {
    double& to = out[i * si + j * sj];
    to = a.accumulate ? to + value : value;
  };
  for (std::int64_t i = 0; i < tile.rows; ++i) {
    const std::int64_t first = plan.symmetric && tile.row == tile.column ? i : 0;
    for (std::int64_t j = first; j < tile.columns; ++j) put(tile.row + i, tile.column + j, sums[i * ld + j]);
  }
  if (!plan.symmetric) return;
  for (std::int64_t j = 0; j < tile.columns; ++j) {
    const std::int64_t last = tile.row == tile.column ? j : tile.rows;
    for (std::int64_t i = 0; i < last; ++i) put(tile.column + j, tile.row + i, sums[i * ld + j]);
  }
}

}  // namespace

GramPlan plan_gram(BatchSizes batch, std::int64_t tokens, std::int64_t rows, std::int64_t columns, bool symmetric) {
  GramPlan plan;
  plan.batch = std::move(batch);
  plan.tokens = tokens;
  plan.rows = rows;
  plan.columns = columns;
  plan.symmetric = symmetric;
  plan.tile_rows = std::clamp<std::int64_t>(rows, 1, kTile);
  plan.tile_columns = std::clamp<std::int64_t>(columns, 1, kTile);
  const std::int64_t down = ceil_div(rows, plan.tile_rows), across = ceil_div(columns, plan.tile_columns);
  plan.tiles = symmetric ? across * (across + 1) / 2 : down * across;
  const std::int64_t tasks = plan.batch.count() * plan.tiles;
  plan.splits = 1;
  if (tasks > 0 && tasks < kWantedTasks) {
    plan.splits = std::clamp<std::int64_t>(tokens / kLeastTokens, 1, ceil_div(kWantedTasks, tasks));
  }
  plan.split_tokens = ceil_div(tokens, plan.splits);
  if (plan.split_tokens > 0) plan.splits = std::max<std::int64_t>(1, ceil_div(tokens, plan.split_tokens));
  const double work = static_cast<double>(tasks) * static_cast<double>(plan.tile_rows * plan.tile_columns) *
                      static_cast<double>(std::max<std::int64_t>(tokens, 8));
  plan.slots = work < kWorthThreads ? 1 : std::min(kSlots, tasks * plan.splits);
  return plan;
}

std::int64_t workspace_bytes(const GramPlan& plan) {
  const std::int64_t parts = plan.splits > 1 ? plan.batch.count() * plan.tiles * plan.splits * tile_elements(plan) : 0;
  return (plan.slots * slot_elements(plan) + parts) * static_cast<std::int64_t>(sizeof(double));
}

void run(const GramPlan& plan, const GramArguments& arguments, void* workspace, const ParallelFor& parallel_for) {
  const std::int64_t tasks = plan.batch.count() * plan.tiles;
  double* const space = static_cast<double*>(workspace);
  double* const parts = space + plan.slots * slot_elements(plan);
  const std::int64_t all = tasks * plan.splits, step = step_of(all);
  const auto in_slots = [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t slot = begin; slot < end; ++slot) {
      double* const packed = space + slot * slot_elements(plan);
      double* const own = packed + round_up(packed_elements(plan.tile_rows, plan.tile_columns), 8);
      for (std::int64_t k = slot; k < all; k += plan.slots) {
        const std::int64_t part = k * step % all;
        const std::int64_t task = part / plan.splits, batch = task / plan.tiles;
        const Tile tile = tile_of(plan, task % plan.tiles);
        double* const sums = plan.splits > 1 ? parts + part * tile_elements(plan) : own;
        multiply(plan, arguments, batch, part % plan.splits, tile, sums, packed);
        if (plan.splits == 1) write(plan, arguments, batch, tile, sums);
      }
    }
  };
  parallel_for(plan.slots, 1, std::ref(in_slots));
  if (plan.splits == 1) return;
  const auto add_parts = [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t task = begin; task < end; ++task) {
      double* const sums = parts + task * plan.splits * tile_elements(plan);
      for (std::int64_t split = 1; split < plan.splits; ++split) {
        const double* const part = sums + split * tile_elements(plan);
        for (std::int64_t e = 0; e < tile_elements(plan); ++e) sums[e] += part[e];
      }
      write(plan, arguments, task / plan.tiles, tile_of(plan, task % plan.tiles), sums);
    }
  };
  parallel_for(tasks, 1, std::ref(add_parts));
}

}  // namespace freqrank::whitening
