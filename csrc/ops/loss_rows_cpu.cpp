#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>
#include <string>

#include "cpu/capability.h"
#include "cpu/loss_rows.h"
#include "ops/check.h"

namespace mtp {
namespace {

template <typename acc_t>
const acc_t* optional_vector(const OptionalTensor& x, int64_t size, ScalarType dtype, const char* name) {
  if (!x.has_value()) return nullptr;
  check_vector(*x, size, dtype, name);
  return x->const_data_ptr<acc_t>();
}

template <typename acc_t>
LossRowsParams<acc_t> make_params(const Tensor& logits, const Tensor& rows, const Tensor& labels,
                                  const Tensor& head_scale, const OptionalTensor& row_scale,
                                  const OptionalTensor& lse_grad, const OptionalTensor& token_weights,
                                  const OptionalTensor& class_weights, const OptionalTensor& bias, int64_t seq_len,
                                  int64_t first_shift, const Tensor& loss, const Tensor& lse, const Tensor& predicted) {
  constexpr ScalarType acc = sizeof(acc_t) == 8 ? ScalarType::Double : ScalarType::Float;
  const int64_t vocab = logits.size(1), heads = head_scale.numel(), all_rows = heads * labels.size(0) * seq_len;
  STD_TORCH_CHECK(logits.stride(1) == 1 || vocab == 1, "logits must have unit stride over the vocabulary");
  check_vector(rows, logits.size(0), ScalarType::Long, "rows");
  check_vector(head_scale, heads, acc, "head_scale");
  check_vector(loss, all_rows, acc, "loss");
  check_vector(lse, all_rows, acc, "lse");
  check_vector(predicted, all_rows, ScalarType::Int, "predicted");
  LossRowsParams<acc_t> p{};
  p.logits = logits.mutable_data_ptr();
  p.row_stride = logits.stride(0);
  p.vocab_size = vocab;
  p.rows = rows.const_data_ptr<int64_t>();
  p.targets = target_rule(labels, std::nullopt, token_weights, seq_len, first_shift, 0);
  p.head_scale = head_scale.const_data_ptr<acc_t>();
  p.row_scale = optional_vector<acc_t>(row_scale, all_rows, acc, "row_scale");
  p.lse_grad = optional_vector<acc_t>(lse_grad, all_rows, acc, "lse_grad");
  p.class_weights = optional_vector<float>(class_weights, vocab, ScalarType::Float, "class_weights");
  p.bias = optional_vector<acc_t>(bias, vocab, acc, "bias");
  p.loss = loss.mutable_data_ptr<acc_t>();
  p.lse = lse.mutable_data_ptr<acc_t>();
  p.predicted = predicted.mutable_data_ptr<int32_t>();
  return p;
}

Stage parse_stage(const std::string& stage) {
  if (stage == "whole") return Stage::kWhole;
  if (stage == "statistics") return Stage::kStatistics;
  STD_TORCH_CHECK(stage == "gradient", "stage must be whole, statistics or gradient, got ", stage);
  return Stage::kGradient;
}

// What a vocabulary shard adds to the parameters.
template <typename acc_t>
void set_stage(LossRowsParams<acc_t>& p, const std::string& stage, int64_t rows, int64_t vocab_start,
               std::optional<int64_t> total_vocab, const OptionalTensor& statistics, const OptionalTensor& local_max) {
  p.stage = parse_stage(stage);
  p.vocab_start = vocab_start;
  p.options.vocab_size = total_vocab.value_or(p.vocab_size);
  if (p.stage == Stage::kWhole) return;
  STD_TORCH_CHECK(statistics.has_value() && local_max.has_value(), "a stage needs statistics and local_max");
  check_vector(*statistics, rows * kRowStatistics, ScalarType::Double, "statistics");
  check_vector(*local_max, rows, ScalarType::Double, "local_max");
  p.statistics = statistics->mutable_data_ptr<double>();
  p.local_max = local_max->mutable_data_ptr<double>();
}

template <typename acc_t, typename Kernel>
void run(const LossRowsParams<acc_t>& params, int64_t num_rows, Kernel kernel) {
  torch::stable::parallel_for(0, num_rows, 1, [&](int64_t begin, int64_t end) { kernel(params, begin, end); });
}

void loss_rows_cpu(const Tensor& logits, const Tensor& rows, const Tensor& labels, const Tensor& head_scale,
                   const OptionalTensor& row_scale, const OptionalTensor& lse_grad, const OptionalTensor& token_weights,
                   const OptionalTensor& class_weights, const OptionalTensor& bias, int64_t seq_len,
                   int64_t first_shift, double label_smoothing, double z_loss, double class_weight_sum, double softcap,
                   double logit_scale, bool write_gradient, const Tensor& loss, const Tensor& lse,
                   const Tensor& predicted, std::string stage, int64_t vocab_start, std::optional<int64_t> total_vocab,
                   const OptionalTensor& statistics, const OptionalTensor& local_max) {
  STD_TORCH_CHECK(logits.dim() == 2, "logits must be [R, V]");
  const int64_t num_rows = logits.size(0);
  const auto make = [&](auto zero) {
    auto params = make_params<decltype(zero)>(logits, rows, labels, head_scale, row_scale, lse_grad, token_weights,
                                              class_weights, bias, seq_len, first_shift, loss, lse, predicted);
    params.logit_scale = logit_scale;
    params.softcap = softcap;
    params.options = {label_smoothing, z_loss, class_weight_sum, 0};
    params.gradient = write_gradient ? Gradient::kWrite : Gradient::kSkip;
    set_stage(params, stage, num_rows, vocab_start, total_vocab, statistics, local_max);
    return params;
  };
  if (logits.scalar_type() == ScalarType::Double) {
    LossRowsParams<double> params = make(double{});
    params.dtype = DType::kFloat64;
    return run(params, num_rows, loss_rows_double);
  }
  const bool narrow = logits.scalar_type() == ScalarType::BFloat16;
  STD_TORCH_CHECK(narrow || logits.scalar_type() == ScalarType::Float,
                  "logits must be float32, float64 or bfloat16 on the CPU");
  LossRowsParams<float> params = make(float{});
  params.dtype = narrow ? DType::kBFloat16 : DType::kFloat32;
  // Between its two stages a shard's row must not be rounded to bfloat16.
  STD_TORCH_CHECK(!narrow || params.stage == Stage::kWhole, "a vocabulary shard's logits must be float32 or float64");
  run(params, num_rows, loss_rows_kernel(cpu_capability()));
}

}  // namespace
}  // namespace mtp

STABLE_TORCH_LIBRARY_IMPL(mtp_ext, CPU, m) { m.impl("_loss_rows_", TORCH_BOX(&mtp::loss_rows_cpu)); }
