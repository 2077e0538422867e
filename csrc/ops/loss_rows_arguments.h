// The arguments of the op `_loss_rows_`, checked, as the parameters of its kernels.
#pragma once
#include <optional>
#include <string>

#include "core/loss_rows_params.h"
#include "ops/check.h"

namespace mtp {

// The schema's arguments, in its order.
struct LossRowsArguments {
  const Tensor &logits, &rows, &labels, &head_scale;
  const OptionalTensor &row_scale, &lse_grad, &token_weights, &class_weights, &bias;
  int64_t seq_len, first_shift;
  double label_smoothing, z_loss, class_weight_sum, softcap, logit_scale;
  bool write_gradient;
  const Tensor &loss, &lse, &predicted;
  const std::string& stage;
  int64_t vocab_start;
  std::optional<int64_t> total_vocab;
  const OptionalTensor &statistics, &local_max, &class_weight_total;
};

template <typename acc_t>
const acc_t* optional_vector(const OptionalTensor& x, int64_t size, ScalarType dtype, const char* name) {
  if (!x.has_value()) return nullptr;
  check_vector(*x, size, dtype, name);
  return x->const_data_ptr<acc_t>();
}

inline Stage parse_stage(const std::string& stage) {
  if (stage == "whole") return Stage::kWhole;
  if (stage == "statistics") return Stage::kStatistics;
  STD_TORCH_CHECK(stage == "gradient", "stage must be whole, statistics or gradient, got ", stage);
  return Stage::kGradient;
}

// What a vocabulary shard adds to the parameters.
template <typename acc_t>
void set_stage(LossRowsParams<acc_t>& p, const LossRowsArguments& a) {
  p.stage = parse_stage(a.stage);
  p.vocab_start = a.vocab_start;
  p.options.vocab_size = a.total_vocab.value_or(p.vocab_size);
  if (p.stage == Stage::kWhole) return;
  STD_TORCH_CHECK(a.statistics.has_value() && a.local_max.has_value(), "a stage needs statistics and local_max");
  check_vector(*a.statistics, a.logits.size(0) * kRowStatistics, ScalarType::Double, "statistics");
  check_vector(*a.local_max, a.logits.size(0), ScalarType::Double, "local_max");
  p.statistics = a.statistics->mutable_data_ptr<double>();
  p.local_max = a.local_max->mutable_data_ptr<double>();
}

template <typename acc_t>
LossRowsParams<acc_t> make_loss_rows_params(const LossRowsArguments& a, DType dtype) {
  constexpr ScalarType acc = sizeof(acc_t) == 8 ? ScalarType::Double : ScalarType::Float;
  STD_TORCH_CHECK(a.logits.dim() == 2, "logits must be [R, V]");
  const int64_t vocab = a.logits.size(1), heads = a.head_scale.numel();
  const int64_t all_rows = heads * a.labels.size(0) * a.seq_len;
  STD_TORCH_CHECK(a.logits.stride(1) == 1 || vocab <= 1, "logits must have unit stride over the vocabulary");
  check_vector(a.rows, a.logits.size(0), ScalarType::Long, "rows");
  check_vector(a.head_scale, heads, acc, "head_scale");
  check_vector(a.loss, all_rows, acc, "loss");
  check_vector(a.lse, all_rows, acc, "lse");
  check_vector(a.predicted, all_rows, ScalarType::Int, "predicted");
  LossRowsParams<acc_t> p{};
  p.logits = a.logits.mutable_data_ptr();
  p.dtype = dtype;
  p.row_stride = a.logits.stride(0);
  p.vocab_size = vocab;
  p.rows = a.rows.const_data_ptr<int64_t>();
  p.targets = target_rule(a.labels, std::nullopt, a.token_weights, a.seq_len, a.first_shift, 0);
  p.head_scale = a.head_scale.const_data_ptr<acc_t>();
  p.row_scale = optional_vector<acc_t>(a.row_scale, all_rows, acc, "row_scale");
  p.lse_grad = optional_vector<acc_t>(a.lse_grad, all_rows, acc, "lse_grad");
  p.class_weights = optional_vector<float>(a.class_weights, vocab, ScalarType::Float, "class_weights");
  p.bias = optional_vector<acc_t>(a.bias, vocab, acc, "bias");
  p.logit_scale = a.logit_scale;
  p.softcap = a.softcap;
  p.options = {a.label_smoothing, a.z_loss, a.class_weight_sum, 0};
  p.class_weight_total = optional_vector<float>(a.class_weight_total, 1, ScalarType::Float, "class_weight_total");
  p.gradient = a.write_gradient ? Gradient::kWrite : Gradient::kSkip;
  p.loss = a.loss.mutable_data_ptr<acc_t>();
  p.lse = a.lse.mutable_data_ptr<acc_t>();
  p.predicted = a.predicted.mutable_data_ptr<int32_t>();
  set_stage(p, a);
  return p;
}

}  // namespace mtp
