#pragma once
// What plans must know of a GPU. Needs no CUDA.

namespace freqrank {

struct GpuLimits {
  int sms = 132;
  int shared_bytes = 232448;         // that one block may use
  int shared_bytes_per_sm = 233472;  // of all its blocks, 1024 bytes of them for the system in each block
  int threads_per_sm = 2048;
  int float_per_double = 2;  // operations in single precision that take as long as one in double
};

}  // namespace freqrank
