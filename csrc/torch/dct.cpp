// CPU adapter of the dct family: check, allocate through torch, run.
#include "dct/dct.h"

#include <list>
#include <memory>
#include <mutex>
#include <new>
#include <optional>
#include <vector>

#include "dct/device.h"
#include "torch/dct_problem.h"

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
  static constexpr std::size_t kMaxBytes = std::size_t{256} << 20, kMaxEntries = 64;
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

// torch::stable::new_empty goes through the dispatcher, which costs more than a short transform.
Tensor empty_cpu(const Sizes& sizes, const Sizes& strides, const Tensor& like) {
  std::int32_t dtype = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
  AtenTensorHandle out = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<std::int64_t>(sizes.size()), sizes.data(), strides.data(),
                                                  dtype, aoti_torch_device_type_cpu(), 0, &out));
  return Tensor(out);
}

Tensor dct_cpu(const Tensor& x, Sizes dims, std::optional<Sizes> lengths, std::optional<Sizes> sizes, std::int64_t type,
               std::int64_t norm, std::int64_t in_ends, std::int64_t out_ends) {
  const dct::Problem problem = dct_problem(x, dims, lengths, sizes, type, norm, in_ends, out_ends);
  Tensor out = empty_cpu(problem.out_sizes, problem.out_strides, x);
  const dct::Plan plan = dct::plan(problem);
  std::vector<TableCache::Table> tables;
  std::vector<const void*> pointers;
  for (const dct::Row& row : plan.rows) {
    tables.push_back(table_cache().get(row));
    pointers.push_back(tables.back()->data());
  }
  const std::unique_ptr<char[]> workspace(new char[dct::workspace_bytes(plan)]);  // far cheaper than a tensor
  dct::run(plan, {x.const_data_ptr(), out.mutable_data_ptr(), pointers.data()}, workspace.get(), torch_parallel_for());
  return out;
}

std::string dct_plan(Sizes in_sizes, Sizes in_strides, ScalarType dtype, Sizes dims, std::optional<Sizes> lengths,
                     std::optional<Sizes> sizes, std::int64_t type, std::int64_t norm, std::int64_t in_ends,
                     std::int64_t out_ends, std::string device, std::vector<std::int64_t> limits) {
  const dct::Problem problem =
      dct_problem(in_sizes, in_strides, dtype, dims, lengths, sizes, type, norm, in_ends, out_ends);
  if (device == "cpu") return dct::describe(dct::plan(problem));
  dct::DeviceLimits gpu;
  if (!limits.empty()) {
    STD_TORCH_CHECK(limits.size() == 4, "freqrank::dct_plan: limits are those of dct_cuda_limits");
    gpu.sms = static_cast<int>(limits[0]);
    gpu.shared_bytes = static_cast<int>(limits[1]);
    gpu.shared_bytes_per_sm = static_cast<int>(limits[2]);
    gpu.threads_per_sm = static_cast<int>(limits[3]);
  }
  return dct::describe(dct::plan_device(problem, gpu));
}

}  // namespace

}  // namespace freqrank::torch_adapter

STABLE_TORCH_LIBRARY_IMPL(freqrank, CompositeExplicitAutograd, m) {
  m.impl("dct_plan", TORCH_BOX(&freqrank::torch_adapter::dct_plan));
}

STABLE_TORCH_LIBRARY_IMPL(freqrank, CPU, m) { m.impl("dct", TORCH_BOX(&freqrank::torch_adapter::dct_cpu)); }
