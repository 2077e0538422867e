#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <tuple>

#include "kernels/rms_norm.h"
#include "ops/aligned.h"
#include "ops/check.h"
#include "ops/stream.h"

namespace mtp {
namespace {

const void* optional_like(const OptionalTensor& x, const Tensor& other, const char* name) {
  if (!x.has_value()) return nullptr;
  check_vector(*x, other.numel(), other.scalar_type(), name);
  return x->const_data_ptr();
}

// x [T, D], residual the same; weight [n, D] float32 -> y [n, T, D], h = x + residual [T, D] (empty without one), rstd
// [T].
std::tuple<Tensor, Tensor, Tensor> rms_norm_heads_cuda(const Tensor& x, const OptionalTensor& residual,
                                                       const Tensor& weight, double eps) {
  check_same_device(x, {weight}, {residual});
  STD_TORCH_CHECK(x.dim() == 2 && x.is_contiguous() && weight.dim() == 2 && weight.size(1) == x.size(1),
                  "x must be contiguous [T, D] and weight [n, D]");
  check_vector(weight, weight.size(0) * x.size(1), ScalarType::Float, "weight");
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const int64_t rows = x.size(0), width = x.size(1), heads = weight.size(0);
  const Tensor x_rows = aligned(x), weights = aligned(weight);
  const OptionalTensor residual_rows = aligned(residual);
  Tensor y = torch::stable::new_empty(x, {heads, rows, width});
  Tensor rstd = torch::stable::new_empty(x, {rows}, ScalarType::Float);
  Tensor h = torch::stable::new_empty(x, {residual.has_value() ? rows : 0, width});
  const RmsNormForwardParams params{x_rows.const_data_ptr(),
                                    optional_like(residual_rows, x, "residual"),
                                    weights.const_data_ptr<float>(),
                                    residual.has_value() ? h.mutable_data_ptr() : nullptr,
                                    y.mutable_data_ptr(),
                                    rstd.mutable_data_ptr<float>(),
                                    heads,
                                    rows,
                                    width,
                                    static_cast<float>(eps),
                                    dtype_of(x)};
  check_launch(launch_rms_norm_forward(params, current_stream(x)), "rms_norm_heads");
  return {y, h, rstd};
}

std::tuple<Tensor, Tensor> rms_norm_heads_backward_cuda(const Tensor& grad_y, const Tensor& h,
                                                        const OptionalTensor& grad_h, const Tensor& weight,
                                                        const Tensor& rstd) {
  check_same_device(h, {grad_y, weight, rstd}, {grad_h});
  STD_TORCH_CHECK(h.dim() == 2 && h.is_contiguous() && weight.dim() == 2 && weight.size(1) == h.size(1),
                  "h must be contiguous [T, D] and weight [n, D]");
  const int64_t rows = h.size(0), width = h.size(1), heads = weight.size(0);
  check_vector(grad_y, heads * rows * width, h.scalar_type(), "grad_y");
  check_vector(weight, heads * width, ScalarType::Float, "weight");
  check_vector(rstd, rows, ScalarType::Float, "rstd");
  const torch::stable::accelerator::DeviceGuard guard(h.get_device_index());
  const Tensor grad_y_rows = aligned(grad_y), h_rows = aligned(h), weights = aligned(weight);
  const OptionalTensor grad_h_rows = aligned(grad_h);
  Tensor grad_x = torch::stable::new_empty(h, {rows, width});
  Tensor grad_weight = torch::stable::new_empty(h, {heads, width}, ScalarType::Float);
  Tensor partial = torch::stable::new_empty(h, {rms_norm_partials(rows, heads, width)}, ScalarType::Float);
  const RmsNormBackwardParams params{grad_y_rows.const_data_ptr(),
                                     h_rows.const_data_ptr(),
                                     optional_like(grad_h_rows, h, "grad_h"),
                                     weights.const_data_ptr<float>(),
                                     rstd.const_data_ptr<float>(),
                                     grad_x.mutable_data_ptr(),
                                     grad_weight.mutable_data_ptr<float>(),
                                     partial.mutable_data_ptr<float>(),
                                     heads,
                                     rows,
                                     width,
                                     dtype_of(h)};
  check_launch(launch_rms_norm_backward(params, current_stream(h)), "rms_norm_heads_backward");
  return {grad_x, grad_weight};
}

}  // namespace
}  // namespace mtp

STABLE_TORCH_LIBRARY_IMPL(mtp_ext, CUDA, m) {
  m.impl("_rms_norm_heads", TORCH_BOX(&mtp::rms_norm_heads_cuda));
  m.impl("_rms_norm_heads_backward", TORCH_BOX(&mtp::rms_norm_heads_backward_cuda));
}
