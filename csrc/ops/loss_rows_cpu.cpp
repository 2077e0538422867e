#include "ops/loss_rows.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "cpu/capability.h"
#include "cpu/loss_rows.h"

namespace mtp {
namespace {

struct Cpu {
  static constexpr bool kFloat64 = true;

  static void check(const Tensor& logits, const Tensor&, const Tensor&, const std::vector<OptionalTensor>&,
                    const std::vector<Tensor>&, const std::vector<Tensor>& statistics) {
    const DType dtype = dtype_of(logits);
    STD_TORCH_CHECK(dtype != DType::kFloat16, "logits must be float32, float64 or bfloat16 on the CPU");
    // A shard's row must not be rounded to bfloat16 between the two stages.
    STD_TORCH_CHECK(dtype != DType::kBFloat16 || statistics.empty(),
                    "a vocabulary shard's logits must be float32 or float64");
  }

  template <typename acc_t>
  static void run(LossRowsParams<acc_t> params, int64_t num_rows, const Tensor&) {
    if (params.class_weight_total != nullptr) params.options.class_weight_sum = *params.class_weight_total;
    torch::stable::parallel_for(0, num_rows, 1, [&](int64_t begin, int64_t end) { loss_rows_cpu(params, begin, end); });
  }
};

}  // namespace
}  // namespace mtp

STABLE_TORCH_LIBRARY_IMPL(mtp_ext, CPU, m) { m.impl("_loss_rows_", TORCH_BOX(&mtp::loss_rows<mtp::Cpu>)); }
