#pragma once
// Which matrices of a batch a launch still has to work on.

#include "simt/simt.h"

namespace freqrank::whitening::device {

// failed[level, matrix] is written by the launches that factor diagonal blocks: 0 while all is well, the order of the
// first leading minor that is not positive definite, negated if its pivot is NaN, which no damping cures. A level works
// on what failed, and not so, at the level before; to others it hands on what that level said.
struct CholeskyProgress {
  simt::global<const int> failed;  // null: all matrices, always
  simt::Index count = 0;
  int level = 0;

  SIMT_DEVICE int before(simt::Index matrix) const { return failed.load((level - 1) * count + matrix); }
  SIMT_DEVICE bool begins(simt::Index matrix) const { return level == 0 || before(matrix) > 0; }
  SIMT_DEVICE bool works(simt::Index matrix) const {
    return !failed || (begins(matrix) && failed.load(level * count + matrix) == 0);
  }
};

}  // namespace freqrank::whitening::device
