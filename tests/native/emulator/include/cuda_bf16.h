// CUDA's bfloat16: storage and conversions only, round to nearest even.
#pragma once
#include "core/dtype.h"
#include "cuda_runtime.h"

struct __nv_bfloat16 {
  uint16_t bits;
};
struct __nv_bfloat162 {
  __nv_bfloat16 x, y;
};
inline float __bfloat162float(__nv_bfloat16 x) { return mtp::to_float(mtp::BFloat16Bits{x.bits}); }
inline __nv_bfloat16 __float2bfloat16_rn(float x) { return {mtp::to_bfloat16(x).bits}; }
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) {
  return {__float2bfloat16_rn(x), __float2bfloat16_rn(y)};
}
