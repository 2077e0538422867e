// Cross-entropy of a block of logit rows and its gradient, in place.
//
//   loss, lse, predicted: see core/row_loss.h; predicted = argmax_v l_v (ties go to the lowest class)
//   l_v = cap(scale * (x_v + bias_v)),  cap(t) = softcap * tanh(t / softcap) if softcap > 0, else t
//   x_v <- d(w loss + u lse)/d x_v      if gradient == Gradient::kWrite; else the row is scratch, left undefined
//
// Shapes    logits [R, V] (row stride >= V), V columns of the whole vocabulary or of a shard; rows [R] flat
//           (head, b, s) indices; loss, lse, predicted: tables over ALL flat rows, written at rows[r];
//           head_scale [n]; row_scale, lse_grad over all flat rows; class_weights, bias [V].
// Cost      in float32 three passes over a row that stays in the L2 cache (128 KiB at V = 32k): maximum, exponential
//           and sum, scaling; one exponential per element (two with softcap). Compute bound, 1-2 % of the GEMMs.
// Launch    rows [begin, end) on the calling thread; threads own disjoint rows, so results do not depend on the number
//           of threads.
// Numerics  float32 sums over blocks of 1024, then float64; bfloat16 rows are widened to float32 once and rounded once.
//           -inf logits contribute 0; NaN propagates into the row's loss and gradient.
// Caller    every rows[r] is -1, or counts (TargetRule::counts) and has a target within the whole vocabulary.
#pragma once
#include <cstdint>

#include "core/loss_rows_params.h"

namespace mtp {

using LossRowsFloat = void (*)(const LossRowsParams<float>& params, int64_t begin, int64_t end);

// The float32 and bfloat16 kernel, one per instruction set.
void loss_rows_plain(const LossRowsParams<float>& params, int64_t begin, int64_t end);
#if defined(__x86_64__)
void loss_rows_avx2(const LossRowsParams<float>& params, int64_t begin, int64_t end);
void loss_rows_avx512(const LossRowsParams<float>& params, int64_t begin, int64_t end);
#endif

// The float64 kernel: same contract, written for accuracy rather than speed.
void loss_rows_double(const LossRowsParams<double>& params, int64_t begin, int64_t end);

}  // namespace mtp
