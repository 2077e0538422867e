#include "kernels/decode.h"

#include <cmath>

#include "kernels/launch.h"
#include "kernels/mma.cuh"
#include "kernels/reduce.cuh"
#include "kernels/shared_memory.cuh"

namespace mtp {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / kWarp;
constexpr int kWarpClasses = 16;
constexpr int kBlockClasses = kWarps * kWarpClasses;
constexpr int kWidth = 8;                            // elements per 16-byte vector
constexpr int kStepWidth = 4 * kWidth;               // elements of D per warp step: a vector per lane and row
constexpr int kChunkWidth = 8 * kStepWidth;          // elements of D of the rows held in shared memory
constexpr int kRowPitch = kChunkWidth + 4 * kWidth;  // padded, so that two rows do not share banks
constexpr int kLogitPitch = kBlockClasses + 1;
constexpr int kMergeThreads = 256;

// A class and its logit. The larger logit is better; ties go to the lowest class.
struct Candidate {
  float logit;
  int id;
};
constexpr int kNobody = 0x7fffffff;

__device__ __forceinline__ bool better(const Candidate& a, const Candidate& b) {
  return a.logit > b.logit || (a.logit == b.logit && a.id < b.id);
}

// Sum of exponentials relative to the largest logit.
struct PartialLse {
  float max, sum;
};

struct Better {
  __device__ __forceinline__ Candidate operator()(const Candidate& a, const Candidate& b) const {
    return better(a, b) ? a : b;
  }
};

__device__ __forceinline__ Candidate warp_best(Candidate own) {
#pragma unroll
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) {
    const Candidate other{__shfl_xor_sync(kFullMask, own.logit, lanes), __shfl_xor_sync(kFullMask, own.id, lanes)};
    own = Better{}(own, other);
  }
  return own;
}

struct Maximum {
  __device__ __forceinline__ float operator()(float a, float b) const { return fmaxf(a, b); }
};

// [rows, blocks] partial sums and [rows, blocks, top] candidates.
struct Workspace {
  PartialLse* lse;
  Candidate* best;
};
__host__ __device__ inline Workspace workspace_of(const DecodeParams& p, int64_t blocks) {
  PartialLse* const lse = static_cast<PartialLse*>(p.workspace);
  return {lse, reinterpret_cast<Candidate*>(lse + p.rows * blocks)};
}

// Loads the rows' elements [begin, begin + kChunkWidth) into shared memory; zeros past the last row and past D.
template <typename scalar_t>
__device__ __forceinline__ void load_rows(const DecodeParams& p, int64_t begin, int padded_rows, scalar_t* chunk) {
  constexpr int kVectors = kChunkWidth / kWidth;
  for (int i = static_cast<int>(threadIdx.x); i < padded_rows * kVectors; i += kThreads) {
    const int row = i / kVectors, vector = i % kVectors;
    const int64_t d = begin + vector * kWidth;
    const scalar_t* const from = static_cast<const scalar_t*>(p.hidden) + row * p.hidden_stride + d;
    const bool inside = row < p.rows && d < p.width;
    *reinterpret_cast<uint4*>(chunk + row * kRowPitch + vector * kWidth) =
        inside ? __ldg(reinterpret_cast<const uint4*>(from)) : make_uint4(0, 0, 0, 0);
  }
}

template <typename scalar_t>
__device__ __forceinline__ uint4 load_class(const DecodeParams& p, int64_t id, int64_t d) {
  if (id >= p.vocab_size || d >= p.width) return make_uint4(0, 0, 0, 0);
  return __ldg(reinterpret_cast<const uint4*>(static_cast<const scalar_t*>(p.weight) + id * p.weight_stride + d));
}

// Two products over 16 elements of D each. A lane's vector holds 8 consecutive elements of D, not the 2 + 2 of the
// instruction's layout; any order of D is correct as long as both operands use it.
template <typename scalar_t, int kTiles>
__device__ __forceinline__ void multiply_step(uint4 low, uint4 high, const scalar_t* rows, float (&c)[kTiles][4]) {
  const unsigned a[2][4] = {{low.x, high.x, low.y, high.y}, {low.z, high.z, low.w, high.w}};
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
    const uint4 vector = *reinterpret_cast<const uint4*>(rows + tile * 8 * kRowPitch);
    const unsigned b[2][2] = {{vector.x, vector.y}, {vector.z, vector.w}};
    warp_mma<scalar_t>(c[tile], a[0], b[0]);
    warp_mma<scalar_t>(c[tile], a[1], b[1]);
  }
}

// By one warp: the block's top-k logits of one row, and its part of the log-sum-exp.
__device__ __forceinline__ void reduce_row(const DecodeParams& p, const float* logits, int64_t first_class,
                                           PartialLse* lse, Candidate* best) {
  constexpr int kPerLane = kBlockClasses / kWarp;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  Candidate own[kPerLane];
  float max = -INFINITY, sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const int64_t id = first_class + i * kWarp + lane;
    own[i] = {id < p.vocab_size ? logits[i * kWarp + lane] : -INFINITY, static_cast<int>(id)};
    max = fmaxf(max, own[i].logit);
  }
  max = warp_reduce(max, Maximum{});
  const float shift = max == -INFINITY ? 0.0f : max;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) sum += exp_shifted(own[i].logit, shift);
  sum = warp_reduce(sum, Sum{});
  if (lane == 0) *lse = {max, sum};
  Candidate last{INFINITY, -1};
  for (int k = 0; k < p.top; ++k) {  // the best candidate worse than the last one
    Candidate next{-INFINITY, kNobody};
#pragma unroll
    for (int i = 0; i < kPerLane; ++i)
      if (better(last, own[i]) && better(own[i], next)) next = own[i];
    last = warp_best(next);
    if (lane == 0) best[k] = last;
  }
}

template <typename scalar_t, int kTiles>
__global__ void __launch_bounds__(kThreads, 1) decode_kernel(const __grid_constant__ DecodeParams p) {
  scalar_t* const chunk = dynamic_shared_memory<scalar_t>();
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  const int group = lane / 4, in_group = lane % 4;
  const int64_t first_class = blockIdx.x * static_cast<int64_t>(kBlockClasses);
  const int64_t id = first_class + warp * kWarpClasses + group;
  float c[kTiles][4] = {};
  for (int64_t begin = 0; begin < p.width; begin += kChunkWidth) {
    __syncthreads();  // every thread has read the previous chunk
    load_rows(p, begin, kTiles * 8, chunk);
    __syncthreads();
#pragma unroll 4
    for (int d = in_group * kWidth; d < kChunkWidth; d += kStepWidth) {
      const uint4 low = load_class<scalar_t>(p, id, begin + d), high = load_class<scalar_t>(p, id + 8, begin + d);
      multiply_step<scalar_t>(low, high, chunk + group * kRowPitch + d, c);
    }
  }
  __syncthreads();
  float* const logits = dynamic_shared_memory<float>();  // [rows, kLogitPitch], over the chunk
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = tile * 8 + 2 * in_group + i % 2, column = warp * kWarpClasses + group + 8 * (i / 2);
      logits[row * kLogitPitch + column] = c[tile][i];
    }
  }
  __syncthreads();
  const Workspace workspace = workspace_of(p, gridDim.x);
  for (int row = warp; row < p.rows; row += kWarps) {
    const int64_t at = row * static_cast<int64_t>(gridDim.x) + blockIdx.x;
    reduce_row(p, logits + row * kLogitPitch, first_class, workspace.lse + at, workspace.best + at * p.top);
  }
}

// One block per row: merges the results of decode_kernel's blocks.
__global__ void __launch_bounds__(kMergeThreads)
    merge_decode_kernel(const __grid_constant__ DecodeParams p, const int64_t blocks) {
  constexpr int kMergeWarps = kMergeThreads / kWarp;
  float* const scratch = dynamic_shared_memory<float>();
  Candidate* const warp_bests = reinterpret_cast<Candidate*>(scratch + 2 * kMergeWarps);  // double-buffered
  const int64_t row = blockIdx.x;
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  const Workspace workspace = workspace_of(p, blocks);
  const PartialLse* const lse = workspace.lse + row * blocks;
  const Candidate* const candidates = workspace.best + row * blocks * p.top;
  float max = -INFINITY, sum = 0.0f;
  for (int64_t i = threadIdx.x; i < blocks; i += kMergeThreads) max = fmaxf(max, lse[i].max);
  max = block_reduce<kMergeThreads>(max, Maximum{}, scratch);
  const float shift = max == -INFINITY ? 0.0f : max;
  for (int64_t i = threadIdx.x; i < blocks; i += kMergeThreads) sum += lse[i].sum * exp_shifted(lse[i].max, shift);
  sum = block_reduce<kMergeThreads>(sum, Sum{}, scratch + kMergeWarps);
  if (threadIdx.x == 0) p.lse[row] = shift + logf(sum);
  Candidate last{INFINITY, -1};
  for (int k = 0; k < p.top; ++k) {
    Candidate next{-INFINITY, kNobody};
    for (int64_t i = threadIdx.x; i < blocks * p.top; i += kMergeThreads)
      if (better(last, candidates[i]) && better(candidates[i], next)) next = candidates[i];
    next = warp_best(next);
    Candidate* const bests = warp_bests + k % 2 * kMergeWarps;
    if (lane == 0) bests[warp] = next;
    __syncthreads();
    last = warp_best(bests[lane % kMergeWarps]);
    if (threadIdx.x == 0) {
      const bool found = last.id < p.vocab_size;  // else only NaN is left; callers index by the id
      p.top_logits[row * p.top + k] = found ? last.logit : NAN;
      p.top_ids[row * p.top + k] = found ? last.id : 0;
    }
  }
}

int64_t blocks_of(int64_t vocab_size) { return (vocab_size + kBlockClasses - 1) / kBlockClasses; }

template <typename scalar_t, int kTiles>
cudaError_t launch_tiles(const DecodeParams& p, cudaStream_t stream) {
  constexpr size_t kChunkBytes = size_t{kTiles} * 8 * kRowPitch * sizeof(scalar_t);
  constexpr size_t kLogitBytes = size_t{kTiles} * 8 * kLogitPitch * sizeof(float);
  LaunchShape shape;
  shape.grid = dim3(static_cast<unsigned>(blocks_of(p.vocab_size)));
  shape.block = dim3(kThreads);
  shape.shared_bytes = kChunkBytes > kLogitBytes ? kChunkBytes : kLogitBytes;
  const cudaError_t error = launch_kernel(decode_kernel<scalar_t, kTiles>, shape, stream, p);
  if (error != cudaSuccess) return error;
  constexpr int kMergeWarps = kMergeThreads / kWarp;
  LaunchShape merge;
  merge.grid = dim3(static_cast<unsigned>(p.rows));
  merge.block = dim3(kMergeThreads);
  merge.shared_bytes = 2 * kMergeWarps * (sizeof(float) + sizeof(Candidate));
  return launch_kernel(merge_decode_kernel, merge, stream, p, blocks_of(p.vocab_size));
}

template <typename scalar_t>
cudaError_t launch_typed(const DecodeParams& p, cudaStream_t stream) {
  if (p.rows <= 8) return launch_tiles<scalar_t, 1>(p, stream);
  if (p.rows <= 16) return launch_tiles<scalar_t, 2>(p, stream);
  if (p.rows <= 32) return launch_tiles<scalar_t, 4>(p, stream);
  return launch_tiles<scalar_t, 8>(p, stream);
}

}  // namespace

size_t decode_workspace_bytes(int64_t rows, int64_t vocab_size, int top) {
  return static_cast<size_t>(rows * blocks_of(vocab_size)) *
         (sizeof(PartialLse) + static_cast<size_t>(top) * sizeof(Candidate));
}

cudaError_t launch_decode(const DecodeParams& p, cudaStream_t stream) {
  if (p.rows == 0) return cudaSuccess;
  const bool shapes = p.rows <= kDecodeLargestRows && p.width > 0 && p.width % kWidth == 0 && p.top >= 1 &&
                      p.top <= kDecodeLargestTop && p.vocab_size >= p.top && p.vocab_size < kNobody;
  if (!shapes) return cudaErrorInvalidValue;
  if (p.dtype == DType::kBFloat16) return launch_typed<__nv_bfloat16>(p, stream);
  if (p.dtype == DType::kFloat16) return launch_typed<__half>(p, stream);
  return cudaErrorInvalidValue;
}

}  // namespace mtp
