// A row as vectors of 16 bytes. It starts at a multiple of 16 bytes; its last vector may reach past its end, into padding
// that belongs to the matrix.
#pragma once
#include <cstdint>

#include "kernels/numeric.cuh"

namespace mtp {

template <typename scalar_t>
class VectorRow {
 public:
  static constexpr int kWidth = kVectorWidth<scalar_t>;

  __device__ __forceinline__ VectorRow(scalar_t* row, int size) : row_(row), size_(size) {}

  __device__ __forceinline__ int size() const { return size_; }
  __device__ __forceinline__ int whole() const { return size_ / kWidth; }  // vectors without padding
  __device__ __forceinline__ int count() const { return (size_ + kWidth - 1) / kWidth; }
  __device__ __forceinline__ static int first_column(int vector) { return vector * kWidth; }
  __device__ __forceinline__ static int vector_of(int column) { return column / kWidth; }

  __device__ __forceinline__ uint4 load(int vector) const { return vectors()[vector]; }
  __device__ __forceinline__ void store(int vector, uint4 bits) const { vectors()[vector] = bits; }
  __device__ __forceinline__ scalar_t& at(int column) const { return row_[column]; }

 private:
  __device__ __forceinline__ uint4* vectors() const { return reinterpret_cast<uint4*>(row_); }

  scalar_t* row_;
  int size_;
};

}  // namespace mtp
