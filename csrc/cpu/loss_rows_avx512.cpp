// The float32/bfloat16 row kernel for processors with AVX-512 (F, BW, VL, DQ).
#include "cpu/loss_rows_isa.h"

#if defined(__x86_64__)
namespace mtp {
namespace {
constexpr int kLanes = 16;
}  // namespace
}  // namespace mtp

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")
#endif

#include "cpu/loss_rows_simd.h"

namespace mtp {
void loss_rows_avx512(const LossRowsParams<float>& params, int64_t begin, int64_t end) {
  loss_rows(params, begin, end);
}
}  // namespace mtp

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif  // __x86_64__
