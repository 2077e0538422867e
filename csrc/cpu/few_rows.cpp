#include "cpu/few_rows.h"

#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

// Inlined into a function for each instruction set, which thereby compiles it.
#define MTP_INLINE inline __attribute__((always_inline))

namespace mtp {
namespace {

// How far ahead w is fetched into the L2 cache. The hardware does not follow several rows of w at once: 17 GB/s on one
// core in place of 11, where 25 are possible.
constexpr int kBytesAhead = 16384;

template <int kLanes>
struct Lanes {
  typedef float Float __attribute__((vector_size(kLanes * sizeof(float))));
  typedef uint32_t Word __attribute__((vector_size(kLanes * sizeof(float))));
  typedef uint16_t Half __attribute__((vector_size(kLanes * sizeof(uint16_t))));
};

template <int kLanes>
MTP_INLINE void load(const float* p, typename Lanes<kLanes>::Float& v) {
  std::memcpy(&v, p, sizeof(v));
}

template <int kLanes>
MTP_INLINE void load(const BFloat16Bits* p, typename Lanes<kLanes>::Float& v) {
  typename Lanes<kLanes>::Half bits;
  std::memcpy(&bits, p, sizeof(bits));
  const auto wide = __builtin_convertvector(bits, typename Lanes<kLanes>::Word) << 16;
  std::memcpy(&v, &wide, sizeof(v));
}

MTP_INLINE float load(float x) { return x; }
MTP_INLINE float load(BFloat16Bits x) { return to_float(x); }
MTP_INLINE void store(float* p, float x) { *p = x; }
MTP_INLINE void store(BFloat16Bits* p, float x) { *p = to_bfloat16(x); }

template <int kLanes>
MTP_INLINE float sum(const typename Lanes<kLanes>::Float& v) {
  if constexpr (kLanes == 1) {
    return v[0];
  } else {
    typename Lanes<kLanes / 2>::Float low, high;
    std::memcpy(&low, &v, sizeof(low));
    std::memcpy(&high, reinterpret_cast<const char*>(&v) + sizeof(low), sizeof(high));
    low += high;
    return sum<kLanes / 2>(low);
  }
}

template <int kLanes, int kRows, int kColumns, typename scalar_t>
MTP_INLINE void tile(const FewRowsParams<scalar_t>& p, int64_t r, int64_t o) {
  typename Lanes<kLanes>::Float total[kRows][kColumns] = {};
  const scalar_t* x = p.x + r * p.width;
  const scalar_t* w = p.w + o * p.width;
  int64_t i = 0;
  for (; i + kLanes <= p.width; i += kLanes) {
    typename Lanes<kLanes>::Float w_vector[kColumns], x_vector;
    for (int c = 0; c < kColumns; ++c) {
      load<kLanes>(w + c * p.width + i, w_vector[c]);
      const char* ahead = reinterpret_cast<const char*>(w + i * kColumns + c * kLanes) + kBytesAhead;
      __builtin_prefetch(ahead, 0, 2);
    }
    for (int k = 0; k < kRows; ++k) {
      load<kLanes>(x + k * p.width + i, x_vector);
      for (int c = 0; c < kColumns; ++c) total[k][c] += x_vector * w_vector[c];
    }
  }
  for (int k = 0; k < kRows; ++k)
    for (int c = 0; c < kColumns; ++c) {
      float y = sum<kLanes>(total[k][c]);
      for (int64_t j = i; j < p.width; ++j) y += load(x[k * p.width + j]) * load(w[c * p.width + j]);
      store(p.y + (r + k) * p.columns + o + c, y);
    }
}

// A block of columns stays in the L1 cache while all rows are multiplied with it.
template <int kLanes, int kColumns, typename scalar_t>
MTP_INLINE void block(const FewRowsParams<scalar_t>& p, int64_t o) {
  int64_t r = 0;
  for (; r + 4 <= p.rows; r += 4) tile<kLanes, 4, kColumns>(p, r, o);
  for (; r + 2 <= p.rows; r += 2) tile<kLanes, 2, kColumns>(p, r, o);
  if (r < p.rows) tile<kLanes, 1, kColumns>(p, r, o);
}

template <int kLanes, typename scalar_t>
MTP_INLINE void blocks(const FewRowsParams<scalar_t>& p, int64_t begin, int64_t end) {
  constexpr int kColumns = kLanes == 16 ? 4 : 2;  // accumulators and operands fit the registers
  int64_t o = begin;
  for (; o + kColumns <= end; o += kColumns) block<kLanes, kColumns>(p, o);
  for (; o < end; ++o) block<kLanes, 1>(p, o);
}

#if defined(__x86_64__)
template <typename scalar_t>
__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma"))) void few_rows_avx512(
    const FewRowsParams<scalar_t>& p, int64_t begin, int64_t end) {
  blocks<16>(p, begin, end);
}

template <typename scalar_t>
__attribute__((target("avx2,fma"))) void few_rows_avx2(const FewRowsParams<scalar_t>& p, int64_t begin, int64_t end) {
  blocks<8>(p, begin, end);
}

// bfloat16 with AVX512-BF16, which widens nothing: four rows take the time of one, eight 0.56 of that without it.
#define MTP_DOT __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma")))

MTP_DOT MTP_INLINE __m512bh load_pairs(const BFloat16Bits* p) {
  __m512bh v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

template <int kRows, int kColumns>
MTP_DOT MTP_INLINE void dot_tile(const FewRowsParams<BFloat16Bits>& p, int64_t r, int64_t o) {
  __m512 total[kRows][kColumns] = {};
  const BFloat16Bits* x = p.x + r * p.width;
  const BFloat16Bits* w = p.w + o * p.width;
  int64_t i = 0;
  for (; i + 32 <= p.width; i += 32) {
    __m512bh w_vector[kColumns];
    for (int c = 0; c < kColumns; ++c) {
      w_vector[c] = load_pairs(w + c * p.width + i);
      __builtin_prefetch(reinterpret_cast<const char*>(w + i * kColumns + c * 32) + kBytesAhead, 0, 2);
    }
    for (int k = 0; k < kRows; ++k) {
      const __m512bh x_vector = load_pairs(x + k * p.width + i);
      for (int c = 0; c < kColumns; ++c) total[k][c] = _mm512_dpbf16_ps(total[k][c], x_vector, w_vector[c]);
    }
  }
  for (int k = 0; k < kRows; ++k)
    for (int c = 0; c < kColumns; ++c) {
      Lanes<16>::Float lanes;
      std::memcpy(&lanes, &total[k][c], sizeof(lanes));
      float y = sum<16>(lanes);
      for (int64_t j = i; j < p.width; ++j) y += load(x[k * p.width + j]) * load(w[c * p.width + j]);
      store(p.y + (r + k) * p.columns + o + c, y);
    }
}

template <int kColumns>
MTP_DOT MTP_INLINE void dot_block(const FewRowsParams<BFloat16Bits>& p, int64_t o) {
  int64_t r = 0;
  for (; r + 4 <= p.rows; r += 4) dot_tile<4, kColumns>(p, r, o);
  for (; r + 2 <= p.rows; r += 2) dot_tile<2, kColumns>(p, r, o);
  if (r < p.rows) dot_tile<1, kColumns>(p, r, o);
}

MTP_DOT void few_rows_dot(const FewRowsParams<BFloat16Bits>& p, int64_t begin, int64_t end) {
  int64_t o = begin;
  for (; o + 4 <= end; o += 4) dot_block<4>(p, o);
  for (; o < end; ++o) dot_block<1>(p, o);
}

bool has_dot() {
  static const bool found = __builtin_cpu_supports("avx512bf16");
  return found;
}
#endif

template <typename scalar_t>
void dispatch(CpuCapability capability, const FewRowsParams<scalar_t>& p, int64_t begin, int64_t end) {
#if defined(__x86_64__)
  if (capability == CpuCapability::kAvx512) return few_rows_avx512(p, begin, end);
  if (capability == CpuCapability::kAvx2) return few_rows_avx2(p, begin, end);
#endif
  static_cast<void>(capability);
  blocks<4>(p, begin, end);
}

}  // namespace

void few_rows(CpuCapability capability, const FewRowsParams<float>& params, int64_t begin, int64_t end) {
  dispatch(capability, params, begin, end);
}

void few_rows(CpuCapability capability, const FewRowsParams<BFloat16Bits>& params, int64_t begin, int64_t end) {
#if defined(__x86_64__)
  if (capability == CpuCapability::kAvx512 && has_dot()) return few_rows_dot(params, begin, end);
#endif
  dispatch(capability, params, begin, end);
}

}  // namespace mtp
