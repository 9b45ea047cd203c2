#pragma once
// Right kernels and what they must give, on whatever `Device` runs them: the host executor (test_machine.cpp,
// test_matrices.cpp) and a GPU (tests/gpu/test_simt_cuda.cu). A Device has `queue()`, `put(vector) -> pointer`,
// `make<T>(count) -> pointer` and `get(pointer, count) -> vector`.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <random>
#include <string>
#include <vector>

#include "machine_kernels.h"

namespace freqrank::machine_tests {

using Problems = std::vector<std::string>;

inline std::vector<float> ramp(int n) {
  std::vector<float> x(n);
  for (int i = 0; i < n; ++i) x[i] = std::sin(0.37f * static_cast<float>(i)) + 0.01f * static_cast<float>(i);
  return x;
}

// Whole numbers, so that every order of summation gives the same bits.
inline std::vector<float> whole(int n) {
  std::vector<float> x(n);
  for (int i = 0; i < n; ++i) x[i] = static_cast<float>(i * 37 % 101 - 50);
  return x;
}

template <class T>
void expect_equal(Problems& problems, const std::string& what, const std::vector<T>& got,
                  const std::vector<T>& expected) {
  for (std::size_t i = 0; i < expected.size(); ++i)
    if (!(got[i] == expected[i])) {
      problems.push_back(what + ": element " + std::to_string(i) + " is " +
                         std::to_string(static_cast<double>(got[i])) + ", not " +
                         std::to_string(static_cast<double>(expected[i])));
      return;
    }
}

template <class Device>
void reverses(Device& device, Problems& problems) {
  constexpr int rows = 3, n = 100;
  const std::vector<float> x = ramp(rows * n);
  float* const y = device.template make<float>(rows * n);
  auto& queue = device.queue();
  const float* const from = device.put(x);
  queue.template launch<Reverse<float>>({rows, 64, 4 * n},
                                        {queue.view(from, 0, rows * n), queue.view(y, 0, rows * n), n, Fault::none});
  std::vector<float> expected(x.size());
  for (int i = 0; i < rows * n; ++i) expected[i] = x[i / n * n + n - 1 - i % n];
  expect_equal(problems, "reverse", device.get(y, rows * n), expected);
}

template <class Device>
void pipelines(Device& device, Problems& problems) {
  constexpr int chunks = 5, chunk = Pipeline::chunk;
  const std::vector<float> x = ramp(chunks * chunk);
  float* const y = device.template make<float>(chunk);
  auto& queue = device.queue();
  const float* const from = device.put(x);
  queue.template launch<Pipeline>({1, 64, 8 * chunk},
                                  {queue.view(from, 0, chunks * chunk), queue.view(y, 0, chunk), chunks, Fault::none});
  std::vector<float> expected(chunk);
  for (int i = 0; i < chunk; ++i)
    for (int c = 0; c < chunks; ++c) expected[i] += x[c * chunk + (63 - i / 4) * 4 + i % 4];
  expect_equal(problems, "pipeline of asynchronous copies", device.get(y, chunk), expected);
}

template <class Device>
void transposes(Device& device, Problems& problems) {
  const std::vector<float> x = ramp(1024);
  float* const y = device.template make<float>(1024);
  auto& queue = device.queue();
  const float* const from = device.put(x);
  queue.template launch<Transpose>({1, 256, 33 * 32 * 4},
                                   {queue.view(from, 0, 1024), queue.view(y, 0, 1024), Fault::none});
  std::vector<float> expected(1024);
  for (int i = 0; i < 1024; ++i) expected[i] = x[i % 32 * 32 + i / 32];
  expect_equal(problems, "transpose", device.get(y, 1024), expected);
}

template <class Device>
void counts_values(Device& device, Problems& problems) {
  constexpr int n = 256;
  std::vector<int> x(n);
  for (int i = 0; i < n; ++i) x[i] = i * i % 8;
  auto& queue = device.queue();
  const int* const from = device.put(x);
  int* const counts = device.put(std::vector<int>(8));
  int* const most = device.put(std::vector<int>{-5});
  queue.template launch<Histogram>({n / 64, 64, 0}, {queue.view(from, 0, n), queue.view(counts, 0, 8),
                                                     queue.view(most, 0, 1), queue.view(counts, 0, 0), Fault::none});
  expect_equal(problems, "atomic_add", device.get(counts, 8), {64, 128, 0, 0, 64, 0, 0, 0});
  expect_equal(problems, "atomic_max", device.get(most, 1), {4});
}

// Lanes exchange values in every way; sums over warps and blocks; half the values are negative.
template <class Device>
void exchanges(Device& device, Problems& problems) {
  const std::vector<float> x = whole(256);
  auto& queue = device.queue();
  const float* const from = device.put(x);
  float* const y = device.template make<float>(256);
  queue.template launch<Sums>({1, 256, 32}, {queue.view(from, 0, 256), queue.view(y, 0, 256)});
  float sum = 0, most = x[0];
  for (float v : x) {
    sum += v;
    most = std::max(most, v);
  }
  std::vector<float> expected(256);
  for (int t = 0; t < 256; ++t) {
    const int lane = t % 32;
    const float* w = x.data() + t - lane;
    float out = sum + most;
    for (int width = 1; width <= 32; width *= 2) {
      const int base = lane & ~(width - 1);
      const float up = lane - 2 >= base ? w[lane - 2] : w[lane];
      const float down = lane + 5 < base + width ? w[lane + 5] : w[lane];
      out += 1.5f * w[base + (3 & (width - 1))] + up - down * 0.25f;  // exact
    }
    unsigned votes = 0;
    bool some = false;
    for (int i = 0; i < 32; ++i) {
      votes |= static_cast<unsigned>(w[i] > 0.25f) << i;
      some |= w[i] > 0.5f;
    }
    if (some) out += static_cast<float>(votes & 0xffu);
    expected[t] = out;
  }
  expect_equal(problems, "shuffles, votes and block sums", device.get(y, 256), expected);

  const float* const few = device.put(std::vector<float>(x.begin(), x.begin() + 128));
  queue.template launch<Neighbours>({1, 128, 512}, {queue.view(few, 0, 128), queue.view(y, 0, 128), Fault::none});
  expected.resize(128);
  for (int t = 0; t < 128; ++t) {
    float of_warp = 0;
    for (int i = 0; i < 32; ++i) of_warp += x[t / 32 * 32 + i];
    expected[t] = x[t] + x[t / 32 * 32 + (t + 1) % 32] + 1000 * of_warp;
  }
  expect_equal(problems, "warp_barrier and warp_sum", device.get(y, 128), expected);
}

template <class E>
E element(double x) {
  if constexpr (std::is_same_v<E, tf32>) {  // round to nearest, ties away from zero
    const float f = static_cast<float>(x);
    std::uint32_t bits;
    std::memcpy(&bits, &f, 4);
    if ((bits & 0x7f800000u) != 0x7f800000u) bits = (bits + 0x1000u) & ~0x1fffu;
    return {bits};
  } else if constexpr (std::is_same_v<E, bfloat16> || std::is_same_v<E, float16>) {
    return freqrank::from_float<E>(static_cast<float>(x));
  } else {
    return static_cast<E>(x);
  }
}
template <class E>
double value(E x) {
  if constexpr (std::is_same_v<E, tf32>) {
    float f;
    std::memcpy(&f, &x.bits, 4);
    return f;
  } else if constexpr (std::is_same_v<E, bfloat16> || std::is_same_v<E, float16>) {
    return freqrank::to_float(x);
  } else {
    return static_cast<double>(x);
  }
}

// Operands of Product<E> and its error.
template <class E>
struct Operands {
  using P = Product<E>;
  std::vector<E> a = std::vector<E>(P::m * P::k), b = std::vector<E>(P::k * P::n);
  std::vector<typename P::Sum> c = std::vector<typename P::Sum>(P::m * P::n);

  Operands(double range, bool whole_numbers, unsigned seed = 5) {
    std::mt19937 random(seed);
    std::uniform_real_distribution<double> uniform(-range, range);
    const auto draw = [&] { return whole_numbers ? std::round(uniform(random)) : uniform(random); };
    for (E& x : a) x = element<E>(draw());
    for (E& x : b) x = element<E>(draw());
    for (auto& x : c) x = static_cast<typename P::Sum>(draw());
  }
  template <class Device>
  std::vector<typename P::Sum> run(Device& device, From from = From::global, Fault fault = Fault::none,
                                   int pitch = P::k + 16 / static_cast<int>(sizeof(E))) const {
    auto& queue = device.queue();
    const E* const x = device.put(a);
    const E* const y = device.put(b);
    const typename P::Sum* const z = device.put(c);
    auto* const d = device.template make<typename P::Sum>(P::m * P::n);
    queue.template launch<P>(
        {1, 32, 4096}, {queue.view(x, 0, P::m * P::k), queue.view(y, 0, P::k * P::n), queue.view(z, 0, P::m * P::n),
                        queue.view(d, 0, P::m * P::n), from, pitch, fault});
    return device.get(d, P::m * P::n);
  }
  // |d - (a b + c)| relative to |a| |b| + |c|, the worst element.
  double error(const std::vector<typename P::Sum>& d) const {
    double worst = 0;
    for (int i = 0; i < P::m; ++i)
      for (int j = 0; j < P::n; ++j) {
        double sum = static_cast<double>(c[i * P::n + j]), size = std::fabs(sum);
        for (int l = 0; l < P::k; ++l) {
          const double product = value(a[i * P::k + l]) * value(b[l * P::n + j]);
          sum += product;
          size += std::fabs(product);
        }
        const double error = std::fabs(static_cast<double>(d[i * P::n + j]) - sum);
        worst = error <= size ? std::max(worst, error / (size + 1e-300)) : 1;
      }
    return worst;
  }
};

template <class E, class Device>
void multiplies(Device& device, Problems& problems, const std::string& type, double tolerance, std::vector<From> ways) {
  const char* names[] = {"registers", "ldmatrix, A by rows and B by columns", "ldmatrix, A by columns and B by rows"};
  for (From from : ways)
    for (bool whole_numbers : {true, false}) {
      const Operands<E> operands(whole_numbers ? 60 : 3, whole_numbers);
      const double error = operands.error(operands.run(device, from));
      if (!(error <= (whole_numbers ? 0 : tolerance)))
        problems.push_back("mma " + type + " from " + names[static_cast<int>(from)] + ": error " +
                           std::to_string(error));
    }
}

template <int Steps, class Device>
void multiplies_wide(Device& device, Problems& problems) {
  using P = WideProduct<Steps>;
  std::mt19937 random(Steps);
  std::uniform_int_distribution<int> whole(-60, 60);
  std::vector<double> a(P::m * P::k), b(P::k * P::n), c(P::m * P::n), expected(P::m * P::n);
  for (auto* x : {&a, &b, &c})
    for (double& v : *x) v = whole(random);
  for (int i = 0; i < P::m; ++i)
    for (int j = 0; j < P::n; ++j) {
      expected[i * P::n + j] = c[i * P::n + j];
      for (int l = 0; l < P::k; ++l) expected[i * P::n + j] += a[i * P::k + l] * b[l * P::n + j];
    }
  auto& queue = device.queue();
  const double* const x = device.put(a);
  const double* const y = device.put(b);
  const double* const z = device.put(c);
  auto* const d = device.template make<double>(P::m * P::n);
  queue.template launch<P>({1, 32, 0}, {queue.view(x, 0, P::m * P::k), queue.view(y, 0, P::k * P::n),
                                        queue.view(z, 0, P::m * P::n), queue.view(d, 0, P::m * P::n)});
  expect_equal(problems, "mma fp64, 16 rows and a depth of " + std::to_string(P::k), device.get(d, P::m * P::n),
               expected);
}

template <class Device>
void all_products(Device& device, Problems& problems) {
  multiplies<bfloat16>(device, problems, "bf16", 0x1p-21, {From::global, From::shared_natural, From::shared_other});
  multiplies<float16>(device, problems, "fp16", 0x1p-21, {From::global, From::shared_natural, From::shared_other});
  multiplies<tf32>(device, problems, "tf32", 0x1p-21, {From::global, From::shared_natural});
  multiplies<double>(device, problems, "fp64", 0x1p-50, {From::global});
  multiplies<std::int8_t>(device, problems, "int8", 0, {From::global, From::shared_natural});
  multiplies_wide<1>(device, problems);
  multiplies_wide<2>(device, problems);
  multiplies_wide<4>(device, problems);
}

template <class Device>
void loads_matrices(Device& device, Problems& problems) {
  std::vector<float16> x(256);
  for (int i = 0; i < 256; ++i) x[i].bits = static_cast<std::uint16_t>(i * 7);
  auto& queue = device.queue();
  const float16* const from = device.put(x);
  auto* const rows = device.template make<float16>(256);
  auto* const columns = device.template make<float16>(256);
  auto* const single = device.template make<unsigned>(32);
  auto* const transposed = device.template make<unsigned>(32);
  queue.template launch<MatrixLoads>({1, 32, 1024},
                                     {queue.view(from, 0, 256), queue.view(rows, 0, 256), queue.view(columns, 0, 256),
                                      queue.view(single, 0, 32), queue.view(transposed, 0, 32)});
  const auto bits = [&](const float16* p) {
    std::vector<unsigned> out;
    for (float16 v : device.get(p, 256)) out.push_back(v.bits);
    return out;
  };
  std::vector<unsigned> as_is(256), turned(256), one(32), one_turned(32);
  for (int i = 0; i < 256; ++i) {
    as_is[i] = x[i].bits;
    turned[i] = x[i % 16 * 16 + i / 16].bits;
  }
  for (int l = 0; l < 32; ++l)
    for (int k = 0; k < 2; ++k) {
      one[l] |= static_cast<unsigned>(x[l / 4 * 16 + l % 4 * 2 + k].bits) << 16 * k;
      one_turned[l] |= static_cast<unsigned>(x[(l % 4 * 2 + k) * 16 + l / 4].bits) << 16 * k;
    }
  expect_equal(problems, "two fragments by rows", bits(rows), as_is);
  expect_equal(problems, "two fragments by columns", bits(columns), turned);
  expect_equal(problems, "ldmatrix.x1", device.get(single, 32), one);
  expect_equal(problems, "ldmatrix.x1.trans", device.get(transposed, 32), one_turned);
}

template <class Device>
Problems run_all_cases(Device& device) {
  Problems problems;
  reverses(device, problems);
  pipelines(device, problems);
  transposes(device, problems);
  counts_values(device, problems);
  exchanges(device, problems);
  all_products(device, problems);
  loads_matrices(device, problems);
  return problems;
}

}  // namespace freqrank::machine_tests
