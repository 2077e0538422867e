// Cross-entropy of a block of logit rows and its gradient, in place: the CUDA form of cpu/loss_rows.h, same contract.
//
//   loss, lse, predicted, gradient: see core/row_loss.h and core/loss_rows_params.h.
//
// Shapes    as LossRowsParams<float>; logits float32, bfloat16 or float16. rows [R]: -1 marks a row without a target:
//           its gradient is zeroed, nothing else is written.
// Cost      kWhole with gradient: one read and one write of the logits if a row fits the shared memory of a block, or
//           of a cluster of up to 8 blocks (sm_90 and newer), else two reads (the second mostly from L2) and one write.
//           Without gradient: one read. kStatistics: one read; kGradient: one read, one write. Bandwidth bound.
// Launch    one block of 32, 128 or 512 threads, or one cluster, per row; the last row first, because its logits were
//           written last and are still in L2. Deterministic: no atomics, but a minimum of integers.
// Numerics  float32 sums of at most a few hundred terms per thread, then a tree; the row is finished in float32. -inf
//           logits contribute 0. A softcap's tanh has an absolute error of 2^-22. A target outside the whole vocabulary
//           makes the row's loss, lse and gradient NaN.
// Caller    every rows[r] is -1 or counts (TargetRule::counts); V < 2^29. Rows start at multiples of 16 bytes, and the
//           padding up to the next multiple after their end may be overwritten; bias and class_weights start at
//           multiples of 16 bytes. kStatistics leaves the logits unchanged, so 16-bit logits are rounded once; local_max
//           is not used.
#pragma once
#include <cuda_runtime_api.h>

#include "core/loss_rows_params.h"

namespace mtp {

cudaError_t launch_loss_rows(const LossRowsParams<float>& params, int64_t num_rows, cudaStream_t stream);

}  // namespace mtp
