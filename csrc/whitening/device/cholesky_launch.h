#pragma once
// Runs a plan of cholesky_device.h on a queue: a CUDA stream or the host executor. Allocates nothing, waits for
// nothing.

#include <algorithm>
#include <utility>

#include "whitening/cholesky_device.h"
#include "whitening/device/cholesky_layout.h"
#include "whitening/device/cholesky_params.h"
#include "whitening/device/cholesky_progress.h"
#include "whitening/device/triangular_params.h"

namespace freqrank::whitening::device {

// Defined in their headers and compiled in files of their own (whitening/launch/).
template <class T, int N, class Queue>
void enqueue_cholesky_warp(const CholeskySource& source, const CholeskyResult<T>& result,
                           const RightHandSides<T>& sides, Index blocks, Queue& queue);
template <class T, class Queue>
void enqueue_cholesky_block(const CholeskySource& source, const CholeskyResult<T>& result,
                            const RightHandSides<T>& sides, Index blocks, int threads, Queue& queue);
template <class Queue>
void enqueue_cholesky_means(const CholeskySource& source, simt::global<double> means, Queue& queue);
template <class T, class Queue>
void enqueue_cholesky_copy(const CholeskySource& source, simt::global<const double> means, simt::global<T> factor,
                           const CholeskyProgress& progress, int level, Queue& queue);
template <class T, class Queue>
void enqueue_cholesky_corner(simt::global<T> factor, Index count, int n, int rows, const CholeskyProgress& progress,
                             simt::global<int> words, Queue& queue);
template <class T, class Queue>
void enqueue_cholesky_finish(const CholeskySource& source, const CholeskyResult<T>& result,
                             simt::global<const int> words, Queue& queue);
template <class T, class Queue>
void enqueue_triangular_solve(TriangularSolveParams<T> p, Index most_blocks, Queue& queue);
template <class T, class Queue>
void enqueue_triangular_update(TriangularUpdateParams<T> p, Queue& queue);

// Blocks beyond these are not launched; those that are do their work.
constexpr Index kMostBlocks = Index{1} << 30;

template <class T>
Matrices<const T> to_read(const Matrices<T>& m) {
  Matrices<const T> out;
  static_cast<Placement&>(out) = m;
  out.data = m.data;
  return out;
}

template <class T, class Queue>
void run_panels(const DeviceCholeskyPlan& plan, const CholeskySource& source, const CholeskyResult<T>& result,
                void* workspace, Queue& queue) {
  const Index count = source.count, n = source.n;
  char* const base = static_cast<char*>(workspace);
  simt::global<double> means;
  if (plan.ladder) {
    means = queue.view(reinterpret_cast<double*>(base + plan.means_at), 0, count);
    enqueue_cholesky_means(source, means, queue);
  }
  // for even and for odd steps
  const Index words = source.levels * count;
  const simt::global<int> all = queue.view(reinterpret_cast<int*>(base + plan.words_at), 0, 2 * words);
  const auto words_of = [&](Index step) { return all + step % 2 * words; };
  const Index last = (n - 1) / plan.rows;
  Matrices<T> factor;
  factor.row = n, factor.column = 1;
  factor.batch.dims = 1;
  factor.batch.sizes[0] = count, factor.batch.strides[0] = n * n;
  factor.data = result.factor;
  const auto rows_of = [&](Index step) { return static_cast<int>(std::min<Index>(plan.rows, n - step * plan.rows)); };
  for (int level = 0; level < source.levels; ++level) {
    CholeskyProgress progress;
    if (level > 0) progress.before = words_of(last) + (level - 1) * count;
    enqueue_cholesky_copy<T>(source, means, result.factor, progress, level, queue);
    enqueue_cholesky_corner<T>(result.factor, count, source.n, rows_of(0), progress, words_of(0) + level * count,
                               queue);
    for (Index step = 0; step < last; ++step) {
      progress.now = words_of(step) + level * count;
      const Index right = (step + 1) * plan.rows;
      TriangularSolveParams<T> solve{};
      solve.u = solve.b = to_read(factor), solve.x = factor;
      solve.count = count, solve.columns = n;
      solve.first_row = static_cast<int>(step * plan.rows), solve.rows = plan.rows, solve.first_column = right;
      solve.progress = progress;
      enqueue_triangular_solve(solve, kMostBlocks, queue);
      TriangularUpdateParams<T> update{};
      update.u = update.x = update.from = to_read(factor), update.to = factor;
      update.count = count, update.first_row = solve.first_row, update.depth = plan.rows;
      update.row = update.column = right, update.row_end = update.column_end = n;
      update.upper = true;
      update.progress = progress;
      update.next_rows = rows_of(step + 1), update.next_words = words_of(step + 1) + level * count;
      enqueue_triangular_update(update, queue);
    }
  }
  enqueue_cholesky_finish<T>(source, result, words_of(last), queue);
}

template <class T, class Queue>
void run_source(const DeviceCholeskyPlan& plan, const CholeskySource& source, const CholeskyResult<T>& result,
                const RightHandSides<T>& sides, void* workspace, Queue& queue) {
  const Index count = source.count;
  const auto blocks_of = [&](Index matrices) { return std::min(kMostBlocks, (count + matrices - 1) / matrices); };
  if (plan.kernel == CholeskyKernel::panels) {
    if (count > 0) run_panels(plan, source, result, workspace, queue);
  } else if (plan.kernel == CholeskyKernel::block) {
    enqueue_cholesky_block(source, result, sides, blocks_of(1), plan.threads, queue);
  } else if (plan.columns == 8) {
    enqueue_cholesky_warp<T, 8>(source, result, sides, blocks_of(warp_kernel_threads / 8), queue);
  } else if (plan.columns == 16) {
    enqueue_cholesky_warp<T, 16>(source, result, sides, blocks_of(warp_kernel_threads / 16), queue);
  } else {
    enqueue_cholesky_warp<T, 32>(source, result, sides, blocks_of(warp_kernel_threads / 32), queue);
  }
}

template <class T, class Queue>
void run_triangular(const DeviceTriangularPlan& plan, const TriangularArguments& args, Queue& queue) {
  const Index n = plan.n, columns = plan.columns, count = plan.batch.count();
  if (n == 0 || columns == 0 || count == 0) return;
  const Index rows = args.left ? n : columns, across = args.left ? columns : n;
  auto u = matrices_of<const T>(args.a, plan.batch, n, n, queue);
  auto b = matrices_of<const T>(args.b, plan.batch, rows, across, queue);
  auto x = matrices_of<T>(args.x, plan.batch, rows, across, queue);
  bool upper = args.upper;
  const auto transpose = [](Placement& m) { std::swap(m.row, m.column); };
  // U^T X = B is what kernels solve. X A = B is A^T X^T = B^T.
  if (!args.left) {
    transpose(b), transpose(x);
  } else {
    transpose(u), upper = !upper;
  }
  if (!upper) {  // from the last row and column to the first, a lower triangle is an upper one
    u.data = u.data + (n - 1) * (u.row + u.column);
    u.row = -u.row, u.column = -u.column;
    b.data = b.data + (n - 1) * b.row, b.row = -b.row;
    x.data = x.data + (n - 1) * x.row, x.row = -x.row;
  }
  for (Index first = 0; first < n; first += plan.rows) {
    TriangularSolveParams<T> solve{};
    solve.u = u, solve.b = first == 0 ? b : to_read(x), solve.x = x;
    solve.count = count, solve.columns = columns;
    solve.first_row = static_cast<int>(first), solve.rows = static_cast<int>(std::min<Index>(plan.rows, n - first));
    solve.unit_diagonal = args.unit_triangular;
    enqueue_triangular_solve(solve, kMostBlocks, queue);
    const Index below = first + solve.rows;
    if (below == n) break;
    TriangularUpdateParams<T> update{};
    update.u = u, update.x = to_read(x), update.from = first == 0 ? b : to_read(x), update.to = x;
    update.count = count, update.first_row = solve.first_row, update.depth = solve.rows;
    update.row = below, update.row_end = n, update.column_end = columns;
    enqueue_triangular_update(update, queue);
  }
}

template <class T, class Queue>
void run_cholesky(const DeviceCholeskyPlan& plan, const CholeskyArguments& args, void* workspace, Queue& queue) {
  const CholeskySource source = source_of(args.a, plan.batch, plan.n, nullptr, false, queue);
  const Index count = source.count, n = plan.n;
  CholeskyResult<T> result{};
  result.factor = queue.view(static_cast<T*>(args.factor), 0, count * n * n);
  result.info = queue.view(args.info, 0, count);
  result.spoil = plan.right_sides != kNoRightSides;
  RightHandSides<T> sides{};
  if (plan.width > 0) sides = right_sides_of<T>(args.b, args.x, plan.batch, n, plan.right_sides, plan.width, queue);
  run_source(plan, source, result, sides, workspace, queue);
  if (plan.solve.launches == 0) return;
  const FactorSolves solves(plan.batch, n, args);
  for (const auto& solve : solves.each) run_triangular<T>(plan.solve, solve, queue);
}

template <class Queue>
void run_device_cholesky(const DeviceCholeskyPlan& plan, const CholeskyArguments& args, void* workspace, Queue& queue) {
  if (plan.dtype == Dtype::float32) {
    run_cholesky<float>(plan, args, workspace, queue);
  } else {
    run_cholesky<double>(plan, args, workspace, queue);
  }
}

template <class Queue>
void run_device_whiten(const DeviceCholeskyPlan& plan, const WhitenArguments& args, void* workspace, Queue& queue) {
  const CholeskySource source = source_of(args.gram, plan.batch, plan.n, args.scale, true, queue);
  const Index count = source.count, n = plan.n;
  CholeskyResult<double> result{};
  result.factor = queue.view(args.factor, 0, count * n * n);
  result.info = queue.view(args.info, 0, count);
  result.damping = queue.view(args.damping, 0, count);
  result.spoil = true;
  run_source<double>(plan, source, result, {}, workspace, queue);
}

template <class Queue>
void run_device_triangular(const DeviceTriangularPlan& plan, const TriangularArguments& args, Queue& queue) {
  if (plan.dtype == Dtype::float32) {
    run_triangular<float>(plan, args, queue);
  } else {
    run_triangular<double>(plan, args, queue);
  }
}

}  // namespace freqrank::whitening::device
