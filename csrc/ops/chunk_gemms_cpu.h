// The three products of a chunk of rows on the CPU, by torch's GEMM.
#pragma once
#include <cstdint>

#include "ops/check.h"

namespace mtp {

// Z = H W^T, dH = dZ W and dW (+)= dZ^T H, for operands that are rounded to `compute` and multiplied as `logits`: the
// same dtype or, for 16-bit operands that this processor multiplies slowly, float32. Then the weight is widened a tile
// at a time. dW is float32 (float64 for float64) whatever the operands are.
//
// Shapes    weight [V, D]; h [C, D] and z [C, V] in `logits`; grad_hidden [C, D] likewise; grad_weight [V, D].
class ChunkGemmsCpu {
 public:
  ChunkGemmsCpu(const Tensor& weight, ScalarType compute, ScalarType logits);

  void logits(const Tensor& h, const Tensor& z);
  void grad_hidden(const Tensor& z, const Tensor& out);
  // Whether threads may call all three at once, each for rows (of grad_weight: columns) of its own.
  bool shareable() const { return !widens_ && logits_ != ScalarType::BFloat16; }

  // With accumulate = false, what grad_weight holds is not read.
  void add_grad_weight(const Tensor& z, const Tensor& h, const Tensor& grad_weight, bool accumulate) const;

 private:
  // Columns [begin, begin + size) of the vocabulary as float32 rows [size, D]; good until the next call.
  Tensor widened(int64_t begin, int64_t size);

  Tensor weight_;
  ScalarType compute_, logits_;
  bool widens_;
  Tensor wide_, narrow_;  // buffers of one tile, made when the first is needed
};

}  // namespace mtp
