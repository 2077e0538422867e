#include "ops/chunk_gemms_cpu.h"

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "ops/cpu_tensor.h"

namespace mtp {
namespace {

constexpr int64_t kTileRows = 4096;                  // weight rows widened at once
constexpr int64_t kProductBytes = int64_t{8} << 20;  // of a weight gradient's tile: 4 % faster than 16 MiB at D = 2048

void mm_out(const Tensor& out, const Tensor& a, const Tensor& b) {
  TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(out.get(), a.get(), b.get()));
}

// out = beta out + a b; with beta 0, non-finite values in out do not propagate.
void addmm_out(const Tensor& out, const Tensor& a, const Tensor& b, double beta) {
  TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(out.get(), out.get(), a.get(), b.get(), beta, 1.0));
}

Tensor converted(const Tensor& x, ScalarType dtype) {
  if (x.scalar_type() == dtype) return x;
  Tensor y = empty_cpu({x.size(0), x.size(1)}, dtype);
  return torch::stable::copy_(y, x);
}

// out (+)= x, bfloat16 into float32.
void add_bfloat16(const Tensor& x, const Tensor& out, bool accumulate) {
  const auto* from = static_cast<const BFloat16Bits*>(x.const_data_ptr());
  float* to = out.mutable_data_ptr<float>();
  torch::stable::parallel_for(0, x.numel(), 1 << 15, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) to[i] = to_float(from[i]) + (accumulate ? to[i] : 0.0f);
  });
}

}  // namespace

ChunkGemmsCpu::ChunkGemmsCpu(const Tensor& weight, ScalarType compute, ScalarType logits)
    : weight_(weight), compute_(compute), logits_(logits), widens_(compute != logits) {
  if (!widens_) weight_ = converted(weight, compute);
}

Tensor ChunkGemmsCpu::widened(int64_t begin, int64_t size) {
  Tensor rows = slice(weight_, 0, begin, size);
  const int64_t tile = std::min(kTileRows, weight_.size(0)), width = weight_.size(1);
  if (!wide_.defined()) wide_ = empty_cpu({tile, width}, logits_);
  if (rows.scalar_type() != compute_) {
    if (!narrow_.defined()) narrow_ = empty_cpu({tile, width}, compute_);
    Tensor rounded = slice(narrow_, 0, 0, size);
    rows = torch::stable::copy_(rounded, rows);
  }
  Tensor wide = slice(wide_, 0, 0, size);
  return torch::stable::copy_(wide, rows);
}

void ChunkGemmsCpu::logits(const Tensor& h, const Tensor& z) {
  if (!widens_) return mm_out(z, h, transposed(weight_));
  for (int64_t v = 0; v < weight_.size(0); v += kTileRows) {
    const int64_t size = std::min(kTileRows, weight_.size(0) - v);
    mm_out(slice(z, 1, v, size), h, transposed(widened(v, size)));
  }
}

void ChunkGemmsCpu::grad_hidden(const Tensor& z, const Tensor& out) {
  if (!widens_) return mm_out(out, z, weight_);
  for (int64_t v = 0; v < weight_.size(0); v += kTileRows) {
    const int64_t size = std::min(kTileRows, weight_.size(0) - v);
    addmm_out(out, slice(z, 1, v, size), widened(v, size), v > 0 ? 1.0 : 0.0);
  }
}

void ChunkGemmsCpu::add_grad_weight(const Tensor& z, const Tensor& h, const Tensor& grad_weight,
                                    bool accumulate) const {
  if (z.scalar_type() == grad_weight.scalar_type()) {
    return addmm_out(grad_weight, transposed(z), h, accumulate ? 1.0 : 0.0);
  }
  // torch's CPU GEMM has no float32 output for bfloat16 operands: add its bfloat16 output a tile at a time.
  const int64_t vocab = weight_.size(0), width = h.size(1);
  const int64_t tile = std::clamp<int64_t>(kProductBytes / std::max<int64_t>(1, width * element_size(h.scalar_type())),
                                           1, std::max<int64_t>(1, vocab));
  const Tensor products = empty_cpu({tile, width}, h.scalar_type());
  for (int64_t v = 0; v < vocab; v += tile) {
    const int64_t size = std::min(tile, vocab - v);
    const Tensor product = slice(products, 0, 0, size);
    mm_out(product, transposed(slice(z, 1, v, size)), h);
    add_bfloat16(product, slice(grad_weight, 0, v, size), accumulate);
  }
}

}  // namespace mtp
