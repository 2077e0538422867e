// Shared parts of the loss row kernels: a row's target, its logits, merging of partial results, the final formula.
#pragma once
#include <cmath>
#include <cstdint>

#include "core/loss_rows_params.h"
#include "kernels/numeric.cuh"
#include "kernels/reduce.cuh"
#include "kernels/vector_row.cuh"

namespace mtp {

constexpr int kLossThreads = 512;
constexpr int kLossWarps = kLossThreads / kWarp;
constexpr int kNowhere = 0x7fffffff;  // no position yet; loses every tie

// kPlain: the logits are the GEMM's output. kGeneral: scale, bias, softcap or label smoothing, each of which costs time
// per element, so plain rows have a kernel without them.
enum class Logits { kPlain, kGeneral };

// Partial result of some of a row's elements. `position` is the first position of the maximum.
struct RowPart {
  float max = -INFINITY;
  float sum = 0.0f;  // over v != y of exp(l_v - max); 0 while max is -inf
  float weighted_sum = 0.0f;
  float target_logit = 0.0f;
  int position = kNowhere;
};

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

// Returns the block's part to every thread. `warp_parts` [kLossWarps] must not be in use by an earlier call.
__device__ __forceinline__ RowPart merge_block(RowPart part, RowPart* warp_parts) {
  part = merge_lanes<kWarp>(part);
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  if (lane == 0) warp_parts[warp] = part;
  __syncthreads();
  return merge_lanes<kLossWarps>(warp_parts[lane % kLossWarps]);
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

// Results of a finished row that its gradient needs.
struct RowGradient {
  float max, prob_scale, uniform, target_grad;
};

// One row of logits: its vectors in memory, and their transformation to l.
template <typename scalar_t, Logits kLogits>
class LogitRow {
 public:
  static constexpr int kWidth = kVectorWidth<scalar_t>;

  __device__ __forceinline__ LogitRow(const LossRowsParams<float>& p, int64_t r)
      : memory(static_cast<scalar_t*>(p.logits) + r * p.row_stride, static_cast<int>(p.vocab_size)),
        bias_(p.bias),
        class_weights_(p.class_weights),
        scale_(static_cast<float>(p.options.logit_scale)),
        cap_(static_cast<float>(p.options.softcap)),
        inverse_cap_(p.options.softcap > 0.0 ? 1.0f / static_cast<float>(p.options.softcap) : 0.0f) {}

  __device__ __forceinline__ uint4 load(int vector) const { return memory.load(vector, -INFINITY); }

  __device__ __forceinline__ float logit(float x, int column) const {
    if constexpr (kLogits == Logits::kGeneral) {
      x = scale_ * (bias_ == nullptr ? x : x + __ldg(bias_ + column));
      if (cap_ > 0.0f) x = cap_ * tanhf(x * inverse_cap_);
    }
    return x;
  }

  // -inf outside the row.
  __device__ __forceinline__ void logits(uint4 bits, int vector, float (&l)[kWidth]) const {
    unpack<scalar_t>(bits, l);
    if constexpr (kLogits == Logits::kGeneral) {
      const int first = memory.first_column(vector);
#pragma unroll
      for (int j = 0; j < kWidth; ++j) l[j] = memory.holds(first + j) ? logit(l[j], first + j) : -INFINITY;
    }
  }

  __device__ __forceinline__ float class_weight(int column) const {
    return class_weights_ == nullptr ? 1.0f : __ldg(class_weights_ + column);
  }

  // sum_v c_v l_v over a vector's elements, for label smoothing.
  __device__ __forceinline__ float weighted_sum(const float (&l)[kWidth], int vector) const {
    const int first = memory.first_column(vector);
    float sum = 0.0f;
#pragma unroll
    for (int j = 0; j < kWidth; ++j)
      if (memory.holds(first + j)) sum += class_weight(first + j) * l[j];
    return sum;
  }

  // First column of the largest logit in a vector; 0 if there is none.
  __device__ __forceinline__ int first_of_largest(int vector) const {
    if (vector == kNowhere) return 0;
    float l[kWidth];
    logits(load(vector), vector, l);
    float max = -INFINITY;
    int column = 0;
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
      if (l[j] > max) {
        max = l[j];
        column = memory.first_column(vector) + j;
      }
    }
    return column;
  }

  // Overwrites a vector with its gradient. The target's element is wrong: the caller must write it.
  __device__ __forceinline__ void write_gradient(uint4 bits, int vector, const RowGradient& row) const {
    float l[kWidth], gradient[kWidth];
    logits(bits, vector, l);
    const int first = memory.first_column(vector);
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
      float g = exp_shifted(l[j], row.max) * row.prob_scale;
      if constexpr (kLogits == Logits::kGeneral) {
        if (row.uniform != 0.0f && memory.holds(first + j)) g -= row.uniform * class_weight(first + j);
        if (cap_ > 0.0f) g *= 1.0f - (l[j] * inverse_cap_) * (l[j] * inverse_cap_);
        g *= scale_;
      }
      gradient[j] = g;
    }
    memory.store(vector, gradient);
  }

  __device__ __forceinline__ void write_zeros(int vector) const {
    const float zeros[kWidth] = {};
    memory.store(vector, zeros);
  }

  VectorRow<scalar_t> memory;

 private:
  const float* bias_;
  const float* class_weights_;
  float scale_, cap_, inverse_cap_;
};

__device__ __forceinline__ float sum_of(const float (&values)[4]) {
  return (values[0] + values[1]) + (values[2] + values[3]);
}
__device__ __forceinline__ float sum_of(const float (&values)[8]) {
  return ((values[0] + values[1]) + (values[2] + values[3])) + ((values[4] + values[5]) + (values[6] + values[7]));
}

template <int kWidth>
__device__ __forceinline__ float max_of(const float (&values)[kWidth]) {
  float max = values[0];
#pragma unroll
  for (int j = 1; j < kWidth; ++j) max = fmaxf(max, values[j]);
  return max;
}

// sum_j exp(l_j - shift)
template <int kWidth>
__device__ __forceinline__ float sum_exp(const float (&l)[kWidth], float shift) {
  float e[kWidth];
#pragma unroll
  for (int j = 0; j < kWidth; ++j) e[j] = exp_shifted(l[j], shift);
  return sum_of(e);
}

using DeviceRowStatistics = BasicRowStatistics<float>;

// Called by one thread: writes the row's tables and returns what its gradient needs. `argmax` is not taken from the
// statistics because a float is exact only up to 2^24.
template <Logits kLogits>
__device__ __forceinline__ RowGradient finish(const LossRowsParams<float>& p, int64_t row, const RowTarget& target,
                                              const DeviceRowStatistics& statistics, int64_t argmax,
                                              bool write_tables) {
  RowOptions options = p.options;
  if constexpr (kLogits == Logits::kPlain) {
    options.label_smoothing = 0.0;  // a constant here: the smoothing terms need registers that three blocks do not have
  } else if (p.class_weight_total != nullptr) {
    options.class_weight_sum = *p.class_weight_total;
  }
  const BasicRowLoss<float> result = finish_row(statistics, options, target.weight, target.lse_grad);
  if (write_tables) p.tables.write(row, result, argmax);
  float target_grad = result.target_grad * static_cast<float>(p.options.logit_scale);
  if (p.options.softcap > 0.0) {
    const float t = statistics.target_logit / static_cast<float>(p.options.softcap);
    target_grad *= 1.0f - t * t;
  }
  return {statistics.max, result.prob_scale, result.uniform, target_grad};
}

}  // namespace mtp
