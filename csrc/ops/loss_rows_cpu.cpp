#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>
#include <string>

#include "cpu/capability.h"
#include "cpu/loss_rows.h"
#include "ops/loss_rows_arguments.h"

namespace mtp {
namespace {

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
                   const OptionalTensor& statistics, const OptionalTensor& local_max,
                   const OptionalTensor& class_weight_total) {
  const LossRowsArguments arguments{logits,
                                    rows,
                                    labels,
                                    head_scale,
                                    row_scale,
                                    lse_grad,
                                    token_weights,
                                    class_weights,
                                    bias,
                                    seq_len,
                                    first_shift,
                                    label_smoothing,
                                    z_loss,
                                    class_weight_sum,
                                    softcap,
                                    logit_scale,
                                    write_gradient,
                                    loss,
                                    lse,
                                    predicted,
                                    stage,
                                    vocab_start,
                                    total_vocab,
                                    statistics,
                                    local_max,
                                    class_weight_total};
  STD_TORCH_CHECK(!class_weight_total.has_value(), "class_weight_total is for GPUs; pass class_weight_sum");
  const DType dtype = dtype_of(logits);
  if (dtype == DType::kFloat64) {
    return run(make_loss_rows_params<double>(arguments, dtype), logits.size(0), loss_rows_double);
  }
  STD_TORCH_CHECK(dtype != DType::kFloat16, "logits must be float32, float64 or bfloat16 on the CPU");
  const LossRowsParams<float> params = make_loss_rows_params<float>(arguments, dtype);
  // Between its two stages a shard's row must not be rounded to bfloat16.
  STD_TORCH_CHECK(dtype == DType::kFloat32 || params.stage == Stage::kWhole,
                  "a vocabulary shard's logits must be float32 or float64");
  run(params, logits.size(0), loss_rows_kernel(cpu_capability()));
}

}  // namespace
}  // namespace mtp

STABLE_TORCH_LIBRARY_IMPL(mtp_ext, CPU, m) { m.impl("_loss_rows_", TORCH_BOX(&mtp::loss_rows_cpu)); }
