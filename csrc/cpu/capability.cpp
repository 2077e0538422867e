#include "cpu/capability.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>

namespace mtp {
namespace {

CpuCapability detect() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  // Must match the targets of loss_rows_avx512.cpp, loss_rows_avx2.cpp and few_rows.cpp.
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("fma"))
    return CpuCapability::kAvx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return CpuCapability::kAvx2;
#endif
  return CpuCapability::kPlain;
}

CpuCapability limit_from_environment() {
  const char* wanted = std::getenv("MTP_EXT_CPU_CAPABILITY");
  if (wanted != nullptr && std::strcmp(wanted, "plain") == 0) return CpuCapability::kPlain;
  if (wanted != nullptr && std::strcmp(wanted, "avx2") == 0) return CpuCapability::kAvx2;
  return CpuCapability::kAvx512;
}

}  // namespace

CpuCapability cpu_capability() {
  static const CpuCapability capability = std::min(detect(), limit_from_environment());
  return capability;
}

const char* capability_name(CpuCapability capability) {
  switch (capability) {
    case CpuCapability::kPlain:
      return "plain";
    case CpuCapability::kAvx2:
      return "avx2";
    case CpuCapability::kAvx512:
      return "avx512";
  }
  return "unknown";
}

LossRowsFloat loss_rows_kernel(CpuCapability capability) {
#if defined(__x86_64__)
  if (capability == CpuCapability::kAvx512) return loss_rows_avx512;
  if (capability == CpuCapability::kAvx2) return loss_rows_avx2;
#endif
  static_cast<void>(capability);
  return loss_rows_plain;
}

}  // namespace mtp
