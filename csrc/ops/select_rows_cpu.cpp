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
                                                   int64_t vocab_size, bool marked) {
  Tensor rows = torch::stable::new_empty(labels, {num_heads * labels.size(0) * seq_len}, ScalarType::Long);
  Tensor counts = torch::stable::new_empty(labels, {num_heads}, ScalarType::Long);
  Tensor first_invalid = torch::stable::new_empty(labels, {1}, ScalarType::Long);
  const auto run = [&](auto zero) {
    const auto rule =
        target_rule<decltype(zero)>(labels, document_ids, token_weights, seq_len, first_shift, ignore_index);
    return select_rows(rule, num_heads, vocab_size, marked, rows.mutable_data_ptr<int64_t>(),
                       counts.mutable_data_ptr<int64_t>());
  };
  const bool is_double = token_weights.has_value() && token_weights->scalar_type() == ScalarType::Double;
  *first_invalid.mutable_data_ptr<int64_t>() = is_double ? run(double{}) : run(float{});
  return {rows, counts, first_invalid};
}

}  // namespace
}  // namespace mtp

STABLE_TORCH_LIBRARY_IMPL(mtp_ext, CPU, m) { m.impl("_select_rows", TORCH_BOX(&mtp::select_rows_cpu)); }
