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

// x [T, D]; weight [n, D] float32 -> y [n, T, D], rstd [T].
std::tuple<Tensor, Tensor> rms_norm_heads_cuda(const Tensor& x, const Tensor& weight, double eps) {
  check_same_device(x, {weight});
  STD_TORCH_CHECK(x.dim() == 2 && x.is_contiguous() && weight.dim() == 2 && weight.size(1) == x.size(1),
                  "x must be contiguous [T, D] and weight [n, D]");
  check_vector(weight, weight.size(0) * x.size(1), ScalarType::Float, "weight");
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const int64_t rows = x.size(0), width = x.size(1), heads = weight.size(0);
  const Tensor x_rows = aligned(x), weights = aligned(weight);
  Tensor y = torch::stable::new_empty(x, {heads, rows, width});
  Tensor rstd = torch::stable::new_empty(x, {rows}, ScalarType::Float);
  RmsNormForwardParams p{};
  p.x = x_rows.const_data_ptr();
  p.weight = weights.const_data_ptr<float>();
  p.y = y.mutable_data_ptr();
  p.rstd = rstd.mutable_data_ptr<float>();
  p.heads = heads;
  p.rows = rows;
  p.width = width;
  p.eps = static_cast<float>(eps);
  p.dtype = dtype_of(x);
  check_launch(launch_rms_norm_forward(p, current_stream(x)), "rms_norm_heads");
  return {y, rstd};
}

std::tuple<Tensor, Tensor> rms_norm_heads_backward_cuda(const Tensor& grad_y, const Tensor& x, const Tensor& weight,
                                                        const Tensor& rstd) {
  check_same_device(x, {grad_y, weight, rstd});
  STD_TORCH_CHECK(x.dim() == 2 && x.is_contiguous() && weight.dim() == 2 && weight.size(1) == x.size(1),
                  "x must be contiguous [T, D] and weight [n, D]");
  const int64_t rows = x.size(0), width = x.size(1), heads = weight.size(0);
  check_vector(grad_y, heads * rows * width, x.scalar_type(), "grad_y");
  check_vector(weight, heads * width, ScalarType::Float, "weight");
  check_vector(rstd, rows, ScalarType::Float, "rstd");
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const Tensor grad_y_rows = aligned(grad_y), x_rows = aligned(x), weights = aligned(weight);
  Tensor grad_x = torch::stable::new_empty(x, {rows, width});
  Tensor grad_weight = torch::stable::new_empty(x, {heads, width}, ScalarType::Float);
  Tensor partial = torch::stable::new_empty(x, {rms_norm_partials(rows, heads, width)}, ScalarType::Float);
  RmsNormBackwardParams p{};
  p.grad_y = grad_y_rows.const_data_ptr();
  p.x = x_rows.const_data_ptr();
  p.weight = weights.const_data_ptr<float>();
  p.rstd = rstd.const_data_ptr<float>();
  p.grad_x = grad_x.mutable_data_ptr();
  p.grad_weight = grad_weight.mutable_data_ptr<float>();
  p.partial = partial.mutable_data_ptr<float>();
  p.heads = heads;
  p.rows = rows;
  p.width = width;
  p.dtype = dtype_of(x);
  check_launch(launch_rms_norm_backward(p, current_stream(x)), "rms_norm_heads_backward");
  return {grad_x, grad_weight};
}

}  // namespace
}  // namespace mtp

STABLE_TORCH_LIBRARY_IMPL(mtp_ext, CUDA, m) {
  m.impl("_rms_norm_heads", TORCH_BOX(&mtp::rms_norm_heads_cuda));
  m.impl("_rms_norm_heads_backward", TORCH_BOX(&mtp::rms_norm_heads_backward_cuda));
}
