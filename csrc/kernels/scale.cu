#include "kernels/scale.h"

#include "kernels/launch.h"
#include "kernels/numeric.cuh"

namespace mtp {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kLargestGrid = 4096;
constexpr int kGroup = 8;  // elements per thread and step: one vector of 16-bit elements, two of float32

template <typename scalar_t>
__device__ __forceinline__ void load_group(const scalar_t* x, float (&values)[kGroup]) {
  const uint4* const vectors = reinterpret_cast<const uint4*>(x);
  if constexpr (sizeof(scalar_t) == 4) {
    const uint4 a = vectors[0], b = vectors[1];
    const unsigned words[kGroup] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
#pragma unroll
    for (int j = 0; j < kGroup; ++j) values[j] = __uint_as_float(words[j]);
  } else {
    unpack<scalar_t>(vectors[0], values);
  }
}

template <typename scalar_t>
__device__ __forceinline__ void store_group(scalar_t* x, const float (&values)[kGroup]) {
  uint4* const vectors = reinterpret_cast<uint4*>(x);
  if constexpr (sizeof(scalar_t) == 4) {
    vectors[0] = make_uint4(__float_as_uint(values[0]), __float_as_uint(values[1]), __float_as_uint(values[2]),
                            __float_as_uint(values[3]));
    vectors[1] = make_uint4(__float_as_uint(values[4]), __float_as_uint(values[5]), __float_as_uint(values[6]),
                            __float_as_uint(values[7]));
  } else {
    vectors[0] = pack<scalar_t>(values);
  }
}

template <typename in_t, typename out_t>
__global__ void __launch_bounds__(kThreads) scale_kernel(const __grid_constant__ ScaleParams p) {
  const float scale = *p.scale;
  if (scale == 1.0f && p.x == p.out) return;
  const in_t* const x = static_cast<const in_t*>(p.x);
  out_t* const out = static_cast<out_t*>(p.out);
  const int64_t thread = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x;
  const int64_t threads = gridDim.x * static_cast<int64_t>(kThreads);
  const bool aligned =
      reinterpret_cast<uintptr_t>(p.x) % kVectorBytes == 0 && reinterpret_cast<uintptr_t>(p.out) % kVectorBytes == 0;
  const int64_t in_groups = aligned ? p.size / kGroup * kGroup : 0;
  for (int64_t i = thread * kGroup; i < in_groups; i += threads * kGroup) {
    float values[kGroup];
    load_group(x + i, values);
#pragma unroll
    for (int j = 0; j < kGroup; ++j) values[j] *= scale;
    store_group(out + i, values);
  }
  for (int64_t i = in_groups + thread; i < p.size; i += threads) from_float(scale * to_float(x[i]), out + i);
}

template <typename in_t, typename out_t>
cudaError_t launch_pair(const ScaleParams& p, cudaStream_t stream) {
  constexpr int64_t kPerBlock = kThreads * kGroup;
  const int64_t blocks = (p.size + kPerBlock - 1) / kPerBlock;
  LaunchShape shape;
  shape.grid = dim3(static_cast<unsigned>(blocks < kLargestGrid ? blocks : kLargestGrid));
  shape.block = dim3(kThreads);
  return launch_kernel(scale_kernel<in_t, out_t>, shape, stream, p);
}

template <typename in_t>
cudaError_t launch_from(const ScaleParams& p, cudaStream_t stream) {
  switch (p.out_type) {
    case DType::kFloat32:
      return launch_pair<in_t, float>(p, stream);
    case DType::kFloat16:
      return launch_pair<in_t, __half>(p, stream);
    case DType::kBFloat16:
      return launch_pair<in_t, __nv_bfloat16>(p, stream);
    case DType::kFloat64:
      break;
  }
  return cudaErrorInvalidValue;
}

}  // namespace

cudaError_t launch_scale(const ScaleParams& p, cudaStream_t stream) {
  if (p.size == 0) return cudaSuccess;
  switch (p.x_type) {
    case DType::kFloat32:
      return launch_from<float>(p, stream);
    case DType::kFloat16:
      return launch_from<__half>(p, stream);
    case DType::kBFloat16:
      return launch_from<__nv_bfloat16>(p, stream);
    case DType::kFloat64:
      break;
  }
  return cudaErrorInvalidValue;
}

}  // namespace mtp
