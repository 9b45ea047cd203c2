#pragma once
// The tables of a plan, made on the device at the start of every run: nothing is copied from the host, nothing outlives
// the workspace. Roots of unity are computed in double and rounded once. The spectrum of Bluestein's chirp is an FFT in
// double, of length L = parts m: block b makes the outputs k = b mod parts, which are the FFT of length m of
//   y[j] = sum_t x[j + m t] exp(-2 pi i (j + m t) b / L).

#include "dct/device/params.h"
#include "dct/unit_root.h"

namespace freqrank::dct::device {

SIMT_DEVICE void store_entry(simt::global_bytes to, bool wide, Index at, double re, double im) {
  if (wide) {
    to.as<double>().store_vector<2>(2 * at, {{re, im}});
  } else {
    to.as<float>().store_vector<2>(2 * at, {{static_cast<float>(re), static_cast<float>(im)}});
  }
}

struct FillTables {
  static constexpr const char* name = "dct_fill_tables";
  static constexpr int max_threads = 256, min_blocks = 2, max_runs = 32;
  struct Run {
    simt::global_bytes to;
    Index begin;  // the first thread that works on it
    Index first, step, square, period;
    bool wide;
  };
  struct Params {
    int runs = 0;
    Index count = 0;
    Run run[max_runs];
  };

  SIMT_DEVICE static void run(const Params& p) {
    const Index at = simt::block() * simt::threads() + simt::thread();
    if (at >= p.count) return;
    int r = p.runs - 1;
    while (p.run[r].begin > at) --r;
    const Run& run = p.run[r];
    const Index k = at - run.begin;
    const UnitRoot w = unit_root(run.first + (run.step + run.square * k) * k, run.period);
    store_entry(run.to, run.wide, k, w.cos, -w.sin);
  }
};

struct FillSpectrum {
  static constexpr const char* name = "dct_fill_spectrum";
  static constexpr int max_threads = 256, min_blocks = 2, max_stages = 16, max_length = 1024;
  struct Params {
    simt::global_bytes to;
    bool wide;
    simt::global<const double> chirp, roots;  // exp(-pi i k^2 / n), k < n; exp(-2 pi i k / length), k < length
    Index n, length, inputs, outputs;         // the filter reaches from -inputs to outputs
    int part_length, stages;
    int radix[max_stages];
  };

  SIMT_DEVICE static void run(const Params& p) {
    const int m = p.part_length;
    const Index part = simt::block(), parts = simt::blocks();
    simt::shared<double> x = simt::shared_array<double>(0, 2 * m), y = simt::shared_array<double>(16 * m, 2 * m);
    for (int j = simt::thread(); j < m; j += simt::threads()) {
      double re = 0, im = 0;
      for (Index k = j; k < p.length; k += m) {
        const Index mirrored = k < p.outputs ? k : p.length - k;
        if (k >= p.outputs && mirrored >= p.inputs) continue;
        const auto c = p.chirp.load_vector<2>(2 * mirrored), w = p.roots.load_vector<2>(2 * (k * part % p.length));
        re += c[0] * w[0] + c[1] * w[1];
        im += c[0] * w[1] - c[1] * w[0];
      }
      x.store_vector<2>(2 * j, {{re, im}});
    }
    // Stockham's order, decimation in frequency, each output as a sum of its own
    int left = m, done = 1;
    for (int stage = 0; stage < p.stages; ++stage) {
      simt::barrier();
      const int radix = p.radix[stage], rest = left / radix;
      for (int at = simt::thread(); at < m; at += simt::threads()) {
        const int q = at % done, j = at / done % radix, from = at / (done * radix);
        double re = 0, im = 0;
        for (int t = from; t < left; t += rest) {
          const auto a = x.load_vector<2>(2 * (q + done * t));
          const auto w = p.roots.load_vector<2>(2 * (static_cast<Index>(j) * t % left * done * parts));
          re += a[0] * w[0] - a[1] * w[1];
          im += a[0] * w[1] + a[1] * w[0];
        }
        y.store_vector<2>(2 * at, {{re, im}});
      }
      const simt::shared<double> other = x;
      x = y;
      y = other;
      left = rest;
      done *= radix;
    }
    simt::barrier();
    const double inverse = 1.0 / static_cast<double>(p.length);
    for (int k = simt::thread(); k < m; k += simt::threads()) {
      const auto a = x.load_vector<2>(2 * k);
      store_entry(p.to, p.wide, part + parts * k, a[0] * inverse, a[1] * inverse);
    }
  }
};

template <class Queue>
void enqueue_tables(const Step& step, const StepPointers& pointers, Queue& queue) {
  char* const tables = static_cast<char*>(const_cast<void*>(pointers.tables));
  double* const scratch = static_cast<double*>(pointers.scratch);
  const std::int64_t entry = step.wide ? 16 : 8;
  const auto target = [&](const TableRun& run) {
    return queue.view_bytes(static_cast<void*>(tables + run.at * entry), 0, run.count * entry);
  };

  FillTables::Params fill;
  const auto flush = [&] {
    queue.template launch<FillTables>({(fill.count + 255) / 256, 256, 0}, fill);
    fill = {};
  };
  const auto add = [&](const TableRun& run, simt::global_bytes to, bool wide) {
    if (fill.runs == FillTables::max_runs) flush();
    fill.run[fill.runs++] = {to, fill.count, run.first, run.step, run.square, run.period, wide};
    fill.count += run.count;
  };
  // A spectrum is made from doubles in the scratch: the chirp, then the roots.
  double* free = scratch;
  for (const TableRun& run : step.tables) {
    if (run.kind != TableRun::spectrum) {
      add(run, target(run), step.wide);
      continue;
    }
    TableRun chirp, roots;
    chirp.count = run.period;
    chirp.step = 0;
    chirp.square = 1;
    chirp.period = 2 * run.period;
    roots.count = roots.period = run.count;
    for (const TableRun& input : {chirp, roots}) {
      add(input, queue.view_bytes(static_cast<void*>(free), 0, 16 * input.count), true);
      free += 2 * input.count;
    }
  }
  flush();

  free = scratch;
  for (const TableRun& run : step.tables) {
    if (run.kind != TableRun::spectrum) continue;
    FillSpectrum::Params p{};
    p.to = target(run);
    p.wide = step.wide;
    p.n = run.period;
    p.inputs = run.inputs;
    p.outputs = run.outputs;
    p.length = run.count;
    p.chirp = queue.template view<const double>(free, 0, 2 * p.n);
    p.roots = queue.template view<const double>(free + 2 * p.n, 0, 2 * p.length);
    std::int64_t m = p.length;  // smooth
    for (std::int64_t radix = 2; m > FillSpectrum::max_length; ++radix) {
      while (m > FillSpectrum::max_length && m % radix == 0) m /= radix;
    }
    p.part_length = static_cast<int>(m);
    int rest = p.part_length;
    const auto take = [&](int radix) {
      for (; rest % radix == 0; rest /= radix) p.radix[p.stages++] = radix;
    };
    take(4);
    for (int radix = 2; rest > 1; ++radix) take(radix);
    queue.template launch<FillSpectrum>({p.length / m, 256, static_cast<int>(32 * m)}, p);
    free += 2 * (p.n + p.length);
  }
}

}  // namespace freqrank::dct::device
