#pragma once
// What the triangular kernels are given.

#include "whitening/device/cholesky_progress.h"
#include "whitening/device/cholesky_views.h"

namespace freqrank::whitening::device {

template <class T>
struct TriangularSolveParams {
  Matrices<const T> u, b;
  Matrices<T> x;
  Index count, columns;  // X's columns are [first_column, columns)
  int first_row, rows;   // of U, B and X
  Index first_column;
  bool unit_diagonal;
  CholeskyProgress progress;
  Index tiles;  // of the columns
};

template <class T>
struct TriangularUpdateParams {
  Matrices<const T> u, x, from;
  Matrices<T> to;  // `to` becomes `from` minus the product
  Index count;
  int first_row, depth;      // rows of U and X that are multiplied
  Index row, row_end;        // of C; columns of U
  Index column, column_end;  // of C and X
  bool upper;                // row == column: tiles below the diagonal do not exist
  CholeskyProgress progress;
  // For a Cholesky factor: how many of C's first rows and columns are factored as soon as they are updated, and where
  // it is written how that went, and handed on what is known of matrices that this launch leaves. Null for others.
  int next_rows;
  simt::global<int> next_words;
  Index down, across, tiles;  // tiles of C
};

}  // namespace freqrank::whitening::device
