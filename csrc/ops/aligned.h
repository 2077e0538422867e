// Alignment for kernels with 16-byte accesses.
#pragma once
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>

namespace mtp {

// x itself, or a copy if it is not aligned to 16 bytes (a view into a flat buffer may not be).
inline torch::stable::Tensor aligned(const torch::stable::Tensor& x) {
  constexpr std::uintptr_t kBytes = 16;
  return reinterpret_cast<std::uintptr_t>(x.const_data_ptr()) % kBytes == 0 ? x : torch::stable::clone(x);
}

}  // namespace mtp
