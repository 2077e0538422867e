// Column sums and scaling by a device scalar.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include "kernels/column_sum.h"
#include "kernels/scale.h"
#include "ops/check.h"
#include "ops/stream.h"

namespace mtp {
namespace {

void column_sum_cuda(const Tensor& x, const Tensor& out, bool accumulate) {
  check_same_device(x, {out});
  STD_TORCH_CHECK(x.dim() == 2 && (x.size(1) <= 1 || x.stride(1) == 1), "x must be [R, C] with unit stride over C");
  check_vector(out, x.size(1), ScalarType::Float, "out");
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  check_launch(launch_column_sum(
                   {x.const_data_ptr(), dtype_of(x), x.size(0), x.size(1), x.stride(0), out.mutable_data_ptr<float>(),
                    accumulate ? Destination::kAccumulate : Destination::kOverwrite},
                   current_stream(x)),
               "column_sum");
}

void scale_into_cuda(const Tensor& x, const Tensor& scale, const Tensor& out) {
  check_same_device(x, {scale, out});
  check_vector(scale, 1, ScalarType::Float, "scale");
  STD_TORCH_CHECK(x.is_contiguous() && out.is_contiguous() && x.numel() == out.numel(),
                  "x and out must be contiguous and of one size");
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  check_launch(launch_scale({x.const_data_ptr(), out.mutable_data_ptr(), dtype_of(x), dtype_of(out), x.numel(),
                             scale.const_data_ptr<float>()},
                            current_stream(x)),
               "scale_into");
}

}  // namespace
}  // namespace mtp

STABLE_TORCH_LIBRARY_IMPL(mtp_ext, CUDA, m) {
  m.impl("_column_sum_", TORCH_BOX(&mtp::column_sum_cuda));
  m.impl("_scale_into_", TORCH_BOX(&mtp::scale_into_cuda));
}
