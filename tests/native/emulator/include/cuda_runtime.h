// The part of CUDA C++ that kernels use, on the emulated device; anything else does not compile under emulation.
// `__shared__` is absent on purpose: blocks of a cluster run side by side, so shared memory is always dynamic (see
// csrc/kernels/shared_memory.cuh).
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "cuda_runtime_api.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

inline float __uint_as_float(unsigned bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}
inline unsigned __float_as_uint(float value) {
  unsigned bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int atomicMin(int* address, int value) {
  const int before = *address;  // fibers do not interrupt each other
  *address = std::min(before, value);
  return before;
}
template <typename T>
T __ldg(const T* address) {
  return *address;
}

// The default arguments capture the call site, so that the emulator detects threads that meet from two places.
inline void __syncthreads(EMULATOR_CALLER) { emulator::block_barrier({file, line}); }
inline void __syncwarp(unsigned mask = ~0u, EMULATOR_CALLER) { emulator::warp_barrier(mask, {file, line}); }

template <typename T>
T __shfl_sync(unsigned mask, T value, int source, EMULATOR_CALLER) {
  return emulator::shuffle(mask, value, source % emulator::kWarpSize, true, {file, line});
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, EMULATOR_CALLER) {
  return emulator::shuffle(mask, value, emulator::lane() ^ lanes, true, {file, line});
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, int lanes, EMULATOR_CALLER) {
  const int source = emulator::lane() - lanes;
  return emulator::shuffle(mask, value, source, source >= 0, {file, line});
}
inline unsigned __ballot_sync(unsigned mask, int predicate, EMULATOR_CALLER) {
  const unsigned char vote = predicate != 0;
  const unsigned char* slots = emulator::warp_exchange(mask, &vote, sizeof(vote), {file, line});
  unsigned result = 0;
  for (int lane = 0; lane < emulator::kWarpSize; ++lane)
    if ((mask >> lane & 1u) != 0)
      result |= unsigned{slots[static_cast<size_t>(lane) * emulator::kExchangeBytes]} << lane;
  return result;
}

namespace emulator {
// Host twin of csrc/kernels/mma.cuh: every lane publishes its operands, and gathers those of its four results from the
// lanes that hold them. `element(word, half)` reads one of the two elements of a word.
template <typename Read>
void warp_mma(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2], const Read& element, EMULATOR_CALLER) {
  const unsigned own[6] = {a[0], a[1], a[2], a[3], b[0], b[1]};
  const unsigned char* slots = warp_exchange(~0u, own, sizeof(own), {file, line});
  const auto word = [&](int lane, int index) {
    unsigned value;
    std::memcpy(&value, slots + static_cast<size_t>(lane) * kExchangeBytes + static_cast<size_t>(index) * 4, 4);
    return value;
  };
  for (int i = 0; i < 4; ++i) {
    const int row = lane() / 4 + 8 * (i / 2), column = 2 * (lane() % 4) + i % 2;
    float sum = c[i];
    for (int k = 0; k < 16; ++k) {
      const unsigned left = word(row % 8 * 4 + k % 8 / 2, row / 8 + 2 * (k / 8));
      const unsigned right = word(column * 4 + k % 8 / 2, 4 + k / 8);
      sum += element(left, k % 2) * element(right, k % 2);
    }
    c[i] = sum;
  }
}
}  // namespace emulator
