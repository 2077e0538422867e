// Tensors as the kernels with 16-byte accesses take them.
#pragma once
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>

namespace mtp {

// x itself, or a copy of it where it does not start at a multiple of 16 bytes: a view into a flat buffer may not.
inline torch::stable::Tensor aligned(const torch::stable::Tensor& x) {
  constexpr std::uintptr_t kBytes = 16;
  return reinterpret_cast<std::uintptr_t>(x.const_data_ptr()) % kBytes == 0 ? x : torch::stable::clone(x);
}

}  // namespace mtp
