#pragma once
// Where a Gram kernel's tiles lie in shared memory. The plan and the kernel both go by it.

#include "whitening/gram_device.h"

namespace freqrank::whitening::device {

struct GramLayout {
  static constexpr int stages = 4, warps = 4;
  static constexpr int scratch_bytes = 8 * 32 * 8;  // of a warp: eight rows of its results

  int stage_tokens;  // of X and Y that are brought at a time
  int pitch;         // elements from one token to the next: X's columns, Y's columns and 32 bytes, so that the four
                     // tokens that a warp reads at a time lie in different banks
  int stage_bytes;
  int weights_at, scratch_at, shared_bytes;
};

constexpr GramLayout gram_layout(const GramShape& shape, int element_bytes) {
  GramLayout l{};
  l.stage_tokens = 64 / element_bytes;
  l.pitch = shape.rows + shape.columns + 32 / element_bytes;
  l.stage_bytes = l.stage_tokens * l.pitch * element_bytes;
  l.weights_at = GramLayout::stages * l.stage_bytes;
  l.scratch_at = l.weights_at + GramLayout::stages * l.stage_tokens * 8;
  l.shared_bytes = l.scratch_at + GramLayout::warps * GramLayout::scratch_bytes;
  return l;
}

// Of the kernel that sums integers: its threads; seven digits of 96 columns, 48 bytes each, masks and exponents, roots
// of weights, and where the block is.
constexpr int kGramIntegerThreads = 256;
constexpr int kGramIntegerSharedBytes = 7 * 96 * 48 + 24 * 4 + 96 * 4 + 2 * 32 * 8 + 4 * 8;

}  // namespace freqrank::whitening::device
