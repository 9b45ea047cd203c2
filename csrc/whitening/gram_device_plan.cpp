#include "whitening/gram_device.h"

#include <algorithm>
#include <sstream>
#include <stdexcept>

#include "whitening/device/gram_layout.h"

namespace freqrank::whitening {

namespace {

using i64 = std::int64_t;

// Estimates, to be measured. What a small tile's element costs beside a large one's (it reads more of X for each
// product), what a block costs beside its tokens, in tokens, what a part of a split sum costs more, and how much longer
// a block takes that has an SM's tensor cores to itself than its share of a full SM's time.
constexpr double kSmallTileCost = 1.15, kBlockTokens = 64, kPartTokens = 160, kAloneCost = 1.3;
constexpr i64 kLeastTokens = 256;  // of a part
constexpr int kSlowDouble = 8;     // operations in float that take as long as one in double: from here on integers win
constexpr i64 kMostBlocksPerSm = 8;  // more parts than that give nothing

// Tiles of a matrix: all, or those with an element on or below the diagonal.
i64 tiles_of(i64 down, i64 across, const GramShape& shape, bool symmetric) {
  if (!symmetric) return down * across;
  const i64 ratio = shape.rows / shape.columns;
  i64 tiles = 0;
  for (i64 i = 0; i < down; ++i) tiles += std::min(across, ratio * (i + 1));
  return tiles;
}

void choose_tiles(GramDevicePlan& plan) {
  const GramDeviceProblem& p = plan.problem;
  double least = 0;
  for (int k = 0; k < (plan.integers ? 1 : kGramShapeCount); ++k) {
    const GramShape& tile = plan.integers ? kGramIntegerShape : kGramShapes[k];
    const i64 down = ceil_div(p.rows, tile.rows), across = ceil_div(p.columns, tile.columns);
    const i64 tiles = tiles_of(down, across, tile, p.symmetric);
    const double cost = static_cast<double>(tiles) * tile.rows * tile.columns * (k == 0 ? 1.0 : kSmallTileCost);
    if (k > 0 && cost >= least) continue;
    least = cost;
    plan.shape = k, plan.tile = tile;
    plan.tiles_down = down, plan.tiles_across = across, plan.tiles = tiles;
  }
}

// Into how many parts the tokens are cut: the fewest whose estimate is least.
void split(GramDevicePlan& plan, i64 multiple, const GpuLimits& limits) {
  const i64 tokens = plan.problem.tokens, tasks = plan.problem.batch.count() * plan.tiles;
  plan.split_tokens = tokens;
  if (tasks == 0) return;
  const i64 most = std::min(tokens / std::max(kLeastTokens, multiple), kMostBlocksPerSm * limits.sms / tasks);
  double least = 0;
  for (i64 splits = 1; splits <= std::max<i64>(1, most); ++splits) {
    const i64 each = round_up(ceil_div(tokens, splits), multiple);
    if (splits > 1 && ceil_div(tokens, each) != splits) continue;
    const i64 per_sm = ceil_div(tasks * splits, limits.sms);
    const double cost = (static_cast<double>(each) + kBlockTokens + (splits > 1 ? kPartTokens : 0)) *
                        (per_sm == 1 ? kAloneCost : static_cast<double>(per_sm));
    if (splits > 1 && cost >= least) continue;
    least = cost;
    plan.splits = splits;
    if (splits > 1) plan.split_tokens = each;
  }
}

// Bytes of x and y that the tiles of one matrix read for each token. In double, a tile of Y that lies within X's is not
// read; by integers it is, and before that everything once, and exponents for each chunk.
i64 bytes_of_token(const GramDevicePlan& plan) {
  const GramDeviceProblem& p = plan.problem;
  const i64 ratio = plan.tile.rows / plan.tile.columns;
  i64 bytes = 0;
  for (i64 i = 0; i < plan.tiles_down; ++i) {
    const i64 width = std::min<i64>(plan.tile.rows, p.rows - i * plan.tile.rows);
    const i64 tiles = p.symmetric ? std::min(plan.tiles_across, ratio * (i + 1)) : plan.tiles_across;
    const i64 apart = p.symmetric && !plan.integers ? ratio * i : tiles;  // tiles of Y that are read beside X's
    bytes += tiles * width * bytes_of(p.x) + std::min(apart * plan.tile.columns, p.columns) * bytes_of(p.y);
  }
  if (plan.integers) bytes += p.rows * bytes_of(p.x) + (p.symmetric ? 0 : p.columns * bytes_of(p.y));
  return bytes;
}
i64 exponents_read(const GramDevicePlan& plan) {
  const GramDeviceProblem& p = plan.problem;
  const i64 ratio = plan.tile.rows / plan.tile.columns;
  i64 count = 0;
  for (i64 i = 0; i < plan.tiles_down; ++i) {
    const i64 tiles = p.symmetric ? std::min(plan.tiles_across, ratio * (i + 1)) : plan.tiles_across;
    count += tiles * std::min<i64>(plan.tile.rows, p.rows - i * plan.tile.rows) +
             std::min(tiles * plan.tile.columns, p.columns);
  }
  return count;
}

}  // namespace

GramDevicePlan plan_gram_device(const GramDeviceProblem& problem, const GpuLimits& limits) {
  const auto& sizes = problem.batch.sizes;
  const auto dims = std::count_if(sizes.begin(), sizes.end(), [](i64 size) { return size != 1; });
  if (dims > kGramBatchSizes)
    throw std::invalid_argument("gram: on a GPU at most " + std::to_string(kGramBatchSizes) +
                                " batch dimensions may be larger than 1; got " + std::to_string(dims));
  GramDevicePlan plan;
  plan.problem = problem;
  plan.integers = limits.float_per_double >= kSlowDouble;
  plan.element = problem.x == problem.y && !(plan.integers && problem.weighted) ? problem.x : Dtype::float64;
  choose_tiles(plan);
  const i64 count = problem.batch.count();
  const i64 part = count * plan.tiles * plan.tile.rows * plan.tile.columns * 8;
  if (plan.integers) {
    plan.threads = device::kGramIntegerThreads;
    plan.shared_bytes = device::kGramIntegerSharedBytes;
    split(plan, kGramFlushTokens, limits);
    plan.chunks = ceil_div(problem.tokens, kGramFlushTokens);
  } else {
    const auto layout = device::gram_layout(plan.tile, static_cast<int>(bytes_of(plan.element)));
    plan.threads = 32 * layout.warps;
    plan.shared_bytes = layout.shared_bytes;
    split(plan, layout.stage_tokens, limits);
  }
  plan.blocks = count * plan.tiles * plan.splits;
  plan.x_exponents_at = plan.splits > 1 ? static_cast<std::size_t>(part * plan.splits) : 0;
  plan.y_exponents_at = plan.x_exponents_at + static_cast<std::size_t>(count * plan.chunks * problem.rows * 4);
  plan.bytes = plan.y_exponents_at;
  if (!problem.symmetric) plan.bytes += static_cast<std::size_t>(count * plan.chunks * problem.columns * 4);

  const i64 written = count * problem.rows * problem.columns * 8;
  plan.read_bytes = count * problem.tokens * bytes_of_token(plan) + count * plan.chunks * exponents_read(plan) * 4;
  if (problem.weighted) plan.read_bytes += count * plan.tiles * problem.tokens * 8;
  plan.write_bytes = static_cast<i64>(plan.bytes - plan.x_exponents_at);
  i64 flushes = 0;  // of a matrix' tiles, over all parts
  for (i64 k = 0; k < plan.splits; ++k) {
    const i64 tokens = std::min(plan.split_tokens, problem.tokens - k * plan.split_tokens);
    flushes += std::max<i64>(1, ceil_div(tokens, kGramFlushTokens));
  }
  if (problem.accumulate) plan.read_bytes += written;
  if (plan.splits > 1) {
    plan.write_bytes += written + part * flushes;
    plan.read_bytes += part * flushes;  // to add to them, and to sum them up
  } else {
    plan.write_bytes += written * flushes;
    plan.read_bytes += written * (flushes - 1);
  }
  return plan;
}

std::size_t workspace_bytes(const GramDevicePlan& plan) { return plan.bytes; }

std::string describe(const GramDevicePlan& plan) {
  std::ostringstream out;
  if (plan.integers) out << "gram_exponents: of " << plan.chunks << " chunks of " << kGramFlushTokens << " tokens\n";
  out << (plan.integers ? "gram_integers: " : "gram: ") << plan.blocks << " blocks of " << plan.threads
      << " threads, tiles of " << plan.tile.rows << " x " << plan.tile.columns
      << (plan.problem.symmetric ? ", of one half" : "") << ", " << plan.shared_bytes << " bytes of shared memory";
  if (plan.splits > 1)
    out << "\n"
        << (plan.integers ? "gram_sum_integer_parts: " : "gram_sum_parts: ") << plan.splits << " parts of "
        << plan.split_tokens << " tokens, too few tiles for the GPU otherwise";
  return out.str();
}

}  // namespace freqrank::whitening
