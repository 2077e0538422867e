// Adds the column sums of a matrix to a vector: the gradient of a bias.
//
//   out[v] += sum_r x[r, v]     for v in [begin, end)
//
// Shapes    x [rows, >= end] with row stride `stride`; out [>= end].
// Cost      one read of x; bandwidth bound.
// Launch    columns [begin, end) on the calling thread; threads own disjoint columns.
// Numerics  float64 sums, rounded once by the final addition.
#pragma once
#include <algorithm>
#include <array>
#include <cstdint>

#include "core/dtype.h"

namespace mtp {

inline double as_double(double x) { return x; }
inline double as_double(float x) { return x; }
inline double as_double(BFloat16Bits x) { return to_float(x); }

template <typename scalar_t, typename acc_t>
void add_column_sum(const scalar_t* x, int64_t rows, int64_t stride, int64_t begin, int64_t end, acc_t* out) {
  constexpr int64_t kWidth = 512;  // columns whose sums stay in the L1 cache
  std::array<double, kWidth> sums;
  for (int64_t low = begin; low < end; low += kWidth) {
    const int64_t width = std::min(kWidth, end - low);
    std::fill_n(sums.begin(), width, 0.0);
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t i = 0; i < width; ++i) sums[i] += as_double(x[r * stride + low + i]);
    for (int64_t i = 0; i < width; ++i) out[low + i] = static_cast<acc_t>(out[low + i] + sums[i]);
  }
}

}  // namespace mtp
