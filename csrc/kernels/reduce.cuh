// Warp and block reductions in a fixed order: bitwise reproducible.
#pragma once
#include <cuda_runtime.h>

namespace mtp {

constexpr unsigned kFullMask = 0xffffffffu;
constexpr int kWarp = 32;

struct Sum {
  template <typename T>
  __device__ __forceinline__ T operator()(T a, T b) const {
    return a + b;
  }
};
struct Maximum {
  __device__ __forceinline__ float operator()(float a, float b) const { return fmaxf(a, b); }  // ignores NaN
};
struct Minimum {
  template <typename T>
  __device__ __forceinline__ T operator()(T a, T b) const {
    return a < b ? a : b;
  }
};

// Returns the result to every lane; `combine` must be commutative, so that both lanes of a butterfly agree.
template <int kLanes = kWarp, typename T, typename Combine>
__device__ __forceinline__ T warp_reduce(T value, Combine combine) {
#pragma unroll
  for (int lanes = kLanes / 2; lanes > 0; lanes /= 2) value = combine(value, __shfl_xor_sync(kFullMask, value, lanes));
  return value;
}

// Returns the result to every thread. `scratch` [kThreads / 32] in shared memory must not be in use by an earlier call.
template <int kThreads, typename T, typename Combine>
__device__ __forceinline__ T block_reduce(T value, Combine combine, T* scratch) {
  constexpr int kWarps = kThreads / kWarp;
  static_assert(kThreads % kWarp == 0 && kWarps <= kWarp && (kWarps & (kWarps - 1)) == 0,
                "a power of two of whole warps");
  value = warp_reduce(value, combine);
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  if (lane == 0) scratch[warp] = value;
  __syncthreads();
  return warp_reduce<kWarps>(scratch[lane % kWarps], combine);
}

}  // namespace mtp
