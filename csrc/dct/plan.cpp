// Sizes -> algorithms and tuning numbers. Nothing else chooses.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>

#include "common/isa.h"
#include "dct/dct.h"

namespace freqrank::dct {

namespace {

// Lengths with a larger prime factor go through Rader's convolution.
constexpr std::int64_t kLargestRadix = 13;
// Time of a stage for each element, by radix.
struct RadixCost {
  int radix;
  double cost;
};
constexpr RadixCost kRadixCosts[] = {{8, 1.9}, {4, 1.5}, {2, 1.2}, {3, 1.6}, {5, 2.3}, {7, 3.2}, {11, 5}, {13, 6.2}};
// Powers of two are split into stages of at most 2^3: radix 16 takes more registers and cache ways than there are.
constexpr int kLargestPower = 3;
// Convolutions are padded to 2^a 3^b 5^c, a at least this where there is a choice.
constexpr std::int64_t kPaddedPowerOfTwo = 8;
// Rows go side by side in vector lanes as long as their scratch stays within one core's share of the caches ...
constexpr std::int64_t kVectorScratchBytes = 2 * 1024 * 1024;
// ... and at least this fraction of the lanes is used.
constexpr std::int64_t kMinLaneFraction = 2;
// Work below this many elements is not worth another thread.
constexpr std::int64_t kElementsPerSlot = 16384;
// Tensors from this size on, input and output, do not stay in the caches.
constexpr std::int64_t kBeyondCachesBytes = 8 * 1024 * 1024;
// Their rows up to this size are fetched a group early; longer ones are left to the prefetchers.
constexpr std::int64_t kFetchedRowBytes = 8192;
// Rows from this size on are stored several lines of one at a time: one line of each of them would fall into few sets
// of the caches and few banks of the memory.
constexpr std::int64_t kScatteredRowBytes = 2048;
constexpr std::int64_t kLineBytes = 64;
constexpr std::size_t kAlign = 64;

std::int64_t padded(std::int64_t elements) { return (elements + kArrayElements - 1) / kArrayElements * kArrayElements; }

std::size_t align(std::size_t bytes) { return (bytes + kAlign - 1) / kAlign * kAlign; }

std::int64_t largest_prime_factor(std::int64_t n) {
  std::int64_t largest = 1;
  for (std::int64_t p = 2; p * p <= n; ++p) {
    while (n % p == 0) {
      n /= p;
      largest = p;
    }
  }
  return std::max(largest, n);
}

// Stages with their twiddles appended at `elements`. Powers of two go first, in stages of even size, large ones before
// small ones, then the large radices: the more transforms are interleaved, the better the stages after fill vectors.
Stages plan_stages(std::int64_t n, std::int64_t& elements) {
  Stages stages;
  stages.n = n;
  std::int64_t rest = n;
  const auto add = [&](std::int64_t radix) {
    rest /= radix;
    stages.radix[stages.count] = radix;
    stages.twiddles[stages.count++] = elements;
    elements += 2 * (radix - 1) * rest;
  };
  int twos = 0;
  for (std::int64_t m = n; m % 2 == 0; m /= 2) ++twos;
  for (int left = (twos + kLargestPower - 1) / kLargestPower; left > 0; --left) {
    const int bits = (twos + left - 1) / left;
    add(std::int64_t{1} << bits);
    twos -= bits;
  }
  for (const std::int64_t radix : {13, 11, 7, 5, 3}) {
    while (rest % radix == 0) add(radix);
  }
  for (std::int64_t p = kLargestRadix + 2; p * p <= rest; p += 2) {
    while (rest % p == 0) add(p);
  }
  if (rest > 1) add(rest);
  return stages;
}

double cost(std::int64_t n) {
  std::int64_t elements = 0;
  const Stages stages = plan_stages(n, elements);
  double sum = 1;  // for passing by
  for (int i = 0; i < stages.count; ++i) {
    for (const RadixCost& c : kRadixCosts) sum += c.radix == stages.radix[i] ? c.cost : 0;
  }
  return sum * static_cast<double>(n);
}

// The length for a convolution of `count` elements: count itself, or at least 2 count - 1, whichever is faster.
std::int64_t convolution_length(std::int64_t count, std::int64_t divisor) {
  const std::int64_t exact = count / divisor, padded = (2 * count - 1 + divisor - 1) / divisor;
  std::int64_t best = 0;
  double least = 0;
  const auto consider = [&](std::int64_t n) {
    const double c = cost(n);
    if (best == 0 || c < least) {
      best = n;
      least = c;
    }
  };
  if (largest_prime_factor(exact) <= kLargestRadix) consider(exact);
  for (std::int64_t odd : {1, 3, 5, 9, 15, 25, 27, 45, 75}) {
    std::int64_t n = odd * kPaddedPowerOfTwo;
    while (n < padded) n *= 2;
    consider(n);
  }
  return best;
}

Convolution plan_convolution(std::int64_t prime, bool real, std::int64_t element_bytes, std::int64_t& elements) {
  Convolution c;
  c.prime = prime;
  c.real = real;
  c.stages = plan_stages(convolution_length(prime - 1, real ? 2 : 1), elements);
  const std::int64_t indices = (4 * (prime - 1) + element_bytes - 1) / element_bytes;
  c.gather = elements;
  c.scatter = c.gather + indices;
  c.spectrum = c.scatter + indices;
  elements = c.spectrum + (real ? 4 : 2) * c.stages.n;
  return c;
}

// A complex FFT, or one of real elements (odd n). Appends its tables at `elements`.
Fft plan_fft(std::int64_t n, bool real, std::int64_t element_bytes, std::int64_t& elements) {
  Fft fft;
  fft.stages = plan_stages(n, elements);
  const auto convolution = [&](std::int64_t prime, bool of_reals) {
    for (std::size_t i = 0; i < fft.convolutions.size(); ++i) {
      if (fft.convolutions[i].prime == prime && fft.convolutions[i].real == of_reals) return static_cast<int>(i);
    }
    fft.convolutions.push_back(plan_convolution(prime, of_reals, element_bytes, elements));
    return static_cast<int>(fft.convolutions.size() - 1);
  };
  for (int i = 0; i < fft.stages.count; ++i) {
    const std::int64_t radix = fft.stages.radix[i];
    fft.convolution[i] = fft.real_convolution[i] = -1;
    if (radix <= kLargestRadix) continue;
    if (!real || i > 0) fft.convolution[i] = convolution(radix, false);
    if (real) fft.real_convolution[i] = convolution(radix, true);
  }
  return fft;
}

Row plan_row(const Problem& problem, std::int64_t n) {
  Row row;
  row.type = problem.type;
  row.norm = problem.norm;
  row.wide = problem.dtype == Dtype::float64;
  row.n = n;
  const std::int64_t period = row.type == 1 ? n - 1 : n;
  row.scale = row.norm == 0   ? 1.0
              : row.norm == 1 ? 1.0 / std::sqrt(2.0 * static_cast<double>(period))
                              : 0.5 / static_cast<double>(period);
  row.even = row.type != 1 && n % 2 == 0;
  std::int64_t elements = 0;
  const std::int64_t length = row.even ? n / 2 : period;
  const auto reserve = [&](std::int64_t count) {
    const std::int64_t at = elements;
    elements += 2 * count;
    return at;
  };
  if (row.type == 1 || (row.even && row.type != 4)) row.rotation = reserve(length / 2 + 1);
  if (row.type == 4) {
    if (row.even) row.pre = reserve(length);
    row.post = reserve(row.even ? length : 1);
  } else if (row.type != 1) {
    row.post = reserve(row.even ? length + 1 : n / 2 + 1);
  }
  const bool real = !row.even && row.type != 1;
  row.fft = plan_fft(length, real, row.wide ? 8 : 4, elements);
  row.table_elements = elements;
  row.scratch = padded(n) + 4 * padded(row.even ? length : n);
  if (real) row.scratch += padded(3 * (n / 2) + 2 * (n / 3));
  for (const Convolution& c : row.fft.convolutions) row.spare = std::max(row.spare, padded(4 * c.stages.n));
  return row;
}

// How many times the FFT of a row takes a column, where cache lines can be fetched.
std::int64_t columns_of(const Row& row) {
  const auto smooth = [](const Stages& stages) {
    std::int64_t columns = 0;
    for (int i = 0; i < stages.count; ++i) columns += stages.n / stages.radix[i];
    return columns;
  };
  std::int64_t columns = 0;
  for (int i = 0; i < row.fft.stages.count; ++i) {
    const std::int64_t count = row.fft.stages.n / row.fft.stages.radix[i];
    const int own = row.fft.convolution[i] >= 0 ? row.fft.convolution[i] : row.fft.real_convolution[i];
    columns += own < 0 ? count : count * 2 * smooth(row.fft.convolutions[static_cast<std::size_t>(own)].stages);
  }
  return std::max<std::int64_t>(1, columns);
}

}  // namespace

void check(const Problem& p) {
  const auto require = [](bool ok, const char* what) {
    if (!ok) throw std::invalid_argument(std::string("dct: ") + what);
  };
  const auto three = [](int e) { return e >= 0 && e <= 2; };
  require(p.type >= 1 && p.type <= 4, "type must be 1, 2, 3 or 4");
  require(three(p.norm), "norm must be 0, 1 or 2");
  require(three(p.in_ends) && (p.in_ends == 0 || p.type == 1 || p.type == 3),
          "in_ends must be 0, 1 or 2, types I, III");
  require(three(p.out_ends) && (p.out_ends == 0 || p.type <= 2), "out_ends must be 0, 1 or 2, types I, II");
  const std::size_t ndim = p.in_sizes.size();
  require(ndim <= 64, "at most 64 dimensions");
  require(p.in_strides.size() == ndim && p.out_sizes.size() == ndim && p.out_strides.size() == ndim,
          "sizes and strides must have one entry a dimension");
  require(!p.dims.empty() && p.dims.size() == p.lengths.size(), "dims and lengths must be as many, at least one");
  require(p.threads >= 1, "threads must be positive");
  std::vector<char> transformed(ndim, 0);
  for (std::size_t i = 0; i < p.dims.size(); ++i) {
    require(p.dims[i] >= 0 && p.dims[i] < static_cast<int>(ndim), "dims out of range");
    char& seen = transformed[static_cast<std::size_t>(p.dims[i])];
    require(!seen, "dims must be distinct");
    seen = 1;
    require(p.lengths[i] >= (p.type == 1 ? 2 : 1), "lengths must be at least 1, for type I at least 2");
    if (p.lengths[i] > kLongestRow) {
      throw std::invalid_argument("dct: lengths must be at most " + std::to_string(kLongestRow) + "; got " +
                                  std::to_string(p.lengths[i]));
    }
  }
  for (std::size_t d = 0; d < ndim; ++d) {
    require(p.in_sizes[d] >= 0 && p.out_sizes[d] >= 0, "sizes must not be negative");
    require(transformed[d] || p.in_sizes[d] == p.out_sizes[d], "sizes may differ only along transformed dimensions");
  }
}

// Drops dimensions of size 1, puts the smallest output stride innermost and merges what is one run in memory.
void collapse(std::vector<BatchDim>& batch) {
  batch.erase(std::remove_if(batch.begin(), batch.end(), [](const BatchDim& d) { return d.size == 1; }), batch.end());
  std::stable_sort(batch.begin(), batch.end(),
                   [](const BatchDim& a, const BatchDim& b) { return a.out_stride > b.out_stride; });
  std::vector<BatchDim> merged;
  for (const BatchDim& inner : batch) {
    if (!merged.empty() && merged.back().in_stride == inner.in_stride * inner.size &&
        merged.back().out_stride == inner.out_stride * inner.size) {
      merged.back() = {merged.back().size * inner.size, inner.in_stride, inner.out_stride};
    } else {
      merged.push_back(inner);
    }
  }
  batch = merged;
}

namespace {

int vector_bytes() {
  switch (isa()) {
    case Isa::avx512: return 64;
    case Isa::avx2: return 32;
    default: return 16;
  }
}

}  // namespace

Plan plan(const Problem& problem) {
  check(problem);
  Plan plan;
  const std::size_t ndim = problem.in_sizes.size();
  const Dtype compute = problem.dtype == Dtype::float64 ? Dtype::float64 : Dtype::float32;
  const std::int64_t element = compute == Dtype::float64 ? 8 : 4;

  // What each dimension holds before, and after, its own pass.
  std::vector<std::int64_t> before = problem.in_sizes;
  bool out_is_empty = false, out_can_hold_intermediates = problem.dtype == compute;
  std::vector<std::int64_t> extents = problem.out_sizes;
  for (std::size_t i = 0; i < problem.dims.size(); ++i) {
    const auto d = static_cast<std::size_t>(problem.dims[i]);
    before[d] = std::min(problem.in_sizes[d], problem.lengths[i]);
    if (before[d] > extents[d]) {
      extents[d] = before[d];
      out_can_hold_intermediates = false;
    }
  }
  for (const std::int64_t size : problem.out_sizes) out_is_empty |= size == 0;
  if (out_is_empty) return plan;

  std::vector<std::int64_t> work_strides(ndim);
  std::int64_t work_elements = 1;
  for (std::size_t d = ndim; d-- > 0;) {
    work_strides[d] = work_elements;
    work_elements *= extents[d];
  }
  const Buffer middle = out_can_hold_intermediates ? Buffer::out : Buffer::work;
  if (middle == Buffer::work && problem.dims.size() > 1) {
    plan.work_bytes = align(static_cast<std::size_t>(work_elements * element));
  }
  const auto strides = [&](Buffer b) -> const std::vector<std::int64_t>& {
    return b == Buffer::in ? problem.in_strides : b == Buffer::out ? problem.out_strides : work_strides;
  };

  std::vector<std::int64_t> now = before;
  for (std::size_t i = 0; i < problem.dims.size(); ++i) {
    const auto d = static_cast<std::size_t>(problem.dims[i]);
    const std::int64_t n = problem.lengths[i];
    Pass pass;
    const auto known =
        std::find_if(plan.rows.begin(), plan.rows.end(), [&](const Row& candidate) { return candidate.n == n; });
    pass.row = static_cast<int>(known - plan.rows.begin());
    if (known == plan.rows.end()) plan.rows.push_back(plan_row(problem, n));
    const Row& row = plan.rows[static_cast<std::size_t>(pass.row)];
    const bool first = i == 0, last = i + 1 == problem.dims.size();
    pass.from = first ? Buffer::in : middle;
    pass.to = last ? Buffer::out : middle;
    pass.from_dtype = first ? problem.dtype : compute;
    pass.to_dtype = last ? problem.dtype : compute;
    pass.in_stride = strides(pass.from)[d];
    pass.out_stride = strides(pass.to)[d];
    pass.filled = before[d];
    pass.out_size = problem.out_sizes[d];
    pass.in_end = std::pow(0.5, 0.5 * problem.in_ends);
    pass.out_end = std::pow(0.5, 0.5 * problem.out_ends);
    pass.rows = 1;
    for (std::size_t e = 0; e < ndim; ++e) {
      if (e == d) continue;
      pass.batch.push_back({now[e], strides(pass.from)[e], strides(pass.to)[e]});
      pass.rows *= now[e];
    }
    now[d] = problem.out_sizes[d];
    collapse(pass.batch);

    const std::int64_t lanes = vector_bytes() / element;
    pass.fewest_lanes = static_cast<int>((lanes + kMinLaneFraction - 1) / kMinLaneFraction);
    const bool side_by_side =
        pass.rows >= pass.fewest_lanes && (row.scratch + row.spare) * vector_bytes() <= kVectorScratchBytes;
    pass.lanes = side_by_side ? static_cast<int>(lanes) : 1;
    pass.groups = (pass.rows + pass.lanes - 1) / pass.lanes;
    const std::int64_t worth =
        std::max<std::int64_t>(1, pass.groups * pass.lanes / std::max<std::int64_t>(1, kElementsPerSlot / n));
    pass.slots = std::min<std::int64_t>({problem.threads, std::max<std::int64_t>(1, pass.groups), worth});
    pass.scratch_bytes =
        align(static_cast<std::size_t>((row.scratch * pass.lanes + row.spare * lanes) * element + 6 * kArraySkew));
    plan.scratch_bytes = std::max(plan.scratch_bytes, pass.scratch_bytes * static_cast<std::size_t>(pass.slots));
    const std::int64_t read_bytes = pass.filled * bytes_of(pass.from_dtype);
    const std::int64_t written_bytes = pass.out_size * bytes_of(pass.to_dtype);
    if (side_by_side && pass.rows * (read_bytes + written_bytes) >= kBeyondCachesBytes) {
      if (pass.in_stride == 1 && read_bytes <= kFetchedRowBytes) {
        const std::int64_t columns = columns_of(row), lines = pass.lanes * ((read_bytes + kLineBytes - 1) / kLineBytes);
        pass.lines_ahead = (lines + columns - 1) / columns;
      }
      if (pass.out_stride == 1) pass.streamed_lines = written_bytes < kScatteredRowBytes ? 1 : kStreamedLines;
    }
    plan.passes.push_back(pass);
  }
  return plan;
}

std::size_t workspace_bytes(const Plan& plan) {
  const std::size_t bytes = plan.work_bytes + plan.scratch_bytes;
  return bytes == 0 ? 0 : bytes + kAlign;  // the workspace itself may lie anywhere
}

}  // namespace freqrank::dct
