// Marks a function shared by the CPU and the CUDA kernels.
#pragma once
#if defined(__CUDACC__)
#define MTP_HD __host__ __device__ __forceinline__
#else
#define MTP_HD inline
#endif
