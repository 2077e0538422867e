// The float32/bfloat16 row kernel for the compiler's baseline: SSE2 on x86-64, NEON on 64-bit Arm.
#include "cpu/loss_rows_isa.h"

namespace mtp {
namespace {
constexpr int kLanes = 4;
}  // namespace
}  // namespace mtp

#include "cpu/loss_rows_simd.h"

namespace mtp {
void loss_rows_plain(const LossRowsParams<float>& params, int64_t begin, int64_t end) { loss_rows(params, begin, end); }
}  // namespace mtp
