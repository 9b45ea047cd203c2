#include "common/parallel.h"

#include <algorithm>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace freqrank {

namespace {

class Pool {
 public:
  explicit Pool(int threads) {
    for (int i = 1; i < threads; ++i) workers_.emplace_back([this] { work(); });
  }

  ~Pool() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      stopping_ = true;
    }
    wake_.notify_all();
    for (auto& worker : workers_) worker.join();
  }

  void run(std::int64_t n, std::int64_t grain, const RangeBody& body) {
    if (n <= 0) return;
    const std::int64_t parts =
        std::min<std::int64_t>(static_cast<std::int64_t>(workers_.size()) + 1, n / std::max<std::int64_t>(grain, 1));
    if (parts <= 1 || inside_) {
      body(0, n);
      return;
    }
    std::lock_guard<std::mutex> one_job_at_a_time(job_mutex_);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      body_ = &body;
      n_ = n;
      parts_ = parts;
      next_ = 0;
      unfinished_ = parts;
    }
    wake_.notify_all();
    take_parts();
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [this] { return unfinished_ == 0; });
    body_ = nullptr;
  }

 private:
  void take_parts() {
    inside_ = true;
    for (;;) {
      std::int64_t part = 0, n = 0, parts = 0;
      const RangeBody* body = nullptr;
      {
        std::lock_guard<std::mutex> lock(mutex_);
        if (body_ == nullptr || next_ >= parts_) break;
        part = next_++;
        n = n_;
        parts = parts_;
        body = body_;
      }
      const std::int64_t base = n / parts, rest = n % parts;
      const std::int64_t begin = part * base + std::min(part, rest);
      (*body)(begin, begin + base + (part < rest ? 1 : 0));
      std::lock_guard<std::mutex> lock(mutex_);
      if (--unfinished_ == 0) done_.notify_all();
    }
    inside_ = false;
  }

  void work() {
    for (;;) {
      {
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, [this] { return stopping_ || (body_ != nullptr && next_ < parts_); });
        if (stopping_) return;
      }
      take_parts();
    }
  }

  static thread_local bool inside_;
  std::vector<std::thread> workers_;
  std::mutex job_mutex_, mutex_;
  std::condition_variable wake_, done_;
  const RangeBody* body_ = nullptr;
  std::int64_t n_ = 0, parts_ = 0, next_ = 0, unfinished_ = 0;
  bool stopping_ = false;
};

thread_local bool Pool::inside_ = false;

}  // namespace

ParallelFor serial() {
  return [](std::int64_t n, std::int64_t, const RangeBody& body) {
    if (n > 0) body(0, n);
  };
}

ParallelFor thread_pool(int threads) {
  if (threads <= 0) threads = std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
  auto pool = std::make_shared<Pool>(threads);
  return [pool](std::int64_t n, std::int64_t grain, const RangeBody& body) { pool->run(n, grain, body); };
}

}  // namespace freqrank
