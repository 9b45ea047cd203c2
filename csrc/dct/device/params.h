#pragma once
// What the parameters of the DCT kernels are made of.

#include <type_traits>

#include "dct/arithmetic.h"
#include "dct/codelets.h"
#include "dct/device.h"
#include "simt/simt.h"

namespace freqrank::dct::device {

using simt::Index;

// Where one step reads and writes; `tables` is the start of all tables of the plan.
struct StepPointers {
  const void* in;
  void* out;
  const void* tables;
  void* scratch;
};

// Quotients of 0 <= a < 2^20 by a number that the host knows.
class Divider {
 public:
  Divider() = default;
  explicit Divider(Index by) : by_(static_cast<std::uint32_t>(by)), multiplier_((kOne + by_ - 1) / by_) {}
  SIMT_DEVICE int quotient(int a) const {
    return static_cast<int>((static_cast<std::uint64_t>(a) * multiplier_) >> 40);
  }
  SIMT_DEVICE int divisor() const { return static_cast<int>(by_); }

 private:
  static constexpr std::uint64_t kOne = std::uint64_t{1} << 40;
  std::uint32_t by_ = 1;
  std::uint64_t multiplier_ = kOne;  // up to 2^40: exact, for the error a by / 2^40 stays below 1 / by
};

// Where the rows of a step lie in memory. Dimensions innermost first.
struct Batch {
  // A tensor with more dimensions that do not merge would have more than 2^40 rows; plan_device checks.
  static constexpr int max_dims = 40;
  Index rows;
  int dims;
  Index size[max_dims], in_stride[max_dims], out_stride[max_dims];
};

inline Batch batch_of(const Step& step) {
  Batch b{};
  b.rows = step.rows;
  b.dims = static_cast<int>(step.batch.size());
  for (int d = 0; d < b.dims; ++d) {
    const BatchDim& dim = step.batch[static_cast<std::size_t>(b.dims - 1 - d)];
    b.size[d] = dim.size;
    b.in_stride[d] = dim.in_stride;
    b.out_stride[d] = dim.out_stride;
  }
  return b;
}

struct Offsets {
  Index in, out;
};

// The first element of a row, from the tensors' base pointers.
SIMT_DEVICE Offsets offsets_of(const Batch& batch, Index row) {
  Offsets at{0, 0};
  for (int d = 0; d < batch.dims; ++d) {
    Index i = row;
    if (d + 1 < batch.dims) {
      row = i / batch.size[d];
      i -= row * batch.size[d];
    }
    at.in += i * batch.in_stride[d];
    at.out += i * batch.out_stride[d];
  }
  return at;
}

// The input and output of a step, bounded by what it may touch.
template <class Queue>
simt::const_global_bytes input_of(const Step& step, const StepPointers& pointers, const Queue& queue) {
  const Extent e = in_extent(step);
  const Index size = bytes_of(step.from_dtype);
  return queue.view_bytes(pointers.in, e.begin * size, e.end * size);
}

template <class Queue>
simt::global_bytes output_of(const Step& step, const StepPointers& pointers, const Queue& queue) {
  const Extent e = out_extent(step);
  const Index size = bytes_of(step.to_dtype);
  return queue.view_bytes(pointers.out, e.begin * size, e.end * size);
}

// Calls f with a value of the element type. `wide` steps hold double, others the rest.
template <class T, class F>
SIMT_DEVICE void with_dtype(Dtype dtype, const F& f) {
  if constexpr (sizeof(T) == 8) {
    f(double{});
  } else if (dtype == Dtype::float32) {
    f(float{});
  } else if (dtype == Dtype::float16) {
    f(float16{});
  } else {
    f(bfloat16{});
  }
}

}  // namespace freqrank::dct::device
