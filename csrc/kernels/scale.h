// Multiplies a tensor by a scalar on the device, without a GPU sync: the backward scales gradients that the forward has
// computed.
//
//   out[i] = round(*scale * x[i])
//
// Shapes    x, out: n elements each, contiguous, float32, bfloat16 or float16, in any combination; scale one float32.
// Cost      one read and one write; in place with a scale of 1, only the scalar is read.
// Launch    at most 4096 blocks of 256 threads, each over its share of the vectors.
// Numerics  float32, one rounding.
// Caller    out is x itself (same dtype) or does not overlap it.
#pragma once
#include <cuda_runtime_api.h>

#include "core/dtype.h"

namespace mtp {

struct ScaleParams {
  const void* x;
  void* out;
  DType x_type, out_type;
  int64_t size;
  const float* scale;
};

cudaError_t launch_scale(const ScaleParams& params, cudaStream_t stream);

}  // namespace mtp
