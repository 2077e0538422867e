// Product of a few rows with a matrix, at the speed at which memory delivers the matrix.
//
//   y[r, o] = sum_i x[r, i] w[o, i]
//
// Shapes    x [R, I] float32, w [O, I] and y [R, O] float32 or bfloat16; all contiguous.
// Cost      reads w once, in the order of its addresses. In float32 one core of an EPYC (Zen 4) is bound by memory up to
//           8 rows, by arithmetic from 16 rows on.
// Launch    columns [begin, end) of y on the calling thread.
// Numerics  sums in float32; those of a row depend on neither the other rows nor the range of columns. y is rounded once.
// Caller    R, I, O >= 0.
#pragma once
#include <cstdint>

#include "cpu/capability.h"

namespace mtp {

template <typename scalar_t>
struct FewRowsParams {
  const float* x;
  const scalar_t* w;
  scalar_t* y;
  int64_t rows, width, columns;
};

void few_rows(CpuCapability capability, const FewRowsParams<float>& params, int64_t begin, int64_t end);
void few_rows(CpuCapability capability, const FewRowsParams<BFloat16Bits>& params, int64_t begin, int64_t end);

}  // namespace mtp
