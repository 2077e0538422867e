// Argument checks for direct callers of the ops, and conversion of torch's types to the kernels'.
#pragma once
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <type_traits>

#include "core/dtype.h"
#include "core/target_rule.h"

namespace mtp {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline DType dtype_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::Double:
      return DType::kFloat64;
    case ScalarType::Half:
      return DType::kFloat16;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    default:
      STD_TORCH_CHECK(false, "expected float32, float64, float16 or bfloat16");
  }
}

inline IndexType index_type_of(const Tensor& x, const char* name) {
  if (x.scalar_type() == ScalarType::Long) return IndexType::kInt64;
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Int, name, " must be int32 or int64");
  return IndexType::kInt32;
}

inline void check_vector(const Tensor& x, int64_t size, ScalarType dtype, const char* name) {
  STD_TORCH_CHECK(x.numel() == size && x.is_contiguous() && x.scalar_type() == dtype, name, " must be contiguous, of ",
                  size, " elements and of the kernel's dtype, got ", x.numel(), " elements");
}

template <typename T>
constexpr ScalarType kScalarType = std::is_same_v<T, double>    ? ScalarType::Double
                                   : std::is_same_v<T, int32_t> ? ScalarType::Int
                                                                : ScalarType::Float;

// labels [B, label_len] and document_ids (same shape) have unit stride along a row.
template <typename weight_t>
BasicTargetRule<weight_t> target_rule(const Tensor& labels, const OptionalTensor& document_ids,
                                      const OptionalTensor& token_weights, int64_t seq_len, int64_t first_shift,
                                      int64_t ignore_index) {
  STD_TORCH_CHECK(labels.dim() == 2 && (labels.size(1) <= 1 || labels.stride(1) == 1),
                  "labels must be [B, label_len] with unit stride");
  STD_TORCH_CHECK(seq_len >= 0 && seq_len <= labels.size(1), "seq_len must be in [0, label_len]");
  STD_TORCH_CHECK(first_shift >= 0, "first_shift must not be negative");
  BasicTargetRule<weight_t> rule{};
  rule.labels = labels.const_data_ptr();
  rule.label_type = index_type_of(labels, "labels");
  rule.batch = labels.size(0);
  rule.seq_len = seq_len;
  rule.label_len = labels.size(1);
  rule.label_stride = labels.stride(0);
  rule.first_shift = first_shift;
  rule.ignore_index = ignore_index;
  if (document_ids.has_value()) {
    const Tensor& ids = *document_ids;
    STD_TORCH_CHECK(ids.dim() == 2 && ids.size(0) == labels.size(0) && ids.size(1) == labels.size(1) &&
                        (ids.size(1) <= 1 || ids.stride(1) == 1),
                    "document_ids must have the shape of labels and unit stride");
    rule.document_ids = ids.const_data_ptr();
    rule.document_type = index_type_of(ids, "document_ids");
    rule.document_stride = ids.stride(0);
  }
  if (token_weights.has_value()) {
    check_vector(*token_weights, labels.size(0) * labels.size(1), kScalarType<weight_t>, "token_weights");
    rule.token_weights = token_weights->const_data_ptr<weight_t>();
  }
  return rule;
}

}  // namespace mtp
