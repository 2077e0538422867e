#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <optional>
#include <string>

#include "kernels/loss_rows.h"
#include "ops/loss_rows_arguments.h"
#include "ops/stream.h"

namespace mtp {
namespace {

void loss_rows_cuda(const Tensor& logits, const Tensor& rows, const Tensor& labels, const Tensor& head_scale,
                    const OptionalTensor& row_scale, const OptionalTensor& lse_grad,
                    const OptionalTensor& token_weights, const OptionalTensor& class_weights,
                    const OptionalTensor& bias, int64_t seq_len, int64_t first_shift, double label_smoothing,
                    double z_loss, double class_weight_sum, double softcap, double logit_scale, bool write_gradient,
                    const Tensor& loss, const Tensor& lse, const Tensor& predicted, std::string stage,
                    int64_t vocab_start, std::optional<int64_t> total_vocab, const OptionalTensor& statistics,
                    const OptionalTensor& local_max, const OptionalTensor& class_weight_total) {
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
  check_same_device(
      logits, {rows, labels, head_scale, loss, lse, predicted},
      {row_scale, lse_grad, token_weights, class_weights, bias, statistics, local_max, class_weight_total});
  const LossRowsParams<float> params = make_loss_rows_params<float>(arguments, dtype_of(logits));
  STD_TORCH_CHECK(params.dtype != DType::kFloat64, "logits must be float32, float16 or bfloat16 on a GPU");
  const torch::stable::accelerator::DeviceGuard guard(logits.get_device_index());
  check_launch(launch_loss_rows(params, logits.size(0), current_stream(logits)), "loss_rows");
}

}  // namespace
}  // namespace mtp

STABLE_TORCH_LIBRARY_IMPL(mtp_ext, CUDA, m) { m.impl("_loss_rows_", TORCH_BOX(&mtp::loss_rows_cuda)); }
