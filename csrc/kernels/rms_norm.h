// RMSNorm of n heads that read the same hidden states, forward and backward.
//
//   rstd[t] = 1 / sqrt(mean_d x[t, d]^2 + eps)    y[k, t, d] = x[t, d] rstd[t] w[k, d]
//   with g = sum_k w[k] dy[k]:                    dx = rstd (g - x rstd mean_d(g x rstd))
//   dw[k, d] = sum_t dy[k, t, d] x[t, d] rstd[t]
//
// Shapes    x, dx [T, D]; y, dy [n, T, D]; all contiguous and of one dtype (float32, bfloat16, float16). w, dw [n, D]
//           float32; rstd [T] float32. partial: workspace of rms_norm_partials(T, n, D) float32.
// Cost      forward: one read of x, n writes. Backward: two reads of dy and x, one write. Bandwidth bound.
// Launch    forward and dx: one block of 256 threads per row, the row in shared memory as float32. dw: blocks over
//           columns, heads and segments of rows, then a sum over the segments. Deterministic: no atomics.
// Numerics  float32.
// Caller    rows of D elements are a multiple of 16 bytes; pointers aligned to 16 bytes; T >= 0; n >= 1 for backward.
#pragma once
#include <cuda_runtime_api.h>

#include "core/dtype.h"

namespace mtp {

struct RmsNormForwardParams {
  const void* x;
  const float* weight;  // [n, D]
  void* y;              // [n, T, D]
  float* rstd;          // [T]
  int64_t heads, rows, width;
  float eps;
  DType dtype;
};

struct RmsNormBackwardParams {
  const void* grad_y;   // [n, T, D]
  const void* x;        // [T, D]
  const float* weight;  // [n, D]
  const float* rstd;    // [T]
  void* grad_x;         // [T, D]
  float* grad_weight;   // [n, D]
  float* partial;
  int64_t heads, rows, width;
  DType dtype;
};

int64_t rms_norm_partials(int64_t rows, int64_t heads, int64_t width);

cudaError_t launch_rms_norm_forward(const RmsNormForwardParams& params, cudaStream_t stream);
cudaError_t launch_rms_norm_backward(const RmsNormBackwardParams& params, cudaStream_t stream);

}  // namespace mtp
