// Instruction set of the CPU kernels, chosen once per process.
#pragma once
#include "cpu/loss_rows.h"

namespace mtp {

enum class CpuCapability { kPlain, kAvx2, kAvx512 };

// The best set this processor supports; MTP_EXT_CPU_CAPABILITY=plain|avx2|avx512 can lower it but not raise it.
CpuCapability cpu_capability();
const char* capability_name(CpuCapability capability);
LossRowsFloat loss_rows_kernel(CpuCapability capability);

// The row kernel for the logits' dtype on this processor.
inline void loss_rows_cpu(const LossRowsParams<double>& params, int64_t begin, int64_t end) {
  loss_rows_double(params, begin, end);
}
inline void loss_rows_cpu(const LossRowsParams<float>& params, int64_t begin, int64_t end) {
  loss_rows_kernel(cpu_capability())(params, begin, end);
}

}  // namespace mtp
