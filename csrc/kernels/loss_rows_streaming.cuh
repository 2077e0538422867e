// The row kernel without a cache: one read for the maximum and the sum of exponentials together, one read and one write
// for the gradient. For rows that do not fit in shared memory, and for either half alone: the loss without its
// gradient, and the two stages of a sharded vocabulary.
#pragma once
#include "kernels/loss_rows_parts.cuh"
#include "kernels/shared_memory.cuh"

namespace mtp {

struct alignas(kVectorBytes) StreamingRowScratch {
  RowPart warp_parts[kLossWarps];
  RowTarget target;
  RowGradient gradient;
};

// Online softmax over this thread's vectors of the row: the sum is rescaled to the running maximum.
template <typename scalar_t, Logits kLogits>
__device__ __forceinline__ RowPart scan_row(const LogitRow<scalar_t, kLogits>& row, int column, bool smoothed) {
  constexpr int kWidth = kVectorWidth<scalar_t>;
  [[maybe_unused]] constexpr int kUnroll = kLogits == Logits::kPlain ? 2 : 1;
  const int target_vector = column < 0 ? -1 : row.memory.vector_of(column);
  RowPart part;
#pragma unroll kUnroll
  for (int i = static_cast<int>(threadIdx.x); i < row.memory.count(); i += kLossThreads) {
    float l[kWidth];
    row.logits(row.load(i), i, l);
    const float max = max_of(l);
    if (max > part.max) {
      part.sum *= exp_shifted(part.max, max);
      part.max = max;
      part.position = i;
    }
    if constexpr (kLogits == Logits::kGeneral) {
      if (smoothed) part.weighted_sum += row.weighted_sum(l, i);
    }
    if (i == target_vector) {
      const int target = column - row.memory.first_column(i);
#pragma unroll
      for (int j = 0; j < kWidth; ++j)
        if (j == target) l[j] = -INFINITY;
    }
    part.sum += sum_exp(l, part.max == -INFINITY ? 0.0f : part.max);
  }
  return part;
}

template <typename scalar_t, Logits kLogits>
__global__ void __launch_bounds__(kLossThreads, 2)
    loss_rows_streaming_kernel(const __grid_constant__ LossRowsParams<float> p, const int64_t num_rows) {
  [[maybe_unused]] constexpr int kUnroll = kLogits == Logits::kPlain ? 4 : 1;
  StreamingRowScratch& scratch = *dynamic_shared_memory<StreamingRowScratch>();
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t r = num_rows - 1 - static_cast<int64_t>(blockIdx.x);
  const int64_t flat_row = p.rows[r];
  const LogitRow<scalar_t, kLogits> row(p, r);
  const bool writes = p.writes_gradient();
  if (flat_row < 0) {
    if (writes)
      for (int i = thread; i < row.memory.count(); i += kLossThreads) row.write_zeros(i);
    return;
  }
  if (thread == 0) scratch.target = find_target(p, flat_row);
  __syncthreads();
  const int column = scratch.target.column;

  DeviceRowStatistics statistics{};  // this and argmax are valid in thread 0
  int64_t argmax = p.vocab_start;
  if (p.stage == Stage::kGradient) {
    if (thread == 0) {
      const double* combined = p.statistics + r * kRowStatistics;
      statistics = {static_cast<float>(combined[0]), static_cast<float>(combined[1]), static_cast<float>(combined[2]),
                    static_cast<float>(combined[3]), static_cast<float>(combined[4]), 0.0f};
      argmax = static_cast<int64_t>(combined[5]);
    }
  } else {
    RowPart part = scan_row(row, column, p.options.label_smoothing > 0.0);
    part = merge_block(part, scratch.warp_parts);
    if (thread == 0) {
      const RowTarget& target = scratch.target;
      const float target_logit = column < 0 ? target.logit : row.logit(to_float(row.memory.at(column)), column);
      statistics = {part.max, part.sum, target_logit, target.class_weight, part.weighted_sum, 0.0f};
      argmax += row.first_of_largest(part.position);
    }
  }
  if (p.stage == Stage::kStatistics) {
    if (thread == 0)
      reinterpret_cast<RowStatistics*>(p.statistics)[r] = {statistics.max,          statistics.sum_others,
                                                           statistics.target_logit, statistics.target_class_weight,
                                                           statistics.weighted_sum, static_cast<double>(argmax)};
    return;
  }
  if (thread == 0) scratch.gradient = finish<kLogits>(p, flat_row, scratch.target, statistics, argmax, true);
  if (!writes) return;
  __syncthreads();
  const RowGradient gradient = scratch.gradient;
#pragma unroll kUnroll
  for (int i = thread; i < row.memory.count(); i += kLossThreads) row.write_gradient(row.load(i), i, gradient);
  if (column >= 0 && row.memory.vector_of(column) % kLossThreads == thread)
    from_float(gradient.target_grad, &row.memory.at(column));
}

}  // namespace mtp
