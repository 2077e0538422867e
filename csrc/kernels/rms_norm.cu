#include "kernels/rms_norm.h"

#include "kernels/column_reduce.cuh"
#include "kernels/column_sum.h"
#include "kernels/launch.h"
#include "kernels/shared_memory.cuh"

namespace mtp {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int64_t kSegmentRows = 512;  // of the weight gradient: 32 rows per warp, and enough blocks at D = 1024

int64_t segments_of(int64_t rows) { return rows == 0 ? 1 : (rows + kSegmentRows - 1) / kSegmentRows; }

template <typename scalar_t>
__device__ __forceinline__ void load_vector(const void* row, int64_t vector, float (&values)[kVectorWidth<scalar_t>]) {
  unpack<scalar_t>(static_cast<const uint4*>(row)[vector], values);
}

template <typename scalar_t>
__device__ __forceinline__ const void* row_of(const void* matrix, int64_t row, int64_t width) {
  return static_cast<const scalar_t*>(matrix) + row * width;
}
template <typename scalar_t>
__device__ __forceinline__ void* row_of(void* matrix, int64_t row, int64_t width) {
  return static_cast<scalar_t*>(matrix) + row * width;
}

// kWidth floats, 16 bytes at a time.
template <int kWidth>
__device__ __forceinline__ void load_floats(const float* from, float (&values)[kWidth]) {
#pragma unroll
  for (int j = 0; j < kWidth; j += 4) {
    const float4 four = *reinterpret_cast<const float4*>(from + j);
    values[j] = four.x, values[j + 1] = four.y, values[j + 2] = four.z, values[j + 3] = four.w;
  }
}
template <int kWidth>
__device__ __forceinline__ void store_floats(float* to, const float (&values)[kWidth]) {
#pragma unroll
  for (int j = 0; j < kWidth; j += 4)
    *reinterpret_cast<float4*>(to + j) = make_float4(values[j], values[j + 1], values[j + 2], values[j + 3]);
}

// Each thread visits the same vectors in every loop, so `row` needs no barrier.
template <typename scalar_t>
__global__ void __launch_bounds__(kThreads) rms_norm_forward_kernel(const __grid_constant__ RmsNormForwardParams p) {
  constexpr int kWidth = kVectorWidth<scalar_t>;
  float* const scratch = dynamic_shared_memory<float>();
  float* const row = scratch + kWarps;
  const int64_t t = blockIdx.x, vectors = p.width / kWidth;
  float squares = 0.0f;
  for (int64_t i = threadIdx.x; i < vectors; i += kThreads) {
    float x[kWidth];
    load_vector<scalar_t>(row_of<scalar_t>(p.x, t, p.width), i, x);
#pragma unroll
    for (int j = 0; j < kWidth; ++j) squares += x[j] * x[j];
    store_floats(row + i * kWidth, x);
  }
  squares = block_reduce<kThreads>(squares, Sum{}, scratch);
  const float rstd = rsqrtf(squares / static_cast<float>(p.width) + p.eps);
  if (threadIdx.x == 0) p.rstd[t] = rstd;
  for (int64_t k = 0; k < p.heads; ++k) {
    uint4* const y = static_cast<uint4*>(row_of<scalar_t>(p.y, k * p.rows + t, p.width));
    for (int64_t i = threadIdx.x; i < vectors; i += kThreads) {
      float x[kWidth], weight[kWidth];
      load_floats(row + i * kWidth, x);
      load_floats(p.weight + k * p.width + i * kWidth, weight);
#pragma unroll
      for (int j = 0; j < kWidth; ++j) x[j] *= rstd * weight[j];
      y[i] = pack<scalar_t>(x);
    }
  }
}

template <typename scalar_t>
__global__ void __launch_bounds__(kThreads) rms_norm_backward_kernel(const __grid_constant__ RmsNormBackwardParams p) {
  constexpr int kWidth = kVectorWidth<scalar_t>;
  float* const scratch = dynamic_shared_memory<float>();
  float* const row = scratch + kWarps;  // g
  const int64_t t = blockIdx.x, vectors = p.width / kWidth;
  const void* const x_row = row_of<scalar_t>(p.x, t, p.width);
  const float rstd = p.rstd[t];
  float along = 0.0f;
  for (int64_t i = threadIdx.x; i < vectors; i += kThreads) {
    float g[kWidth] = {}, x[kWidth];
#pragma unroll 2
    for (int64_t k = 0; k < p.heads; ++k) {
      float grad[kWidth], weight[kWidth];
      load_vector<scalar_t>(row_of<scalar_t>(p.grad_y, k * p.rows + t, p.width), i, grad);
      load_floats(p.weight + k * p.width + i * kWidth, weight);
#pragma unroll
      for (int j = 0; j < kWidth; ++j) g[j] += weight[j] * grad[j];
    }
    load_vector<scalar_t>(x_row, i, x);
#pragma unroll
    for (int j = 0; j < kWidth; ++j) along += g[j] * x[j];
    store_floats(row + i * kWidth, g);
  }
  along = block_reduce<kThreads>(along, Sum{}, scratch);
  const float factor = along * rstd * rstd / static_cast<float>(p.width);
  uint4* const out = static_cast<uint4*>(row_of<scalar_t>(p.grad_x, t, p.width));
  for (int64_t i = threadIdx.x; i < vectors; i += kThreads) {
    float g[kWidth], x[kWidth];
    load_floats(row + i * kWidth, g);
    load_vector<scalar_t>(x_row, i, x);
#pragma unroll
    for (int j = 0; j < kWidth; ++j) g[j] = rstd * (g[j] - x[j] * factor);
    out[i] = pack<scalar_t>(g);
  }
}

// Weight gradient over one segment of rows, for one head and 32 vectors of columns.
template <typename scalar_t>
__global__ void __launch_bounds__(kColumnThreads)
    rms_norm_weight_kernel(const __grid_constant__ RmsNormBackwardParams p) {
  constexpr int kWidth = kVectorWidth<scalar_t>;
  const int64_t vector = blockIdx.x * static_cast<int64_t>(kWarp) + threadIdx.x % kWarp, head = blockIdx.y;
  const int64_t begin = blockIdx.z * kSegmentRows;
  const int64_t end = begin + kSegmentRows < p.rows ? begin + kSegmentRows : p.rows;
  const bool inside = vector * kWidth < p.width;
  const auto add = [&](int64_t t, float (&sums)[kWidth]) {
    if (!inside) return;
    float grad[kWidth], x[kWidth];
    load_vector<scalar_t>(row_of<scalar_t>(p.grad_y, head * p.rows + t, p.width), vector, grad);
    load_vector<scalar_t>(row_of<scalar_t>(p.x, t, p.width), vector, x);
    const float rstd = p.rstd[t];
#pragma unroll
    for (int j = 0; j < kWidth; ++j) sums[j] += grad[j] * (x[j] * rstd);
  };
  float sums[kWidth];
  sum_columns(begin, end, dynamic_shared_memory<float>(), add, sums);
  if (threadIdx.x >= kWarp || !inside) return;
  store_floats(p.partial + ((blockIdx.z * p.heads) + head) * p.width + vector * kWidth, sums);
}

LaunchShape row_shape(int64_t rows, int64_t width) {
  LaunchShape shape;
  shape.grid = dim3(static_cast<unsigned>(rows));
  shape.block = dim3(kThreads);
  shape.shared_bytes = (kWarps + static_cast<size_t>(width)) * sizeof(float);
  return shape;
}

template <typename scalar_t>
cudaError_t launch_backward(const RmsNormBackwardParams& p, cudaStream_t stream) {
  constexpr int kWidth = kVectorWidth<scalar_t>;
  if (p.rows > 0) {
    const cudaError_t error = launch_kernel(rms_norm_backward_kernel<scalar_t>, row_shape(p.rows, p.width), stream, p);
    if (error != cudaSuccess) return error;
  }
  const int64_t segments = segments_of(p.rows);
  LaunchShape shape;
  shape.grid = dim3(static_cast<unsigned>((p.width / kWidth + kWarp - 1) / kWarp), static_cast<unsigned>(p.heads),
                    static_cast<unsigned>(segments));
  shape.block = dim3(kColumnThreads);
  shape.shared_bytes = kColumnThreads * kWidth * sizeof(float);
  const cudaError_t error = launch_kernel(rms_norm_weight_kernel<scalar_t>, shape, stream, p);
  if (error != cudaSuccess) return error;
  const int64_t columns = p.heads * p.width;
  return launch_column_sum(
      {p.partial, DType::kFloat32, segments, columns, columns, p.grad_weight, Destination::kOverwrite}, stream);
}

bool fits_vectors(int64_t width, DType dtype) {
  const int64_t element = dtype == DType::kFloat32 ? 4 : 2;
  return dtype != DType::kFloat64 && width > 0 && width * element % kVectorBytes == 0;
}

}  // namespace

int64_t rms_norm_partials(int64_t rows, int64_t heads, int64_t width) { return segments_of(rows) * heads * width; }

cudaError_t launch_rms_norm_forward(const RmsNormForwardParams& p, cudaStream_t stream) {
  if (!fits_vectors(p.width, p.dtype)) return cudaErrorInvalidValue;
  if (p.rows == 0) return cudaSuccess;
  const LaunchShape shape = row_shape(p.rows, p.width);
  if (p.dtype == DType::kFloat32) return launch_kernel(rms_norm_forward_kernel<float>, shape, stream, p);
  if (p.dtype == DType::kFloat16) return launch_kernel(rms_norm_forward_kernel<__half>, shape, stream, p);
  return launch_kernel(rms_norm_forward_kernel<__nv_bfloat16>, shape, stream, p);
}

cudaError_t launch_rms_norm_backward(const RmsNormBackwardParams& p, cudaStream_t stream) {
  if (!fits_vectors(p.width, p.dtype)) return cudaErrorInvalidValue;
  if (p.heads == 0) return cudaErrorInvalidValue;
  if (p.dtype == DType::kFloat32) return launch_backward<float>(p, stream);
  if (p.dtype == DType::kFloat16) return launch_backward<__half>(p, stream);
  return launch_backward<__nv_bfloat16>(p, stream);
}

}  // namespace mtp
