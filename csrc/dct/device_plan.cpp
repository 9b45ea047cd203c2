// Sizes -> launches: which algorithm a GPU uses for each dimension, and all tile numbers. Nothing else chooses.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

#include "dct/device.h"
#include "dct/device/power_of_two_shape.h"

namespace freqrank::dct {

namespace {

// A block of this size leaves room for several on an SM, so that one loads while another computes.
constexpr int kPreferredThreads = 256;
constexpr int kBlocksPerSm = 4;
// Memory moves in sectors; a tile that is read across rows has at least one of each element.
constexpr int kSectorBytes = 32;
// Work is spread over this many blocks an SM before a block takes several rows.
constexpr int kWaves = 2;

std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }
std::size_t align(std::size_t bytes) { return (bytes + kDeviceAlign - 1) / kDeviceAlign * kDeviceAlign; }

// What a stage costs for one complex number, beside one of radix 2: mostly the way through shared memory.
double stage_cost(int radix) {
  switch (radix) {
    case 2: return 1.0;
    case 3: return 1.1;
    case 4: return 1.05;
    case 5: return 1.2;
    case 7: return 1.5;
    case 8: return 1.15;
    case 6: return 1.2;
    case 9:
    case 10:
    case 12: return 1.45;
    case 15: return 1.7;
    case 16: return 1.4;
    default: return 0.2 * radix;
  }
}

// The cheapest list of radices for n, none above the one before it; `best` bounds the cost. Empty: there is none.
void search(std::int64_t n, int largest, double cost, std::vector<int>& now, double& best, std::vector<int>& found) {
  if (cost >= best) return;
  if (n == 1) {
    best = cost;
    found = now;
    return;
  }
  for (const int radix : kBlockRadices) {
    if (radix > largest || n % radix) continue;
    now.push_back(radix);
    search(n / radix, radix, cost + stage_cost(radix), now, best, found);
    now.pop_back();
  }
}

bool is_smooth(std::int64_t n) {
  for (const int p : {2, 3, 5, 7, 11, 13}) {
    while (n % p == 0) n /= p;
  }
  return n == 1;
}

// The smallest 2^a 3^b 5^c that is at least n.
std::int64_t smooth_at_least(std::int64_t n) {
  std::int64_t best = std::numeric_limits<std::int64_t>::max();
  for (std::int64_t five = 1; five < best; five *= 5) {
    for (std::int64_t three = five; three < best; three *= 3) {
      std::int64_t two = three;
      while (two < n) two *= 2;
      best = std::min(best, two);
      if (three >= n) break;
    }
    if (five >= n) break;
  }
  return best;
}

// For a smooth `inner`. A stage's neighbouring threads write the product of the radices up to it apart, or beside each
// other once that is long. With enough factors 2 these go first and padding spreads them over all banks: reads start at
// multiples of 128 bytes, which padding does not hurt. Otherwise odd radices go first, which need none.
void set_radices(DeviceFft& fft) {
  std::vector<int> now, found;
  double best = std::numeric_limits<double>::max();
  search(fft.inner, kBlockRadices[0], 0.0, now, best, found);
  const std::int64_t twos = fft.inner & -fft.inner;
  fft.padded = twos >= 128 || fft.inner / twos < 5;
  const auto rank = [&](int radix) { return fft.padded ? (radix & (radix - 1)) != 0 : radix % 2 == 0; };
  std::stable_sort(found.begin(), found.end(), [&](int a, int b) { return rank(a) < rank(b); });
  fft.stages = static_cast<int>(found.size());
  std::copy(found.begin(), found.end(), fft.radix);
}

DeviceFft plan_fft(std::int64_t n) {
  DeviceFft fft;
  fft.n = fft.inputs = fft.outputs = n;
  fft.inner = is_smooth(n) ? n : smooth_at_least(2 * n - 1);
  set_radices(fft);
  return fft;
}

// --- one block's shared memory ------------------------------------------------------------------------------------

// Complex numbers from one row of the tile to the next.
std::int64_t row_pitch(const Step& step) {
  const DeviceFft& fft = step.axis[0].fft;
  const std::int64_t count = std::max(fft.inner, (step.axis[0].n + 1) / 2);
  const std::int64_t last = count - 1, padding = last >> block_pad_shift(fft.padded, step.wide);
  return (last + padding + 1) | 1;  // odd: few bank conflicts across rows
}

std::int64_t block_shared_bytes(const Step& step, std::int64_t rows) {
  return rows * (row_pitch(step) * (step.wide ? 16 : 8) + kBlockRowBytes);
}

// Threads that hold all complex numbers of `rows` rows at once, in every stage.
std::int64_t stage_threads(const DeviceFft& fft, std::int64_t rows) {
  std::int64_t threads = 1;
  for (int i = 0; i < fft.stages; ++i) {
    threads = std::max(threads, ceil_div(rows * (fft.inner / fft.radix[i]), kBlockPerThread / fft.radix[i]));
  }
  return ceil_div(threads, 32) * 32;
}

std::int64_t block_threads(const Step& step, std::int64_t rows) { return stage_threads(step.axis[0].fft, rows); }

// The cheapest radices, first stage, those between and last stage, for a convolution of length `least` or more: the
// stages between go through shared memory once for each FFT, so does the first one, the last one once for both.
void set_convolution(DeviceFft& fft, bool tile, bool wide) {
  const std::int64_t least = fft.inputs + fft.outputs - 1;
  double best = std::numeric_limits<double>::max();
  std::vector<int> now;
  const auto extend = [&](auto& self, std::int64_t length, double cost, int largest) -> void {
    if (length < least) {
      if (2 * now.size() > kBlockStages - 4) return;
      for (const int radix : kConvolutionRadices) {
        if (radix > largest) continue;
        now.push_back(radix);
        self(self, length * radix, cost + 2 * stage_cost(radix), radix);
        now.pop_back();
      }
    } else if (cost * static_cast<double>(length) < best) {
      best = cost * static_cast<double>(length);
      fft.inner = length;
      fft.stages = static_cast<int>(now.size());
      std::copy(now.begin(), now.end(), fft.radix);
    }
  };
  for (const int first : kConvolutionFirst) {
    for (const int last : kConvolutionLast) {
      if (first > convolution_first_limit(tile) || last > convolution_last_limit(tile, wide)) continue;
      now = {first, last};
      extend(extend, first * last, 2 * stage_cost(first) + stage_cost(last), kConvolutionRadices[0]);
    }
  }
  std::rotate(fft.radix + 1, fft.radix + 2, fft.radix + fft.stages);
  // Powers of two at both ends, where neighbouring threads write their radix apart: padding spreads these over all
  // banks.
  fft.padded = true;
}

// A step whose Bluestein's convolution, if it has one, takes place in a block. Half of the spectrum of a real row,
// which an odd length of types II to IV is, is enough: type III has it as input, the others as output.
Step in_a_block(const Step& step, bool tile) {
  Step block = step;
  DeviceFft& fft = block.axis[0].fft;
  if (!fft.bluestein()) return block;
  if (step.type != 1 && step.axis[0].n % 2 == 1) (step.type == 3 ? fft.inputs : fft.outputs) = fft.n / 2 + 1;
  set_convolution(fft, tile, step.wide);
  return block;
}

bool fits_block(const Step& step, const DeviceLimits& limits) {
  return step.axis[0].fft.stages <= kBlockStages && step.axis[0].fft.inner < (1 << 20) &&
         block_shared_bytes(step, 1) <= limits.shared_bytes && block_threads(step, 1) <= block_threads_limit(step.wide);
}

// `count` elements of a row lie in memory, one after the other and nothing between rows if it is to be flat.
Tiling tiling(std::int64_t stride, std::int64_t count, const Step& step, std::int64_t BatchDim::* batch_stride) {
  const bool one_run = step.batch.empty() || (step.batch.size() == 1 && step.batch[0].*batch_stride == count);
  if (stride == 1 || step.batch.empty()) return stride == 1 && one_run ? Tiling::flat : Tiling::by_element;
  const std::int64_t across = step.batch.back().*batch_stride;
  return std::abs(across) < std::abs(stride) ? Tiling::by_row : Tiling::by_element;
}

void plan_block(Step& step, const DeviceLimits& limits) {
  const Axis& axis = step.axis[0];
  step.algorithm = axis.fft.bluestein() ? Algorithm::bluestein : Algorithm::mixed_radix;
  step.why = axis.fft.bluestein() ? "a prime factor above 13, fits one block" : "smooth, fits one block";
  step.load = tiling(axis.in_stride, axis.filled, step, &BatchDim::in_stride);
  step.store = tiling(axis.out_stride, std::min(axis.n, axis.out_size), step, &BatchDim::out_stride);
  if (step.store == Tiling::flat && axis.out_size > axis.n) step.store = Tiling::by_element;
  const int narrowest = std::min(bytes_of(step.from_dtype), bytes_of(step.to_dtype));
  const bool across = step.load == Tiling::by_row || step.store == Tiling::by_row;
  const std::int64_t wanted = across ? kSectorBytes / narrowest : 1;
  const std::int64_t spread = std::max(wanted, step.rows / (kWaves * limits.sms));
  const std::int64_t shared = limits.shared_bytes_per_sm / kBlocksPerSm - 1024;
  // Every tile starts with a whole sector, or is whole sectors wide.
  const auto aligned = [](Tiling how, std::int64_t elements, Dtype dtype) {
    const std::int64_t bytes = bytes_of(dtype);
    return how == Tiling::flat     ? kSectorBytes / std::gcd(std::int64_t{kSectorBytes}, elements * bytes)
           : how == Tiling::by_row ? kSectorBytes / bytes
                                   : std::int64_t{1};
  };
  const std::int64_t whole =
      std::max(aligned(step.load, axis.filled, step.from_dtype), aligned(step.store, axis.out_size, step.to_dtype));
  const auto fits = [&](std::int64_t rows) {
    const bool small = block_threads(step, rows) <= kPreferredThreads && block_shared_bytes(step, rows) <= shared;
    const bool fits_at_all = block_threads(step, rows) <= block_threads_limit(step.wide) &&
                             block_shared_bytes(step, rows) <= limits.shared_bytes;
    return fits_at_all && (small || rows <= wanted);
  };
  std::int64_t rows = 1;
  while (rows < std::min(step.rows, spread) && rows < kBlockRows && fits(rows + 1)) ++rows;
  if (rows > 1 && rows >= whole) rows = rows / whole * whole;
  step.rows_per_block = static_cast<int>(rows);
  step.threads = static_cast<int>(block_threads(step, rows));
  step.shared_bytes = static_cast<int>(block_shared_bytes(step, rows));
  step.blocks = ceil_div(step.rows, rows);
}

// --- tiles of two dimensions --------------------------------------------------------------------------------------

// A block's tiles have about this many elements; more would not help it to hide what it waits for.
constexpr std::int64_t kTileElements = 8192;

// One side of a tile: `axis`, and as the innermost batch dimension the other one.
Step side_of(const Step& step, const Axis& axis, const BatchDim& other) {
  Step side;
  side.type = step.type;
  side.wide = step.wide;
  side.axis[0] = axis;
  side.from = step.from;
  side.to = step.to;
  side.from_dtype = step.from_dtype;
  side.to_dtype = step.to_dtype;
  side.batch = step.batch;
  side.batch.push_back(other);
  side.rows = step.rows * other.size;
  return in_a_block(side, true);
}

// As many rows or columns side by side as a block's threads hold, up to `count`; the shared memory that they take.
std::int64_t set_side(Step& side, std::int64_t count, const Step& step, int threads) {
  std::int64_t rows = 1;
  while (rows < std::min<std::int64_t>(count, kBlockRows) && block_threads(side, rows + 1) <= threads) ++rows;
  const std::int64_t sector = kSectorBytes / std::min(bytes_of(step.from_dtype), bytes_of(step.to_dtype));
  if (rows < count && rows >= sector) rows = rows / sector * sector;
  side.rows_per_block = static_cast<int>(rows);
  side.threads = static_cast<int>(block_threads(side, rows));
  side.shared_bytes = static_cast<int>(block_shared_bytes(side, rows));
  side.blocks = step.blocks;
  return side.shared_bytes;
}

// Whether a block can transform tiles of this step.
bool plan_tile(Step& step, const DeviceLimits& limits) {
  const Axis &outer = step.axis[0], &inner = step.axis[1];
  Step rows = side_of(step, inner, {outer.filled, outer.in_stride, 0});
  Step columns = side_of(step, outer, {inner.out_size, 0, inner.out_stride});
  // Rows that follow each other in memory are one run.
  for (std::size_t d = rows.batch.size(); d-- > 1;) {
    const BatchDim& last = rows.batch[d];
    if (rows.batch[d - 1].in_stride != last.in_stride * last.size) continue;
    rows.batch[d - 1] = {rows.batch[d - 1].size * last.size, last.in_stride, 0};
    rows.batch.erase(rows.batch.begin() + static_cast<std::ptrdiff_t>(d));
  }
  if (block_threads(rows, 1) > kTile2dThreads || block_threads(columns, 1) > kTile2dThreads) return false;
  step.tile_pitch = static_cast<int>(std::min(inner.n, inner.out_size) | 1);  // odd: no bank conflicts along columns
  const std::int64_t pitch_bytes = step.tile_pitch * (step.wide ? 8 : 4), entry = outer.n * inner.n;
  std::int64_t tiles = std::max<std::int64_t>(1, std::min(kTileElements / entry, step.rows / (kWaves * limits.sms)));
  step.blocks = ceil_div(step.rows, tiles);
  std::int64_t at = 0, shared = 0;
  for (int threads = kTile2dThreads;; threads /= 2) {
    at = std::max(set_side(rows, tiles * outer.filled, step, threads),
                  set_side(columns, tiles * inner.out_size, step, threads));
    at = ceil_div(at, 16) * 16;
    shared = at + tiles * outer.filled * pitch_bytes;
    if (shared <= limits.shared_bytes) break;
    if (threads == 32) return false;
  }
  step.algorithm = Algorithm::tile_2d;
  step.why = "both dimensions in one block";
  step.rows_per_block = static_cast<int>(tiles);
  step.threads = std::max(rows.threads, columns.threads);
  step.tile_at = static_cast<int>(at);
  step.shared_bytes = static_cast<int>(shared);
  rows.load = tiling(inner.in_stride, inner.filled, rows, &BatchDim::in_stride);
  columns.store = tiling(outer.out_stride, outer.out_size, columns, &BatchDim::out_stride);
  step.load = rows.load;
  step.store = columns.store;
  step.sides = {rows, columns};
  return true;
}

// --- several passes -----------------------------------------------------------------------------------------------

// A tile's columns lie beside each other in memory: at least a sector of them and of their mirror images, four sectors
// of each if that leaves room for several blocks on an SM.
constexpr int kColumnBytes = 2 * kSectorBytes, kWantedColumnBytes = 8 * kSectorBytes;
// Rows go through all passes in groups whose workspace stays in the second-level cache.
constexpr std::int64_t kGroupBytes = 24 << 20;

// Columns of `pass` side by side; whether a block can take them.
bool set_columns(MultiPass::Pass& pass, int column_bits, bool wide, std::int64_t largest_shared, int most_threads) {
  Step block;  // whose rows the columns are
  block.wide = wide;
  block.axis[0].fft = pass.fft;
  const std::int64_t columns = std::int64_t{1} << column_bits;
  const std::int64_t shared = columns * row_pitch(block) * (wide ? 16 : 8), threads = stage_threads(pass.fft, columns);
  if (shared > largest_shared || threads > most_threads) return false;
  pass.column_bits = column_bits;
  pass.shared_bytes = static_cast<int>(shared);
  pass.threads = static_cast<int>(threads);
  return true;
}

// The longest column that is considered.
constexpr int kLongestColumn = 1024;

// Splits n into `passes` factors that `fits` allows, none above `largest` and the largest first, that one as small as
// can be.
template <class Fits>
bool split(std::int64_t n, int passes, std::int64_t largest, const Fits& fits, MultiPass& plan, int at) {
  const auto take = [&](std::int64_t factor) {
    plan.pass[at].fft.n = plan.pass[at].fft.inner = factor;
    return true;
  };
  if (passes == 1) return n <= largest && fits(n) && take(n);
  const double root = std::pow(static_cast<double>(n), 1.0 / passes);
  for (auto factor = std::max<std::int64_t>(2, static_cast<std::int64_t>(root)); factor <= largest; ++factor) {
    if (n % factor == 0 && fits(factor) && split(n / factor, passes - 1, factor, fits, plan, at + 1)) {
      return take(factor);
    }
  }
  return false;
}

void plan_multi_pass(Step& step, const DeviceLimits& limits) {
  const Axis& axis = step.axis[0];
  const bool bluestein = axis.fft.bluestein();
  const std::int64_t n = axis.n, length = axis.fft.n, inner = axis.fft.inner, entry = step.wide ? 16 : 8;
  step.algorithm = Algorithm::multi_pass;
  step.why = bluestein ? "a prime factor above 13, beyond one block" : "smooth, beyond one block";

  const auto bits_of = [&](std::int64_t bytes) {
    int bits = 1;
    while ((entry << bits) < bytes) ++bits;
    return bits;
  };
  const int fewest = bits_of(kColumnBytes), most = bits_of(kWantedColumnBytes);
  MultiPass& plan = step.multi_pass;
  const auto fits = [&](std::int64_t factor) {
    MultiPass::Pass pass;
    pass.fft.n = pass.fft.inner = factor;
    set_radices(pass.fft);
    return set_columns(pass, fewest, step.wide, limits.shared_bytes, kLongThreads);
  };
  plan.passes = 2;
  while (!split(inner, plan.passes, kLongestColumn, fits, plan, 0)) {
    if (++plan.passes > MultiPass::max_passes) {
      throw std::length_error("dct: a row of length " + std::to_string(n) + " needs more than the " +
                              std::to_string(limits.shared_bytes) + " bytes of shared memory of a block");
    }
  }
  const std::int64_t roomy = limits.shared_bytes_per_sm / kBlocksPerSm - 1024;
  for (int i = 0; i < plan.passes; ++i) {
    MultiPass::Pass& pass = plan.pass[i];
    set_radices(pass.fft);
    set_columns(pass, fewest, step.wide, limits.shared_bytes, kLongThreads);
    for (int bits = fewest + 1; bits <= most; ++bits) {
      if (!set_columns(pass, bits, step.wide, std::min<std::int64_t>(roomy, limits.shared_bytes), kPreferredThreads))
        break;
    }
  }
  const auto roots_of = [](std::int64_t period) {
    MultiPass::Roots roots;
    roots.period = period;
    while ((std::int64_t{1} << (2 * roots.bits)) < period) ++roots.bits;
    return roots;
  };
  plan.row = roots_of(step.type == 1 ? 2 * length : step.type == 4 ? 8 * n : 4 * n);
  plan.fft = roots_of(inner);

  const std::int64_t row_bytes = inner * entry;
  plan.rows_per_launch = std::clamp<std::int64_t>(kGroupBytes / row_bytes, 1, std::max<std::int64_t>(step.rows, 1));
  step.scratch_bytes =
      static_cast<std::size_t>(row_bytes * (bluestein ? 2 * plan.rows_per_launch + 1 : plan.rows_per_launch));
  step.threads = plan.pass[0].threads;
  step.shared_bytes = plan.pass[0].shared_bytes;
  step.blocks = plan.rows_per_launch * plan.tiles(0);

  // Type I reads what its symmetric extension has twice. A pass reads and writes the workspace, but for the tensor's
  // ends.
  if (step.type == 1 && axis.filled > 0) {
    const std::int64_t twice = axis.filled - 1 - (axis.filled == n ? 1 : 0);
    step.read_bytes += twice * step.rows * bytes_of(step.from_dtype);
  }
  const std::int64_t passes = plan.passes;
  if (!bluestein) {
    step.read_bytes += step.rows * (passes - 1) * row_bytes;
    step.write_bytes += step.rows * (passes - 1) * row_bytes;
  } else {  // before: written; two FFTs, one from `length` elements, times the filter; after: read. The filter's own
            // FFT.
    const std::int64_t part = length * entry;
    step.read_bytes += step.rows * (part + (2 * passes - 1) * row_bytes + row_bytes + part) + passes * row_bytes;
    step.write_bytes += step.rows * (part + 2 * passes * row_bytes) + (passes + 1) * row_bytes;
  }
}

// --- powers of two ------------------------------------------------------------------------------------------------

// False if another algorithm has to do it.
bool plan_power_of_two(Step& step, const DeviceLimits& limits) {
  const Axis& axis = step.axis[0];
  if (step.wide || step.type == 1 || axis.n > limits.largest_power_of_two || axis.out_size > (1 << 30)) return false;
  const device::PowerOfTwoShape shape = device::power_of_two_shape(axis.n);
  if (!shape.valid()) return false;
  step.load = tiling(axis.in_stride, axis.filled, step, &BatchDim::in_stride);
  step.store = tiling(axis.out_stride, axis.out_size, step, &BatchDim::out_stride);

  int threads = shape.max_threads;
  const auto rows = [&] { return shape.rows(threads); };
  while (threads > shape.group_lanes() && shape.shared_bytes(threads) > limits.shared_bytes) threads /= 2;
  if (shape.shared_bytes(threads) > limits.shared_bytes) return false;
  // Across rows a tile must have whole sectors of them.
  const bool across = step.load == Tiling::by_row || step.store == Tiling::by_row;
  const int wanted = across ? kSectorBytes / std::min(bytes_of(step.from_dtype), bytes_of(step.to_dtype)) : 1;
  if (rows() < wanted) return false;
  while (threads > shape.group_lanes() && rows() / 2 >= wanted && ceil_div(step.rows, rows()) < limits.sms)
    threads /= 2;

  step.algorithm = Algorithm::power_of_two;
  step.why = "a power of two, fits registers";
  step.threads = threads;
  step.rows_per_block = rows();
  step.shared_bytes = shape.shared_bytes(threads);
  // Blocks loop: as many as an SM holds at once.
  const int resident = std::min({limits.shared_bytes_per_sm / (step.shared_bytes + 1024),
                                 limits.threads_per_sm / threads, shape.min_blocks() * shape.max_threads / threads});
  step.blocks = std::min<std::int64_t>(ceil_div(step.rows, rows()), std::int64_t{limits.sms} * std::max(1, resident));
  return true;
}

// --- tables -------------------------------------------------------------------------------------------------------

class Tables {
 public:
  explicit Tables(bool wide) : wide_(wide) {}

  void add(Step& step, Axis& axis) {
    const DeviceFft& fft = axis.fft;
    const std::int64_t n = axis.n, h = fft.n;
    if (step.algorithm == Algorithm::tile_2d) {
      for (Step& side : step.sides) add(side, side.axis[0]);
      return;
    }
    if (step.algorithm == Algorithm::multi_pass) {
      MultiPass& plan = step.multi_pass;
      for (MultiPass::Roots* roots : {&plan.row, &plan.fft}) {
        roots->low = units(roots->low_count(), 0, 1, roots->period);
        roots->high = units(roots->high_count(), 0, roots->low_count(), roots->period);
      }
      for (int i = 0; i < plan.passes; ++i) {
        const std::int64_t factor = plan.pass[i].fft.inner;
        plan.pass[i].roots = units(factor / 2 + 1, 0, 1, factor);
      }
      return;
    }
    axis.roots = units(fft.inner / 2 + 1, 0, 1, fft.inner);
    switch (step.type) {
      case 1: axis.twist = units(h / 2 + 1, 0, 1, 2 * h); break;
      case 4:
        if (axis.even(4)) axis.twist = units(h, 1, 8, 16 * n);
        break;
      default:
        if (!axis.fused(step.type)) axis.twist = units((axis.even(step.type) ? h / 2 : n / 2) + 1, 0, 1, 4 * n);
    }
    if (!fft.bluestein()) return;
    axis.chirp_in = axis.chirp_out = units(h, 0, 0, 2 * h, 1);
    if (axis.fused(step.type)) (step.type == 3 ? axis.chirp_in : axis.chirp_out) = units(n / 2 + 1, 0, 1, 4 * n, 2);
    TableRun spectrum;
    spectrum.kind = TableRun::spectrum;
    spectrum.count = fft.inner;
    spectrum.period = fft.n;
    spectrum.inputs = fft.inputs;
    spectrum.outputs = fft.outputs;
    axis.spectrum = reserve(spectrum);
  }

  std::vector<TableRun> runs;
  std::size_t bytes() const { return static_cast<std::size_t>(count_) * (wide_ ? 16 : 8); }

 private:
  std::int64_t units(std::int64_t count, std::int64_t first, std::int64_t step, std::int64_t period,
                     std::int64_t square = 0) {
    TableRun run;
    run.count = count;
    run.first = first;
    run.step = step;
    run.square = square;
    run.period = period;
    return reserve(run);
  }

  // Dimensions of the same length share their tables.
  std::int64_t reserve(TableRun run) {
    for (const TableRun& r : runs) {
      if (r.kind == run.kind && r.count == run.count && r.first == run.first && r.step == run.step &&
          r.square == run.square && r.period == run.period && r.inputs == run.inputs && r.outputs == run.outputs) {
        return r.at;
      }
    }
    run.at = count_;
    count_ += (run.count + 1) / 2 * 2;  // 16 bytes
    runs.push_back(run);
    return run.at;
  }

  bool wide_;
  std::int64_t count_ = 0;
};

}  // namespace

// --- the plan -----------------------------------------------------------------------------------------------------

DevicePlan plan_device(const Problem& problem, const DeviceLimits& limits) {
  check(problem);
  DevicePlan plan;
  plan.limits = limits;
  for (const std::int64_t size : problem.out_sizes) {
    if (size == 0) return plan;
  }
  const std::size_t ndim = problem.in_sizes.size(), count = problem.dims.size();
  const Dtype compute = problem.dtype == Dtype::float64 ? Dtype::float64 : Dtype::float32;

  // What each dimension holds now; after its own step, the output's size.
  std::vector<std::int64_t> now = problem.in_sizes, extents = problem.out_sizes;
  bool in_out = problem.dtype == compute;  // the output can hold what lies between two steps
  for (std::size_t i = 0; i < count; ++i) {
    const auto d = static_cast<std::size_t>(problem.dims[i]);
    now[d] = std::min(problem.in_sizes[d], problem.lengths[i]);
    in_out = in_out && now[d] <= extents[d];
    extents[d] = std::max(extents[d], now[d]);
  }
  std::vector<std::int64_t> work_strides(ndim);
  std::int64_t work_elements = 1;
  for (std::size_t d = ndim; d-- > 0;) {
    work_strides[d] = work_elements;
    work_elements *= extents[d];
  }
  const Buffer middle = in_out ? Buffer::out : Buffer::work;

  Tables tables(compute == Dtype::float64);
  const auto strides = [&](Buffer b) -> const std::vector<std::int64_t>& {
    return b == Buffer::in ? problem.in_strides : b == Buffer::out ? problem.out_strides : work_strides;
  };
  // The step for `together` of problem.dims from the i-th on, two of them with the one that is contiguous second.
  const auto begin_step = [&](std::size_t i, std::size_t together) {
    Step step;
    step.type = problem.type;
    step.wide = compute == Dtype::float64;
    const bool first = i == 0, last = i + together == count;
    step.from = first ? Buffer::in : middle;
    step.to = last ? Buffer::out : middle;
    step.from_dtype = first ? problem.dtype : compute;
    step.to_dtype = last ? problem.dtype : compute;
    std::vector<char> mine(ndim, 0);
    std::int64_t read = bytes_of(step.from_dtype), written = bytes_of(step.to_dtype);
    for (std::size_t a = 0; a < together; ++a) {
      const auto d = static_cast<std::size_t>(problem.dims[i + a]);
      Axis& axis = step.axis[a];
      axis.n = problem.lengths[i + a];
      axis.in_stride = strides(step.from)[d];
      axis.out_stride = strides(step.to)[d];
      axis.filled = now[d];
      axis.out_size = problem.out_sizes[d];
      const double period = static_cast<double>(problem.type == 1 ? axis.n - 1 : axis.n);
      axis.scale = problem.norm == 0 ? 1.0 : problem.norm == 1 ? 1.0 / std::sqrt(2.0 * period) : 0.5 / period;
      axis.in_end = std::pow(0.5, 0.5 * problem.in_ends);
      axis.out_end = std::pow(0.5, 0.5 * problem.out_ends);
      axis.fft = plan_fft(problem.type == 1 ? axis.n - 1 : axis.n % 2 == 0 ? axis.n / 2 : axis.n);
      mine[d] = 1;
      read *= axis.filled;
      written *= axis.out_size;
    }
    if (together == 2 && step.axis[0].in_stride == 1) std::swap(step.axis[0], step.axis[1]);
    step.rows = 1;
    for (std::size_t e = 0; e < ndim; ++e) {
      if (mine[e]) continue;
      step.batch.push_back({now[e], strides(step.from)[e], strides(step.to)[e]});
      step.rows *= now[e];
    }
    collapse(step.batch);
    if (step.batch.size() + together > 40) {
      throw std::length_error("dct: more than 40 dimensions that do not lie in one run");
    }
    step.read_bytes = read * step.rows;
    step.write_bytes = written * step.rows;
    return step;
  };
  for (std::size_t i = 0; i < count;) {
    std::size_t together = 1;
    Step step;
    if (i + 1 < count && std::max(problem.lengths[i], problem.lengths[i + 1]) <= limits.largest_tile) {
      step = begin_step(i, 2);
      if (step.axis[1].in_stride == 1 && step.axis[1].out_stride == 1 && plan_tile(step, limits)) together = 2;
    }
    if (together == 1) {
      step = begin_step(i, 1);
      if (!plan_power_of_two(step, limits)) {
        const Step block = in_a_block(step, false);
        if (fits_block(block, limits)) {
          step = block;
          plan_block(step, limits);
        } else {
          plan_multi_pass(step, limits);
        }
      }
    }
    if (step.algorithm != Algorithm::power_of_two) tables.add(step, step.axis[0]);
    for (; together > 0; --together, ++i) {
      const auto d = static_cast<std::size_t>(problem.dims[i]);
      now[d] = problem.out_sizes[d];
    }
    plan.steps.push_back(step);
  }

  const bool several = plan.steps.size() > 1;

  plan.tables_bytes = align(tables.bytes());
  if (!tables.runs.empty()) {
    Step fill;
    fill.algorithm = Algorithm::tables;
    fill.wide = compute == Dtype::float64;
    fill.tables = tables.runs;
    fill.table_bytes = static_cast<std::int64_t>(tables.bytes());
    for (const TableRun& run : fill.tables) fill.scratch_bytes += static_cast<std::size_t>(run.scratch_bytes());
    fill.why = "sines that depend on the length";
    plan.steps.insert(plan.steps.begin(), fill);
  }
  plan.work_at = plan.tables_bytes;
  if (several && middle == Buffer::work) {
    plan.work_bytes = align(static_cast<std::size_t>(work_elements) * static_cast<std::size_t>(bytes_of(compute)));
  }
  plan.scratch_at = plan.work_at + plan.work_bytes;
  for (const Step& step : plan.steps) plan.scratch_bytes = std::max(plan.scratch_bytes, align(step.scratch_bytes));
  return plan;
}

std::size_t workspace_bytes(const DevicePlan& plan) { return plan.scratch_at + plan.scratch_bytes; }

namespace {

Extent extent(const Step& step, std::int64_t Axis::* size, std::int64_t Axis::* stride,
              std::int64_t BatchDim::* batch_stride) {
  Extent e{0, 1};
  const auto widen = [&](std::int64_t count, std::int64_t by) {
    if (count == 0) e = {0, 0};
    if (count == 0 || e.end == 0) return;
    (by < 0 ? e.begin : e.end) += (count - 1) * by;
  };
  for (const Axis& axis : step.axis) {
    if (&axis == step.axis || step.algorithm == Algorithm::tile_2d) widen(axis.*size, axis.*stride);
  }
  for (const BatchDim& dim : step.batch) widen(dim.size, dim.*batch_stride);
  return e;
}

const char* name(Dtype dtype) {
  switch (dtype) {
    case Dtype::float16: return "float16";
    case Dtype::bfloat16: return "bfloat16";
    case Dtype::float32: return "float32";
    default: return "float64";
  }
}

const char* name(Buffer buffer) {
  return buffer == Buffer::in ? "input" : buffer == Buffer::out ? "output" : "workspace";
}

const char* name(Tiling tiling) {
  return tiling == Tiling::flat ? "as one run" : tiling == Tiling::by_row ? "across rows" : "along rows";
}

}  // namespace

Extent in_extent(const Step& step) { return extent(step, &Axis::filled, &Axis::in_stride, &BatchDim::in_stride); }
Extent out_extent(const Step& step) { return extent(step, &Axis::out_size, &Axis::out_stride, &BatchDim::out_stride); }

const char* name(Algorithm algorithm) {
  switch (algorithm) {
    case Algorithm::tables: return "tables";
    case Algorithm::power_of_two: return "power of two";
    case Algorithm::mixed_radix: return "mixed radix";
    case Algorithm::bluestein: return "Bluestein";
    case Algorithm::multi_pass: return "several passes";
    default: return "2-D tile";
  }
}

std::string describe(const DevicePlan& plan) {
  static const char* const roman[] = {"I", "II", "III", "IV"};
  if (plan.steps.empty()) return "nothing to do: the output is empty\n";
  std::string text;
  for (const Step& step : plan.steps) {
    const bool tile = step.algorithm == Algorithm::tile_2d;
    text += name(step.algorithm);
    if (step.algorithm == Algorithm::tables) {
      text += ": " + std::to_string(step.table_bytes) + " bytes into the workspace; " + step.why + "\n";
      continue;
    }
    text += std::string(" (") + step.why + "): type " + roman[step.type - 1] + " of length " +
            (tile ? std::to_string(step.axis[0].n) + " x " + std::to_string(step.axis[1].n)
                  : std::to_string(step.axis[0].n)) +
            ", " + std::to_string(step.rows) + (tile ? " tiles" : " rows") + ", " + name(step.from) + " " +
            name(step.from_dtype) + " -> " + name(step.to) + " " + name(step.to_dtype) + "\n";
    for (const Axis& axis : step.axis) {
      if (axis.fft.stages == 0 || step.algorithm == Algorithm::power_of_two) continue;
      text += "  FFT of length " + std::to_string(axis.fft.n);
      if (axis.fft.bluestein()) text += " by two of length " + std::to_string(axis.fft.inner);
      if (step.algorithm == Algorithm::multi_pass) {
        text += ", passes of";
        for (int i = 0; i < step.multi_pass.passes; ++i) {
          const MultiPass::Pass& pass = step.multi_pass.pass[i];
          text += (i > 0 ? ", " : " ") + std::to_string(pass.fft.n) + " (" + std::to_string(1 << pass.column_bits) +
                  " columns a block)";
        }
        text += "; " + std::to_string(step.multi_pass.rows_per_launch) + " rows at once\n";
        continue;
      }
      text += ", radices";
      for (int i = 0; i < axis.fft.stages; ++i) text += " " + std::to_string(axis.fft.radix[i]);
      text += "\n";
    }
    text += "  " + std::to_string(step.blocks) + " blocks of " + std::to_string(step.threads) + " threads, " +
            std::to_string(step.rows_per_block) + (tile ? " tiles" : " rows") + " a block, " +
            std::to_string(step.shared_bytes) + " bytes of shared memory; read " + name(step.load) + ", written " +
            name(step.store) + "\n  moves " + std::to_string(step.read_bytes) + " + " +
            std::to_string(step.write_bytes) + " bytes\n";
  }
  text += "workspace " + std::to_string(workspace_bytes(plan)) + " bytes\n";
  return text;
}

}  // namespace freqrank::dct
