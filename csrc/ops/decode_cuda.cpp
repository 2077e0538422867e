#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <tuple>

#include "kernels/decode.h"
#include "ops/aligned.h"
#include "ops/check.h"
#include "ops/stream.h"

namespace mtp {
namespace {

std::tuple<Tensor, Tensor, Tensor> decode_cuda(const Tensor& hidden, const Tensor& weight, int64_t top) {
  check_same_device(hidden, {weight});
  STD_TORCH_CHECK(hidden.dim() == 2 && weight.dim() == 2 && hidden.size(1) == weight.size(1),
                  "hidden must be [R, D] and weight [V, D]");
  STD_TORCH_CHECK(hidden.size(0) <= kDecodeLargestRows && top >= 1 && top <= kDecodeLargestTop &&
                      top <= weight.size(0) && hidden.size(1) % 8 == 0,
                  "at most ", kDecodeLargestRows, " rows, 1 <= top <= ", kDecodeLargestTop, " and D a multiple of 8");
  STD_TORCH_CHECK(hidden.scalar_type() == weight.scalar_type() && hidden.is_contiguous() && weight.is_contiguous(),
                  "hidden and weight must be contiguous and of one dtype");
  const torch::stable::accelerator::DeviceGuard guard(hidden.get_device_index());
  const int64_t rows = hidden.size(0), vocab = weight.size(0);
  const Tensor hidden_rows = aligned(hidden), weight_rows = aligned(weight);
  Tensor logits = torch::stable::new_empty(hidden, {rows, top}, ScalarType::Float);
  Tensor ids = torch::stable::new_empty(hidden, {rows, top}, ScalarType::Int);
  Tensor lse = torch::stable::new_empty(hidden, {rows}, ScalarType::Float);
  const auto bytes = static_cast<int64_t>(decode_workspace_bytes(rows, vocab, static_cast<int>(top)));
  Tensor workspace = torch::stable::new_empty(hidden, {bytes}, ScalarType::Byte);
  check_launch(launch_decode({hidden_rows.const_data_ptr(), weight_rows.const_data_ptr(), dtype_of(hidden), rows, vocab,
                              hidden.size(1), hidden_rows.stride(0), weight_rows.stride(0), static_cast<int>(top),
                              logits.mutable_data_ptr<float>(), ids.mutable_data_ptr<int32_t>(),
                              lse.mutable_data_ptr<float>(), workspace.mutable_data_ptr()},
                             current_stream(hidden)),
               "decode");
  return {logits, ids, lse};
}

}  // namespace
}  // namespace mtp

STABLE_TORCH_LIBRARY_IMPL(mtp_ext, CUDA, m) { m.impl("_decode", TORCH_BOX(&mtp::decode_cuda)); }
