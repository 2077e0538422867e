// Decoding: the top-k classes and the log-sum-exp of a few hidden rows, without writing the logits.
//
//   l[r, v] = sum_d hidden[r, d] weight[v, d]       lse[r] = log sum_v exp(l[r, v])
//   top_ids[r, :], top_logits[r, :]: the k largest l[r, :], descending; ties go to the lowest class. [:, 0]: argmax
//
// Shapes    hidden [R, D], R <= 64; weight [V, D]; both bfloat16 or float16; top_logits [R, k] float32, top_ids [R, k]
//           int32, k <= 16; lse [R] float32; workspace of decode_workspace_bytes(R, V, k).
// Cost      one read of the weight, 2 V D bytes for any R; bandwidth bound. n heads that share the unembedding are
//           n R rows of one call. Use a GEMM for more than 64 rows.
// Launch    one block of 512 threads per 256 classes: each warp multiplies 16 classes by all rows on tensor cores, the
//           rows in shared memory; then one block per row merges the blocks' results. Deterministic.
// Numerics  float32 sums; the logits are never rounded. NaN logits are never selected but make lse NaN; with fewer than
//           k other logits, the rest of the row is filled with logit NaN and class 0.
// Caller    D a multiple of 8; rows of hidden and weight aligned to 16 bytes; V >= k.
#pragma once
#include <cuda_runtime_api.h>

#include <cstddef>

#include "core/dtype.h"

namespace mtp {

constexpr int64_t kDecodeLargestRows = 64;
constexpr int kDecodeLargestTop = 16;

struct DecodeParams {
  const void* hidden;
  const void* weight;
  DType dtype;
  int64_t rows, vocab_size, width;
  int64_t hidden_stride, weight_stride;  // elements
  int top;
  float* top_logits;
  int32_t* top_ids;
  float* lse;
  void* workspace;
};

size_t decode_workspace_bytes(int64_t rows, int64_t vocab_size, int top);

cudaError_t launch_decode(const DecodeParams& params, cudaStream_t stream);

}  // namespace mtp
