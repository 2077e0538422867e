// Shared parts of the loss row kernels: a row's target, merging of partial results, the final formula.
#pragma once
#include <cmath>
#include <cstdint>

#include "core/loss_rows_params.h"
#include "kernels/logit_row.cuh"
#include "kernels/reduce.cuh"

namespace mtp {

// Blocks of a cached row that a multiprocessor is to hold, at most 24: 1536 threads, at 40 registers. Before sm_90 the
// shared memory suffices for two blocks of the longest rows, whose threads may have 64.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr int kThreadsPerMultiprocessor = 1024;
#else
constexpr int kThreadsPerMultiprocessor = 1536;
#endif
template <int kThreads>
constexpr int kBlocksPerMultiprocessor = kThreads < 64 ? 24 : kThreadsPerMultiprocessor / kThreads;

__device__ __forceinline__ float rescaled_sum(const RowPart& part, float max) {
  return part.max == max ? part.sum : part.sum * exp_shifted(part.max, max);  // (-inf) - (-inf) would be NaN
}

// Commutative, so that both lanes of a butterfly get the same bits.
__device__ __forceinline__ RowPart merge(const RowPart& a, const RowPart& b) {
  const float max = fmaxf(a.max, b.max);
  const int first = a.position < b.position ? a.position : b.position;
  const int position = a.max == b.max ? first : (a.max > b.max ? a.position : b.position);
  return {max, rescaled_sum(a, max) + rescaled_sum(b, max), a.weighted_sum + b.weighted_sum,
          a.target_logit + b.target_logit, position};
}

template <int kLanes>
__device__ __forceinline__ RowPart merge_lanes(RowPart part) {
#pragma unroll
  for (int lanes = kLanes / 2; lanes > 0; lanes /= 2) {
    const RowPart other{__shfl_xor_sync(kFullMask, part.max, lanes), __shfl_xor_sync(kFullMask, part.sum, lanes),
                        __shfl_xor_sync(kFullMask, part.weighted_sum, lanes),
                        __shfl_xor_sync(kFullMask, part.target_logit, lanes),
                        __shfl_xor_sync(kFullMask, part.position, lanes)};
    part = merge(part, other);
  }
  return part;
}

// A row's inputs besides its logits, found by one thread: the divisions of TargetRule::locate are slow.
struct RowTarget {
  int column;          // of the target in these logits; -1 if another shard or none holds it
  float logit;         // if column is -1: 0, or NaN for a target outside the whole vocabulary
  float class_weight;  // 0 if column is -1
  float weight, lse_grad;
};

__device__ __forceinline__ RowTarget find_target(const LossRowsParams<float>& p, int64_t row) {
  const TargetRule::Location at = p.targets.locate(row);
  const int64_t target = p.targets.target(at);
  const bool is_class = target >= 0 && target < p.options.vocab_size;
  const bool held = is_class && p.holds(target);
  const int column = held ? static_cast<int>(target - p.vocab_start) : -1;
  const float class_weight = p.class_weights == nullptr ? 1.0f : (held ? p.class_weights[column] : 0.0f);
  float weight = p.head_scale[at.head] * p.targets.token_weight(at);
  if (p.row_scale != nullptr) weight *= p.row_scale[row];
  return {column, is_class ? 0.0f : NAN, held ? class_weight : 0.0f, weight,
          p.lse_grad == nullptr ? 0.0f : p.lse_grad[row]};
}

using DeviceRowStatistics = BasicRowStatistics<float>;

// Called by one thread: writes the row's tables and returns what its gradient needs. `argmax` is not taken from the
// statistics because a float is exact only up to 2^24.
template <typename scalar_t, Logits kLogits>
__device__ __forceinline__ RowGradient finish(const LossRowsParams<float>& p, const LogitMap& map,
                                              const LogitRow<scalar_t, kLogits>& logits, int64_t row,
                                              const RowTarget& target, const DeviceRowStatistics& statistics,
                                              int64_t argmax, bool write_tables) {
  RowOptions options = p.options;
  if constexpr (kLogits == Logits::kScaled) {
    options.label_smoothing = 0.0;  // a constant here: the smoothing terms need registers that three blocks do not have
  } else if (p.class_weight_total != nullptr) {
    options.class_weight_sum = *p.class_weight_total;
  }
  const BasicRowLoss<float> result = finish_row(statistics, options, target.weight, target.lse_grad);
  if (write_tables) p.tables.write(row, result, argmax);
  const float factor = kLogits == Logits::kCapped ? 4.0f * map.scale : map.scale;  // 1 - tanh^2 = 4 r (1 - r)
  const Shift shift = logits.shift(statistics.max);
  return {shift.high, result.prob_scale * shift.correction * factor, result.uniform * factor,
          result.target_grad * map.scale};
}

}  // namespace mtp
