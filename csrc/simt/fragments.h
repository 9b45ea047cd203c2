#pragma once
// Matrix fragments: which lane holds which element of the operands of a tensor-core product (PTX ISA, mma.sync). The
// product D = A B + C of one warp is named by the type of A's and B's elements:
//   bfloat16, float16   m16n8k16, float accumulator      tf32   m16n8k8, float
//   double              m8n8k4, double                   int8   m16n8k32, int32
// A is rows x depth, B depth x columns, both from one lane's view a list of `count` elements.

namespace freqrank::simt {

// A float of which a product reads 1 + 8 + 10 bits; to_tf32 rounds to them, ties away from zero.
struct tf32 {
  std::uint32_t bits;
};

enum class Role { a, b, accumulator };

template <class E>
struct MmaShape {  // all but double: operands in 32-bit registers, each `packed` elements along the depth
  static_assert(sizeof(E) <= 4);
  static constexpr int packed = 4 / static_cast<int>(sizeof(E));
  static constexpr int m = 16, n = 8, k = 8 * packed;
  using Accumulator = float;
};
template <>
struct MmaShape<std::int8_t> {
  static constexpr int packed = 4;
  static constexpr int m = 16, n = 8, k = 32;
  using Accumulator = std::int32_t;
};
template <>
struct MmaShape<double> {
  static constexpr int packed = 1;
  static constexpr int m = 8, n = 8, k = 4;
  using Accumulator = double;
};

template <class E, Role R>
struct Layout;

template <class E>
struct Layout<E, Role::a> {
  using Shape = MmaShape<E>;
  using Element = E;
  static constexpr int rows = Shape::m, cols = Shape::k, count = rows * cols / 32;
  SIMT_BOTH static constexpr int row(int lane, int i) { return lane / 4 + i / Shape::packed % 2 * 8; }
  SIMT_BOTH static constexpr int col(int lane, int i) {
    return lane % 4 * Shape::packed + i % Shape::packed + i / (2 * Shape::packed) * 4 * Shape::packed;
  }
};
template <class E>
struct Layout<E, Role::b> {
  using Shape = MmaShape<E>;
  using Element = E;
  static constexpr int rows = Shape::k, cols = Shape::n, count = rows * cols / 32;
  SIMT_BOTH static constexpr int row(int lane, int i) {
    return lane % 4 * Shape::packed + i % Shape::packed + i / Shape::packed * 4 * Shape::packed;
  }
  SIMT_BOTH static constexpr int col(int lane, int) { return lane / 4; }
};
template <class E>
struct Layout<E, Role::accumulator> {
  using Shape = MmaShape<E>;
  using Element = typename Shape::Accumulator;
  static constexpr int rows = Shape::m, cols = Shape::n, count = rows * cols / 32;
  SIMT_BOTH static constexpr int row(int lane, int i) { return lane / 4 + i / 2 * 8; }
  SIMT_BOTH static constexpr int col(int lane, int i) { return lane % 4 * 2 + i % 2; }
};

}  // namespace freqrank::simt
