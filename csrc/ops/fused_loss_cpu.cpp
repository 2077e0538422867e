// The ops of the loss on the CPU.
#include "ops/fused_loss_cpu.h"

#include <torch/csrc/stable/library.h>

#include <optional>
#include <vector>

#include "ops/cpu_tensor.h"
#include "ops/fused_loss_arguments.h"

namespace mtp {
namespace {

template <typename acc_t>
FusedLossResult all_results(const FusedLossArguments& arguments) {
  FusedLoss<acc_t> fused(arguments);
  const int64_t invalid = fused.run();
  if (invalid < 0) return fused.result();
  const Tensor none = empty_cpu({0}, ScalarType::Float);
  return {none, none, none, none, none, none, none, invalid};
}

template <typename acc_t>
PlainLossResult loss_alone(const FusedLossArguments& arguments, const OptionalTensor& grad_hidden) {
  FusedLoss<acc_t> fused(arguments);
  const int64_t invalid = fused.run();
  if (invalid < 0) return {fused.loss(), grad_hidden, arguments.grad_weight, -1};
  return {empty_cpu({}, ScalarType::Float), std::nullopt, std::nullopt, invalid};
}

FusedLossResult fused_loss_cpu(const std::vector<Tensor>& hidden, const Tensor& weight, const OptionalTensor& bias,
                               const Tensor& labels, const OptionalTensor& document_ids,
                               const OptionalTensor& token_weights, const OptionalTensor& class_weights,
                               const OptionalTensor& head_weights, const OptionalTensor& row_scale,
                               const OptionalTensor& lse_grad, std::optional<double> normalizer, int64_t seq_len,
                               int64_t first_shift, int64_t ignore_index, double label_smoothing, double z_loss,
                               double softcap, double logit_scale, const std::vector<int64_t>& detach_weight,
                               ScalarType compute_dtype, const Tensor& workspace,
                               const std::vector<Tensor>& grad_hidden, const OptionalTensor& grad_weight,
                               const OptionalTensor& grad_bias) {
  const FusedLossArguments arguments{hidden,        weight,        bias,         labels,        document_ids,
                                     token_weights, class_weights, head_weights, row_scale,     lse_grad,
                                     normalizer,    seq_len,       first_shift,  ignore_index,  label_smoothing,
                                     z_loss,        softcap,       logit_scale,  detach_weight, compute_dtype,
                                     workspace,     grad_hidden,   grad_weight,  grad_bias,     Tables::kAll};
  if (compute_dtype == ScalarType::Double) return all_results<double>(arguments);
  return all_results<float>(arguments);
}

// The same for one head without options, where the steps to the call above would cost a small loss as much as itself.
PlainLossResult plain_loss_cpu(const Tensor& hidden, const Tensor& weight, const Tensor& targets,
                               std::optional<double> normalizer, int64_t ignore_index, const Tensor& workspace,
                               int64_t chunk_rows, bool need_hidden, bool need_weight) {
  const int64_t n_rows = targets.numel(), vocab = weight.size(0), width = weight.size(1);
  STD_TORCH_CHECK(hidden.numel() == n_rows * width && hidden.scalar_type() == weight.scalar_type(),
                  "hidden must be [..., D] of weight's dtype, and targets [...]");
  STD_TORCH_CHECK(workspace.is_contiguous() && workspace.scalar_type() == weight.scalar_type() && chunk_rows > 0 &&
                      workspace.numel() >= chunk_rows * vocab,
                  "workspace must be contiguous, of weight's dtype, and hold chunk_rows * V elements");
  OptionalTensor grad_hidden, grad_weight;
  if (need_hidden) grad_hidden = empty_like_cpu(hidden);
  if (need_weight) grad_weight = empty_like_cpu(weight);
  const OptionalTensor none;
  const std::vector<int64_t> no_heads;
  const std::vector<Tensor> rows{as_matrix(hidden, n_rows, width)};
  std::vector<Tensor> grad_rows;
  if (need_hidden) grad_rows.push_back(as_matrix(*grad_hidden, n_rows, width));
  const Tensor labels = as_matrix(torch::stable::contiguous(targets), 1, n_rows);
  const Tensor chunk = reinterpreted(workspace, {chunk_rows, vocab}, {vocab, 1}, 0);
  const FusedLossArguments arguments{
      rows,       weight,    none,        labels,       none,         none, none, none, none,     none,
      normalizer, n_rows,    0,           ignore_index, 0.0,          0.0,  0.0,  1.0,  no_heads, weight.scalar_type(),
      chunk,      grad_rows, grad_weight, none,         Tables::kNone};
  if (weight.scalar_type() == ScalarType::Double) return loss_alone<double>(arguments, grad_hidden);
  return loss_alone<float>(arguments, grad_hidden);
}

}  // namespace
}  // namespace mtp

STABLE_TORCH_LIBRARY_IMPL(mtp_ext, CPU, m) {
  m.impl("_fused_loss_", TORCH_BOX(&mtp::fused_loss_cpu));
  m.impl("_plain_loss_", TORCH_BOX(&mtp::plain_loss_cpu));
}
