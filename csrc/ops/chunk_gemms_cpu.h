// The three GEMMs of a chunk of rows on the CPU, through torch.
#pragma once
#include <cstdint>

#include "ops/check.h"

namespace mtp {

// Z = H W^T, dH = dZ W and dW (+)= dZ^T H. Operands are rounded to `compute` and multiplied in `logits`: the same dtype
// or, for 16-bit operands that this processor multiplies slowly, float32; then the weight is widened a tile at a time.
// dW is float32 (float64 for float64 operands), or, from a single bfloat16 chunk, bfloat16.
//
// Shapes    weight, grad_weight [V, D]; h, grad_hidden [C, D] and z [C, V] in `logits`.
class ChunkGemmsCpu {
 public:
  ChunkGemmsCpu(const Tensor& weight, ScalarType compute, ScalarType logits);

  void logits(const Tensor& h, const Tensor& z);
  void grad_hidden(const Tensor& z, const Tensor& out);
  // Whether threads may call all three concurrently, each on its own rows (columns of grad_weight).
  bool shareable() const { return !widens_ && logits_ != ScalarType::BFloat16; }

  // With accumulate = false, grad_weight is overwritten without being read.
  void add_grad_weight(const Tensor& z, const Tensor& h, const Tensor& grad_weight, bool accumulate) const;

 private:
  // The weight rows of classes [begin, begin + size) as float32 [size, D]; valid until the next call.
  Tensor widened(int64_t begin, int64_t size);

  Tensor weight_;
  ScalarType compute_, logits_;
  bool widens_;
  Tensor wide_, narrow_;  // one tile each, allocated on first use
};

}  // namespace mtp
