#include "kernels/loss_rows.h"

#include "kernels/launch.h"
#include "kernels/loss_rows_cached.cuh"
#include "kernels/loss_rows_streaming.cuh"

namespace mtp {
namespace {

// A warp, or 128 threads, per row of at most so many vectors.
constexpr int64_t kShortVectors = 256, kMediumVectors = 1024;

static_assert(sizeof(RowStatistics) == kRowStatistics * sizeof(double), "statistics are a table of doubles");

// How a row is kept in shared memory; 0 blocks: not at all, the row is read twice.
struct CachePlan {
  unsigned blocks = 0;
  int threads = 0;
  size_t shared_bytes = 0;
};

size_t cache_bytes(int64_t vectors, unsigned blocks) {
  return sizeof(CachedRowScratch) + static_cast<size_t>((vectors + blocks - 1) / blocks) * kVectorBytes;
}

// A block reads, then computes, then writes; three blocks per multiprocessor overlap these. A row of which fewer fit is
// split over the smallest cluster of which three do, or two for the largest. Short rows have small blocks, of which
// more fit, and each thread about eight vectors: what threads exchange costs as much as two vectors of each.
CachePlan plan_cache(int64_t vectors, const DeviceLimits& limits, bool allow_clusters) {
  constexpr size_t kReservedPerBlock = 1024;
  const auto fit = [&](unsigned blocks) {
    const size_t bytes = cache_bytes(vectors, blocks);
    return bytes > limits.shared_per_block ? 0 : limits.shared_per_multiprocessor / (bytes + kReservedPerBlock);
  };
  const int threads = vectors <= kShortVectors ? 32 : vectors <= kMediumVectors ? 128 : 512;
  if (fit(1) >= 3) return {1, threads, cache_bytes(vectors, 1)};
  if (limits.has_clusters && allow_clusters)
    for (const unsigned blocks : {2u, 4u, 8u})
      if (fit(blocks) >= (blocks == 8 ? 2 : 3)) return {blocks, 512, cache_bytes(vectors, blocks)};
  if (fit(1) == 2) return {1, threads, cache_bytes(vectors, 1)};
  return {};
}

template <typename Kernel>
cudaError_t launch_rows(Kernel* kernel, const CachePlan& plan, int64_t num_rows, cudaStream_t stream,
                        const LossRowsParams<float>& p, const LogitMap& map, bool* refused = nullptr) {
  LaunchShape shape;
  shape.grid = dim3(static_cast<unsigned>(num_rows * plan.blocks));
  shape.block = dim3(static_cast<unsigned>(plan.threads));
  shape.shared_bytes = plan.shared_bytes;
  shape.cluster = plan.blocks;
  if (refused != nullptr && (*refused = !clusters_fit(kernel, shape))) return cudaSuccess;
  return launch_kernel(kernel, shape, stream, p, map, num_rows);
}

template <typename scalar_t, Logits kLogits>
cudaError_t launch_cached(const CachePlan& plan, int64_t num_rows, cudaStream_t stream, const LossRowsParams<float>& p,
                          const LogitMap& map) {
  const auto one = plan.threads == 32    ? loss_rows_cached_kernel<scalar_t, kLogits, Blocks::kOne, 32>
                   : plan.threads == 128 ? loss_rows_cached_kernel<scalar_t, kLogits, Blocks::kOne, 128>
                                         : loss_rows_cached_kernel<scalar_t, kLogits, Blocks::kOne, 512>;
  return launch_rows(one, plan, num_rows, stream, p, map);
}

template <typename scalar_t, Logits kLogits>
cudaError_t launch_row_kernel(const LossRowsParams<float>& p, int64_t num_rows, cudaStream_t stream) {
  const LogitMap map = LogitMap::of(p.options, kLogits);
  if (p.stage == Stage::kWhole && p.gradient == Gradient::kWrite) {
    DeviceLimits limits;
    const cudaError_t error = device_limits(&limits);
    if (error != cudaSuccess) return error;
    constexpr int kWidth = kVectorWidth<scalar_t>;
    const int64_t vectors = (p.vocab_size + kWidth - 1) / kWidth;
    CachePlan plan = plan_cache(vectors, limits, true);
    if (plan.blocks > 1) {
      bool refused = false;
      const cudaError_t launched = launch_rows(loss_rows_cached_kernel<scalar_t, kLogits, Blocks::kCluster, 512>, plan,
                                               num_rows, stream, p, map, &refused);
      if (!refused) return launched;
      plan = plan_cache(vectors, limits, false);
    }
    if (plan.blocks == 1) return launch_cached<scalar_t, kLogits>(plan, num_rows, stream, p, map);
  }
  return launch_rows(loss_rows_streaming_kernel<scalar_t, kLogits>, {1, kStreamingThreads, sizeof(StreamingRowScratch)},
                     num_rows, stream, p, map);
}

template <typename scalar_t>
cudaError_t launch_typed(const LossRowsParams<float>& p, int64_t num_rows, cudaStream_t stream) {
  if (p.options.softcap > 0.0) return launch_row_kernel<scalar_t, Logits::kCapped>(p, num_rows, stream);
  // A scale that is not positive, also as float32, reverses or removes the order of the logits.
  const bool scaled =
      p.bias == nullptr && p.options.label_smoothing <= 0.0 && static_cast<float>(p.options.logit_scale) > 0.0f;
  return scaled ? launch_row_kernel<scalar_t, Logits::kScaled>(p, num_rows, stream)
                : launch_row_kernel<scalar_t, Logits::kAffine>(p, num_rows, stream);
}

bool is_aligned(const void* x) { return reinterpret_cast<uintptr_t>(x) % kVectorBytes == 0; }

}  // namespace

cudaError_t launch_loss_rows(const LossRowsParams<float>& p, int64_t num_rows, cudaStream_t stream) {
  constexpr int64_t kLargestGrid = 0x7fffffff, kLargestVocabulary = int64_t{1} << 29, kLargestCluster = 8;
  if (num_rows == 0) return cudaSuccess;  // an empty grid is a launch error
  if (num_rows * kLargestCluster > kLargestGrid || p.vocab_size >= kLargestVocabulary) return cudaErrorInvalidValue;
  const int64_t row_bytes = p.row_stride * (p.dtype == DType::kFloat32 ? 4 : 2);
  if (p.row_stride < p.vocab_size || row_bytes % kVectorBytes != 0 || !is_aligned(p.logits) || !is_aligned(p.bias) ||
      !is_aligned(p.class_weights))
    return cudaErrorInvalidValue;
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
