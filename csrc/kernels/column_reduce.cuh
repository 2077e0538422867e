// Column sums of a matrix by one block: each warp adds every 16th row, each lane one vector of columns, and the warps'
// sums are combined in shared memory. Fixed order, no atomics.
#pragma once
#include "kernels/numeric.cuh"
#include "kernels/reduce.cuh"

namespace mtp {

constexpr int kColumnThreads = 512;
constexpr int kColumnWarps = kColumnThreads / kWarp;

// Loads a vector of a row from `column`, with 0 past `size`. kWidth 1: the matrix is not aligned.
template <typename scalar_t, int kWidth>
__device__ __forceinline__ void load_columns(const scalar_t* row, int64_t column, int64_t size,
                                             float (&values)[kWidth]) {
  if constexpr (kWidth > 1) {
    if (column + kWidth <= size) {
      unpack<scalar_t>(*reinterpret_cast<const uint4*>(row + column), values);
      return;
    }
  }
#pragma unroll
  for (int j = 0; j < kWidth; ++j) values[j] = column + j < size ? to_float(row[column + j]) : 0.0f;
}

// Calls add(row, sums) for rows [begin, end); the result is in warp 0's lanes. `scratch` [kColumnThreads * kWidth].
template <int kWidth, typename AddRow>
__device__ __forceinline__ void sum_columns(int64_t begin, int64_t end, float* scratch, const AddRow& add,
                                            float (&sums)[kWidth]) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
#pragma unroll
  for (int j = 0; j < kWidth; ++j) sums[j] = 0.0f;
#pragma unroll 2
  for (int64_t r = begin + warp; r < end; r += kColumnWarps) add(r, sums);
#pragma unroll
  for (int j = 0; j < kWidth; ++j) scratch[(warp * kWidth + j) * kWarp + lane] = sums[j];
  __syncthreads();
  if (warp != 0) return;
#pragma unroll
  for (int j = 0; j < kWidth; ++j)
    for (int other = 1; other < kColumnWarps; ++other) sums[j] += scratch[(other * kWidth + j) * kWarp + lane];
}

}  // namespace mtp
