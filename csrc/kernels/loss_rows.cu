#include "kernels/loss_rows.h"

#include "kernels/launch.h"
#include "kernels/loss_rows_cached.cuh"
#include "kernels/loss_rows_streaming.cuh"

namespace mtp {
namespace {

static_assert(sizeof(RowStatistics) == kRowStatistics * sizeof(double), "statistics are a table of doubles");

// How a row is split over the blocks of a cluster; 0 blocks: no cache, the row is read twice.
struct CachePlan {
  unsigned blocks = 0;
  size_t shared_bytes = 0;
};

size_t cache_bytes(int64_t vocab_size, int width, unsigned blocks) {
  const auto vectors = static_cast<size_t>(vocab_size / width + 2);  // + 2: the ends of an unaligned row
  return sizeof(CachedRowScratch) + (vectors + blocks - 1) / blocks * kVectorBytes;
}

// A single block reads, then computes, then writes; two blocks per multiprocessor overlap these, three do so better. A
// row of which two blocks do not fit is split over the smallest cluster of which three do, or two for the largest.
CachePlan plan_cache(int64_t vocab_size, int width, const DeviceLimits& limits) {
  constexpr size_t kReservedPerBlock = 1024;
  const auto fit = [&](size_t bytes) {
    return bytes > limits.shared_per_block ? 0 : limits.shared_per_multiprocessor / (bytes + kReservedPerBlock);
  };
  const size_t alone = cache_bytes(vocab_size, width, 1);
  if (fit(alone) >= 2) return {1, alone};
  if (!limits.has_clusters) return {};
  for (const unsigned blocks : {2u, 4u, 8u}) {
    const size_t bytes = cache_bytes(vocab_size, width, blocks);
    if (fit(bytes) >= (blocks == 8 ? 2 : 3)) return {blocks, bytes};
  }
  return {};
}

LaunchShape shape_of(int64_t num_rows, unsigned cluster, size_t shared_bytes) {
  LaunchShape shape;
  shape.grid = dim3(static_cast<unsigned>(num_rows * cluster));
  shape.block = dim3(kLossThreads);
  shape.shared_bytes = shared_bytes;
  shape.cluster = cluster;
  return shape;
}

template <typename scalar_t, Logits kLogits>
cudaError_t launch_row_kernel(const LossRowsParams<float>& p, int64_t num_rows, cudaStream_t stream) {
  if (p.stage == Stage::kWhole && p.gradient == Gradient::kWrite) {
    DeviceLimits limits;
    const cudaError_t error = device_limits(&limits);
    if (error != cudaSuccess) return error;
    const CachePlan plan = plan_cache(p.vocab_size, kVectorWidth<scalar_t>, limits);
    const LaunchShape shape = shape_of(num_rows, plan.blocks, plan.shared_bytes);
    if (plan.blocks == 1)
      return launch_kernel(loss_rows_cached_kernel<scalar_t, kLogits, Blocks::kOne>, shape, stream, p, num_rows);
    const auto in_cluster = loss_rows_cached_kernel<scalar_t, kLogits, Blocks::kCluster>;
    if (plan.blocks > 1 && clusters_fit(in_cluster, shape))
      return launch_kernel(in_cluster, shape, stream, p, num_rows);
  }
  const LaunchShape shape = shape_of(num_rows, 1, sizeof(StreamingRowScratch));
  return launch_kernel(loss_rows_streaming_kernel<scalar_t, kLogits>, shape, stream, p, num_rows);
}

template <typename scalar_t>
cudaError_t launch_typed(const LossRowsParams<float>& p, int64_t num_rows, cudaStream_t stream) {
  const bool plain =
      p.bias == nullptr && p.options.softcap <= 0.0 && p.options.logit_scale == 1.0 && p.options.label_smoothing <= 0.0;
  return plain ? launch_row_kernel<scalar_t, Logits::kPlain>(p, num_rows, stream)
               : launch_row_kernel<scalar_t, Logits::kGeneral>(p, num_rows, stream);
}

}  // namespace

cudaError_t launch_loss_rows(const LossRowsParams<float>& p, int64_t num_rows, cudaStream_t stream) {
  constexpr int64_t kLargestGrid = 0x7fffffff, kLargestVocabulary = int64_t{1} << 29, kLargestCluster = 8;
  if (num_rows == 0) return cudaSuccess;  // an empty grid is a launch error
  if (num_rows * kLargestCluster > kLargestGrid || p.vocab_size >= kLargestVocabulary) return cudaErrorInvalidValue;
  switch (p.dtype) {
    case DType::kFloat32:
      return launch_typed<float>(p, num_rows, stream);
    case DType::kFloat16:
      return launch_typed<__half>(p, num_rows, stream);
    case DType::kBFloat16:
      return launch_typed<__nv_bfloat16>(p, num_rows, stream);
    case DType::kFloat64:
      break;
  }
  return cudaErrorInvalidValue;
}

}  // namespace mtp
