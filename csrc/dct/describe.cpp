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
    const Fft& fft = row.fft;
    text += fft.bluestein() ? "Bluestein (a large prime factor)" : "mixed radix (no large prime factor)";
    text += std::string(": type ") + roman[row.type - 1] + " of length " + std::to_string(row.n) + ", " +
            std::to_string(pass.rows) + " rows\n  FFT of length " + std::to_string(fft.n);
    if (fft.bluestein()) text += " by two of length " + std::to_string(fft.inner);
    if (fft.stages > 0) text += ", radices";
    for (int i = 0; i < fft.stages; ++i) text += " " + std::to_string(fft.radix[i]);
    text += "\n  " + std::to_string(pass.lanes) + " rows side by side in a vector, in " + std::to_string(pass.slots) +
            " parts\n";
  }
  text += "workspace " + std::to_string(workspace_bytes(plan)) + " bytes\n";
  return text;
}

}  // namespace freqrank::dct
