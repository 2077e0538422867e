// The row kernel that keeps a row in shared memory across its three passes: maximum, sum of exponentials, gradient. A
// row too long for one block is split over the blocks of a cluster, which exchange five numbers each.
#pragma once
#include "kernels/cluster.cuh"
#include "kernels/loss_rows_parts.cuh"
#include "kernels/shared_memory.cuh"

namespace mtp {

enum class Blocks { kOne, kCluster };

struct alignas(kVectorBytes) CachedRowScratch {
  RowPart warp_max[kLossWarps], warp_sum[kLossWarps];
  RowPart block_part;  // read by the other blocks of the cluster
  RowTarget target;
  RowGradient gradient;
};

// Merges the parts of all blocks of the cluster; the result is in warp 0's lanes.
__device__ __forceinline__ RowPart merge_cluster(CachedRowScratch& scratch, unsigned blocks) {
  constexpr int kLargestCluster = 8;
  RowPart part;
  if (threadIdx.x % kLargestCluster < blocks)
    part = *shared_of_rank(&scratch.block_part, threadIdx.x % kLargestCluster);
  return merge_lanes<kLargestCluster>(part);
}

// The launcher relies on two blocks per multiprocessor; three fit if the row is short enough.
template <typename scalar_t, Logits kLogits, Blocks kBlocks>
__global__ void __launch_bounds__(kLossThreads, kLogits == Logits::kPlain ? 3 : 2)
    loss_rows_cached_kernel(const __grid_constant__ LossRowsParams<float> p, const int64_t num_rows) {
  constexpr int kWidth = kVectorWidth<scalar_t>;
  constexpr bool kPlain = kLogits == Logits::kPlain;
  [[maybe_unused]] constexpr int kUnroll = kPlain ? 4 : 1;  // tanh needs the registers and hides the latency
  CachedRowScratch& scratch = *dynamic_shared_memory<CachedRowScratch>();
  uint4* const cache = reinterpret_cast<uint4*>(&scratch + 1);
  const int thread = static_cast<int>(threadIdx.x);
  const unsigned blocks = kBlocks == Blocks::kCluster ? cluster_size() : 1;
  const unsigned rank = kBlocks == Blocks::kCluster ? cluster_rank() : 0;
  const int64_t r = num_rows - 1 - static_cast<int64_t>(blockIdx.x / blocks);
  const int64_t flat_row = p.rows[r];
  const LogitRow<scalar_t, kLogits> row(p, r);
  const int per_block = (row.memory.count() + static_cast<int>(blocks) - 1) / static_cast<int>(blocks);
  const int begin = static_cast<int>(rank) * per_block;
  const int end = begin + per_block < row.memory.count() ? begin + per_block : row.memory.count();
  if (flat_row < 0) {  // uniform across the cluster
    for (int i = begin + thread; i < end; i += kLossThreads) row.write_zeros(i);
    return;
  }
  if (thread == 0) scratch.target = find_target(p, flat_row);

  RowPart part;
#pragma unroll kUnroll
  for (int i = begin + thread; i < end; i += kLossThreads) {
    const uint4 bits = row.load(i);
    cache[i - begin] = bits;
    float l[kWidth];
    row.logits(bits, i, l);
    const float max = max_of(l);
    if (max > part.max) {
      part.max = max;
      part.position = i;
    }
  }
  part = merge_block(part, scratch.warp_max);  // its barrier also publishes scratch.target

  // The sum excludes the target (see core/row_loss.h): a plain row replaces it by -inf in the cache.
  const int column = scratch.target.column;
  const int target_vector = column < 0 ? -1 : row.memory.vector_of(column);
  const bool owns_target =
      target_vector >= begin && target_vector < end && (target_vector - begin) % kLossThreads == thread;
  if (owns_target) {
    scalar_t& element =
        reinterpret_cast<scalar_t*>(cache + (target_vector - begin))[column - row.memory.first_column(target_vector)];
    scratch.target.logit = row.logit(to_float(element), column);
    if (kPlain) from_float(-INFINITY, &element);
  }
  // Reads global memory: another thread may already have replaced the target in the cache.
  if (thread == 0) part.position = row.first_of_largest(part.position);
  const float shift = part.max == -INFINITY ? 0.0f : part.max;
  const bool smoothed = !kPlain && p.options.label_smoothing > 0.0;
#pragma unroll kUnroll
  for (int i = begin + thread; i < end; i += kLossThreads) {
    float l[kWidth];
    row.logits(cache[i - begin], i, l);
    if constexpr (!kPlain) {
      if (smoothed) part.weighted_sum += row.weighted_sum(l, i);
#pragma unroll
      for (int j = 0; j < kWidth; ++j)
        if (row.memory.first_column(i) + j == column) l[j] = -INFINITY;
    }
    part.sum += sum_exp(l, shift);
  }
  const int argmax = part.position;  // valid in thread 0
  part = merge_block(part, scratch.warp_sum);
  if (thread == 0) {
    part.position = argmax;
    part.target_logit = scratch.target.logit;
  }
  if constexpr (kBlocks == Blocks::kCluster) {
    if (thread == 0) scratch.block_part = part;
    cluster_sync();
    if (thread < kWarp) part = merge_cluster(scratch, blocks);
  }
  if (thread == 0) {
    const DeviceRowStatistics statistics{part.max,          part.sum, part.target_logit, scratch.target.class_weight,
                                         part.weighted_sum, 0.0f};
    scratch.gradient =
        finish<kLogits>(p, flat_row, scratch.target, statistics, p.vocab_start + part.position, rank == 0);
  }
  __syncthreads();
  const RowGradient gradient = scratch.gradient;
#pragma unroll kUnroll
  for (int i = begin + thread; i < end; i += kLossThreads) row.write_gradient(cache[i - begin], i, gradient);
  if (owns_target) from_float(gradient.target_grad, &row.memory.at(column));
  if constexpr (kBlocks == Blocks::kCluster) cluster_sync();  // nobody exits while its block_part may be read
}

}  // namespace mtp
