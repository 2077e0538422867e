// CUDA's float16: storage, conversions and the maximum, round to nearest even, with subnormal numbers.
#pragma once
#include "cuda_runtime.h"

struct __half {
  uint16_t bits;
};
struct __half2 {
  __half x, y;
};

inline float __half2float(__half x) {
  const int exponent = x.bits >> 10 & 0x1f, mantissa = x.bits & 0x3ff;
  const float sign = (x.bits & 0x8000u) != 0 ? -1.0f : 1.0f;
  if (exponent == 0x1f) return mantissa != 0 ? NAN : sign * INFINITY;
  if (exponent == 0) return sign * std::ldexp(static_cast<float>(mantissa), -24);
  return sign * std::ldexp(static_cast<float>(mantissa | 0x400), exponent - 25);
}

inline __half __float2half_rn(float x) {
  const auto sign = static_cast<uint16_t>(std::signbit(x) ? 0x8000 : 0);
  if (std::isnan(x)) return {0x7fff};
  const float magnitude = std::fabs(x);
  if (magnitude >= 65520.0f) return {static_cast<uint16_t>(sign | 0x7c00)};  // half an ulp above the largest number
  int exponent = -13;
  if (magnitude >= 6.103515625e-5f) std::frexp(magnitude, &exponent);  // else subnormal: the smallest exponent's ulp
  // nearbyint rounds to even; a mantissa that rounds up to 2^11 carries into the exponent by itself.
  const auto mantissa = static_cast<int>(std::nearbyint(std::ldexp(magnitude, 11 - exponent)));
  return {static_cast<uint16_t>(sign | (((exponent + 13) << 10) + mantissa))};
}

inline __half2 __floats2half2_rn(float x, float y) { return {__float2half_rn(x), __float2half_rn(y)}; }
inline __half __hmax(__half a, __half b) { return __float2half_rn(fmaxf(__half2float(a), __half2float(b))); }
inline __half2 __hmax2(__half2 a, __half2 b) { return {__hmax(a.x, b.x), __hmax(a.y, b.y)}; }
