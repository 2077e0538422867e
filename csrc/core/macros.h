// Marks a function that both the CPU and the CUDA kernels call.
#pragma once
#if defined(__CUDACC__)
#define MTP_HD __host__ __device__ __forceinline__
#else
#define MTP_HD inline
#endif
