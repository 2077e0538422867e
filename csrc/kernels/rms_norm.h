// RMSNorm of n heads that read the same hidden states, forward and backward, optionally after a residual addition.
//
//   h = x + residual                              rstd[t] = 1 / sqrt(mean_d h[t, d]^2 + eps)
//   y[k, t, d] = h[t, d] rstd[t] w[k, d]
//   with g = sum_k w[k] dy[k]:                    dh = rstd (g - h rstd mean_d(g h rstd)) + dsum
//   dw[k, d] = sum_t dy[k, t, d] h[t, d] rstd[t]
//
// Shapes    x, residual, sum, h, dsum, dh [T, D]; y, dy [n, T, D]; all contiguous and of one dtype (float32, bfloat16,
//           float16). w, dw [n, D] float32; rstd [T] float32. residual, sum and dsum may be null; the forward writes h
//           to `sum` where it is given. partial: workspace of rms_norm_partials(T, n, D) float32.
// Cost      forward: one read of x (and residual), n writes. Backward: two reads of dy and h, one write. Bandwidth
// bound. Launch    forward and dh: one block of 256 threads per row, the row in shared memory as float32. dw: blocks
// over
//           columns, heads and segments of rows, then a sum over the segments. No atomics: deterministic.
// Numerics  float32; h is rounded once to its dtype, and what is normed is the rounded h.
// Caller    D is a multiple of 16 bytes; pointers aligned to 16 bytes; n, T >= 0.
#pragma once
#include <cuda_runtime_api.h>

#include "core/dtype.h"

namespace mtp {

struct RmsNormForwardParams {
  const void* x;
  const void* residual;  // or null
  const float* weight;   // [n, D]
  void* sum;             // or null
  void* y;               // [n, T, D]
  float* rstd;           // [T]
  int64_t heads, rows, width;
  float eps;
  DType dtype;
};

struct RmsNormBackwardParams {
  const void* grad_y;    // [n, T, D]
  const void* h;         // what was normed: x, or x + residual
  const void* grad_sum;  // or null: a gradient that reaches h by another way
  const float* weight;   // [n, D]
  const float* rstd;     // [T]
  void* grad_h;          // [T, D], also the gradient of x and of residual
  float* grad_weight;    // [n, D]
  float* partial;
  int64_t heads, rows, width;
  DType dtype;
};

int64_t rms_norm_partials(int64_t rows, int64_t heads, int64_t width);

cudaError_t launch_rms_norm_forward(const RmsNormForwardParams& params, cudaStream_t stream);
cudaError_t launch_rms_norm_backward(const RmsNormBackwardParams& params, cudaStream_t stream);

}  // namespace mtp
