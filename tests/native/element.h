// Element types of the emulated kernels: storing a double and loading it back, and the tolerance for one rounding.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "core/dtype.h"

template <typename scalar_t>
struct Element;

template <>
struct Element<float> {
  static constexpr mtp::DType dtype = mtp::DType::kFloat32;
  static constexpr double rounding = 0.0;  // on top of float32 arithmetic
  static constexpr double smallest = 0.0;
  static float store(double x) { return static_cast<float>(x); }
  static double load(float x) { return x; }
};

template <>
struct Element<__nv_bfloat16> {
  static constexpr mtp::DType dtype = mtp::DType::kBFloat16;
  static constexpr double rounding = 1.0 / 256;  // twice 2^-9, one rounding to 8 bits
  static constexpr double smallest = 0.0;
  static __nv_bfloat16 store(double x) { return __float2bfloat16_rn(static_cast<float>(x)); }
  static double load(__nv_bfloat16 x) { return __bfloat162float(x); }
};

template <>
struct Element<__half> {
  static constexpr mtp::DType dtype = mtp::DType::kFloat16;
  static constexpr double rounding = 1.0 / 2048;
  static constexpr double smallest = 6e-8;  // spacing of subnormal numbers
  static __half store(double x) { return __float2half_rn(static_cast<float>(x)); }
  static double load(__half x) { return __half2float(x); }
};

template <typename scalar_t>
float rounded(float x) {
  return static_cast<float>(Element<scalar_t>::load(Element<scalar_t>::store(x)));
}
