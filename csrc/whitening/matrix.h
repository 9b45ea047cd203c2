#pragma once
// How this family is told where a batch of matrices lies.

#include <cstdint>
#include <vector>

namespace freqrank::whitening {

enum class Dtype { float16, bfloat16, float32, float64 };

static constexpr std::int64_t bytes_of(Dtype dtype) {
  return dtype == Dtype::float64 ? 8 : dtype == Dtype::float32 ? 4 : 2;
}

// A batch of matrices anywhere in memory. Strides count elements; any of them may be zero or, for input, negative.
// `batch_strides` has one entry for each entry of the plan's batch sizes.
struct MatrixBatch {
  void* data = nullptr;
  Dtype dtype = Dtype::float64;
  std::int64_t row_stride = 0, column_stride = 0;
  const std::int64_t* batch_strides = nullptr;
};

struct BatchSizes {
  std::vector<std::int64_t> sizes;

  std::int64_t count() const {
    std::int64_t product = 1;
    for (const auto size : sizes) product *= size;
    return product;
  }

  // Elements from the first matrix to matrix `index`, the last batch dimension running fastest.
  std::int64_t offset(std::int64_t index, const std::int64_t* strides) const {
    std::int64_t elements = 0;
    for (auto d = sizes.size(); d-- > 0; index /= sizes[d]) elements += index % sizes[d] * strides[d];
    return elements;
  }
};

constexpr std::int64_t kNoRightSides = -1;  // a factorisation that solves nothing

// static: this header is included where an instruction set is compiled for, which must not export functions
static constexpr std::int64_t round_up(std::int64_t x, std::int64_t to) { return (x + to - 1) / to * to; }
static constexpr std::int64_t ceil_div(std::int64_t x, std::int64_t by) { return (x + by - 1) / by; }

}  // namespace freqrank::whitening
