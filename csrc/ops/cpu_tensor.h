// CPU memory and views through torch's C shim: the functions of torch/csrc/stable/ops.h go through the dispatcher, 2 us
// each, and a call of the loss needs a dozen.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cstdint>
#include <initializer_list>
#include <vector>

#include "cpu/huge_pages.h"
#include "ops/check.h"

namespace mtp {

inline int32_t type_code(ScalarType dtype) {
  return torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
}

inline int64_t element_size(ScalarType dtype) {
  return static_cast<int64_t>(aoti_torch_dtype_element_size(type_code(dtype)));
}

// Uninitialised and contiguous; on huge pages if large.
inline Tensor empty_cpu(const int64_t* sizes, size_t dim, ScalarType dtype) {
  std::vector<int64_t> strides(dim);
  int64_t numel = 1;
  for (size_t i = dim; i-- > 0; numel *= sizes[i]) strides[i] = numel;
  AtenTensorHandle made = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(dim), sizes, strides.data(), type_code(dtype),
                                                  aoti_torch_device_type_cpu(), 0, &made));
  Tensor x(made);
  const auto bytes = static_cast<size_t>(numel * element_size(dtype));
  if (bytes >= kHugePageBytes) advise_huge_pages(x.mutable_data_ptr(), bytes);
  return x;
}

inline Tensor empty_cpu(std::initializer_list<int64_t> sizes, ScalarType dtype) {
  return empty_cpu(sizes.begin(), sizes.size(), dtype);
}

// A view [rows, columns] of `data`, which must outlive it.
inline Tensor matrix_of(void* data, int64_t rows, int64_t columns, ScalarType dtype) {
  const int64_t sizes[] = {rows, columns}, strides[] = {columns, 1};
  AtenTensorHandle made = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_create_tensor_from_blob(data, 2, sizes, strides, 0, type_code(dtype),
                                                            aoti_torch_device_type_cpu(), 0, &made));
  return Tensor(made);
}

inline Tensor empty_like_cpu(const Tensor& x, ScalarType dtype) {
  return empty_cpu(x.sizes().data(), static_cast<size_t>(x.dim()), dtype);
}

inline void zero(Tensor x) { torch::stable::zero_(x); }

// A view of x's memory; the offset is relative to the start of x.
inline Tensor reinterpreted(const Tensor& x, std::initializer_list<int64_t> sizes,
                            std::initializer_list<int64_t> strides, int64_t offset) {
  AtenTensorHandle view = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(x.get(), static_cast<int64_t>(sizes.size()), sizes.begin(),
                                                        strides.begin(), offset, &view));
  return Tensor(view);
}

// x.T of a matrix.
inline Tensor transposed(const Tensor& x) {
  return reinterpreted(x, {x.size(1), x.size(0)}, {x.stride(1), x.stride(0)}, 0);
}

// x.narrow(dim, start, size) of a matrix; x itself if that is all of it.
inline Tensor slice(const Tensor& x, int64_t dim, int64_t start, int64_t size) {
  if (size == x.size(dim)) return x;
  return reinterpreted(x, {dim == 0 ? size : x.size(0), dim == 1 ? size : x.size(1)}, {x.stride(0), x.stride(1)},
                       start * x.stride(dim));
}

// x.reshape(rows, columns).
inline Tensor as_matrix(const Tensor& x, int64_t rows, int64_t columns) {
  if (x.dim() == 2 && x.size(0) == rows && x.size(1) == columns) return x;
  if (x.is_contiguous()) return reinterpreted(x, {rows, columns}, {columns, 1}, 0);
  return torch::stable::reshape(x, {rows, columns});
}

}  // namespace mtp
