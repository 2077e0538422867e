// Alignment for kernels with 16-byte accesses.
#pragma once
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>

namespace mtp {

constexpr std::int64_t kAlignment = 16;

inline bool is_aligned(const torch::stable::Tensor& x) {
  return reinterpret_cast<std::uintptr_t>(x.const_data_ptr()) % kAlignment == 0;
}

// x itself, or a copy if it is not aligned (a view into a flat buffer may not be).
inline torch::stable::Tensor aligned(const torch::stable::Tensor& x) {
  return is_aligned(x) ? x : torch::stable::clone(x);
}

}  // namespace mtp
