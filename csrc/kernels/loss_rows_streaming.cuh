// The row kernel without a cache: one read for the maximum and the sum of exponentials together, one read and one write
// for the gradient. For rows that do not fit in shared memory, and for either half alone: the loss without its
// gradient, and the two stages of a sharded vocabulary.
#pragma once
#include "kernels/loss_rows_parts.cuh"
#include "kernels/shared_memory.cuh"

namespace mtp {

constexpr int kStreamingThreads = 512;
constexpr int kStreamingWarps = kStreamingThreads / kWarp;

struct alignas(kVectorBytes) StreamingRowScratch {
  RowPart warp_parts[kStreamingWarps];
  RowTarget target;
  RowGradient gradient;
};

// Returns the block's part to every thread.
__device__ __forceinline__ RowPart merge_block(RowPart part, RowPart* warp_parts) {
  part = merge_lanes<kWarp>(part);
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  if (lane == 0) warp_parts[warp] = part;
  __syncthreads();
  return merge_lanes<kStreamingWarps>(warp_parts[lane % kStreamingWarps]);
}

// Online softmax over this thread's vectors of the row: the sum is rescaled to the running maximum. The part's position
// is a vector.
template <typename Row>
__device__ __forceinline__ RowPart scan_row(const Row& row, const Slice& slice, int column) {
  const int target_vector = column < 0 ? -1 : row.memory.vector_of(column);
  RowPart part;
  float largest = -INFINITY, high = 0.0f;
  const auto add = [&](int i, auto whole) {
    constexpr bool kWhole = decltype(whole)::value;
    float u[Row::kWidth];
    row.template load_u<kWhole>(row.memory.load(i), i, u);
    const float max = max_of(u);
    // The target's vector comes last, whatever its place.
    const bool first = !kWhole && max == largest && i < part.position;
    if (max > largest || part.position == kNowhere || first) {
      largest = max;
      part.max = row.logit(max);
      const float new_high = row.shift(part.max).high;
      if (part.sum != 0.0f) part.sum *= exp2_approx(high - new_high);
      high = new_high;
      part.position = i;
    }
    row.template add_terms_of<kWhole>(u, i, high, column, &part);
  };
  slice.for_own<kStreamingThreads, Row::kScaled ? 2 : 1>([&](int i, auto whole) {
    if (i != target_vector) add(i, whole);
  });
  if (slice.owns<kStreamingThreads>(target_vector)) add(target_vector, std::false_type{});
  part.sum *= row.shift(part.max).correction;
  return part;
}

template <typename scalar_t, Logits kLogits>
__global__ void __launch_bounds__(kStreamingThreads, 2)
    loss_rows_streaming_kernel(const __grid_constant__ LossRowsParams<float> p, const __grid_constant__ LogitMap map,
                               const int64_t num_rows) {
  using Row = LogitRow<scalar_t, kLogits>;
  StreamingRowScratch& scratch = *dynamic_shared_memory<StreamingRowScratch>();
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t r = num_rows - 1 - static_cast<int64_t>(blockIdx.x);
  const int64_t flat_row = p.rows[r];
  const Row row(p, map, r);
  const Slice slice(row.memory, 0, 1);
  const bool writes = p.writes_gradient();
  if (flat_row < 0) {
    if (writes)
      for (int i = thread; i < slice.end; i += kStreamingThreads) row.write_zeros(i);
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
    const RowPart part = merge_block(scan_row(row, slice, column), scratch.warp_parts);
    if (thread == 0) {
      const RowTarget& target = scratch.target;
      const float target_logit = column < 0 ? target.logit : row.logit_at(to_float(row.memory.at(column)), column);
      statistics = {part.max, part.sum, target_logit, target.class_weight, part.weighted_sum, 0.0f};
      float found = -INFINITY;
      int position = 0;
      if (part.position != kNowhere)
        row.template find_largest<false>(row.memory.load(part.position), part.position, &found, &position);
      argmax += position;
    }
  }
  if (p.stage == Stage::kStatistics) {
    if (thread == 0)
      reinterpret_cast<RowStatistics*>(p.statistics)[r] = {statistics.max,          statistics.sum_others,
                                                           statistics.target_logit, statistics.target_class_weight,
                                                           statistics.weighted_sum, static_cast<double>(argmax)};
    return;
  }
  if (thread == 0) scratch.gradient = finish(p, map, row, flat_row, scratch.target, statistics, argmax, true);
  if (!writes) return;
  __syncthreads();
  const RowGradient gradient = scratch.gradient;
  const bool owns_target = column >= 0 && slice.owns<kStreamingThreads>(row.memory.vector_of(column));
  const float target_slope = owns_target ? row.slope_at(to_float(row.memory.at(column)), column) : 1.0f;
  slice.for_own<kStreamingThreads, Row::kScaled ? 4 : 1>(
      [&](int i, auto whole) { row.template write_gradient<decltype(whole)::value>(row.memory.load(i), i, gradient); });
  if (owns_target) from_float(gradient.target_grad * target_slope, &row.memory.at(column));
}

}  // namespace mtp
