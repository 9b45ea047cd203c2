#pragma once
// The CUDA back end: the operations of simt.h as intrinsics and PTX. The host's are in host.h.

#include <cuda_runtime_api.h>

#include <cstddef>
#include <string>
#include <type_traits>

#include "common/cuda_device.h"

namespace freqrank::simt {
inline namespace cuda {

// --- Where am I ---
SIMT_DEVICE int thread() { return static_cast<int>(threadIdx.x); }
SIMT_DEVICE int threads() { return static_cast<int>(blockDim.x); }
SIMT_DEVICE int lane() { return static_cast<int>(threadIdx.x) % warp_size; }
SIMT_DEVICE int warp() { return static_cast<int>(threadIdx.x) / warp_size; }
SIMT_DEVICE Index block() { return blockIdx.x; }
SIMT_DEVICE Index blocks() { return gridDim.x; }

SIMT_DEVICE void barrier() { __syncthreads(); }
SIMT_DEVICE void warp_barrier() { __syncwarp(); }

// --- Memory ---
template <class T>
class global {
 public:
  using Value = std::remove_const_t<T>;

  global() = default;
  SIMT_BOTH explicit global(T* base) : base_(base) {}
  template <class U, class = std::enable_if_t<std::is_same_v<const U, T>>>
  SIMT_BOTH global(global<U> other) : base_(other.address()) {}

  SIMT_DEVICE Value load(Index i) const { return base_[i]; }
  SIMT_DEVICE void store(Index i, Value v) const {
    static_assert(!std::is_const_v<T>, "a store through global<const T>");
    base_[i] = v;
  }
  template <int V>
  SIMT_DEVICE pack<Value, V> load_vector(Index i) const {
    return *reinterpret_cast<const pack<Value, V>*>(base_ + i);
  }
  template <int V>
  SIMT_DEVICE void store_vector(Index i, pack<Value, V> v) const {
    static_assert(!std::is_const_v<T>, "a store through global<const T>");
    *reinterpret_cast<pack<Value, V>*>(base_ + i) = v;
  }
  SIMT_BOTH global operator+(Index n) const { return global(base_ + n); }
  SIMT_BOTH explicit operator bool() const { return base_ != nullptr; }
  SIMT_BOTH T* address() const { return base_; }

 private:
  T* base_ = nullptr;
};

template <class Byte>
class untyped_global {
 public:
  untyped_global() = default;
  SIMT_BOTH explicit untyped_global(Byte* base) : base_(base) {}
  template <class T>
  SIMT_BOTH auto as() const {
    using Element = std::conditional_t<std::is_const_v<Byte>, const T, T>;
    return global<Element>(static_cast<Element*>(base_));
  }
  SIMT_BOTH explicit operator bool() const { return base_ != nullptr; }

 private:
  Byte* base_ = nullptr;
};
using global_bytes = untyped_global<void>;
using const_global_bytes = untyped_global<const void>;

template <class T>
class shared {
 public:
  shared() = default;
  SIMT_DEVICE explicit shared(T* base) : base_(base) {}
  SIMT_DEVICE T load(int i) const { return base_[i]; }
  SIMT_DEVICE void store(int i, T v) const { base_[i] = v; }
  template <int V>
  SIMT_DEVICE pack<T, V> load_vector(int i) const {
    return *reinterpret_cast<const pack<T, V>*>(base_ + i);
  }
  template <int V>
  SIMT_DEVICE void store_vector(int i, pack<T, V> v) const {
    *reinterpret_cast<pack<T, V>*>(base_ + i) = v;
  }
  SIMT_DEVICE shared operator+(int n) const { return shared(base_ + n); }
  SIMT_DEVICE T* address() const { return base_; }

 private:
  T* base_;
};

template <class T>
SIMT_DEVICE shared<T> shared_array(int byte_offset, int /*count*/) {
  extern __shared__ __align__(128) unsigned char dynamic_shared_memory[];
  return shared<T>(reinterpret_cast<T*>(dynamic_shared_memory + byte_offset));
}

template <int Bytes, class T>
SIMT_DEVICE void copy_async(shared<T> to, int i, global<const T> from, Index j, bool valid = true) {
  static_assert(Bytes == 4 || Bytes == 8 || Bytes == 16, "copy_async moves 4, 8 or 16 bytes");
  static_assert(Bytes % sizeof(T) == 0);
  const unsigned destination = static_cast<unsigned>(__cvta_generic_to_shared(to.address() + i));
  // not read if it is not valid, but aligned even so
  const auto nowhere = reinterpret_cast<std::uintptr_t>(from.address()) & ~std::uintptr_t{Bytes - 1};
  const void* source = valid ? from.address() + j : reinterpret_cast<const T*>(nowhere);
  const int bytes = valid ? Bytes : 0;
  if constexpr (Bytes == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(destination), "l"(source), "r"(bytes)
                 : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %3, %2;" ::"r"(destination), "l"(source), "r"(bytes), "n"(Bytes)
                 : "memory");
}
SIMT_DEVICE void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N>
SIMT_DEVICE void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// --- Between the lanes of a warp: all 32 take part ---
constexpr unsigned all_lanes = 0xffffffffu;
template <class T>
SIMT_DEVICE T shuffle(T v, int from, int width = warp_size) {
  return __shfl_sync(all_lanes, v, from, width);
}
template <class T>
SIMT_DEVICE T shuffle_xor(T v, int mask, int width = warp_size) {
  return __shfl_xor_sync(all_lanes, v, mask, width);
}
template <class T>
SIMT_DEVICE T shuffle_up(T v, int delta, int width = warp_size) {
  return __shfl_up_sync(all_lanes, v, delta, width);
}
template <class T>
SIMT_DEVICE T shuffle_down(T v, int delta, int width = warp_size) {
  return __shfl_down_sync(all_lanes, v, delta, width);
}
SIMT_DEVICE unsigned ballot(bool predicate) { return __ballot_sync(all_lanes, predicate); }
SIMT_DEVICE bool any(bool predicate) { return __any_sync(all_lanes, predicate); }
SIMT_DEVICE bool all(bool predicate) { return __all_sync(all_lanes, predicate); }

// --- Atomics: the old value comes back. Sums of floats depend on the order and so break repeatability. ---
template <class T>
SIMT_DEVICE T atomic_add_at(T* address, T value) {
  if constexpr (std::is_same_v<T, std::int64_t>)  // two's complement
    return static_cast<T>(
        atomicAdd(reinterpret_cast<unsigned long long*>(address), static_cast<unsigned long long>(value)));
  else
    return atomicAdd(address, value);
}
template <class T>
SIMT_DEVICE T atomic_max_at(T* address, T value) {
  if constexpr (std::is_same_v<T, float>) {  // IEEE numbers order as integers do, negative ones reversed; not for NaN
    if (__float_as_int(value) >= 0)
      return __int_as_float(atomicMax(reinterpret_cast<int*>(address), __float_as_int(value)));
    return __uint_as_float(atomicMin(reinterpret_cast<unsigned*>(address), __float_as_uint(value)));
  } else if constexpr (std::is_same_v<T, std::int64_t>) {
    return static_cast<T>(atomicMax(reinterpret_cast<long long*>(address), static_cast<long long>(value)));
  } else {
    return atomicMax(address, value);
  }
}
template <class T>
SIMT_DEVICE T atomic_add(global<T> memory, Index i, T value) {
  return atomic_add_at(memory.address() + i, value);
}
template <class T>
SIMT_DEVICE T atomic_add(shared<T> memory, int i, T value) {
  return atomic_add_at(memory.address() + i, value);
}
template <class T>
SIMT_DEVICE T atomic_max(global<T> memory, Index i, T value) {
  return atomic_max_at(memory.address() + i, value);
}
template <class T>
SIMT_DEVICE T atomic_max(shared<T> memory, int i, T value) {
  return atomic_max_at(memory.address() + i, value);
}

// --- Numbers ---
SIMT_DEVICE float to_float(float x) { return x; }
SIMT_DEVICE double to_float(double x) { return x; }
SIMT_DEVICE float to_float(bfloat16 x) { return __uint_as_float(static_cast<unsigned>(x.bits) << 16); }
SIMT_DEVICE float to_float(float16 x) {
  float out;
  asm("cvt.f32.f16 %0, %1;" : "=f"(out) : "h"(x.bits));
  return out;
}
template <class S, class F>
SIMT_DEVICE S from_float(F x) {
  S out;  // the headers of CUDA's own 16-bit types take longer to compile than many a kernel
  if constexpr (std::is_same_v<S, bfloat16>)
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(out.bits) : "f"(static_cast<float>(x)));
  else if constexpr (std::is_same_v<S, float16>)
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(out.bits) : "f"(static_cast<float>(x)));
  else
    out = static_cast<S>(x);
  return out;
}
// x, of which the compiler knows nothing: what is computed from it in a loop stays there and takes no register outside.
SIMT_DEVICE int opaque(int x) {
  asm volatile("" : "+r"(x));
  return x;
}
SIMT_DEVICE float fma(float a, float b, float c) { return __fmaf_rn(a, b, c); }
SIMT_DEVICE double fma(double a, double b, double c) { return __fma_rn(a, b, c); }
SIMT_DEVICE float sqrt(float x) { return __fsqrt_rn(x); }
SIMT_DEVICE double sqrt(double x) { return __dsqrt_rn(x); }
// 1 / sqrt(x), two units in the last place off at most: a fraction of the time of a root and a division.
SIMT_DEVICE float rsqrt(float x) { return ::rsqrtf(x); }
SIMT_DEVICE double rsqrt(double x) { return ::rsqrt(x); }
SIMT_DEVICE float exp(float x) { return ::expf(x); }
SIMT_DEVICE double exp(double x) { return ::exp(x); }
template <class To, class From>
SIMT_DEVICE To bits_as(From x) {
  static_assert(sizeof(To) == sizeof(From));
  To out;
  memcpy(&out, &x, sizeof out);
  return out;
}

// --- Launching ---
template <class Kernel>
__global__ void __launch_bounds__(Kernel::max_threads, Kernel::min_blocks)
    entry(const __grid_constant__ typename Kernel::Params params) {
  Kernel::run(params);
}

// A stream, and the first launch that failed on it.
class Queue {
 public:
  explicit Queue(cudaStream_t stream) : stream_(stream) {}

  template <class Kernel>
  void launch(Grid grid, const typename Kernel::Params& params) {
    if (grid.blocks == 0 || status_ != cudaSuccess) return;
    static_assert(sizeof(typename Kernel::Params) <= 4096, "a kernel's parameters have at most 4096 bytes");
    const void* function = reinterpret_cast<const void*>(&entry<Kernel>);
    cudaError_t status = cudaSuccess;
    if (grid.threads < warp_size || grid.threads % warp_size != 0 || grid.threads > Kernel::max_threads ||
        grid.blocks < 0 || grid.blocks > 0x7fffffff)
      status = cudaErrorInvalidConfiguration;
    if (status == cudaSuccess && grid.shared_bytes > 48 * 1024) status = allow_all_shared_memory(function);
    if (status == cudaSuccess) {
      void* arguments[] = {const_cast<typename Kernel::Params*>(&params)};
      status = cudaLaunchKernel(function, dim3(static_cast<unsigned>(grid.blocks)), dim3(grid.threads), arguments,
                                grid.shared_bytes, stream_);
    }
    if (status != cudaSuccess) {
      cudaGetLastError();  // it is reported here, and must not surface in somebody else's next call
      status_ = status;
      kernel_ = Kernel::name;
      grid_ = grid;
    }
  }
  template <class T>
  global<T> view(T* base, Index, Index) const {
    return global<T>(base);
  }
  global_bytes view_bytes(void* base, Index, Index) const { return global_bytes(base); }
  const_global_bytes view_bytes(const void* base, Index, Index) const { return const_global_bytes(base); }

  template <class T>
  void expect_written(global<T>) {}

  cudaStream_t stream() const { return stream_; }
  bool ok() const { return status_ == cudaSuccess; }
  cudaError_t status() const { return status_; }
  // What failed, for people: "" if nothing did.
  std::string message() const;

 private:
  // More than 48 KB have to be allowed, to a function and on each GPU. Always all that there is: were it what this
  // launch needs, another thread's launch of the same kernel could lower it before this one.
  static cudaError_t allow_all_shared_memory(const void* function) {
    int device = 0, most = 0;
    cudaError_t status = cudaGetDevice(&device);
    if (status == cudaSuccess) status = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    if (status == cudaSuccess)
      status = cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
    return status;
  }

  cudaStream_t stream_;
  cudaError_t status_ = cudaSuccess;
  const char* kernel_ = nullptr;
  Grid grid_{};
};

inline std::string Queue::message() const {
  if (ok()) return "";
  return std::string("CUDA kernel ") + kernel_ + " could not be launched (" + std::to_string(grid_.blocks) +
         " blocks of " + std::to_string(grid_.threads) + " threads, " + std::to_string(grid_.shared_bytes) +
         " bytes of shared memory): " + explain_cuda_error(status_);
}

}  // namespace cuda
}  // namespace freqrank::simt
