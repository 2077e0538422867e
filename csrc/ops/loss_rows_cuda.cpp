#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include "kernels/loss_rows.h"
#include "ops/aligned.h"
#include "ops/loss_rows.h"
#include "ops/stream.h"

namespace mtp {
namespace {

struct Cuda {
  static constexpr bool kFloat64 = false;

  static void check(const Tensor& logits, const Tensor& rows, const Tensor& labels,
                    const std::vector<OptionalTensor>& tensors, const std::vector<Tensor>& tables,
                    const std::vector<Tensor>& statistics) {
    check_same_device(logits, {rows, labels});
    check_same_device(logits, tensors);
    check_same_device(logits, tables);
    check_same_device(logits, statistics);
    STD_TORCH_CHECK(dtype_of(logits) != DType::kFloat64, "logits must be float32, float16 or bfloat16 on a GPU");
    const int64_t row_bytes = logits.stride(0) * logits.element_size();
    STD_TORCH_CHECK(logits.stride(0) >= logits.size(1) && row_bytes % kAlignment == 0 && is_aligned(logits),
                    "rows of logits must start at multiples of ", kAlignment, " bytes, got a stride of ", row_bytes);
  }

  static void run(const LossRowsParams<float>& params, int64_t num_rows, const Tensor& logits) {
    const torch::stable::accelerator::DeviceGuard guard(logits.get_device_index());
    check_launch(launch_loss_rows(params, num_rows, current_stream(logits)), "loss_rows");
  }
};

void loss_rows_cuda(const Tensor& logits, const Tensor& rows, const Tensor& labels, std::vector<OptionalTensor> tensors,
                    const std::vector<double>& options, double class_weight_sum, const std::vector<int64_t>& sizes,
                    bool write_gradient, const std::vector<Tensor>& tables, std::string stage,
                    const std::vector<Tensor>& statistics) {
  for (const LossRowsTensor table : {kClassWeights, kBias})
    if (tensors.size() == kLossRowsTensors && tensors[table].has_value()) tensors[table] = aligned(*tensors[table]);
  loss_rows<Cuda>(logits, rows, labels, tensors, options, class_weight_sum, sizes, write_gradient, tables, stage,
                  statistics);
}

}  // namespace
}  // namespace mtp

STABLE_TORCH_LIBRARY_IMPL(mtp_ext, CUDA, m) { m.impl("_loss_rows_", TORCH_BOX(&mtp::loss_rows_cuda)); }
