#pragma once
// Which matrices of a batch a launch still has to work on.

#include "simt/simt.h"

namespace freqrank::whitening::device {

// How matrices stand, a word each: 0 while all is well, the order of the first leading minor that is not positive
// definite, negated if its pivot is NaN, which no damping cures. Steps have words of their own, for a step's are
// written by the launch that updates what it will work on, of which other blocks still read those of the step before. A
// level works on what failed, and not so, at the level before; to others it hands on what that level said.
struct CholeskyProgress {
  simt::global<const int> now;     // [count], of this step; null: all matrices, always
  simt::global<const int> before;  // [count], of the last step of the level before; null at the first level

  SIMT_DEVICE bool begins(simt::Index matrix) const { return !before || before.load(matrix) > 0; }
  SIMT_DEVICE bool works(simt::Index matrix) const { return !now || (now.load(matrix) == 0 && begins(matrix)); }
};

}  // namespace freqrank::whitening::device
