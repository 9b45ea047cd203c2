#pragma once
// Shared memory of the Cholesky and triangular kernels. Known to plans and kernels.

namespace freqrank::whitening::device {

#if defined(__CUDACC__)
#define FREQRANK_LAYOUT __host__ __device__ constexpr
#else
#define FREQRANK_LAYOUT constexpr
#endif

// Elements from one row of a tile to the next: 8 rows of 4 columns (T double: 4 of 4) fall on different banks.
template <class T>
FREQRANK_LAYOUT int tile_pitch(int columns) {
  constexpr int banks = 128 / static_cast<int>(sizeof(T));
  return (columns - 4 + banks - 1) / banks * banks + 4;
}

FREQRANK_LAYOUT int triangle_padded(int n) { return (n + 15) / 16 * 16; }
template <class T>
FREQRANK_LAYOUT int triangle_pitch(int n) {
  return tile_pitch<T>(triangle_padded(n));
}
// With the inverses of the diagonal.
template <class T>
FREQRANK_LAYOUT int triangle_bytes(int n) {
  return triangle_padded(n) * (triangle_pitch<T>(n) + 1) * static_cast<int>(sizeof(T));
}

// Matrices of at most `columns` columns, of which a warp has 32 at a time.
constexpr int warp_kernel_threads = 128;
FREQRANK_LAYOUT int warp_pitch(int columns) { return columns + 1; }
// `solve`: with as much for the right-hand sides.
FREQRANK_LAYOUT int warp_bytes(int columns, int element, bool solve = false) {
  return (solve ? 2 : 1) * warp_kernel_threads * warp_pitch(columns) * element;
}

// A whole matrix, beside it what its block's warps sum up and the order of the minor that failed, and `width` columns
// of the right-hand sides.
constexpr int block_warps = 8;
template <class T>
FREQRANK_LAYOUT int block_bytes(int n, int width = 0) {
  const int sides = width > 0 ? triangle_padded(n) * tile_pitch<T>(width) * static_cast<int>(sizeof(T)) : 0;
  return triangle_bytes<T>(n) + 8 * block_warps + 16 + sides;
}

// A triangle that is factored in place.
template <class T>
FREQRANK_LAYOUT int corner_bytes(int n) {
  return triangle_bytes<T>(n) + 16;
}

// A solve: the triangle, and `solve_columns` columns of the right-hand sides.
constexpr int solve_columns = 64;
template <class T>
FREQRANK_LAYOUT int solve_bytes(int n) {
  return triangle_bytes<T>(n) + triangle_padded(n) * tile_pitch<T>(solve_columns) * static_cast<int>(sizeof(T));
}

// An update: a square tile of the result, and of each factor two slices of the inner dimension, one arriving while the
// other is multiplied. The pitch spreads a fragment's 4 rows of 8 elements (T double: half of it) over the banks.
constexpr int update_tile = 128;
template <class T>
FREQRANK_LAYOUT int update_slice() {
  return 128 / static_cast<int>(sizeof(T));
}
template <class T>
FREQRANK_LAYOUT int update_pitch() {
  return update_tile + 32 / static_cast<int>(sizeof(T));
}
template <class T>
FREQRANK_LAYOUT int update_bytes() {
  return 4 * update_slice<T>() * update_pitch<T>() * static_cast<int>(sizeof(T));
}

}  // namespace freqrank::whitening::device
