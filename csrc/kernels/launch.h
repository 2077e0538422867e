// Kernel launches, with or without clusters, and the limits of the device.
#pragma once
#include <cuda_runtime.h>

#include <cstddef>
#include <utility>

namespace mtp {

constexpr size_t kSharedBytesWithoutPermission = 48 << 10;
// 32 blocks of them, the most on a multiprocessor, fit the smallest part of the L1 cache that a driver chooses by itself.
constexpr size_t kSharedBytesWithoutCarveout = 1 << 10;

struct LaunchShape {
  dim3 grid, block;
  size_t shared_bytes = 0;
  unsigned cluster = 1;  // consecutive blocks along x
};

struct DeviceLimits {
  bool has_clusters = false;
  size_t shared_per_block = 0;  // with opt-in
  size_t shared_per_multiprocessor = 0;
};

// Limits of the current device. The runtime caches them: no driver call, no GPU sync.
inline cudaError_t device_limits(DeviceLimits* limits) {
  int device = 0, major = 0, per_block = 0, per_multiprocessor = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&per_block, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&per_multiprocessor, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device);
  *limits = {major >= 9, static_cast<size_t>(per_block), static_cast<size_t>(per_multiprocessor)};
  return error;
}

// Opts a kernel in to shared memory beyond 48 KiB. It always grants the device's maximum: with the shape's own bytes,
// two host threads that launch one kernel with two sizes could lower each other's limit before the launch. The kernel
// also asks for all of the L1 cache as shared memory: a smaller part could halve the blocks of a multiprocessor.
template <typename... Formal>
cudaError_t permit_shared_memory(void (*kernel)(Formal...), const LaunchShape& shape) {
  if (shape.shared_bytes <= kSharedBytesWithoutCarveout) return cudaSuccess;
  cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
  if (error != cudaSuccess || shape.shared_bytes <= kSharedBytesWithoutPermission) return error;
  DeviceLimits limits;
  error = device_limits(&limits);
  if (error != cudaSuccess) return error;
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                              static_cast<int>(limits.shared_per_block));
}

// `attribute` must live as long as the result, which points to it.
inline cudaLaunchConfig_t launch_config(const LaunchShape& shape, cudaStream_t stream, cudaLaunchAttribute* attribute) {
  cudaLaunchConfig_t config{};
  config.gridDim = shape.grid;
  config.blockDim = shape.block;
  config.dynamicSmemBytes = shape.shared_bytes;
  config.stream = stream;
  if (shape.cluster > 1) {
    attribute->id = cudaLaunchAttributeClusterDimension;
    attribute->val.clusterDim.x = shape.cluster;
    attribute->val.clusterDim.y = attribute->val.clusterDim.z = 1;
    config.attrs = attribute;
    config.numAttrs = 1;
  }
  return config;
}

// Whether the current device can run a cluster of this shape; a partition with too few multiprocessors cannot. Queried
// before the launch, because a launch captured in a graph fails only when the graph is created, if at all.
template <typename... Formal>
bool clusters_fit(void (*kernel)(Formal...), const LaunchShape& shape) {
  cudaLaunchAttribute attribute{};
  const cudaLaunchConfig_t config = launch_config(shape, nullptr, &attribute);
  int clusters = 0;
  cudaError_t error = permit_shared_memory(kernel, shape);
  if (error == cudaSuccess) error = cudaOccupancyMaxActiveClusters(&clusters, kernel, &config);
  if (error != cudaSuccess) cudaGetLastError();  // clears the error: an answer, not a failure
  return error == cudaSuccess && clusters > 0;
}

// Enqueues `kernel`; returns the status of the launch.
template <typename... Formal, typename... Actual>
cudaError_t launch_kernel(void (*kernel)(Formal...), const LaunchShape& shape, cudaStream_t stream,
                          Actual&&... arguments) {
  const cudaError_t error = permit_shared_memory(kernel, shape);
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute attribute{};
  const cudaLaunchConfig_t config = launch_config(shape, stream, &attribute);
  return cudaLaunchKernelEx(&config, kernel, std::forward<Actual>(arguments)...);
}

}  // namespace mtp
