// A row of any length at any address, as aligned 16-byte vectors. The first and the last vector may extend past the
// row; elements outside it are neither read nor written.
#pragma once
#include <cstdint>

#include "kernels/numeric.cuh"

namespace mtp {

template <typename scalar_t>
class VectorRow {
 public:
  static constexpr int kWidth = kVectorWidth<scalar_t>;

  // `row` must be aligned to its element type.
  __device__ __forceinline__ VectorRow(scalar_t* row, int size) : size_(size) {
    lead_ = static_cast<int>(reinterpret_cast<uintptr_t>(row) % kVectorBytes / sizeof(scalar_t));
    base_ = row - lead_;
    count_ = (lead_ + size + kWidth - 1) / kWidth;
  }

  __device__ __forceinline__ int count() const { return count_; }
  __device__ __forceinline__ int first_column(int vector) const { return vector * kWidth - lead_; }
  __device__ __forceinline__ int vector_of(int column) const { return (column + lead_) / kWidth; }
  __device__ __forceinline__ bool holds(int column) const { return column >= 0 && column < size_; }

  // Elements outside the row are `fill`, which scalar_t must represent exactly.
  __device__ __forceinline__ uint4 load(int vector, float fill) const {
    const int first = first_column(vector);
    if (first >= 0 && first + kWidth <= size_) return *address(vector);
    float values[kWidth];
#pragma unroll
    for (int j = 0; j < kWidth; ++j) values[j] = holds(first + j) ? to_float(at(first + j)) : fill;
    return pack<scalar_t>(values);
  }

  __device__ __forceinline__ void store(int vector, const float (&values)[kWidth]) const {
    const int first = first_column(vector);
    if (first >= 0 && first + kWidth <= size_) {
      *address(vector) = pack<scalar_t>(values);
      return;
    }
#pragma unroll
    for (int j = 0; j < kWidth; ++j)
      if (holds(first + j)) from_float(values[j], &at(first + j));
  }

  __device__ __forceinline__ scalar_t& at(int column) const { return base_[lead_ + column]; }

 private:
  __device__ __forceinline__ uint4* address(int vector) const {
    return reinterpret_cast<uint4*>(base_) + vector;  // a row has fewer than 2^31 bytes
  }

  scalar_t* base_;
  int lead_, size_, count_;
};

}  // namespace mtp
