#pragma once
// The host executor as a Device of machine_cases.h.

#include <deque>

#include "machine_cases.h"

namespace freqrank::machine_tests {

class HostDevice {
 public:
  explicit HostDevice(std::uint64_t seed = 0) : executor(seed), queue_(executor) {}

  Queue& queue() { return queue_; }
  template <class T>
  T* put(const std::vector<T>& values) {
    T* const to = make<T>(values.size());
    std::memcpy(to, values.data(), values.size() * sizeof(T));
    return to;
  }
  template <class T>
  T* make(std::size_t count) {
    memory_.emplace_back(count * sizeof(T) + 1);
    sizes_.push_back(count * sizeof(T));
    return static_cast<T*>(memory_.back().data());
  }
  template <class T>
  std::vector<T> get(const T* from, std::size_t count) {
    return std::vector<T>(from, from + count);
  }
  // All bytes of all arrays.
  std::vector<unsigned char> everything() const {
    std::vector<unsigned char> out;
    for (std::size_t i = 0; i < sizes_.size(); ++i) {
      const auto* p = static_cast<const unsigned char*>(memory_[i].data());
      out.insert(out.end(), p, p + sizes_[i]);
    }
    return out;
  }

  Executor executor;

 private:
  Queue queue_;
  std::deque<SparseMemory> memory_;
  std::vector<std::size_t> sizes_;
};

}  // namespace freqrank::machine_tests
