// Product of a few rows with a matrix, at the speed at which memory delivers the matrix.
//
//   y[r, o] = sum_i x[r, i] w[o, i]
//
// Shapes    x [R, I], w [O, I], y [R, O] in one dtype, float32 or bfloat16; all contiguous.
// Cost      reads w once, in the order of its addresses. One core of an EPYC (Zen 4) is bound by memory up to 8 rows in
//           float32 and 4 in bfloat16 (with AVX512-BF16), by arithmetic from 16 rows on.
// Launch    columns [begin, end) of y on the calling thread.
// Numerics  sums in float32; those of a row depend on neither the other rows nor the range of columns. y is rounded once.
// Caller    R, I, O >= 0.
#pragma once
#include <cstdint>

#include "cpu/capability.h"

namespace mtp {

template <typename scalar_t>
struct FewRowsParams {
  const scalar_t* x;
  const scalar_t* w;
  scalar_t* y;
  int64_t rows, width, columns;
};

void few_rows(CpuCapability capability, const FewRowsParams<float>& params, int64_t begin, int64_t end);
void few_rows(CpuCapability capability, const FewRowsParams<BFloat16Bits>& params, int64_t begin, int64_t end);

}  // namespace mtp
