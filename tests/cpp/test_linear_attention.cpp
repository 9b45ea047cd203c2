#include <gtest/gtest.h>

#include <cmath>
#include <memory>
#include <random>
#include <string>
#include <type_traits>
#include <vector>

#include "common/half.h"
#include "linear_attention/linear_attention.h"

namespace freqrank::linear_attention {

namespace {

using i64 = std::int64_t;

template <class S>
constexpr Dtype dtype_for = std::is_same_v<S, double>     ? Dtype::float64
                            : std::is_same_v<S, float>    ? Dtype::float32
                            : std::is_same_v<S, bfloat16> ? Dtype::bfloat16
                                                          : Dtype::float16;

template <class S>
double value(S x) {
  return static_cast<double>(to_float(x));
}

template <class S>
S rounded(double x) {
  if constexpr (std::is_same_v<S, double>) {
    return x;
  } else {
    return from_float<S>(static_cast<float>(x));
  }
}

struct Options {
  Decay decay = Decay::none;
  bool decay_per_query_head = false, normalize = false, mask = false, initial = false;
  std::vector<i64> offsets;  // cu_seqlens; empty: one sequence per batch row
};

// One problem with S tensors and A arithmetic; every buffer has exactly the size that the contract states, so that a
// sanitizer sees anything beyond.
template <class S, class A>
struct Problem {
  Sizes sizes;
  Options options;
  std::vector<S> q, k, v;
  std::vector<A> log_decay, kv0, z0;
  std::vector<unsigned char> mask;
  double scale = 0.4, eps = 0.05;

  Problem(Sizes s, Options o, unsigned seed = 1) : sizes(s), options(std::move(o)) {
    sizes.decay = options.decay;
    sizes.normalize = options.normalize;
    sizes.double_precision = std::is_same_v<A, double>;
    sizes.sequences = options.offsets.empty() ? s.batch : static_cast<i64>(options.offsets.size()) - 1;
    sizes.state_heads = options.decay != Decay::none && options.decay_per_query_head ? s.heads : s.key_heads;
    std::mt19937 random(seed);
    std::uniform_real_distribution<double> uniform(options.normalize ? 0.1 : -1.0, 1.0);
    const auto fill = [&](auto& x, i64 n, double low, double high) {
      for (i64 i = 0; i < n; ++i) {
        const double u = uniform(random);
        x.push_back(rounded<typename std::decay_t<decltype(x)>::value_type>(low + (high - low) * std::fabs(u)));
        if (low < 0 && high > 0 && u < 0) x.back() = rounded<typename std::decay_t<decltype(x)>::value_type>(u);
      }
    };
    const double low = options.normalize ? 0.0 : -1.0;
    fill(q, s.batch * s.time * s.heads * s.key_dim, low, 1);
    fill(k, s.batch * s.time * s.key_heads * s.key_dim, low, 1);
    fill(v, s.batch * s.time * s.key_heads * s.value_dim, -1, 1);
    if (options.decay == Decay::per_head) fill(log_decay, sizes.state_heads, -0.3, 0);
    if (options.decay == Decay::per_token) fill(log_decay, s.batch * s.time * sizes.state_heads, -0.3, 0);
    if (options.mask) {
      for (i64 i = 0; i < s.batch * s.time; ++i) mask.push_back(uniform(random) > 0.4 ? 0 : 1);
    }
    if (options.initial) {
      fill(kv0, sizes.sequences * sizes.state_heads * s.key_dim * s.value_dim, -1, 1);
      fill(z0, sizes.sequences * sizes.state_heads * s.key_dim, 0, 1);
    }
  }

  template <class E>
  static View view(std::vector<E>& x, std::vector<i64> shape) {
    View out;
    static char nothing;
    out.data = x.empty() ? static_cast<void*>(&nothing) : x.data();
    if constexpr (!std::is_same_v<E, unsigned char>) out.dtype = dtype_for<E>;
    i64 stride = 1;
    for (i64 i = static_cast<i64>(shape.size()) - 1; i >= 0; --i) {
      out.stride[i] = stride;
      stride *= shape[static_cast<std::size_t>(i)];
    }
    return out;
  }

  View state_view(std::vector<A>& x) {
    return view(x, {sizes.sequences, sizes.state_heads, sizes.key_dim, sizes.value_dim});
  }
  View z_view(std::vector<A>& x) { return view(x, {sizes.sequences, sizes.state_heads, sizes.key_dim}); }
  View decay_view(std::vector<A>& x) {
    if (options.decay == Decay::none) return {};
    if (options.decay == Decay::per_token) return view(x, {sizes.batch, sizes.time, sizes.state_heads});
    View out = view(x, {sizes.state_heads});
    out.stride[2] = 1, out.stride[0] = 0;
    return out;
  }
  template <class E>
  View queries(std::vector<E>& x, i64 dim) {
    return view(x, {sizes.batch, sizes.time, sizes.heads, dim});
  }
  template <class E>
  View keys(std::vector<E>& x, i64 dim) {
    return view(x, {sizes.batch, sizes.time, sizes.key_heads, dim});
  }

  Inputs inputs() {
    Inputs in;
    in.q = queries(q, sizes.key_dim);
    in.k = keys(k, sizes.key_dim);
    in.v = keys(v, sizes.value_dim);
    in.log_decay = decay_view(log_decay);
    if (options.mask) in.mask = view(mask, {sizes.batch, sizes.time});
    if (options.initial) in.initial_kv = state_view(kv0), in.initial_z = z_view(z0);
    if (!options.offsets.empty()) in.cu_seqlens = options.offsets.data();
    in.scale = scale, in.eps = eps;
    return in;
  }

  struct Result {
    std::vector<S> o;
    std::vector<A> kv, z;
  };

  Result run(const ParallelFor& parallel_for, i64 threads) {
    Result out;
    out.o.resize(static_cast<std::size_t>(sizes.batch * sizes.time * sizes.heads * sizes.value_dim));
    out.kv.resize(static_cast<std::size_t>(sizes.sequences * sizes.state_heads * sizes.key_dim * sizes.value_dim));
    out.z.resize(static_cast<std::size_t>(sizes.sequences * sizes.state_heads * sizes.key_dim));
    const Plan plan = plan_forward(sizes, threads);
    const std::unique_ptr<char[]> workspace(new char[workspace_bytes_forward(plan)]);
    run_forward(plan, inputs(), {queries(out.o, sizes.value_dim), state_view(out.kv), z_view(out.z)}, workspace.get(),
                parallel_for);
    return out;
  }

  struct Gradients {
    std::vector<S> dq, dk, dv;
    std::vector<A> dlog_decay, dkv, dz;
  };

  Gradients backward(std::vector<S> grad_o, std::vector<A> grad_kv, std::vector<A> grad_z,
                     const ParallelFor& parallel_for, i64 threads) {
    Gradients out;
    out.dq.resize(q.size()), out.dk.resize(k.size()), out.dv.resize(v.size());
    out.dlog_decay.resize(log_decay.size()), out.dkv.resize(kv0.size()), out.dz.resize(z0.size());
    Sizes s = sizes;
    s.decay_gradient = options.decay != Decay::none;
    BackwardArguments args;
    args.grad_o = queries(grad_o, s.value_dim);
    args.grad_kv = state_view(grad_kv), args.grad_z = z_view(grad_z);
    args.dq = queries(out.dq, s.key_dim), args.dk = keys(out.dk, s.key_dim), args.dv = keys(out.dv, s.value_dim);
    args.dlog_decay = decay_view(out.dlog_decay);
    if (options.initial) args.dinitial_kv = state_view(out.dkv), args.dinitial_z = z_view(out.dz);
    const Plan plan = plan_backward(s, threads);
    const std::unique_ptr<char[]> workspace(new char[workspace_bytes_backward(plan)]);
    run_backward(plan, inputs(), args, workspace.get(), parallel_for);
    return out;
  }

  // The definition, token by token, in double.
  struct Reference {
    std::vector<double> o, kv, z;
  };
  Reference recurrent() const {
    const Sizes& s = sizes;
    Reference out;
    out.o.assign(static_cast<std::size_t>(s.batch * s.time * s.heads * s.value_dim), 0.0);
    const i64 state_size = s.key_dim * s.value_dim;
    out.kv.assign(static_cast<std::size_t>(s.sequences * s.state_heads * state_size), 0.0);
    out.z.assign(static_cast<std::size_t>(s.sequences * s.state_heads * s.key_dim), 0.0);
    for (std::size_t i = 0; i < kv0.size(); ++i) out.kv[i] = value(kv0[i]);
    for (std::size_t i = 0; i < z0.size(); ++i) out.z[i] = value(z0[i]);
    for (i64 n = 0; n < s.sequences; ++n) {
      const bool packed = !options.offsets.empty();
      const i64 b = packed ? 0 : n;
      const i64 begin = packed ? options.offsets[static_cast<std::size_t>(n)] : 0;
      const i64 end = packed ? options.offsets[static_cast<std::size_t>(n + 1)] : s.time;
      for (i64 t = begin; t < end; ++t) {
        const i64 at = b * s.time + t;
        if (options.mask && !mask[static_cast<std::size_t>(at)]) continue;
        for (i64 j = 0; j < s.state_heads; ++j) {
          double g = 0;
          if (options.decay == Decay::per_head) g = value(log_decay[static_cast<std::size_t>(j)]);
          if (options.decay == Decay::per_token) {
            g = value(log_decay[static_cast<std::size_t>(at * s.state_heads + j)]);
          }
          const i64 key_head = j * s.key_heads / s.state_heads;
          double* kv = out.kv.data() + (n * s.state_heads + j) * state_size;
          double* z = out.z.data() + (n * s.state_heads + j) * s.key_dim;
          const S* key = k.data() + (at * s.key_heads + key_head) * s.key_dim;
          const S* val = v.data() + (at * s.key_heads + key_head) * s.value_dim;
          for (i64 d = 0; d < s.key_dim; ++d) {
            for (i64 e = 0; e < s.value_dim; ++e) {
              kv[d * s.value_dim + e] = std::exp(g) * kv[d * s.value_dim + e] + value(key[d]) * value(val[e]);
            }
            z[d] = std::exp(g) * z[d] + value(key[d]);
          }
        }
        for (i64 h = 0; h < s.heads; ++h) {
          const i64 j = h * s.state_heads / s.heads;
          const double* kv = out.kv.data() + (n * s.state_heads + j) * state_size;
          const double* z = out.z.data() + (n * s.state_heads + j) * s.key_dim;
          const S* query = q.data() + (at * s.heads + h) * s.key_dim;
          double denominator = eps;
          for (i64 d = 0; d < s.key_dim; ++d) denominator += scale * value(query[d]) * z[d];
          for (i64 e = 0; e < s.value_dim; ++e) {
            double sum = 0;
            for (i64 d = 0; d < s.key_dim; ++d) sum += scale * value(query[d]) * kv[d * s.value_dim + e];
            out.o[static_cast<std::size_t>((at * s.heads + h) * s.value_dim + e)] =
                s.normalize ? sum / denominator : sum;
          }
        }
      }
    }
    return out;
  }
};

template <class E>
double relative_error(const std::vector<E>& actual, const std::vector<double>& expected) {
  EXPECT_EQ(actual.size(), expected.size());
  double difference = 0, norm = 0;
  for (std::size_t i = 0; i < expected.size(); ++i) {
    difference += std::pow(value(actual[i]) - expected[i], 2);
    norm += expected[i] * expected[i];
  }
  return std::sqrt(difference / (norm > 0 ? norm : 1));
}

Sizes shape(i64 batch, i64 time, i64 heads, i64 key_heads, i64 key_dim, i64 value_dim) {
  Sizes s;
  s.batch = batch, s.time = time, s.heads = heads, s.key_heads = key_heads;
  s.key_dim = key_dim, s.value_dim = value_dim;
  return s;
}

std::vector<Options> all_options() {
  std::vector<Options> out;
  for (Decay decay : {Decay::none, Decay::per_head, Decay::per_token}) {
    for (bool per_query_head : {false, true}) {
      for (bool normalize : {false, true}) {
        for (bool rest : {false, true}) out.push_back({decay, per_query_head, normalize, rest, rest, {}});
      }
    }
  }
  return out;
}

template <class S, class A>
void matches_the_recurrence(double tolerance) {
  for (const Sizes& sizes : {shape(2, 0, 2, 1, 3, 3), shape(1, 1, 1, 1, 1, 1), shape(2, 70, 4, 2, 5, 18),
                             shape(1, 130, 3, 3, 33, 7), shape(1, 67, 4, 1, 64, 80)}) {
    for (const Options& options : all_options()) {
      Problem<S, A> problem(sizes, options);
      const auto result = problem.run(serial(), 1);
      const auto expected = problem.recurrent();
      EXPECT_LT(relative_error(result.o, expected.o), tolerance);
      const double state_tolerance = sizeof(A) == sizeof(double) ? 1e-13 : 1e-6;
      EXPECT_LT(relative_error(result.kv, expected.kv), state_tolerance);
      EXPECT_LT(relative_error(result.z, expected.z), state_tolerance);
    }
  }
}

}  // namespace

TEST(LinearAttention, MatchesTheRecurrenceFloat64) { matches_the_recurrence<double, double>(1e-12); }
TEST(LinearAttention, MatchesTheRecurrenceFloat32) { matches_the_recurrence<float, float>(2e-6); }
TEST(LinearAttention, MatchesTheRecurrenceBfloat16) { matches_the_recurrence<bfloat16, float>(3.3e-3); }
TEST(LinearAttention, MatchesTheRecurrenceFloat16) { matches_the_recurrence<float16, float>(1e-3); }

TEST(LinearAttention, PackedSequencesMatchTheRecurrence) {
  for (Options options : all_options()) {
    options.offsets = {0, 0, 1, 66, 66, 130, 200};
    Problem<double, double> problem(shape(1, 200, 4, 2, 6, 5), options);
    const auto result = problem.run(thread_pool(3), 3);
    const auto expected = problem.recurrent();
    EXPECT_LT(relative_error(result.o, expected.o), 1e-12);
    EXPECT_LT(relative_error(result.kv, expected.kv), 1e-12);
  }
}

// Every gradient against a central difference of the recurrence along a random direction of each input.
TEST(LinearAttention, GradientsMatchDifferences) {
  std::mt19937 random(5);
  std::uniform_real_distribution<double> uniform(-1, 1);
  const auto draw = [&](std::size_t n) {
    std::vector<double> x(n);
    for (auto& e : x) e = uniform(random);
    return x;
  };
  for (Options options : all_options()) {
    for (bool packed : {false, true}) {
      if (packed) options.offsets = {0, 3, 3, 620, 700};
      Problem<double, double> problem(packed ? shape(1, 700, 2, 1, 3, 2) : shape(2, 75, 4, 2, 4, 3), options);
      const auto grad_o = draw(problem.run(serial(), 1).o.size());
      const auto grad_kv = draw(problem.run(serial(), 1).kv.size());
      const auto grad_z = draw(problem.run(serial(), 1).z.size());
      const auto gradients = problem.backward(grad_o, grad_kv, grad_z, serial(), 1);
      const auto loss = [&] {
        const auto out = problem.recurrent();
        double sum = 0;
        for (std::size_t i = 0; i < grad_o.size(); ++i) sum += grad_o[i] * out.o[i];
        for (std::size_t i = 0; i < grad_kv.size(); ++i) sum += grad_kv[i] * out.kv[i];
        for (std::size_t i = 0; i < grad_z.size(); ++i) sum += grad_z[i] * out.z[i];
        return sum;
      };
      const auto check = [&](std::vector<double>& x, const std::vector<double>& gradient, const char* name) {
        const auto direction = draw(x.size());
        const auto kept = x;
        double expected = 0, size = 1e-3;
        for (std::size_t i = 0; i < x.size(); ++i) {
          expected += gradient[i] * direction[i];
          size += std::fabs(gradient[i] * direction[i]);
        }
        const double h = 1e-5;
        for (std::size_t i = 0; i < x.size(); ++i) x[i] = kept[i] + h * direction[i];
        const double above = loss();
        for (std::size_t i = 0; i < x.size(); ++i) x[i] = kept[i] - h * direction[i];
        const double below = loss();
        x = kept;
        EXPECT_NEAR((above - below) / (2 * h), expected, 1e-6 * size) << name;
      };
      check(problem.q, gradients.dq, "q");
      check(problem.k, gradients.dk, "k");
      check(problem.v, gradients.dv, "v");
      check(problem.log_decay, gradients.dlog_decay, "log_decay");
      check(problem.kv0, gradients.dkv, "initial kv");
      check(problem.z0, gradients.dz, "initial z");
    }
  }
}

// 2 sequences of 2 heads for up to 8 threads: also segments of a sequence are computed at the same time.
TEST(LinearAttention, ThreadsDoNotChangeABit) {
  for (const Options& options : all_options()) {
    Problem<float, float> problem(shape(2, 600, 4, 2, 20, 34), options);
    const auto once = problem.run(serial(), 1);
    const std::vector<float> grad_o(once.o.size(), 0.5f), grad_kv(once.kv.size(), 0.25f), grad_z(once.z.size(), 1.0f);
    const auto gradients = problem.backward(grad_o, grad_kv, grad_z, serial(), 1);
    for (int threads : {2, 3, 8}) {
      const auto pool = thread_pool(threads);
      const auto again = problem.run(pool, threads);
      EXPECT_EQ(once.o, again.o);
      EXPECT_EQ(once.kv, again.kv);
      const auto same = problem.backward(grad_o, grad_kv, grad_z, pool, threads);
      EXPECT_EQ(gradients.dq, same.dq);
      EXPECT_EQ(gradients.dk, same.dk);
      EXPECT_EQ(gradients.dv, same.dv);
      EXPECT_EQ(gradients.dlog_decay, same.dlog_decay);
      EXPECT_EQ(gradients.dkv, same.dkv);
    }
  }
}

// Token t of a call as a step, but for its state.
StepArguments token_of(const Inputs& in, const View& o, i64 t) {
  const auto at = [t](View view) {
    if (view) {
      const auto bytes = view.dtype == Dtype::float32 ? 4 : 8;
      view.data = static_cast<char*>(view.data) + t * view.stride[1] * bytes;
    }
    return view;
  };
  StepArguments args;
  args.q = at(in.q), args.k = at(in.k), args.v = at(in.v), args.log_decay = at(in.log_decay), args.o = at(o);
  if (in.mask) args.mask = in.mask, args.mask.data = static_cast<char*>(in.mask.data) + t * in.mask.stride[1];
  args.scale = in.scale, args.eps = in.eps;
  args.projection = in.projection, args.weights = in.weights;
  return args;
}

// A feature map is the scan over features: outputs and gradients against those of features made here.
TEST(LinearAttention, FeatureMapsEqualTheScanOfFeatures) {
  for (Feature feature : {Feature::softmax, Feature::exp, Feature::softmax_pm}) {
    for (const Options& options : all_options()) {
      for (bool shared : {false, true}) {
        const i64 channels = 5, columns = 6, features = feature == Feature::softmax_pm ? 12 : 6, key_heads = 2;
        Problem<double, double> raw(shape(2, 530, 4, key_heads, channels, 7), options, 2);
        raw.scale = 1;
        Problem<double, double> mapped(shape(2, 530, 4, key_heads, features, 7), options, 2);
        mapped.scale = 1;
        mapped.v = raw.v, mapped.log_decay = raw.log_decay, mapped.mask = raw.mask;
        std::mt19937 random(7);
        std::uniform_real_distribution<double> uniform(-0.7, 0.7);
        std::vector<double> projection(static_cast<std::size_t>((shared ? 1 : key_heads) * channels * columns));
        std::vector<double> weights(static_cast<std::size_t>((shared ? 1 : key_heads) * features));
        for (auto& x : projection) x = uniform(random);
        for (auto& x : weights) x = 1 + uniform(random);
        const auto map_of = [&](i64 key_head) {
          return std::make_pair(projection.data() + (shared ? 0 : key_head * channels * columns),
                                weights.data() + (shared ? 0 : key_head * features));
        };
        // features of every row, and those before the weights
        const auto make = [&](const std::vector<double>& x, i64 heads, std::vector<double>& to,
                              std::vector<double>& plain) {
          const i64 rows = static_cast<i64>(x.size()) / channels;
          to.resize(static_cast<std::size_t>(rows * features)), plain.resize(to.size());
          for (i64 i = 0; i < rows; ++i) {
            const auto [matrix, weight] = map_of(i % heads * key_heads / heads);
            double sum = 0;
            for (i64 j = 0; j < features; ++j) {
              double p = 0;
              for (i64 c = 0; c < channels; ++c) {
                p += x[static_cast<std::size_t>(i * channels + c)] * matrix[c * columns + j % columns];
              }
              plain[static_cast<std::size_t>(i * features + j)] = std::exp(j < columns ? p : -p);
              sum += plain[static_cast<std::size_t>(i * features + j)];
            }
            for (i64 j = 0; j < features; ++j) {
              const auto at = static_cast<std::size_t>(i * features + j);
              if (feature != Feature::exp) plain[at] /= sum;
              to[at] = plain[at] * weight[j];
            }
          }
        };
        std::vector<double> plain_q, plain_k;
        make(raw.q, 4, mapped.q, plain_q);
        make(raw.k, key_heads, mapped.k, plain_k);

        const auto with_map = [&](Sizes s) {
          s.channels = channels, s.key_dim = features, s.feature = feature;
          s.sequences = raw.sizes.sequences, s.map_gradient = true, s.decay_gradient = options.decay != Decay::none;
          return s;
        };
        Inputs in = mapped.inputs();
        in.q = raw.queries(raw.q, channels), in.k = raw.keys(raw.k, channels);
        in.projection.data = projection.data(), in.weights.data = weights.data();
        in.projection.dtype = in.weights.dtype = Dtype::float64;
        in.projection.stride[0] = shared ? 0 : channels * columns;
        in.projection.stride[1] = columns, in.projection.stride[2] = 1;
        in.weights.stride[0] = shared ? 0 : features, in.weights.stride[1] = 1;
        const Sizes s = with_map(mapped.sizes);
        const auto expected = mapped.run(serial(), 1);
        std::vector<double> o(expected.o.size()), kv(expected.kv.size()), z(expected.z.size());
        const std::vector<double> grad_o(o.size(), 0.5), grad_kv(kv.size(), 0.25), grad_z(z.size(), 1.0);
        const auto gradients = mapped.backward(grad_o, grad_kv, grad_z, serial(), 1);
        std::vector<double> want_projection(projection.size()), want_weights(weights.size());
        const auto chain = [&](const std::vector<double>& x, const std::vector<double>& plain,
                               const std::vector<double>& gradient, i64 heads) {
          std::vector<double> out(x.size());
          for (i64 i = 0; i < static_cast<i64>(x.size()) / channels; ++i) {
            const i64 key_head = i % heads * key_heads / heads;
            const auto [matrix, weight] = map_of(key_head);
            const double *g = gradient.data() + i * features, *p = plain.data() + i * features;
            double mean = 0;
            for (i64 j = 0; j < features; ++j) {
              want_weights[static_cast<std::size_t>((shared ? 0 : key_head * features) + j)] += g[j] * p[j];
              if (feature != Feature::exp) mean += g[j] * weight[j] * p[j];
            }
            for (i64 j = 0; j < features; ++j) {
              const double dp = (j < columns ? 1 : -1) * p[j] * (g[j] * weight[j] - mean);
              for (i64 c = 0; c < channels; ++c) {
                out[static_cast<std::size_t>(i * channels + c)] += dp * matrix[c * columns + j % columns];
                want_projection[static_cast<std::size_t>((shared ? 0 : key_head * channels * columns) + c * columns +
                                                         j % columns)] +=
                    dp * x[static_cast<std::size_t>(i * channels + c)];
              }
            }
          }
          return out;
        };
        const auto want_q = chain(raw.q, plain_q, gradients.dq, 4);
        const auto want_k = chain(raw.k, plain_k, gradients.dk, key_heads);
        if (options.initial) {
          kv = mapped.kv0, z = mapped.z0;
        }
        for (i64 t = 0; t < s.time; ++t) {
          StepArguments args = token_of(in, mapped.queries(o, 7), t);
          args.kv = mapped.state_view(kv), args.z = mapped.z_view(z);
          run_step(s, args, serial());
        }
        EXPECT_LT(relative_error(o, expected.o), 1e-12);
        EXPECT_LT(relative_error(kv, expected.kv), 1e-12);
        EXPECT_LT(relative_error(z, expected.z), 1e-12);
        for (int threads : {1, 8}) {
          const auto pool = threads == 1 ? serial() : thread_pool(threads);
          const Plan forward = plan_forward(s, threads);
          EXPECT_EQ(forward.split, threads > 1);
          const std::unique_ptr<char[]> workspace(new char[workspace_bytes_forward(forward)]);
          run_forward(forward, in, {mapped.queries(o, 7), mapped.state_view(kv), mapped.z_view(z)}, workspace.get(),
                      pool);
          EXPECT_LT(relative_error(o, expected.o), 1e-12);
          EXPECT_LT(relative_error(kv, expected.kv), 1e-12);
          EXPECT_LT(relative_error(z, expected.z), 1e-12);

          std::vector<double> dq(raw.q.size()), dk(raw.k.size()), dv(raw.v.size()), dg(raw.log_decay.size());
          std::vector<double> dprojection(projection.size()), dweights(weights.size());
          auto do_o = grad_o, do_kv = grad_kv, do_z = grad_z;
          BackwardArguments args;
          args.grad_o = mapped.queries(do_o, 7), args.grad_kv = mapped.state_view(do_kv);
          args.grad_z = mapped.z_view(do_z);
          args.dq = raw.queries(dq, channels), args.dk = raw.keys(dk, channels), args.dv = raw.keys(dv, 7);
          args.dlog_decay = mapped.decay_view(dg);
          args.dprojection = in.projection, args.dprojection.data = dprojection.data();
          args.dweights = in.weights, args.dweights.data = dweights.data();
          const Plan backward = plan_backward(s, threads);
          const std::unique_ptr<char[]> scratch(new char[workspace_bytes_backward(backward)]);
          run_backward(backward, in, args, scratch.get(), pool);
          EXPECT_LT(relative_error(dq, want_q), 1e-11);
          EXPECT_LT(relative_error(dk, want_k), 1e-11);
          EXPECT_LT(relative_error(dv, gradients.dv), 1e-12);
          EXPECT_LT(relative_error(dg, gradients.dlog_decay), 1e-11);
          EXPECT_LT(relative_error(dprojection, want_projection), 1e-11);
          EXPECT_LT(relative_error(dweights, want_weights), 1e-11);
        }
      }
    }
  }
}

TEST(LinearAttention, StepsEqualTheScan) {
  for (const Options& options : all_options()) {
    Problem<float, float> problem(shape(3, 9, 4, 2, 7, 12), options);
    const auto scanned = problem.run(serial(), 1);
    const Sizes& s = problem.sizes;
    std::vector<float> kv(scanned.kv.size(), 0.0f), z(scanned.z.size(), 0.0f), o(scanned.o.size());
    if (options.initial) kv = problem.kv0, z = problem.z0;
    for (i64 t = 0; t < s.time; ++t) {
      StepArguments args = token_of(problem.inputs(), problem.queries(o, s.value_dim), t);
      args.kv = problem.state_view(kv), args.z = problem.z_view(z);
      run_step(s, args, thread_pool(2));
    }
    const std::vector<double> expected_o(scanned.o.begin(), scanned.o.end());
    const std::vector<double> expected_kv(scanned.kv.begin(), scanned.kv.end());
    EXPECT_LT(relative_error(o, expected_o), 2e-6);
    EXPECT_LT(relative_error(kv, expected_kv), 2e-6);
  }
}

}  // namespace freqrank::linear_attention
