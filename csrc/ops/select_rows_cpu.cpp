#include "cpu/select_rows.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <tuple>

#include "ops/check.h"

namespace mtp {
namespace {

std::tuple<Tensor, Tensor, Tensor> select_rows_cpu(const Tensor& labels, const OptionalTensor& document_ids,
                                                   const OptionalTensor& token_weights, int64_t num_heads,
                                                   int64_t seq_len, int64_t first_shift, int64_t ignore_index,
                                                   int64_t vocab_size) {
  const TargetRule rule = target_rule(labels, document_ids, token_weights, seq_len, first_shift, ignore_index);
  Tensor rows = torch::stable::new_empty(labels, {num_heads * rule.batch * seq_len}, ScalarType::Long);
  Tensor counts = torch::stable::new_empty(labels, {num_heads}, ScalarType::Long);
  Tensor first_invalid = torch::stable::new_empty(labels, {1}, ScalarType::Long);
  *first_invalid.mutable_data_ptr<int64_t>() =
      select_rows(rule, num_heads, vocab_size, rows.mutable_data_ptr<int64_t>(), counts.mutable_data_ptr<int64_t>());
  return {rows, counts, first_invalid};
}

}  // namespace
}  // namespace mtp

STABLE_TORCH_LIBRARY_IMPL(mtp_ext, CPU, m) { m.impl("_select_rows", TORCH_BOX(&mtp::select_rows_cpu)); }
