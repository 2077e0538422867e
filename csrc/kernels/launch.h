// Starting a kernel, with or without clusters, and the limits of the device that it starts on.
#pragma once
#include <cuda_runtime.h>

#include <cstddef>
#include <utility>

namespace mtp {

constexpr size_t kSharedBytesWithoutPermission = 48 << 10;

struct LaunchShape {
  dim3 grid, block;
  size_t shared_bytes = 0;
  unsigned cluster = 1;  // consecutive blocks along x
};

struct DeviceLimits {
  bool has_clusters = false;
  size_t shared_per_block = 0;  // with permission
  size_t shared_per_multiprocessor = 0;
};

// Of the current device. The runtime keeps these numbers: no call to the driver, no synchronisation.
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

// Enqueues `kernel`; returns the status of the launch.
template <typename... Formal, typename... Actual>
cudaError_t launch_kernel(void (*kernel)(Formal...), const LaunchShape& shape, cudaStream_t stream,
                          Actual&&... arguments) {
  if (shape.shared_bytes > kSharedBytesWithoutPermission) {
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shape.shared_bytes));
    if (error != cudaSuccess) return error;
  }
  cudaLaunchConfig_t config{};
  config.gridDim = shape.grid;
  config.blockDim = shape.block;
  config.dynamicSmemBytes = shape.shared_bytes;
  config.stream = stream;
  cudaLaunchAttribute attribute{};
  if (shape.cluster > 1) {
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = shape.cluster;
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    config.attrs = &attribute;
    config.numAttrs = 1;
  }
  return cudaLaunchKernelEx(&config, kernel, std::forward<Actual>(arguments)...);
}

}  // namespace mtp
