// Column sums of a matrix: the gradient of a bias from the gradient of the logits.
//
//   out[c] (+)= sum_r x[r, c]
//
// Shapes    x [R, C] float32, bfloat16 or float16, row stride >= C; out [C] float32.
// Cost      one read of x; bandwidth bound.
// Launch    one block of 512 threads per 32 vectors of columns (256 columns in 16 bits), over all rows.
//           Deterministic: no atomics.
// Numerics  float32: 16 interleaved sums of R / 16 terms, then their sum.
// Caller    R * row_stride < 2^63. 16-byte loads if x and its stride are aligned to 16 bytes, else single elements.
#pragma once
#include <cuda_runtime_api.h>

#include "core/dtype.h"

namespace mtp {

enum class Destination { kOverwrite, kAccumulate };

struct ColumnSumParams {
  const void* x;
  DType dtype;
  int64_t rows, columns, row_stride;
  float* out;
  Destination destination;
};

cudaError_t launch_column_sum(const ColumnSumParams& params, cudaStream_t stream);

}  // namespace mtp
