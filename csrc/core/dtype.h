// Element types of the kernels, and bfloat16 storage on the host (arithmetic is always float32 or float64).
#pragma once
#include <cstdint>
#include <cstring>

#include "core/macros.h"

namespace mtp {

enum class DType { kFloat32, kFloat64, kFloat16, kBFloat16 };
enum class IndexType { kInt32, kInt64 };

struct BFloat16Bits {
  uint16_t bits;
};

inline float to_float(BFloat16Bits x) {
  const uint32_t bits = uint32_t{x.bits} << 16;
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

// Rounds to nearest even; NaN stays a (quiet) NaN.
inline BFloat16Bits to_bfloat16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {static_cast<uint16_t>((bits >> 16) | 0x40u)};
  return {static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}

MTP_HD int64_t load_index(const void* values, IndexType type, int64_t i) {
  return type == IndexType::kInt64 ? static_cast<const int64_t*>(values)[i] : static_cast<const int32_t*>(values)[i];
}

}  // namespace mtp
