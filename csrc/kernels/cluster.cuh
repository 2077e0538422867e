// The thread-block cluster of the calling block. Before sm_90 there are no clusters: the functions describe one of a
// single block, and the launchers never start a cluster kernel.
#pragma once
#include <cooperative_groups.h>
#include <cuda_runtime.h>

namespace mtp {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900

__device__ __forceinline__ unsigned cluster_rank() { return 0; }
__device__ __forceinline__ unsigned cluster_size() { return 1; }
__device__ __forceinline__ void cluster_sync() { __syncthreads(); }
__device__ __forceinline__ void cluster_arrive() {}
__device__ __forceinline__ void cluster_wait() {}
template <typename T>
__device__ __forceinline__ const T* shared_of_rank(T* address, unsigned) {
  return address;
}

#else

__device__ __forceinline__ unsigned cluster_rank() { return cooperative_groups::this_cluster().block_rank(); }
__device__ __forceinline__ unsigned cluster_size() { return cooperative_groups::this_cluster().num_blocks(); }
__device__ __forceinline__ void cluster_sync() { cooperative_groups::this_cluster().sync(); }
// The two halves of a barrier that publishes nothing, only that every thread has arrived: without the fence of
// cluster_sync, which waits for all stores before it.
__device__ __forceinline__ void cluster_arrive() {
#if defined(__CUDA_ARCH__)
  asm volatile("barrier.cluster.arrive.relaxed.aligned;");
#else
  cooperative_groups::this_cluster().barrier_arrive();
#endif
}
__device__ __forceinline__ void cluster_wait() {
#if defined(__CUDA_ARCH__)
  asm volatile("barrier.cluster.wait.aligned;" ::: "memory");
#else
  cooperative_groups::this_cluster().barrier_wait();
#endif
}
// The same variable in another block's shared memory; that block must not exit before the read.
template <typename T>
__device__ __forceinline__ const T* shared_of_rank(T* address, unsigned rank) {
  return cooperative_groups::this_cluster().map_shared_rank(address, rank);
}

#endif

}  // namespace mtp
