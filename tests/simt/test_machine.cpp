// The executor itself: right kernels give the same bits for every seed, planted faults are reported by kernel and line.

#include <gtest/gtest.h>

#include <cmath>
#include <fstream>
#include <string>
#include <vector>

#include "host_device.h"

namespace freqrank::machine_tests {
namespace {

constexpr std::uint64_t seeds[] = {1, 2, 3};

// The line of machine_kernels.h that a comment marks.
int line_of(const std::string& tag) {
  std::ifstream file(FREQRANK_MACHINE_KERNELS);
  std::string line;
  for (int n = 1; std::getline(file, line); ++n)
    if (line.find("[" + tag + "]") != std::string::npos) return n;
  ADD_FAILURE() << "no line is marked " << tag;
  return 0;
}

// Runs `f(executor)` and demands an error of this kernel, at the marked line, with these words, whatever the seed.
template <class F>
void expect_error(const std::string& kernel, const std::string& tag, const std::vector<std::string>& words, F f) {
  for (std::uint64_t seed : seeds) {
    Executor executor(seed);
    Queue queue(executor);
    try {
      f(queue);
      ADD_FAILURE() << "no error with seed " << seed;
    } catch (const Error& e) {
      const std::string text = e.what();
      EXPECT_EQ(e.kernel(), kernel) << text;
      EXPECT_NE(text.find("kernel " + kernel), std::string::npos) << text;
      if (!tag.empty()) {
        EXPECT_EQ(static_cast<int>(e.at().line()), line_of(tag)) << text;
        EXPECT_NE(text.find("machine_kernels.h:" + std::to_string(line_of(tag))), std::string::npos) << text;
      }
      for (const std::string& word : words)
        EXPECT_NE(text.find(word), std::string::npos) << text << "\nlacks: " << word;
    }
  }
}

std::string at(const std::string& tag) { return "machine_kernels.h:" + std::to_string(line_of(tag)); }

TEST(Machine, right_kernels_give_the_same_bits_for_every_seed) {
  std::vector<unsigned char> first;
  for (std::uint64_t seed : seeds) {
    HostDevice device(seed);
    for (const std::string& problem : run_all_cases(device)) ADD_FAILURE() << problem << ", seed " << seed;
    if (first.empty()) first = device.everything();
    EXPECT_EQ(device.everything(), first) << "seed " << seed;
  }
  EXPECT_GT(first.size(), 20000u);
}

std::vector<float> reverse(Queue& queue, Fault fault) {
  constexpr int rows = 3, n = 100;
  const std::vector<float> x = ramp(rows * n);
  std::vector<float> y(rows * n, -1.f);
  const auto out = queue.view(y.data(), 0, rows * n);
  queue.expect_written(out);
  queue.launch<Reverse<float>>({rows, 64, 4 * n}, {queue.view(x.data(), 0, rows * n), out, n, fault});
  return y;
}

TEST(Machine, missing_barrier) {
  // Either a thread reads what another has just written, or nobody has written it yet.
  expect_error("test_reverse", "reverse reads", {"shared memory at byte"},
               [](Queue& q) { reverse(q, Fault::missing_barrier); });
}

TEST(Machine, missing_barrier_names_both_lines) {
  expect_error("test_neighbours", "", {"race in shared memory", "warp_barrier between"}, [](Queue& q) {
    const std::vector<float> x = ramp(32);
    std::vector<float> y(32);
    q.launch<Neighbours>({1, 32, 128},
                         {q.view(x.data(), 0, 32), q.view(y.data(), 0, 32), Fault::shuffle_is_no_barrier});
  });
}

TEST(Machine, overwriting_what_others_may_still_read) {
  for (std::uint64_t seed : seeds) {  // which of the two comes first is the seed's choice
    Executor executor(seed);
    Queue queue(executor);
    try {
      reverse(queue, Fault::overwritten_too_early);
      ADD_FAILURE();
    } catch (const Error& e) {
      const std::string text = e.what();
      EXPECT_NE(text.find("race in shared memory"), std::string::npos) << text;
      EXPECT_NE(text.find(at("too early")), std::string::npos) << text;
    }
  }
}

TEST(Machine, divergent_barrier) {
  expect_error("test_reverse", "last barrier", {"divergent barrier", "thread 40 has ended"},
               [](Queue& q) { reverse(q, Fault::divergent_barrier); });
}

TEST(Machine, barrier_after_a_thread_has_ended) {
  expect_error("test_reverse", "reverse barrier", {"divergent barrier", "thread 33 has ended"},
               [](Queue& q) { reverse(q, Fault::early_end); });
}

TEST(Machine, warps_at_different_barriers) {
  expect_error("test_reverse", "reverse barrier", {"divergent barrier", at("other barrier")},
               [](Queue& q) { reverse(q, Fault::two_barriers); });
}

TEST(Machine, off_by_one_in_shared_memory) {
  expect_error("test_reverse", "reverse reads", {"shared memory: element 100 outside [0, 100)", "thread 0"},
               [](Queue& q) { reverse(q, Fault::shared_bound); });
}

TEST(Machine, off_by_one_in_global_memory) {
  expect_error("test_reverse", "reverse stores",
               {"global memory: element 100 outside [-200, 100)", "block 2, thread 36"},
               [](Queue& q) { reverse(q, Fault::global_bound); });
}

TEST(Machine, unwritten_output) {
  expect_error("test_reverse", "", {"element 107 of the output", "was not written", "launched in"},
               [](Queue& q) { reverse(q, Fault::unwritten_output); });
}

TEST(Machine, unwritten_output_of_several_launches) {
  std::vector<float> x = ramp(512), y(512);
  Executor executor;
  Queue queue(executor);
  executor.expect_written(y.data(), 512, 4, false);
  const auto half = [&](int i) {
    queue.launch<Reverse<float>>(
        {1, 64, 1024}, {queue.view(x.data(), 0, 512), queue.view(y.data() + 256 * i, 0, 256), 256, Fault::none});
  };
  half(0);
  half(1);
  executor.check_written();
  executor.expect_written(y.data(), 512, 4, false);
  half(0);
  try {
    executor.check_written();
    FAIL();
  } catch (const Error& e) {
    EXPECT_NE(std::string(e.what()).find("test_reverse: element 256"), std::string::npos) << e.what();
  }
}

TEST(Machine, unwritten_shared_memory) {
  expect_error("test_reverse", "reverse reads", {"shared memory at byte 20 that no thread of the block has written"},
               [](Queue& q) { reverse(q, Fault::unwritten_shared); });
}

TEST(Machine, misaligned_vectors) {
  expect_error("test_reverse", "misaligned", {"global memory: misaligned access of 16 bytes at element 2"},
               [](Queue& q) { reverse(q, Fault::misaligned); });
  expect_error("test_reverse", "misaligned shared", {"shared memory: misaligned access of 8 bytes at element 1"},
               [](Queue& q) { reverse(q, Fault::misaligned_shared); });
}

std::vector<float> pipeline(Queue& queue, Fault fault) {
  constexpr int chunks = 5, n = chunks * Pipeline::chunk;
  const std::vector<float> x = ramp(n);
  std::vector<float> y(Pipeline::chunk);
  queue.launch<Pipeline>({1, 64, 8 * Pipeline::chunk},
                         {queue.view(x.data(), 0, n), queue.view(y.data(), 0, Pipeline::chunk), chunks, fault});
  return y;
}

TEST(Machine, asynchronous_copies_gone_wrong) {
  const auto run = [](Fault fault) { return [fault](Queue& q) { pipeline(q, fault); }; };
  const std::string copy = at("copy");
  expect_error("test_pipeline", "reads the copy", {"in flight", copy}, run(Fault::no_wait));
  expect_error("test_pipeline", "reads the copy", {"in flight", copy}, run(Fault::no_commit));
  expect_error("test_pipeline", "reads the copy", {"in flight", copy}, run(Fault::lax_wait));
  expect_error("test_pipeline", "reads the copy", {}, run(Fault::no_barrier_after_wait));
  expect_error("test_pipeline", "overwrites in flight", {"overwrites shared", "in flight", copy},
               run(Fault::overwrite_in_flight));
  expect_error("test_pipeline", "ends in flight", {"in flight"}, run(Fault::ends_in_flight));
}

void transpose(Queue& queue, Fault fault) {
  alignas(128) float x[1024], y[1024];  // as cudaMalloc would align them
  std::copy_n(ramp(1024).begin(), 1024, x);
  queue.launch<Transpose>({1, 256, 33 * 32 * 4}, {queue.view<const float>(x, 0, 1024), queue.view(y, 0, 1024), fault});
  for (int i = 0; i < 1024; ++i) ASSERT_EQ(y[i], x[i % 32 * 32 + i / 32]);
}

TEST(Machine, bank_conflicts) {
  Executor executor;
  Queue queue(executor);
  transpose(queue, Fault::none);
  executor.require_no_bank_conflicts();
  executor.require_full_sectors("test_transpose");
  const Counts& c = executor.counters().at("test_transpose").total;
  EXPECT_EQ(c.global_read_bytes, 4096u);
  EXPECT_EQ(c.global_read_unique_bytes, 4096u);
  EXPECT_EQ(c.global_read_sectors, 128u);
  EXPECT_EQ(c.global_reads, 32u);
  EXPECT_EQ(c.global_written_sectors, 128u);
  EXPECT_EQ(c.global_written_unique_bytes, 4096u);
  EXPECT_EQ(c.shared_reads, 32u);
  EXPECT_EQ(c.shared_writes, 32u);
  EXPECT_EQ(c.barriers, 1u);
  EXPECT_EQ(c.shuffles, 0u);

  executor.reset_counters();
  transpose(queue, Fault::no_padding);
  EXPECT_EQ(executor.counters().at("test_transpose").total.bank_conflicts, 32u * 31u);
  try {
    executor.require_no_bank_conflicts();
    FAIL();
  } catch (const Error& e) {
    const std::string text = e.what();
    EXPECT_NE(text.find("kernel test_transpose"), std::string::npos) << text;
    EXPECT_NE(text.find(at("column") + ": 992 "), std::string::npos) << text;
  }
}

void neighbours(Queue& queue, Fault fault) {
  const std::vector<float> x = ramp(128);
  std::vector<float> y(128);
  queue.launch<Neighbours>({1, 128, 512}, {queue.view(x.data(), 0, 128), queue.view(y.data(), 0, 128), fault});
}

TEST(Machine, lanes_of_a_warp) {
  for (std::uint64_t seed : seeds) {
    Executor executor(seed);
    Queue queue(executor);
    neighbours(queue, Fault::none);
    EXPECT_EQ(executor.counters().at("test_neighbours").total.shuffles, 4u * 5u);
    EXPECT_EQ(executor.counters().at("test_neighbours").total.warp_barriers, 4u);
  }
  expect_error("test_neighbours", "half a shuffle", {"divergent shuffle", "has ended"},
               [](Queue& q) { neighbours(q, Fault::divergent_shuffle); });
  expect_error("test_neighbours", "", {"divergent shuffle"}, [](Queue& q) { neighbours(q, Fault::two_shuffles); });
  expect_error("test_neighbours", "neighbour reads",
               {"race in shared memory", at("neighbour writes"), "do not order memory"},
               [](Queue& q) { neighbours(q, Fault::shuffle_is_no_barrier); });
  // Without anything between, the error may come from either access.
  expect_error("test_neighbours", "", {"shared memory"}, [](Queue& q) { neighbours(q, Fault::no_warp_barrier); });
}

void histogram(Queue& queue, Fault fault) {
  constexpr int n = 256;
  std::vector<int> x(n), counts(8), most(1, -5), scratch(4);
  for (int i = 0; i < n; ++i) x[i] = i * i % 8;
  queue.launch<Histogram>({n / 64, 64, 0}, {queue.view<const int>(x.data(), 0, n), queue.view(counts.data(), 0, 8),
                                            queue.view(most.data(), 0, 1), queue.view(scratch.data(), -1, 4), fault});
  EXPECT_EQ(counts, (std::vector<int>{64, 128, 0, 0, 64, 0, 0, 0}));
  EXPECT_EQ(most[0], 4);
}

TEST(Machine, blocks_and_atomics) {
  for (std::uint64_t seed : seeds) {
    Executor executor(seed);
    Queue queue(executor);
    histogram(queue, Fault::none);
    histogram(queue, Fault::none);  // another launch may touch what this one wrote
    EXPECT_EQ(executor.counters().at("test_histogram").total.atomics, 2u * 2u * 8u);
  }
  expect_error("test_histogram", "overlap", {"race in global memory", "overwrites what block", at("overlap")},
               [](Queue& q) { histogram(q, Fault::blocks_overlap); });
  expect_error("test_histogram", "", {"race in global memory", "block", at("reads another's"), at("and writes")},
               [](Queue& q) {
                 std::vector<int> x(128), counts(1), most(1), scratch(2);
                 q.launch<Histogram>(
                     {2, 64, 0}, {q.view<const int>(x.data(), 0, 128), q.view(counts.data(), 0, 1),
                                  q.view(most.data(), 0, 1), q.view(scratch.data(), 0, 2), Fault::block_reads_block});
               });
  expect_error("test_histogram", "", {"race in global memory", "block", at("is read"), at("is overwritten")},
               [](Queue& q) { histogram(q, Fault::block_overwrites_read); });
  expect_error("test_histogram", "", {"race in global memory", at("atomic")},
               [](Queue& q) { histogram(q, Fault::atomic_then_plain_read); });
}

TEST(Machine, refuses_impossible_launches) {
  Executor executor(0, 1024);
  Queue queue(executor);
  const Transpose::Params p{};
  const auto text = [&](Grid grid) {
    try {
      queue.launch<Transpose>(grid, p);
    } catch (const Error& e) {
      return std::string(e.what());
    }
    return std::string();
  };
  EXPECT_EQ(text({0, 32, 0}), "");
  EXPECT_NE(text({1, 33, 0}).find("test_transpose, launched in"), std::string::npos);
  EXPECT_NE(text({1, 512, 0}).find("a multiple of 32 up to 256"), std::string::npos);
  EXPECT_NE(text({1, 32, 1025}).find("at most 1024"), std::string::npos);
  EXPECT_NE(text({Index{1} << 31, 32, 0}).find("2147483647"), std::string::npos);
  EXPECT_THROW(thread(), Error);
}

// One thread of each block touches an element beyond 2^33 in an array of which only the touched pages exist.
TEST(Machine, huge_strides) {
  const std::uint64_t n = (std::uint64_t{1} << 33) + 1024;
  SparseMemory x(4 * n), y(4 * n);
  static_cast<float*>(x.data())[n - 100] = 5.f;
  Executor executor;
  Queue queue(executor);
  const auto begin = static_cast<Index>(n) - 100;
  queue.launch<Reverse<float>>(
      {1, 32, 400}, {queue.view(static_cast<const float*>(x.data()), 0, static_cast<Index>(n)) + begin,
                     queue.view(static_cast<float*>(y.data()), 0, static_cast<Index>(n)) + begin, 100, Fault::none});
  EXPECT_EQ(static_cast<float*>(y.data())[n - 1], 5.f);
}

}  // namespace
}  // namespace freqrank::machine_tests
