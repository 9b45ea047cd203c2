#pragma once
// The DCT on a GPU: what dct.h describes, as a list of kernel launches. Host code without CUDA: plans can be made, read
// and tested anywhere; dct/device/launch.h runs them, on CUDA or under the host executor.
//
//   const DevicePlan p = plan_device(problem, limits);        // the only place that chooses algorithms and tile
//   numbers run_device(p, {in, out}, workspace, queue);               // workspace_bytes(p), aligned to kDeviceAlign
//
// A workspace holds, in this order: the tables of all steps, the intermediate tensor of a transform along several
// dimensions, the scratch of steps that need one.

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "common/gpu_limits.h"
#include "common/inline.h"
#include "dct/dct.h"

namespace freqrank::dct {

constexpr std::size_t kDeviceAlign = 256;

// What a plan must know of the GPU. Tests shrink the limits to reach every branch with small sizes.
struct DeviceLimits : GpuLimits {
  DeviceLimits() = default;
  DeviceLimits(const GpuLimits& gpu) : GpuLimits(gpu) {}

  std::int64_t largest_power_of_two = 8192;  // lengths up to this one go through registers and shuffles
  int largest_tile = 128;                    // sides up to this one are transformed two dimensions at once
};

enum class Algorithm {
  tables,        // fills `Step::tables`
  power_of_two,  // registers and shuffles
  mixed_radix,   // one block's shared memory
  bluestein,     // the same, twice, around a product with a chirp's spectrum
  multi_pass,    // lengths beyond one block's shared memory
  tile_2d,       // the last two dimensions at once in shared memory
};

const char* name(Algorithm algorithm);

// What the block FFT is compiled for: complex numbers that a thread holds in a stage, threads of a block at most.
constexpr int kBlockPerThread = 16;
constexpr int block_threads_limit(bool wide) { return wide ? 512 : 1024; }
constexpr int kBlockStages = 12;
constexpr int kTile2dThreads = 256;  // of a block that transforms tiles
constexpr int kBlockRadices[] = {16, 15, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2};
// Its shared memory: rows of complex numbers, where `padded` one is left free after every 128 bytes; behind them, where
// each row starts in global memory.
constexpr int kBlockRowBytes = 16, kBlockRows = 256;
FREQRANK_INLINE constexpr int block_pad_shift(bool padded, bool wide) { return !padded ? 31 : wide ? 3 : 4; }

// Bluestein's convolution in a block: radices of the first stage of its FFT, which is the last one of the FFT back; of
// the last one, which is the first one back; of the stages between.
constexpr int kConvolutionFirst[] = {16, 8}, kConvolutionLast[] = {16, 8, 4},
              kConvolutionRadices[] = {16, 12, 10, 8, 5};
// Sides of tiles are short: less to compile. The last radix 16 would spill doubles.
FREQRANK_INLINE constexpr int convolution_first_limit(bool tile) { return tile ? 8 : 16; }
FREQRANK_INLINE constexpr int convolution_last_limit(bool tile, bool wide) { return tile || wide ? 8 : 16; }

// The complex FFT of length n of one row: `inner` == n, or Bluestein's convolution of length `inner` >= 2n - 1.
// Stage i splits what is left by radix[i]: Stockham's order, decimation in frequency. In a block, the FFT back from the
// convolution has the radices in reverse.
struct DeviceFft {
  static constexpr int max_stages = 20;
  std::int64_t n = 1, inner = 1;
  // Bluestein's convolution is long enough for this many inputs, the rest being zero, and this many outputs.
  std::int64_t inputs = 1, outputs = 1;
  int stages = 0;
  int radix[max_stages] = {};
  bool padded = false;  // in shared memory, against bank conflicts
  bool bluestein() const { return inner != n; }
};

// A run of complex numbers (real and imaginary part beside each other), float or double as the plan computes.
struct TableRun {
  enum Kind {
    units,     // exp(-2 pi i (first + step k + square k^2) / period), k < count, nothing negative
    spectrum,  // FFT of length count of the wrapped conjugate chirp of length period, over count
  };
  Kind kind = units;
  std::int64_t at = 0, count = 0;  // complex numbers from the start of the workspace's tables
  std::int64_t first = 0, step = 1, square = 0, period = 1;
  std::int64_t inputs = 0, outputs = 0;  // of a spectrum's convolution (DeviceFft)
  // of the workspace's scratch, while the table is made
  std::int64_t scratch_bytes() const { return kind == spectrum ? 16 * (period + count) : 0; }
};

// One transformed dimension of a step.
struct Axis {
  std::int64_t n = 1;  // length of the transform
  std::int64_t in_stride = 0, out_stride = 0;
  std::int64_t filled = 0;         // elements read, the rest up to n is zero
  std::int64_t out_size = 0;       // elements written, those beyond n are zero
  double scale = 1;                // (2L)^(-norm/2)
  double in_end = 1, out_end = 1;  // factors of the first element, in type I of the last one too
  DeviceFft fft;
  // Tables, complex numbers from the start of the workspace's tables; -1: none. With H the FFT's length fft.n:
  //   roots  exp(-2 pi i k / inner), k <= inner / 2, for all stages
  //   twist  types II and III exp(-i pi k / 2n), k <= n / 2 (n odd) or H / 2 (n even)
  //          type I exp(-i pi k / H), k <= H / 2
  //          type IV, n even, exp(-i pi (8k + 1) / 8n), k < H
  //   chirp_in, chirp_out  by which Bluestein's convolution multiplies what comes and goes: exp(-i pi k^2 / H), k < H;
  //          on the side of the spectrum of an odd row of types II and III times its twist, k <= n / 2
  //   spectrum  of the convolution's filter
  std::int64_t roots = -1, twist = -1, chirp_in = -1, chirp_out = -1, spectrum = -1;
  bool even(int type) const { return type != 1 && n % 2 == 0; }  // an FFT of length n / 2 serves
  // Bluestein's convolution takes the row itself and gives the result.
  bool fused(int type) const { return fft.bluestein() && n % 2 == 1 && (type == 2 || type == 3); }
};

constexpr int kLongThreads = 512;  // of a block

// An FFT beyond one block's shared memory (device/passes.h): a pass over the workspace for each factor of its length.
struct MultiPass {
  static constexpr int max_passes = 8;
  struct Pass {
    DeviceFft fft;            // its length is the factor
    std::int64_t roots = -1;  // table, as Axis::roots
    int column_bits = 0;      // 2^column_bits columns a tile
    int threads = 0, shared_bytes = 0;
  };
  // exp(-2 pi i k / period) as a product of two entries: tables for k < 2^bits and for every 2^bits-th k.
  struct Roots {
    std::int64_t period = 1, low = -1, high = -1;
    int bits = 0;
    std::int64_t low_count() const { return std::int64_t{1} << bits; }
    std::int64_t high_count() const { return ((period - 1) >> bits) + 1; }
  };
  int passes = 0;
  Pass pass[max_passes];
  Roots row, fft;  // before and after the FFT; between its passes
  std::int64_t rows_per_launch = 0;

  std::int64_t length() const {
    std::int64_t product = 1;
    for (int i = 0; i < passes; ++i) product *= pass[i].fft.inner;
    return product;
  }
  // Blocks that pass i takes for one row.
  std::int64_t tiles(int i) const {
    const std::int64_t slots = std::int64_t{1} << pass[i].column_bits;
    const std::int64_t columns = length() / pass[i].fft.inner;
    if (i == 0 || i + 1 == passes) return columns / 2 / (slots / 2) + 1;  // columns 0 .. columns / 2, with their images
    std::int64_t before = 1;
    for (int j = 0; j < i; ++j) before *= pass[j].fft.inner;
    return before * ((columns / before + slots - 1) / slots);
  }
};

// How a tile of rows moves between global and shared memory.
enum class Tiling {
  flat,        // rows follow each other without a gap: one run of 16-byte vectors
  by_element,  // neighbouring threads take neighbouring elements of a row
  by_row,      // neighbouring threads take the same element of neighbouring rows
};

// One launch, or for tables and multi_pass a few.
struct Step {
  Algorithm algorithm = Algorithm::mixed_radix;
  int type = 2;
  bool wide = false;  // computed in double
  Axis axis[2];       // tile_2d uses both, [0] the outer one
  Buffer from = Buffer::in, to = Buffer::out;
  Dtype from_dtype = Dtype::float32, to_dtype = Dtype::float32;
  std::vector<BatchDim> batch;  // outermost first; rows (of tile_2d: tiles) count through it in C order
  std::int64_t rows = 0;

  // tuning, by device_plan.cpp alone
  int threads = 0, rows_per_block = 1;
  std::int64_t blocks = 0;
  int shared_bytes = 0;
  Tiling load = Tiling::by_element, store = Tiling::by_element;

  MultiPass multi_pass;

  // Of tile_2d: its rows, axis[1], and its columns, axis[0], each as a step of their own whose rows count through the
  // tiles; where the tiles are in shared memory, and real numbers from one of their rows to the next.
  std::vector<Step> sides;
  int tile_at = 0, tile_pitch = 0;

  std::vector<TableRun> tables;                  // of the step `tables`
  std::size_t scratch_bytes = 0;                 // of multi_pass, in the workspace at DevicePlan::scratch_at
  std::int64_t read_bytes = 0, write_bytes = 0;  // of the tensors and of scratch: what the step moves, tables apart
  std::int64_t table_bytes = 0;                  // that its tables take
  const char* why = "";                          // this algorithm
};

struct DevicePlan {
  DeviceLimits limits;
  std::vector<Step> steps;  // none if the output is empty
  std::size_t tables_bytes = 0, work_at = 0, work_bytes = 0, scratch_at = 0, scratch_bytes = 0;
};

// Throws std::invalid_argument; std::length_error for lengths that no algorithm takes, naming the largest.
DevicePlan plan_device(const Problem& problem, const DeviceLimits& limits);
std::size_t workspace_bytes(const DevicePlan& plan);

// For people: a line a step, which algorithm and why, and its numbers.
std::string describe(const DevicePlan& plan);

struct DevicePointers {
  const void* in;
  void* out;
};

// The first and one past the last element, relative to the base pointer, that a step touches in `from` or `to`.
struct Extent {
  std::int64_t begin, end;
};
Extent in_extent(const Step& step);
Extent out_extent(const Step& step);

}  // namespace freqrank::dct
