// The CPU's plan in words.
#include <string>

#include "dct/dct.h"

namespace freqrank::dct {

std::string describe(const Plan& plan) {
  static const char* const roman[] = {"I", "II", "III", "IV"};
  if (plan.passes.empty()) return "nothing to do: the output is empty\n";
  std::string text;
  for (const Pass& pass : plan.passes) {
    const Row& row = plan.rows[static_cast<std::size_t>(pass.row)];
    const Stages& stages = row.fft.stages;
    text += row.fft.convolutions.empty() ? "mixed radix (no large prime factor)" : "Rader (a large prime factor)";
    text += std::string(": type ") + roman[row.type - 1] + " of length " + std::to_string(row.n) + ", " +
            std::to_string(pass.rows) + " rows\n  " + (row.even || row.type == 1 ? "complex" : "real") +
            " FFT of length " + std::to_string(stages.n);
    if (stages.count > 0) text += ", radices";
    for (int i = 0; i < stages.count; ++i) text += " " + std::to_string(stages.radix[i]);
    for (const Convolution& c : row.fft.convolutions) {
      text += "\n  " + std::to_string(c.prime) + (c.real ? " for real" : " for complex") +
              " numbers by two complex FFTs of length " + std::to_string(c.stages.n);
    }
    text += "\n  " + std::to_string(pass.lanes) + " rows side by side in a vector, in " + std::to_string(pass.slots) +
            " parts\n";
  }
  text += "workspace " + std::to_string(workspace_bytes(plan)) + " bytes\n";
  return text;
}

}  // namespace freqrank::dct
