// A block's dynamic shared memory. Kernels use no static shared memory, so that the blocks of a cluster can run side by
// side on the host (tests/native/emulator).
#pragma once
#include <cuda_runtime.h>

namespace mtp {

template <typename T>
__device__ __forceinline__ T* dynamic_shared_memory() {
#if defined(__CUDACC__)
  extern __shared__ __align__(16) unsigned char bytes[];
  return reinterpret_cast<T*>(bytes);
#else
  return static_cast<T*>(emulator::shared_memory());
#endif
}

}  // namespace mtp
