#pragma once
// What the Cholesky kernels have in common: the matrices, and the ladder of damping levels.

#include "whitening/cholesky.h"
#include "whitening/device/cholesky_views.h"

namespace freqrank::whitening::device {

// A factorisation without a ladder has one level, 0.
struct CholeskySource {
  Index count;
  int n;
  AnyMatrices a;                     // its upper triangle is read
  simt::global<const double> scale;  // null, or one for each matrix
  double damping[kDampingLevelCount];
  int levels;

  template <class T>
  SIMT_DEVICE T factor(Index matrix) const {
    return scale ? static_cast<T>(scale.load(matrix)) : T(1);
  }
  // What a level adds to an element of the diagonal, which is `mean` on average.
  template <class T>
  SIMT_DEVICE T damping_of(T x, int level, double mean) const {
    return level == 0 ? T(0) : static_cast<T>(damping[level] * (x != T(0) ? static_cast<double>(x) : mean));
  }
};

template <class T>
struct CholeskyResult {
  simt::global<T> factor;  // [count, n, n]
  simt::global<int> info;
  simt::global<double> damping;  // null without a ladder
  bool spoil;                    // factors that failed become NaN; else they are left as they are
};

// X of A X = B, for each matrix. No columns: nothing is solved.
template <class T>
struct RightHandSides {
  Matrices<const T> b;
  Matrices<T> x;
  Index columns;
  int width;  // that a block has in shared memory at a time
};

// Everything of a call but the launches.
template <class Queue>
CholeskySource source_of(const MatrixBatch& a, const BatchSizes& batch, Index n, const double* scale, bool ladder,
                         const Queue& queue) {
  CholeskySource s{};
  s.count = batch.count();
  s.n = static_cast<int>(n);
  s.a = any_matrices_of(a, batch, n, n, queue);
  if (scale) s.scale = queue.view(scale, 0, s.count);
  s.levels = ladder ? kDampingLevelCount : 1;
  for (int level = 0; level < s.levels; ++level) s.damping[level] = kDampingLevels[level];
  return s;
}

template <class T, class Queue>
RightHandSides<T> right_sides_of(const MatrixBatch& b, const MatrixBatch& x, const BatchSizes& batch, Index n,
                                 Index columns, int width, const Queue& queue) {
  return {matrices_of<const T>(b, batch, n, columns, queue), matrices_of<T>(x, batch, n, columns, queue), columns,
          width};
}

}  // namespace freqrank::whitening::device
