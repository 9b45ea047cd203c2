// CPU adapter of the dct family: check, allocate through torch, run.
#include "dct/dct.h"

#include <list>
#include <memory>
#include <mutex>
#include <new>
#include <optional>
#include <vector>

#include "torch/adapter.h"

namespace freqrank::torch_adapter {

namespace {

// Twiddle tables of the row transforms used last: making one costs more than using it on a few rows. Bounded; safe to
// use from any thread; a table lives on while a call uses it.
class TableCache {
 public:
  using Table = std::shared_ptr<const std::vector<double>>;

  Table get(const dct::Row& row) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      for (auto entry = entries_.begin(); entry != entries_.end(); ++entry) {
        if (entry->type == row.type && entry->norm == row.norm && entry->wide == row.wide && entry->n == row.n) {
          entries_.splice(entries_.begin(), entries_, entry);
          return entries_.front().table;
        }
      }
    }
    auto table = std::make_shared<std::vector<double>>((row.table_bytes() + 7) / 8);  // doubles: aligned for either
    dct::fill_table(row, table->data());
    if (row.table_bytes() > kMaxBytes / 2) return table;
    std::lock_guard<std::mutex> lock(mutex_);
    entries_.push_front({row.type, row.norm, row.wide, row.n, table});
    bytes_ += table->size() * 8;
    while (bytes_ > kMaxBytes || entries_.size() > kMaxEntries) {
      bytes_ -= entries_.back().table->size() * 8;
      entries_.pop_back();
    }
    return table;
  }

 private:
  static constexpr std::size_t kMaxBytes = std::size_t{64} << 20, kMaxEntries = 64;
  struct Entry {
    int type, norm;
    bool wide;
    std::int64_t n;
    Table table;
  };
  std::mutex mutex_;
  std::list<Entry> entries_;  // the most recent first
  std::size_t bytes_ = 0;
};

TableCache& table_cache() {
  static TableCache cache;
  return cache;
}

dct::Dtype dct_dtype(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Half: return dct::Dtype::float16;
    case ScalarType::BFloat16: return dct::Dtype::bfloat16;
    case ScalarType::Float: return dct::Dtype::float32;
    case ScalarType::Double: return dct::Dtype::float64;
    default: STD_TORCH_CHECK(false, "freqrank::dct: x must have dtype float16, bfloat16, float32 or float64");
  }
}

Tensor dct_cpu(const Tensor& x, std::vector<std::int64_t> dims, std::vector<std::int64_t> lengths,
               std::vector<std::int64_t> sizes, std::int64_t type, std::int64_t norm, std::int64_t in_ends,
               std::int64_t out_ends) {
  dct::Problem problem;
  problem.dtype = dct_dtype(x.scalar_type());
  problem.type = static_cast<int>(type);
  problem.norm = static_cast<int>(norm);
  problem.in_ends = static_cast<int>(in_ends);
  problem.out_ends = static_cast<int>(out_ends);
  for (std::int64_t d = 0; d < x.dim(); ++d) {
    problem.in_sizes.push_back(x.size(d));
    problem.in_strides.push_back(x.stride(d));
  }
  problem.out_sizes = problem.in_sizes;
  STD_TORCH_CHECK(dims.size() == sizes.size(), "freqrank::dct: one size a transformed dimension");
  for (std::size_t i = 0; i < dims.size(); ++i) {
    STD_TORCH_CHECK(dims[i] >= 0 && dims[i] < x.dim(), "freqrank::dct: dims out of range");
    problem.dims.push_back(static_cast<int>(dims[i]));
    problem.out_sizes[static_cast<std::size_t>(dims[i])] = sizes[i];
  }
  problem.lengths = lengths;
  problem.threads = static_cast<int>(torch::stable::get_num_threads());
  Tensor out = torch::stable::new_empty(x, problem.out_sizes);
  for (std::int64_t d = 0; d < out.dim(); ++d) problem.out_strides.push_back(out.stride(d));

  const dct::Plan plan = dct::plan(problem);
  std::vector<TableCache::Table> tables;
  std::vector<const void*> pointers;
  for (const dct::Row& row : plan.rows) {
    tables.push_back(table_cache().get(row));
    pointers.push_back(tables.back()->data());
  }
  const Tensor workspace = torch::stable::new_empty(x, {static_cast<std::int64_t>(dct::workspace_bytes(plan))},
                                                    std::make_optional(ScalarType::Byte));
  dct::run(plan, {x.const_data_ptr(), out.mutable_data_ptr(), pointers.data()}, workspace.mutable_data_ptr(),
           torch_parallel_for());
  return out;
}

}  // namespace

}  // namespace freqrank::torch_adapter

STABLE_TORCH_LIBRARY_IMPL(freqrank, CPU, m) { m.impl("dct", TORCH_BOX(&freqrank::torch_adapter::dct_cpu)); }
