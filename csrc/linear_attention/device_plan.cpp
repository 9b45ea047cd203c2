#include <algorithm>
#include <initializer_list>
#include <sstream>
#include <stdexcept>

#include "linear_attention/device.h"
#include "linear_attention/device/fma_layout.h"
#include "linear_attention/device/mma_layout.h"

namespace freqrank::linear_attention {

namespace {

using i64 = std::int64_t;

// A split sequence is read once more for the states of its segments; each has at least this many chunks.
constexpr i64 kLeastChunks = 4;
// The decay's gradient is summed up anew at this many tokens, so that rounding does not pile up over a long sequence.
constexpr i64 kDecayTokens = 512;
// Estimates, to be measured: what part of the memory's rate a scan reaches, what part of a full SM's time a block takes
// that is alone on it, and what the states' pass costs beside a scan (it reads half and does a third of the
// arithmetic).
constexpr double kTensorCoreReach = 0.6, kFmaReach = 0.15, kAloneCost = 0.4, kStatesCost = 0.45;
// Tokens of a tile of the map's gradient, and about how many blocks an SM gets of it.
constexpr i64 kMapTokens = 64, kMapBlocks = 2;
// Estimates err: only a clear gain is worth the states' memory.
constexpr double kSplitGain = 0.75;

i64 ceil_div(i64 a, i64 b) { return (a + b - 1) / b; }

struct Roles {
  bool rows_are_queries, out;  // where rows are not queries, columns are, and the order is reverse
  int depth, width;
  bool map_depth;  // whether the features of a map are the depth, of columns and rows, or the width, of values
};

Roles roles_of(Role role, const Sizes& s) {
  const int k = static_cast<int>(s.key_dim), v = static_cast<int>(s.value_dim);
  switch (role) {
    case Role::forward: return {true, true, k, v, true};
    case Role::states: return {true, false, k, v, true};
    case Role::query_gradient: return {true, true, v, k, false};
    case Role::key_gradient: return {false, true, v, k, false};
    case Role::value_gradient: return {false, true, k, v, true};
    case Role::state_gradients: return {false, false, v, k, false};
  }
  throw std::logic_error("linear_attention: no such role");
}

int blocks_per_sm(const DevicePlan& plan, const DevicePlan::Scan& scan) {
  const int by_shared = plan.limits.shared_bytes_per_sm / (scan.shared_bytes + 1024);
  const int by_threads = plan.limits.threads_per_sm / scan.threads;
  const int by_registers =
      plan.kernel == ScanKernel::tensor_cores ? kMmaShapes[plan.shape].min_blocks : 65536 / (scan.threads * 128);
  return std::max(1, std::min({by_shared, by_threads, by_registers}));
}

DevicePlan::Scan scan_of(const DevicePlan& plan, Role role) {
  const Sizes& s = plan.problem.sizes;
  const Roles roles = roles_of(role, s);
  DevicePlan::Scan scan;
  scan.role = role;
  scan.depth = roles.depth, scan.width = roles.width;
  const int group = static_cast<int>(s.heads / s.state_heads);
  scan.row_heads = roles.rows_are_queries && roles.out ? group : 1;
  scan.column_heads = roles.rows_are_queries ? 1 : group;
  scan.rows_per_block = scan.row_heads;
  if (plan.kernel == ScanKernel::tensor_cores) {
    const MmaShape& shape = kMmaShapes[plan.shape];
    const MmaLayout layout = mma_layout(shape);
    scan.tile = shape.tile, scan.chunk = shape.chunk, scan.threads = 32 * shape.warps;
    scan.shared_bytes = layout.bytes;
    if (scan.column_heads > 1 && roles.out) scan.shared_bytes = layout.parked + layout.parked_bytes;
  } else {
    const FmaLayout layout = fma_layout(scan.depth, scan.width, s.double_precision, plan.limits);
    scan.tile = layout.tile, scan.chunk = layout.chunk, scan.threads = layout.threads;
    scan.shared_bytes = layout.shared_bytes;
  }
  scan.width_tiles = static_cast<int>(ceil_div(scan.width, scan.tile));
  if (plan.maps()) scan.mapped = roles.map_depth && roles.out ? 2 : 1;
  return scan;
}

// Whether one block of every scan that the pass may need has room on this GPU.
bool fits(const DevicePlan& plan) {
  for (Role role : {Role::forward, Role::states, Role::query_gradient, Role::key_gradient, Role::value_gradient,
                    Role::state_gradients}) {
    const bool needed = role == Role::states || (role == Role::forward) != plan.problem.backward;
    if (needed && scan_of(plan, role).shared_bytes > plan.limits.shared_bytes) return false;
  }
  return true;
}

// Tensor cores where there is a shape that the heads fit into and that fits the GPU.
void choose_kernel(DevicePlan& plan) {
  const Sizes& s = plan.problem.sizes;
  const i64 larger = std::max({s.key_dim, s.value_dim, s.channels});
  const auto makes_features = [](const MmaShape& shape) { return shape.depth == shape.tile; };
  plan.kernel = ScanKernel::tensor_cores;
  for (plan.shape = 0; plan.problem.half && plan.shape < kMmaShapeCount; ++plan.shape)
    if (kMmaShapes[plan.shape].depth >= larger && (!plan.maps() || makes_features(kMmaShapes[plan.shape])) &&
        fits(plan))
      return;
  if (plan.maps())
    throw std::invalid_argument("linear_attention: no kernel of this GPU makes " + std::to_string(s.key_dim) +
                                " features of " + std::to_string(s.channels) + " channels for V = " +
                                std::to_string(s.value_dim) + "; up to 128 of 16 bits are allowed where there is room");
  plan.shape = 0;
  plan.kernel = ScanKernel::fma;
  if (!fits(plan))
    throw std::invalid_argument("linear_attention: K = " + std::to_string(s.key_dim) + " and V = " +
                                std::to_string(s.value_dim) + " need more shared memory than this GPU's " +
                                std::to_string(plan.limits.shared_bytes) + " bytes a block; smaller ones are allowed");
}

// Query heads that share a state are spread over blocks where there are too few blocks for the GPU.
void spread_rows(const DevicePlan& plan, DevicePlan::Scan& scan, i64 segments) {
  const i64 blocks = segments * plan.problem.sizes.state_heads * scan.width_tiles;
  const i64 wanted = i64{plan.limits.sms} * blocks_per_sm(plan, scan);
  while (scan.rows_per_block > 1 && blocks * ceil_div(scan.row_heads, scan.rows_per_block) < wanted)
    scan.rows_per_block = (scan.rows_per_block + 1) / 2;
  scan.row_blocks = static_cast<int>(ceil_div(scan.row_heads, scan.rows_per_block));
}

// Rows are read by every tile of the width, columns and values by every block of rows too, values a tile each.
void count_bytes(const DevicePlan& plan, DevicePlan::Scan& scan) {
  const Sizes& s = plan.problem.sizes;
  const i64 element = plan.problem.half ? 2 : s.double_precision ? 8 : 4;
  const i64 numbers = s.batch * s.time * s.state_heads * element;
  const Roles roles = roles_of(scan.role, s);
  const bool to_features = plan.maps() && !roles.map_depth;
  const i64 written = (plan.parts() && !roles.rows_are_queries) || to_features ? (s.double_precision ? 8 : 4) : element;
  const i64 depth = plan.maps() && roles.map_depth ? s.channels : scan.depth;
  const i64 width = to_features ? s.channels : scan.width;
  scan.read_bytes = numbers * scan.row_blocks * scan.column_heads * (depth * scan.width_tiles + width);
  if (roles.out) {
    scan.read_bytes += numbers * scan.row_heads * depth * scan.width_tiles;
    scan.write_bytes = numbers / element * written * scan.row_heads * scan.width;
  }
}

// How long a scan of `blocks` blocks takes that do `chunks` chunks each, in times that memory takes for a chunk's four
// tensors. A full GPU moves `reach` of what memory could; blocks alone on their SM do more each than they do together.
double scan_time(const DevicePlan& plan, const DevicePlan::Scan& scan, i64 blocks, i64 chunks) {
  const double reach = plan.kernel == ScanKernel::tensor_cores ? kTensorCoreReach : kFmaReach;
  const i64 together = blocks_per_sm(plan, scan), at_once = plan.limits.sms * together;
  const i64 left = blocks % at_once;
  double waves = static_cast<double>(blocks / at_once);
  if (left > 0)
    waves += kAloneCost +
             (1 - kAloneCost) * static_cast<double>(ceil_div(left, plan.limits.sms)) / static_cast<double>(together);
  return waves * static_cast<double>(chunks * at_once) / reach;
}

// How many segments a sequence is cut into.
i64 segments_of(const DevicePlan& plan, DevicePlan::Scan scan) {
  const Sizes& s = plan.problem.sizes;
  if (s.sequences == 0) return 1;
  const i64 chunks = ceil_div(ceil_div(s.batch * s.time, s.sequences), scan.chunk);
  spread_rows(plan, scan, s.sequences);
  const i64 blocks = s.sequences * s.state_heads * scan.width_tiles * scan.row_blocks;
  const i64 most_blocks = 4 * i64{plan.limits.sms} * blocks_per_sm(plan, scan);
  // a segment's state is written, carried and read: four times, against four rows of a chunk
  const double element = plan.problem.half ? 2 : s.double_precision ? 8 : 4;
  const double state = static_cast<double>(s.key_dim * s.value_dim) * (s.double_precision ? 8 : 4) * 4 /
                       (2 * static_cast<double>((s.key_dim + s.value_dim) * scan.chunk) * element);
  i64 best = 1;
  double least = kSplitGain * scan_time(plan, scan, blocks, chunks);
  for (i64 count = 2; count <= chunks / kLeastChunks && blocks * count <= most_blocks; ++count) {
    const double cost = scan_time(plan, scan, blocks * count, ceil_div(chunks, count)) * (1 + kStatesCost) +
                        static_cast<double>(blocks * count) / scan.width_tiles * state;
    if (cost < least) best = count, least = cost;
  }
  return best;
}

}  // namespace

const char* name(Role role) {
  switch (role) {
    case Role::forward: return "forward";
    case Role::states: return "states";
    case Role::query_gradient: return "query gradient";
    case Role::key_gradient: return "key gradient";
    case Role::value_gradient: return "value gradient";
    case Role::state_gradients: return "state gradients";
  }
  return "?";
}

DevicePlan plan_device(const DeviceProblem& problem, const GpuLimits& limits) {
  const Sizes& s = problem.sizes;
  DevicePlan plan;
  plan.problem = problem;
  plan.limits = limits;
  plan.with_z = problem.with_z || s.normalize;
  if (plan.maps() && s.decay_gradient)
    throw std::invalid_argument("linear_attention: the gradient of a decay is not made together with features");
  choose_kernel(plan);

  const Role main = problem.backward ? Role::query_gradient : Role::forward;
  i64 segments = segments_of(plan, scan_of(plan, main));
  const i64 chunk = scan_of(plan, main).chunk;
  const i64 average = s.sequences == 0 ? 0 : ceil_div(s.batch * s.time, s.sequences);
  plan.why = segments > 1 ? "few heads: sequences are split over blocks" : "splitting sequences would not pay";
  if (s.decay_gradient) {
    segments = std::max(segments, ceil_div(average, kDecayTokens));
    plan.split = true;
    plan.why = "split for the gradient of the decay";
  }
  plan.split = plan.split || segments > 1;
  const i64 length = std::max(chunk, ceil_div(ceil_div(average, segments), chunk) * chunk);
  if (problem.with_offsets) {
    plan.segment_length = plan.split ? length : s.time + 1;
    // at least one, to make NaN of tokens that no sequence has
    plan.slots = std::max<i64>(1, (plan.split ? s.time / length : 0) + s.sequences);
  } else {
    plan.segment_length = plan.split ? length : std::max<i64>(s.time, 1);
    plan.segments_per_sequence = std::max<i64>(1, ceil_div(s.time, plan.segment_length));
    plan.slots = s.sequences * plan.segments_per_sequence;
  }

  const auto add = [&](Role role) {
    DevicePlan::Scan& scan = plan.scan[plan.scans++];
    scan = scan_of(plan, role);
    spread_rows(plan, scan, plan.slots);
    scan.blocks = plan.slots * s.state_heads * scan.row_blocks * scan.width_tiles;
    count_bytes(plan, scan);
  };
  if (plan.split) add(Role::states);
  if (plan.split && problem.backward) add(Role::state_gradients);
  add(main);
  if (problem.backward) add(Role::key_gradient), add(Role::value_gradient);

  std::size_t used = 0;
  const auto take = [&](bool wanted, std::initializer_list<i64> sizes) {
    const std::size_t begin = used;
    i64 bytes = wanted ? 1 : 0;
    for (i64 size : sizes) bytes *= size;
    used += (static_cast<std::size_t>(bytes) + kDeviceAlign - 1) / kDeviceAlign * kDeviceAlign;
    return begin;
  };
  const i64 real = s.double_precision ? 8 : 4;
  const bool gradients = plan.split && problem.backward;
  plan.offsets_at = take(problem.with_offsets, {3 * plan.slots + 2 * s.sequences, 8});
  plan.states_at = take(plan.split, {plan.slots, s.state_heads, s.key_dim, s.value_dim, real});
  plan.states_z_at = take(plan.split && plan.with_z, {plan.slots, s.state_heads, s.key_dim, real});
  plan.gradients_at = take(gradients, {plan.slots, s.state_heads, s.key_dim, s.value_dim, real});
  plan.gradients_z_at = take(gradients && plan.with_z, {plan.slots, s.state_heads, s.key_dim, real});
  plan.decay_at = take(plan.split, {plan.slots, s.state_heads, 8});
  plan.query_scale_at = take(problem.backward && s.normalize, {s.batch, s.time, s.heads, real});
  plan.query_add_at = take(problem.backward && s.normalize, {s.batch, s.time, s.heads, real});
  if (problem.backward) {
    const i64 key_tiles = ceil_div(s.key_dim, plan.scan[plan.scans - 2].tile);
    const i64 heads = plan.parts() ? s.state_heads : s.key_heads;
    plan.query_dots_at = take(s.decay_gradient, {key_tiles, s.batch, s.time, s.heads, real});
    plan.key_dots_at = take(s.decay_gradient, {key_tiles, s.batch, s.time, heads, real});
    plan.pairs_at = take(s.decay_gradient, {s.batch, s.time, s.state_heads, real});
    plan.head_sums_at = take(s.decay_gradient, {plan.slots, s.state_heads, 8});
    plan.final_at = take(s.decay_gradient, {s.sequences, s.state_heads, s.key_dim, s.value_dim, real});
    plan.final_z_at = take(s.decay_gradient && plan.with_z, {s.sequences, s.state_heads, s.key_dim, real});
    plan.key_parts_at = take(plan.parts(), {s.batch, s.time, s.state_heads, s.key_dim, real});
    plan.value_parts_at = take(plan.parts(), {s.batch, s.time, s.state_heads, s.value_dim, real});
  }
  if (plan.maps()) {
    const i64 depth = kMmaShapes[plan.shape].depth;
    plan.map_at = take(true, {s.key_heads, depth, depth, 4});
    plan.map_weights_at = take(true, {s.key_heads, depth, 4});
    plan.transposed_map_at = take(problem.backward, {s.key_heads, depth, depth, 4});
    plan.query_features_at = take(problem.backward, {s.batch, s.time, s.heads, s.key_dim, 4});
    plan.key_features_at = take(problem.backward, {s.batch, s.time, s.key_heads, s.key_dim, 4});
  }
  if (plan.maps() && problem.backward) {
    // a block a tile of tokens, or where the map's gradient is summed up, as many as keep the GPU busy
    const i64 tiles = s.batch * ceil_div(s.time, kMapTokens);
    const auto parts = [&](i64 heads) {
      return static_cast<int>(s.map_gradient ? std::min(tiles, ceil_div(kMapBlocks * plan.limits.sms, heads)) : tiles);
    };
    plan.query_map_parts = parts(s.heads);
    plan.key_map_parts = parts(s.key_heads);
    plan.map_slots = static_cast<int>(s.heads / s.key_heads) * plan.query_map_parts + plan.key_map_parts;
    plan.projection_sums_at = take(s.map_gradient, {s.key_heads, plan.map_slots, s.channels, s.key_dim, 4});
    plan.weight_sums_at = take(s.map_gradient, {s.key_heads, plan.map_slots, s.key_dim, 4});
  }
  plan.bytes = used;
  return plan;
}

std::size_t workspace_bytes(const DevicePlan& plan) { return plan.bytes; }

std::string describe(const DevicePlan& plan) {
  const Sizes& s = plan.problem.sizes;
  std::ostringstream out;
  out << (plan.problem.backward ? "linear attention, backward" : "linear attention") << " of " << s.sequences
      << " sequences of " << s.heads << " heads (" << s.state_heads << " states), K = " << s.key_dim
      << ", V = " << s.value_dim << ": "
      << (plan.kernel == ScanKernel::tensor_cores ? "tensor cores" : "fused multiply-adds") << "; " << plan.why << '\n';
  if (plan.split)
    out << "  segments of " << plan.segment_length << " tokens, states carried through " << plan.slots << " slots\n";
  for (int i = 0; i < plan.scans; ++i) {
    const DevicePlan::Scan& scan = plan.scan[i];
    out << "  " << name(scan.role) << ": " << scan.blocks << " blocks of " << scan.threads << " threads, "
        << scan.shared_bytes << " bytes of shared memory, chunks of " << scan.chunk << " tokens";
    if (scan.width_tiles > 1) out << ", " << scan.width_tiles << " tiles of " << scan.tile << " columns";
    if (scan.row_heads > 1) out << ", " << scan.rows_per_block << " of " << scan.row_heads << " query heads a block";
    if (scan.column_heads > 1) out << ", " << scan.column_heads << " query heads one after another";
    if (scan.mapped > 0) out << ", features made on the way";
    out << '\n';
  }
  out << "  workspace of " << plan.bytes << " bytes\n";
  return out.str();
}

}  // namespace freqrank::linear_attention
