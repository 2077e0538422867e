// The row kernel that keeps a row in shared memory across its three passes: maximum, sum of exponentials, gradient. A
// row too long for one block is split over the blocks of a cluster, which exchange five numbers each.
#pragma once
#include "kernels/cluster.cuh"
#include "kernels/loss_rows_parts.cuh"
#include "kernels/shared_memory.cuh"

namespace mtp {

enum class Blocks { kOne, kCluster };

struct alignas(kVectorBytes) CachedRowScratch {
  float warp_max[kWarp], warp_sum[kWarp], warp_weighted_sum[kWarp];
  int argmax;
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

// Copies this thread's vectors of the row into `cache` and returns the largest u of them. Several loads are under way
// before the first is used: they take longer than all else that a thread does. Past its end a slice's last vector is
// loaded again, which changes nothing, where a branch would keep the loads apart.
template <int kThreads, typename Row>
__device__ __forceinline__ float fill_cache(const Row& row, const Slice& slice, uint4* cache) {
  constexpr int kInFlight = Row::kScaled ? 4 : 2;
  typename Row::Largest largest = Row::nothing();
#pragma unroll 1
  for (int first = slice.begin + static_cast<int>(threadIdx.x); first < slice.whole_end;
       first += kInFlight * kThreads) {
    const auto vector = [&](int k) {
      const int i = first + k * kThreads;
      return i < slice.whole_end ? i : slice.whole_end - 1;
    };
    uint4 bits[kInFlight];
#pragma unroll
    for (int k = 0; k < kInFlight; ++k) bits[k] = row.memory.load(vector(k));
#pragma unroll
    for (int k = 0; k < kInFlight; ++k) {
      cache[vector(k) - slice.begin] = bits[k];
      row.template add_largest<true>(bits[k], vector(k), &largest);
    }
  }
  if (slice.owns_ragged<kThreads>()) {
    const uint4 bits = row.memory.load(slice.whole_end);
    cache[slice.whole_end - slice.begin] = bits;
    row.template add_largest<false>(bits, slice.whole_end, &largest);
  }
  return Row::value(largest);
}

template <typename scalar_t, Logits kLogits, Blocks kBlocks, int kThreads>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor<kThreads>)
    loss_rows_cached_kernel(const __grid_constant__ LossRowsParams<float> p, const __grid_constant__ LogitMap map,
                            const int64_t num_rows) {
  using Row = LogitRow<scalar_t, kLogits>;
  constexpr int kUnroll = !Row::kScaled ? 1 : sizeof(scalar_t) == 4 ? 2 : 4;  // as the registers allow
  CachedRowScratch& scratch = *dynamic_shared_memory<CachedRowScratch>();
  uint4* const cache = reinterpret_cast<uint4*>(&scratch + 1);
  const int thread = static_cast<int>(threadIdx.x);
  const unsigned blocks = kBlocks == Blocks::kCluster ? cluster_size() : 1;
  const unsigned rank = kBlocks == Blocks::kCluster ? cluster_rank() : 0;
  const int64_t r = num_rows - 1 - static_cast<int64_t>(blockIdx.x / blocks);
  const int64_t flat_row = p.rows[r];
  const Row row(p, map, r);
  const Slice slice(row.memory, static_cast<int>(rank), static_cast<int>(blocks));
  if (flat_row < 0) {  // uniform across the cluster
    for (int i = slice.begin + thread; i < slice.end; i += kThreads) row.write_zeros(i);
    return;
  }
  if (thread == 0) {
    scratch.target = find_target(p, flat_row);
    scratch.argmax = kNowhere;
  }

  const float own = fill_cache<kThreads>(row, slice, cache);
  const float largest = block_reduce<kThreads>(own, Maximum{}, scratch.warp_max);  // also publishes scratch.target
  if (own == largest) {  // few threads, so that the others need not keep a position
    float found = -INFINITY;
    int position = kNowhere;
    slice.for_own<kThreads, 1>([&](int i, auto whole) {
      row.template find_largest<decltype(whole)::value>(cache[i - slice.begin], i, &found, &position);
    });
    if (found == largest) atomicMin(&scratch.argmax, position);  // fill_cache may have seen another thread's vector
  }

  // The sum excludes the target (see core/row_loss.h): a scaled row replaces it by -inf in the cache, another one adds
  // the terms of its vector apart.
  const int column = scratch.target.column;
  const int target_vector = column < 0 ? -1 : row.memory.vector_of(column);
  const bool owns_target = slice.owns<kThreads>(target_vector);
  RowPart part;
  part.max = slice.begin < slice.end ? row.logit(largest) : -INFINITY;
  const Shift shift = row.shift(part.max);
  float target_slope = 1.0f;  // valid in the owner
  if (owns_target) {
    uint4* const vector = cache + (target_vector - slice.begin);
    scalar_t& element = reinterpret_cast<scalar_t*>(vector)[column - row.memory.first_column(target_vector)];
    scratch.target.logit = row.logit_at(to_float(element), column);
    target_slope = row.slope_at(to_float(element), column);
    if constexpr (Row::kScaled) {
      from_float(-INFINITY, &element);
    } else {
      row.template add_terms<false>(*vector, target_vector, shift.high, column, &part);
    }
  }
  slice.for_own<kThreads, kUnroll>([&](int i, auto whole) {
    if (!Row::kScaled && i == target_vector) return;
    row.template add_terms<decltype(whole)::value>(cache[i - slice.begin], i, shift.high, -1, &part);
  });
  part.sum = block_reduce<kThreads>(part.sum, Sum{}, scratch.warp_sum) * shift.correction;
  if (map.smoothed) part.weighted_sum = block_reduce<kThreads>(part.weighted_sum, Sum{}, scratch.warp_weighted_sum);
  part.position = scratch.argmax;
  part.target_logit = scratch.target.logit;
  if constexpr (kBlocks == Blocks::kCluster) {
    if (thread == 0) scratch.block_part = part;
    cluster_sync();
    if (thread < kWarp) part = merge_cluster(scratch, blocks);
  }
  if (thread == 0) {
    const DeviceRowStatistics statistics{part.max,          part.sum, part.target_logit, scratch.target.class_weight,
                                         part.weighted_sum, 0.0f};
    const int64_t argmax = p.vocab_start + (part.position == kNowhere ? 0 : part.position);
    scratch.gradient = finish(p, map, row, flat_row, scratch.target, statistics, argmax, rank == 0);
  }
  __syncthreads();
  if constexpr (kBlocks == Blocks::kCluster) cluster_arrive();  // no block_part is read any more
  const RowGradient gradient = scratch.gradient;
  slice.for_own<kThreads, kUnroll>([&](int i, auto whole) {
    row.template write_gradient<decltype(whole)::value>(cache[i - slice.begin], i, gradient);
  });
  if (owns_target) from_float(gradient.target_grad * target_slope, &row.memory.at(column));
  if constexpr (kBlocks == Blocks::kCluster) cluster_wait();  // nobody exits while its block_part may be read
}

}  // namespace mtp
