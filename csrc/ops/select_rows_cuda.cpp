#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <tuple>

#include "kernels/select_rows.h"
#include "ops/check.h"
#include "ops/stream.h"

namespace mtp {
namespace {

std::tuple<Tensor, Tensor, Tensor> select_rows_cuda(const Tensor& labels, const OptionalTensor& document_ids,
                                                    const OptionalTensor& token_weights, int64_t num_heads,
                                                    int64_t seq_len, int64_t first_shift, int64_t ignore_index,
                                                    int64_t vocab_size, bool marked) {
  check_same_device(labels, {document_ids, token_weights});
  STD_TORCH_CHECK(num_heads >= 1, "num_heads must be at least 1, got ", num_heads);
  SelectRowsParams p{};
  p.rule = target_rule<float>(labels, document_ids, token_weights, seq_len, first_shift, ignore_index);
  p.num_heads = num_heads;
  p.vocab_size = vocab_size;
  p.marked = marked;
  const torch::stable::accelerator::DeviceGuard guard(labels.get_device_index());
  const auto empty = [&](int64_t size) { return torch::stable::new_empty(labels, {size}, ScalarType::Long); };
  constexpr int64_t kWordsPerTile = sizeof(SelectedTile) / sizeof(int64_t);
  const int64_t rows_per_head = p.rule.batch * seq_len;
  Tensor rows = empty(num_heads * rows_per_head), counts = empty(num_heads), first_invalid = empty(1);
  Tensor tiles = empty(select_rows_tiles(num_heads, rows_per_head) * kWordsPerTile);
  p.rows = rows.mutable_data_ptr<int64_t>();
  p.counts = counts.mutable_data_ptr<int64_t>();
  p.first_invalid = first_invalid.mutable_data_ptr<int64_t>();
  p.tiles = static_cast<SelectedTile*>(tiles.mutable_data_ptr());
  check_launch(launch_select_rows(p, current_stream(labels)), "select_rows");
  return {rows, counts, first_invalid};
}

}  // namespace
}  // namespace mtp

STABLE_TORCH_LIBRARY_IMPL(mtp_ext, CUDA, m) { m.impl("_select_rows", TORCH_BOX(&mtp::select_rows_cuda)); }
