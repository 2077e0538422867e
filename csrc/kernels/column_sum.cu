#include "kernels/column_sum.h"

#include "kernels/column_reduce.cuh"
#include "kernels/launch.h"
#include "kernels/shared_memory.cuh"

namespace mtp {
namespace {

template <typename scalar_t, int kWidth>
__global__ void __launch_bounds__(kColumnThreads) column_sum_kernel(const __grid_constant__ ColumnSumParams p) {
  const int64_t column = (blockIdx.x * static_cast<int64_t>(kWarp) + threadIdx.x % kWarp) * kWidth;
  const scalar_t* const x = static_cast<const scalar_t*>(p.x);
  const auto add = [&](int64_t r, float (&sums)[kWidth]) {
    float values[kWidth];
    load_columns(x + r * p.row_stride, column, p.columns, values);
#pragma unroll
    for (int j = 0; j < kWidth; ++j) sums[j] += values[j];
  };
  float sums[kWidth];
  sum_columns(0, p.rows, dynamic_shared_memory<float>(), add, sums);
  if (threadIdx.x >= kWarp) return;
#pragma unroll
  for (int j = 0; j < kWidth; ++j) {
    if (column + j >= p.columns) continue;
    p.out[column + j] = p.destination == Destination::kAccumulate ? p.out[column + j] + sums[j] : sums[j];
  }
}

template <typename scalar_t, int kWidth>
cudaError_t launch_width(const ColumnSumParams& p, cudaStream_t stream) {
  constexpr int64_t kColumnsPerBlock = kWarp * kWidth;
  LaunchShape shape;
  shape.grid = dim3(static_cast<unsigned>((p.columns + kColumnsPerBlock - 1) / kColumnsPerBlock));
  shape.block = dim3(kColumnThreads);
  shape.shared_bytes = kColumnThreads * kWidth * sizeof(float);
  return launch_kernel(column_sum_kernel<scalar_t, kWidth>, shape, stream, p);
}

template <typename scalar_t>
cudaError_t launch_typed(const ColumnSumParams& p, cudaStream_t stream) {
  const bool aligned = reinterpret_cast<uintptr_t>(p.x) % kVectorBytes == 0 &&
                       p.row_stride * static_cast<int64_t>(sizeof(scalar_t)) % kVectorBytes == 0;
  return aligned ? launch_width<scalar_t, kVectorWidth<scalar_t>>(p, stream) : launch_width<scalar_t, 1>(p, stream);
}

}  // namespace

cudaError_t launch_column_sum(const ColumnSumParams& p, cudaStream_t stream) {
  if (p.columns == 0 || (p.rows == 0 && p.destination == Destination::kAccumulate)) return cudaSuccess;
  switch (p.dtype) {
    case DType::kFloat32:
      return launch_typed<float>(p, stream);
    case DType::kFloat16:
      return launch_typed<__half>(p, stream);
    case DType::kBFloat16:
      return launch_typed<__nv_bfloat16>(p, stream);
    case DType::kFloat64:
      break;
  }
  return cudaErrorInvalidValue;
}

}  // namespace mtp
