// Conversion of element types to float32 and back, 16 bytes at a time; the fast exponential.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cmath>
#include <cstring>
#include <type_traits>

namespace mtp {

constexpr int kVectorBytes = 16;  // the widest access of a thread
template <typename scalar_t>
constexpr int kVectorWidth = kVectorBytes / static_cast<int>(sizeof(scalar_t));

constexpr float kLog2E = 1.4426950408889634f;

// 2^x with relative error 2^-22; subnormal results are 0. Without fast-math, exp2f wraps the same instruction in
// corrections for subnormal numbers, which exp(logit - maximum) does not need.
__device__ __forceinline__ float exp2_approx(float x) {
#if defined(__CUDA_ARCH__)
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#else
  return exp2f(x);
#endif
}

// 1 / x with relative error 2^-23; 0 for infinity.
__device__ __forceinline__ float reciprocal_approx(float x) {
#if defined(__CUDA_ARCH__)
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#else
  return 1.0f / x;
#endif
}

// exp(x - max). Subtracts first: the difference is exact near the maximum, where the large terms are, whereas
// x * log2(e) - max * log2(e) would carry the rounding error of the second product.
__device__ __forceinline__ float exp_shifted(float x, float max) { return exp2_approx((x - max) * kLog2E); }

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

__device__ __forceinline__ void from_float(float x, float* to) { *to = x; }
__device__ __forceinline__ void from_float(float x, __half* to) { *to = __float2half_rn(x); }
__device__ __forceinline__ void from_float(float x, __nv_bfloat16* to) { *to = __float2bfloat16_rn(x); }

template <typename to_t, typename from_t>
__device__ __forceinline__ to_t bit_cast(from_t x) {
  static_assert(sizeof(to_t) == sizeof(from_t), "only the type changes");
  to_t result;
  memcpy(&result, &x, sizeof(result));
  return result;
}

// Unpacks the two 16-bit elements of a word; pack_pair rounds each once.
template <typename scalar_t>
__device__ __forceinline__ float2 unpack_pair(unsigned word);
template <>
__device__ __forceinline__ float2 unpack_pair<__nv_bfloat16>(unsigned word) {
  return {__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u)};
}
template <>
__device__ __forceinline__ float2 unpack_pair<__half>(unsigned word) {
  const __half2 pair = bit_cast<__half2>(word);
  return {__half2float(pair.x), __half2float(pair.y)};
}

template <typename scalar_t>
__device__ __forceinline__ unsigned pack_pair(float x, float y);
template <>
__device__ __forceinline__ unsigned pack_pair<__nv_bfloat16>(float x, float y) {
  return bit_cast<unsigned>(__floats2bfloat162_rn(x, y));
}
template <>
__device__ __forceinline__ unsigned pack_pair<__half>(float x, float y) {
  return bit_cast<unsigned>(__floats2half2_rn(x, y));
}

// The larger element of each of a word's halves, or of two float32 words; like fmaxf, it ignores NaN.
template <typename scalar_t>
__device__ __forceinline__ unsigned max_word(unsigned a, unsigned b) {
  if constexpr (sizeof(scalar_t) == 4) {
    return __float_as_uint(fmaxf(__uint_as_float(a), __uint_as_float(b)));
  } else if constexpr (std::is_same_v<scalar_t, __half>) {
    return bit_cast<unsigned>(__hmax2(bit_cast<__half2>(a), bit_cast<__half2>(b)));
  } else {
    return bit_cast<unsigned>(__hmax2(bit_cast<__nv_bfloat162>(a), bit_cast<__nv_bfloat162>(b)));
  }
}

template <typename scalar_t>
__device__ __forceinline__ float largest_of_word(unsigned word) {
  if constexpr (sizeof(scalar_t) == 4) {
    return __uint_as_float(word);
  } else {
    const float2 pair = unpack_pair<scalar_t>(word);
    return fmaxf(pair.x, pair.y);
  }
}

template <typename scalar_t>
__device__ __forceinline__ void unpack(uint4 bits, float (&values)[kVectorWidth<scalar_t>]) {
  const unsigned words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(scalar_t) == 4) {
      values[i] = __uint_as_float(words[i]);
    } else {
      const float2 pair = unpack_pair<scalar_t>(words[i]);
      values[2 * i] = pair.x;
      values[2 * i + 1] = pair.y;
    }
  }
}

template <typename scalar_t>
__device__ __forceinline__ uint4 pack(const float (&values)[kVectorWidth<scalar_t>]) {
  unsigned words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(scalar_t) == 4) {
      words[i] = __float_as_uint(values[i]);
    } else {
      words[i] = pack_pair<scalar_t>(values[2 * i], values[2 * i + 1]);
    }
  }
  return make_uint4(words[0], words[1], words[2], words[3]);
}

}  // namespace mtp
