// The arguments of the op `_fused_loss_`, in the order of its schema, and its results.
#pragma once
#include <optional>
#include <tuple>
#include <vector>

#include "ops/check.h"

namespace mtp {

// Whether the log-sum-exp and the argmax of every row are wanted.
enum class Tables { kNone, kAll };

struct FusedLossArguments {
  const std::vector<Tensor>& hidden;  // n of [B * S, D]
  const Tensor& weight;               // [V, D] or [n, V, D]
  const OptionalTensor& bias;         // [V]
  const Tensor& labels;               // [B, label_len]
  const OptionalTensor &document_ids, &token_weights, &class_weights, &head_weights;
  const OptionalTensor &row_scale, &lse_grad;  // [n * B * S]
  std::optional<double> normalizer;            // of every head; none: each head's sum of weights
  int64_t seq_len, first_shift, ignore_index;
  double label_smoothing, z_loss, softcap, logit_scale;
  const std::vector<int64_t>& detach_weight;  // 1-based heads
  ScalarType compute_dtype;
  const Tensor& workspace;                 // [C, V], in the dtype that the logits have
  const std::vector<Tensor>& grad_hidden;  // n of [B * S, D], or none
  const OptionalTensor &grad_weight, &grad_bias;
  Tables tables;
};

// loss 0-d, head_loss [n], n_valid [n], denominators [n], losses and lse [n * B * S], predicted [n * B * S] int32, and
// the flat index into labels of a target that is no class, or -1; where there is one, nothing else was computed.
using FusedLossResult = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, int64_t>;

// Of the op `_plain_loss_`: loss 0-d, the gradients that were asked for, and that index.
using PlainLossResult = std::tuple<Tensor, OptionalTensor, OptionalTensor, int64_t>;

}  // namespace mtp
