// Tensors as the kernels with 16-byte accesses take them.
#pragma once
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>

namespace mtp {

// x itself, or a copy of it where it does not start at a multiple of 16 bytes: a view into a flat buffer may not.
inline torch::stable::Tensor aligned(const torch::stable::Tensor& x) {
  constexpr std::uintptr_t kBytes = 16;
  return reinterpret_cast<std::uintptr_t>(x.const_data_ptr()) % kBytes == 0 ? x : torch::stable::clone(x);
}

inline std::optional<torch::stable::Tensor> aligned(const std::optional<torch::stable::Tensor>& x) {
  if (!x.has_value()) return std::nullopt;
  return aligned(*x);
}

}  // namespace mtp
