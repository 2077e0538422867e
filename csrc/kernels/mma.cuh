// One tensor-core product per warp: C[16, 8] += A[16, 16] B[16, 8], 16-bit operands, float32 sums. With g = lane / 4
// and t = lane % 4, a lane holds, in words of two elements,
//   a[0], a[1], a[2], a[3]: A[g, 2t..], A[g + 8, 2t..], A[g, 2t + 8..], A[g + 8, 2t + 8..]
//   b[0], b[1]:             B[2t.., g], B[2t + 8.., g]
//   c[0..3]:                C[g, 2t], C[g, 2t + 1], C[g + 8, 2t], C[g + 8, 2t + 1]
// On the host the emulator gathers the operands from the lanes by the same table.
#pragma once
#include "kernels/numeric.cuh"

namespace mtp {

template <typename scalar_t>
__device__ __forceinline__ void warp_mma(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2]);

#if defined(__CUDACC__)

template <>
__device__ __forceinline__ void warp_mma<__nv_bfloat16>(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

template <>
__device__ __forceinline__ void warp_mma<__half>(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

#else

template <typename scalar_t>
void warp_mma(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  const auto pair = [](unsigned word, int half) {
    const float2 both = unpack_pair<scalar_t>(word);
    return half == 0 ? both.x : both.y;
  };
  emulator::warp_mma(c, a, b, pair);
}

#endif

}  // namespace mtp
