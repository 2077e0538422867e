// Memory and views on the CPU by torch's C functions: those of torch/csrc/stable/ops.h go through the dispatcher, 2 us
// each, and a call of the loss needs a dozen.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cstdint>
#include <initializer_list>
#include <vector>

#include "ops/check.h"

namespace mtp {

// Uninitialised and contiguous.
inline Tensor empty_cpu(std::initializer_list<int64_t> sizes, ScalarType dtype) {
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t i = sizes.size(); i-- > 0; stride *= sizes.begin()[i]) strides[i] = stride;
  const auto type = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  AtenTensorHandle made = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.begin(), strides.data(),
                                                  type, aoti_torch_device_type_cpu(), 0, &made));
  return Tensor(made);
}

// x.T of a matrix.
inline Tensor transposed(const Tensor& x) {
  const int64_t sizes[] = {x.size(1), x.size(0)}, strides[] = {x.stride(1), x.stride(0)};
  AtenTensorHandle view = nullptr;
  // The offset is counted from where x begins.
  TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(x.get(), 2, sizes, strides, /*offset=*/0, &view));
  return Tensor(view);
}

// x.narrow(dim, start, size); x is passed by value because torch's function wants it to be mutable.
inline Tensor slice(Tensor x, int64_t dim, int64_t start, int64_t size) {
  return torch::stable::narrow(x, dim, start, size);
}

}  // namespace mtp
