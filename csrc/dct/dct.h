#pragma once
// Discrete cosine transforms of types I to IV along any dimensions of a strided tensor, on the CPU.
//
//   const Plan p = plan(problem);                     // host code, the only place that chooses algorithms
//   fill_table(p.rows[i], tables[i]);                 // for each row transform, p.rows[i].table_bytes(); reusable
//   run(p, {in, out, tables}, workspace, parallel_for) // workspace_bytes(p); allocates nothing
//
// The transform of one row of length N, with L = N (types II to IV) or N - 1 (type I), is
//   y = (2L)^(-norm/2) Out K In x,
// K the matrix 2 cos(angle) of the type:
//   I pi k n / (N - 1)   II pi k (2n + 1) / 2N   III pi (2k + 1) n / 2N   IV pi (2k + 1)(2n + 1) / 4N
// and In (types I and III) and Out (types I and II) scale the ends, the first element and in type I the last one too,
// by 2^(-ends/2). SciPy's transforms, their orthogonalised forms and all their transposes are of this kind:
//   type I    plain in 2 out 0, orthogonalised 1 and 1, transpose of the plain one in 0 out 2
//   type II   plain out 0, orthogonalised 1, transpose of plain type III 2;   type III the same with `in`.

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "common/parallel.h"

namespace freqrank::dct {

enum class Dtype { float16, bfloat16, float32, float64 };
constexpr int bytes_of(Dtype dtype) { return dtype == Dtype::float64 ? 8 : dtype == Dtype::float32 ? 4 : 2; }

// The longest transform of one row, on any device; tables have 32-bit indices.
constexpr std::int64_t kLongestRow = std::int64_t{1} << 30;

struct Problem {
  Dtype dtype = Dtype::float32;
  int type = 2;      // 1 to 4
  int norm = 0;      // 0, 1, 2
  int in_ends = 0;   // 0, 1, 2; 0 for types II and IV
  int out_ends = 0;  // 0, 1, 2; 0 for types III and IV
  // Sizes and strides (in elements) of input and output; they differ only in the size of transformed dimensions. Input
  // is cropped or zero-padded to the transform's length, and the result to the output's size.
  std::vector<std::int64_t> in_sizes, in_strides, out_sizes, out_strides;
  std::vector<int> dims;              // the transformed dimensions, distinct, not negative, at least one
  std::vector<std::int64_t> lengths;  // of the transform along each of them
  int threads = 1;                    // how many parts run() may work on at once; results do not depend on it
};

// Stages of a mixed-radix FFT of length n. Offsets count elements from the start of the row's table.
struct Stages {
  static constexpr int max = 64;
  std::int64_t n = 1;
  int count = 0;
  std::int64_t radix[max] = {}, twiddles[max] = {};
};

// Rader's convolution for a prime factor, itself by two FFTs of length stages.n, which has small factors only: prime -
// 1 or enough for zeros between. For real elements half of that does, two of them in a complex number.
struct Convolution {
  std::int64_t prime = 0;
  bool real = false;
  Stages stages;
  std::int64_t gather = 0, scatter = 0, spectrum = 0;
};

struct Fft {
  Stages stages;
  std::vector<Convolution> convolutions;
  int convolution[Stages::max] = {}, real_convolution[Stages::max] = {};  // of each stage, -1 for small radices
};

// Arrays in a row's scratch take multiples of so many elements, and start so many bytes further apart than that:
// lengths that are powers of two would put all of them into the same sets of the caches.
constexpr std::int64_t kArrayElements = 16, kArraySkew = 832;

// The transform of one row.
struct Row {
  int type = 2, norm = 0;
  bool wide = false;  // computed in double
  std::int64_t n = 1;
  double scale = 1;
  bool even = false;  // types II to IV: a complex FFT of length n / 2 serves; otherwise a real one of length n
  Fft fft;
  std::int64_t pre = 0, post = 0, rotation = 0;  // table offsets
  std::int64_t table_elements = 0;
  std::int64_t scratch = 0, spare = 0;  // elements for each row at work; spare those of convolutions
  std::size_t table_bytes() const { return static_cast<std::size_t>(table_elements) * (wide ? 8 : 4); }
};

enum class Buffer { in, work, out };

struct BatchDim {
  std::int64_t size, in_stride, out_stride;
};

constexpr int kStreamedLines = 4;

// One pass over the tensor: the rows along one dimension.
struct Pass {
  int row = 0;  // index into Plan::rows
  Buffer from = Buffer::in, to = Buffer::out;
  Dtype from_dtype = Dtype::float32, to_dtype = Dtype::float32;
  std::int64_t in_stride = 0, out_stride = 0;  // along the transformed dimension
  std::int64_t filled = 0;                     // elements read, the rest up to n is zero
  std::int64_t out_size = 0;                   // elements written, those beyond n are zero
  double in_end = 1, out_end = 1;
  std::vector<BatchDim> batch;  // outermost first
  std::int64_t rows = 0;
  int lanes = 1;         // rows that go through the arithmetic side by side, one in each lane of a vector
  int fewest_lanes = 1;  // a last group of fewer rows goes one by one
  std::int64_t groups = 0;
  std::int64_t slots = 1;         // parts, each with a scratch of its own
  std::size_t scratch_bytes = 0;  // of one slot
  // For tensors beyond the caches, 0 for others:
  std::int64_t lines_ahead = 0;  // cache lines of the next group to fetch for each column of the FFT
  int streamed_lines = 0;        // of a row, 1 or kStreamedLines, to store past the caches at once
};

struct Plan {
  std::vector<Row> rows;  // distinct row transforms
  std::vector<Pass> passes;
  std::size_t work_bytes = 0, scratch_bytes = 0;
};

// What the plans of all devices share.
void check(const Problem& problem);           // throws std::invalid_argument
void collapse(std::vector<BatchDim>& batch);  // fewer dimensions, the smallest output stride innermost

// Throws std::invalid_argument.
Plan plan(const Problem& problem);
std::size_t workspace_bytes(const Plan& plan);
std::string describe(const Plan& plan);  // for people

// Writes row.table_bytes() bytes. A table depends on type, norm, wide and n alone.
void fill_table(const Row& row, void* table);

struct Pointers {
  const void* in;
  void* out;
  const void* const* tables;  // one for each of Plan::rows
};

void run(const Plan& plan, const Pointers& pointers, void* workspace, const ParallelFor& parallel_for);

}  // namespace freqrank::dct
