#include "cpu/few_rows.h"

#include <algorithm>

#include "ops/cpu_tensor.h"

namespace mtp {
namespace {

constexpr int64_t kWeightsPerThread = 65536;  // 15 us of float32; waking a thread takes 5

template <typename scalar_t>
void run(const Tensor& x, const Tensor& weight, Tensor y) {
  FewRowsParams<scalar_t> params{};
  params.x = static_cast<const scalar_t*>(x.const_data_ptr());
  params.w = static_cast<const scalar_t*>(weight.const_data_ptr());
  params.y = static_cast<scalar_t*>(y.mutable_data_ptr());
  params.rows = x.size(0), params.width = x.size(1), params.columns = weight.size(0);
  const int64_t grain = std::max<int64_t>(64, kWeightsPerThread / std::max<int64_t>(1, params.width));
  torch::stable::parallel_for(0, params.columns, grain,
                              [&](int64_t begin, int64_t end) { few_rows(cpu_capability(), params, begin, end); });
}

Tensor few_rows_cpu(const Tensor& x, const Tensor& weight) {
  STD_TORCH_CHECK(x.dim() == 2 && weight.dim() == 2 && x.size(1) == weight.size(1) && x.is_contiguous() &&
                      weight.is_contiguous() && x.scalar_type() == weight.scalar_type(),
                  "x must be [R, I] and weight [O, I], contiguous and of one dtype");
  Tensor y = empty_cpu({x.size(0), weight.size(0)}, x.scalar_type());
  if (x.scalar_type() == ScalarType::Float) {
    run<float>(x, weight, y);
  } else {
    STD_TORCH_CHECK(x.scalar_type() == ScalarType::BFloat16, "x must be float32 or bfloat16");
    run<BFloat16Bits>(x, weight, y);
  }
  return y;
}

}  // namespace
}  // namespace mtp

STABLE_TORCH_LIBRARY_IMPL(mtp_ext, CPU, m) { m.impl("_few_rows", TORCH_BOX(&mtp::few_rows_cpu)); }
