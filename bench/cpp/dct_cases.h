#pragma once
// The DCT's cases, the same on every device: type II, float32, rows.

#include <string>
#include <vector>

#include "bench.h"
#include "dct/dct.h"

namespace freqrank::bench {

struct DctCase {
  std::int64_t rows, n;
  std::int64_t bytes() const { return 2 * rows * n * 4; }
  std::string name(const char* device) const {
    return std::string("dct/") + device + "/type 2 " + std::to_string(rows) + "x" + std::to_string(n) + " float32";
  }
  dct::Problem problem() const {
    dct::Problem problem;
    problem.type = 2;
    problem.norm = 1;
    problem.out_ends = 1;
    problem.in_sizes = problem.out_sizes = {rows, n};
    problem.in_strides = problem.out_strides = {n, 1};
    problem.dims = {1};
    problem.lengths = {n};
    problem.threads = options().threads;
    return problem;
  }
};

inline std::vector<DctCase> dct_cases(std::int64_t elements) {
  std::vector<DctCase> cases;
  const std::vector<std::int64_t> all{8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 100, 1000, 6000, 127, 1009};
  for (const std::int64_t n : options().quick ? std::vector<std::int64_t>{64, 1024, 1000, 1009} : all)
    cases.push_back({elements / n, n});
  return cases;
}

}  // namespace freqrank::bench
