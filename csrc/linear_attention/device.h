#pragma once
// Linear attention on a GPU: what linear_attention.h describes, as a list of kernel launches. Host code without CUDA:
// plans can be made, read and tested anywhere; linear_attention/device/launch.h runs them, on CUDA or under the host
// executor.
//
// Forward, dq, dk and dv are one kernel, the scan, with its operands in other places (device/params.h):
//
//   role             rows  columns  values  out   state         order
//   forward          q     k        v       o     S  [K,V]      forward
//   query_gradient   do    v        k       dq    S^T           forward
//   key_gradient     v     do       q       dk    D^T           reverse
//   value_gradient   k     q        do      dv    D  [K,V]      reverse
//
// with S the decayed sum of k v^T and D, the gradient of S, that of q do^T. Where the sequences are split, `states` and
// `state_gradients` sum up each segment, and a kernel of its own carries the sums from segment to segment.
//
// With a feature map the scan makes features of q and k itself, on tensor cores (device/feature_map.h). What the
// gradient scans give are then the gradients of features, from which a kernel of its own makes those of q, k and the
// map (device/map_gradient.h).

#include <cstddef>
#include <cstdint>
#include <string>

#include "common/gpu_limits.h"
#include "linear_attention/linear_attention.h"

namespace freqrank::linear_attention {

constexpr std::size_t kDeviceAlign = 256;

enum class Role { forward, states, query_gradient, key_gradient, value_gradient, state_gradients };
const char* name(Role role);

// How a scan is computed.
enum class ScanKernel {
  tensor_cores,  // 16-bit tensors: mma, the state in registers
  fma,           // everything else
};

// The shapes that the tensor-core kernel is compiled for: the state's depth, values' columns of a block, its warps,
// tokens of a chunk, and of those the ones whose outputs are in registers at a time; blocks of an SM.
struct MmaShape {
  int depth, tile, warps, chunk, rows, min_blocks;
};
constexpr MmaShape kMmaShapes[] = {{64, 64, 4, 64, 64, 3}, {128, 128, 4, 64, 32, 2}, {256, 128, 8, 32, 32, 1}};
constexpr int kMmaShapeCount = static_cast<int>(sizeof kMmaShapes / sizeof *kMmaShapes);

// What a GPU's plan must know beside the sizes.
struct DeviceProblem {
  Sizes sizes;  // decay_gradient: of the backward pass
  bool backward = false;
  bool half = false;          // q, k, v (and grad_o) all have this one 16-bit dtype, and features fit into it
  bool with_offsets = false;  // cu_seqlens are given
  bool with_z = false;        // forward: z is given or asked for; backward: its gradient is given
};

struct DevicePlan {
  DeviceProblem problem;
  GpuLimits limits;
  ScanKernel kernel = ScanKernel::fma;
  int shape = 0;  // of kMmaShapes

  // Segments of the sequences; one slot each. `split`: their states are summed up and carried in launches of their own.
  std::int64_t segment_length = 0, segments_per_sequence = 1, slots = 0;
  bool split = false;

  struct Scan {
    Role role = Role::forward;
    int depth = 0, width = 0;
    int tile = 0, width_tiles = 1, row_heads = 1, column_heads = 1, rows_per_block = 1, row_blocks = 1;
    int chunk = 0, threads = 0, shared_bytes = 0;
    std::int64_t blocks = 0;
    std::int64_t read_bytes = 0, write_bytes = 0;  // of q, k, v, o and their gradients; fma reads parts again
    int mapped = 0;                                // tiles of a chunk that features are made of
  };
  // In the order in which they run; `states` and `state_gradients` only where the sequences are split.
  static constexpr int max_scans = 5;
  int scans = 0;
  Scan scan[max_scans];
  const char* why = "";  // split or not

  // Workspace, bytes from its start.
  std::size_t offsets_at = 0;                        // int64 [slots,3] and, for each sequence, [N,2]: slots from, count
  std::size_t states_at = 0, states_z_at = 0;        // A [slots,Hs,K,V] and [slots,Hs,K]
  std::size_t gradients_at = 0, gradients_z_at = 0;  // the same of the gradients
  std::size_t final_at = 0, final_z_at = 0;          // A [N,Hs,K,V] and [N,Hs,K]: backward with decay_gradient
  std::size_t decay_at = 0;                          // double [slots,Hs]
  std::size_t query_scale_at = 0, query_add_at = 0;  // A [B,H,T]
  std::size_t query_dots_at = 0, key_dots_at = 0;    // A [tiles,B,H,T] and [tiles,B,Hk or Hs,T]
  std::size_t pairs_at = 0;                          // A [B,Hs,T]
  std::size_t head_sums_at = 0;                      // double [slots,Hs]
  std::size_t key_parts_at = 0, value_parts_at = 0;  // A [B,T,Hs,K] and [B,T,Hs,V] where Hs > Hk
  // With a feature map: fragments of the projection, and of its transpose, 4 bytes each [Hk or 1,depth,depth]; weights
  // float [Hk,depth]; the gradients of features float [B,T,H,K], [B,T,Hk,K]; sums of each block of the map's gradient,
  // float [Hk * map_slots,C,K] and [Hk * map_slots,K].
  std::size_t map_at = 0, transposed_map_at = 0, map_weights_at = 0;
  std::size_t query_features_at = 0, key_features_at = 0;
  std::size_t projection_sums_at = 0, weight_sums_at = 0;
  int query_map_parts = 0, key_map_parts = 0, map_slots = 0;  // blocks a head, and of a key head and its queries
  std::size_t bytes = 0;

  bool with_z = false;  // z is carried beside the state
  bool parts() const { return problem.sizes.state_heads > problem.sizes.key_heads; }
  bool maps() const { return problem.sizes.feature != Feature::none; }
};

// Throws std::invalid_argument where no kernel takes the sizes. Feature maps need tensor cores, channels, features and
// V up to 128, and go without the gradient of the decay.
DevicePlan plan_device(const DeviceProblem& problem, const GpuLimits& limits);
std::size_t workspace_bytes(const DevicePlan& plan);

// For people: a line a launch.
std::string describe(const DevicePlan& plan);

// What Inputs, ForwardOutputs and BackwardArguments do not hold, of a call with `normalize`: forward writes the last
// two, backward takes all. `rest`, what rounding took from o, is worth its memory where o has 16 bits; it may be
// absent.
struct Normalizer {
  View o;            // [B,T,H,V], what forward returned
  View denominator;  // [B,H,T] contiguous, of the arithmetic's dtype
  View rest;         // [B,T,H,V], dtype of o
};

}  // namespace freqrank::linear_attention
