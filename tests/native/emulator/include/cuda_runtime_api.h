// The part of CUDA's runtime API that launchers use, on the emulated device.
#pragma once
#include <cstddef>
#include <functional>
#include <map>
#include <utility>

#include "emulator/device.h"

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorLaunchOutOfResources = 701,
  cudaErrorInvalidClusterSize = 912
};
using cudaStream_t = struct emulated_stream*;

enum cudaDeviceAttr {
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize, cudaFuncAttributePreferredSharedMemoryCarveout };
enum cudaSharedCarveout { cudaSharedmemCarveoutMaxShared = 100 };
enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension };

struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  union {
    struct {
      unsigned x, y, z;
    } clusterDim;
  } val;
};

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
  cudaLaunchAttribute* attrs = nullptr;
  unsigned numAttrs = 0;
};

namespace emulator {
// A kernel's limit on dynamic shared memory: 48 KiB, or what it has opted in to.
inline size_t& shared_limit(const void* kernel) {
  static std::map<const void*, size_t> limits;
  return limits.try_emplace(kernel, size_t{48} << 10).first->second;
}

inline cudaError_t& last_error() {
  static cudaError_t error = cudaSuccess;
  return error;
}

inline cudaError_t record(cudaError_t error) {
  if (error != cudaSuccess) last_error() = error;
  return error;
}
}  // namespace emulator

inline cudaError_t cudaGetLastError() { return std::exchange(emulator::last_error(), cudaSuccess); }

inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  const emulator::Device& device = emulator::device();
  switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor:
      *value = device.compute_capability_major;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = device.shared_bytes_per_block;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      *value = device.shared_bytes_per_multiprocessor;
      return cudaSuccess;
  }
  return emulator::record(cudaErrorInvalidValue);
}

template <typename... Formal>
cudaError_t cudaFuncSetAttribute(void (*kernel)(Formal...), cudaFuncAttribute attribute, int bytes) {
  if (attribute == cudaFuncAttributePreferredSharedMemoryCarveout) return cudaSuccess;  // a hint
  if (bytes > emulator::device().shared_bytes_per_block) return emulator::record(cudaErrorInvalidValue);
  emulator::shared_limit(reinterpret_cast<const void*>(kernel)) = static_cast<size_t>(bytes);
  return cudaSuccess;
}

// Number of clusters of this shape that fit at once; 0 for a kernel not opted in to its shared memory.
template <typename... Formal>
cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, void (*kernel)(Formal...), const cudaLaunchConfig_t* config) {
  const unsigned size = config->numAttrs > 0 ? config->attrs[0].val.clusterDim.x : 1;
  *clusters = 0;
  if (emulator::device().compute_capability_major < 9 || size > 8) return emulator::record(cudaErrorInvalidClusterSize);
  if (config->dynamicSmemBytes > emulator::shared_limit(reinterpret_cast<const void*>(kernel))) return cudaSuccess;
  if (!emulator::device().refuses_clusters) *clusters = static_cast<int>(132 / size);
  return cudaSuccess;
}

template <typename... Formal, typename... Actual>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Formal...), Actual&&... arguments) {
  const unsigned cluster = config->numAttrs > 0 ? config->attrs[0].val.clusterDim.x : 1;
  const unsigned long long block = 1ull * config->blockDim.x * config->blockDim.y * config->blockDim.z;
  if (config->gridDim.x == 0 || config->gridDim.y == 0 || config->gridDim.z == 0 || block == 0 || block > 1024 ||
      config->gridDim.x > 0x7fffffffu || config->gridDim.y > 0xffffu || config->gridDim.z > 0xffffu)
    return emulator::record(cudaErrorInvalidValue);
  if (config->dynamicSmemBytes > emulator::shared_limit(reinterpret_cast<const void*>(kernel)))
    return emulator::record(cudaErrorInvalidValue);
  if (cluster > 1 && (cluster > 8 || config->gridDim.x % cluster != 0 || emulator::device().refuses_clusters ||
                      emulator::device().compute_capability_major < 9))
    return emulator::record(cudaErrorInvalidClusterSize);
  const std::function<void()> body = [&] { kernel(arguments...); };
  emulator::run_grid(config->gridDim, config->blockDim, config->dynamicSmemBytes, cluster, body);
  return cudaSuccess;
}
