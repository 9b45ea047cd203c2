#include "dct_cases.h"

namespace freqrank::bench {

void add_dct() {
  for (const DctCase& each : dct_cases(1 << 22)) {
    add(each.name("cpu"), [each](benchmark::State& state) {
      const dct::Plan plan = dct::plan(each.problem());
      std::vector<std::vector<double>> tables;  // doubles: aligned for either type
      std::vector<const void*> pointers;
      for (const dct::Row& row : plan.rows) {
        tables.emplace_back((row.table_bytes() + 7) / 8);
        dct::fill_table(row, tables.back().data());
        pointers.push_back(tables.back().data());
      }
      std::vector<char> workspace(dct::workspace_bytes(plan));
      Rotation<float> in(normal(static_cast<std::size_t>(each.rows * each.n)));
      std::vector<float> out(static_cast<std::size_t>(each.rows * each.n));
      measure(state, each.n, each.bytes(),
              [&] { dct::run(plan, {in.next(), out.data(), pointers.data()}, workspace.data(), parallel_for()); });
    });
  }
}

}  // namespace freqrank::bench
