#pragma once
// Race detection: for every piece of memory, who wrote it last and who has read it since, and when. "When" is two
// numbers: the epoch, which each block barrier and each new block advances, and the warp's own, which warp_barrier
// advances. They order two accesses completely in a program that synchronises by nothing else. Part of executor.cpp.

#include <cstdint>
#include <memory>
#include <unordered_map>
#include <vector>

namespace freqrank::simt {
inline namespace host {

struct Record {
  std::uint32_t write_epoch = 0, read_epoch = 0;  // 0: never
  std::uint32_t write_warp_epoch = 0, read_warp_epoch = 0;
  std::uint16_t write_site = 0, read_site = 0;
  std::uint16_t writer = 0, reader = 0;  // the thread, and flags
};
constexpr std::uint16_t thread_mask = 1023;
// Of a writer.
constexpr std::uint16_t by_atomic = 1 << 10;  // the last write was atomic
constexpr std::uint16_t in_flight = 1 << 11;  // an asynchronous copy that nobody has waited for
constexpr std::uint16_t unordered = 1 << 12;  // several atomics, none before the other
constexpr std::uint16_t many_atomic_blocks = 1 << 13;
// Of a reader: besides the one recorded, in the same epoch (and warp epoch) or, for blocks, in the same launch.
constexpr std::uint16_t many_lanes = 1 << 10, many_warps = 1 << 11, many_blocks = 1 << 12;

// 1 KB of memory in equal pieces: as large as the smallest access so far, so that memory that is only touched by
// 16-byte vectors costs little.
class Page {
 public:
  static constexpr int shift = 10, size = 1 << shift;

  int log2_piece() const { return log2_; }
  Record* records() { return records_.get(); }
  // The records of `bytes` (1, 2, 4, 8 or 16) aligned bytes at `offset`.
  Record* find(int offset, int log2_bytes) {
    if (log2_bytes < log2_) refine(log2_bytes);
    return records_.get() + (offset >> log2_);
  }

 private:
  void refine(int log2) {
    auto finer = std::make_unique<Record[]>(size >> log2);
    if (records_)
      for (int i = 0; i < size >> log2; ++i) finer[i] = records_[(i << log2) >> log2_];
    records_ = std::move(finer);
    log2_ = log2;
  }
  std::unique_ptr<Record[]> records_;
  int log2_ = 99;
};

// The pages of global memory by address.
class Pages {
 public:
  Page& at(std::uintptr_t address) {
    const std::uintptr_t number = address >> Page::shift;
    Entry& entry = recent_[number % recent_size];
    if (entry.number != number) entry = {number, &pages_[number]};
    return *entry.page;
  }
  Page* find(std::uintptr_t address) {
    const auto found = pages_.find(address >> Page::shift);
    return found == pages_.end() ? nullptr : &found->second;
  }
  std::size_t count() const { return pages_.size(); }
  void clear() {
    pages_.clear();
    recent_.assign(recent_size, {});
  }

 private:
  static constexpr std::size_t recent_size = 1024;
  struct Entry {
    std::uintptr_t number = ~std::uintptr_t{0};
    Page* page = nullptr;
  };
  std::unordered_map<std::uintptr_t, Page> pages_;  // its elements do not move
  std::vector<Entry> recent_ = std::vector<Entry>(recent_size);
};

}  // namespace host
}  // namespace freqrank::simt
