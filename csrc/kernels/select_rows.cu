#include "kernels/select_rows.h"

#include <cuda_runtime.h>

#include "kernels/launch.h"
#include "kernels/reduce.cuh"
#include "kernels/shared_memory.cuh"

namespace mtp {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kRowsPerThread = 16;
constexpr int64_t kTileRows = kThreads * kRowsPerThread;
constexpr int64_t kNoRow = INT64_MAX;

int64_t tiles_of(int64_t rows_per_head) { return rows_per_head == 0 ? 1 : (rows_per_head + kTileRows - 1) / kTileRows; }

// The rows of one head that one block processes, kThreads at a time.
struct Tile {
  int64_t head, first, rows_per_head;

  __device__ explicit Tile(const TargetRule& rule)
      : head(blockIdx.y),
        first(static_cast<int64_t>(blockIdx.x) * kTileRows),
        rows_per_head(rule.batch * rule.seq_len) {}

  __device__ int64_t in_head(int step) const { return first + step * kThreads + static_cast<int64_t>(threadIdx.x); }
  __device__ int64_t flat(int step) const { return head * rows_per_head + in_head(step); }
  __device__ bool holds(int step) const { return in_head(step) < rows_per_head; }
  __device__ TargetRule::Location locate(const TargetRule& rule, int step) const {
    const int64_t b = in_head(step) / rule.seq_len;
    return {head, b, in_head(step) - b * rule.seq_len};
  }
};

__global__ void __launch_bounds__(kThreads) count_rows_kernel(const __grid_constant__ SelectRowsParams p) {
  int64_t* const scratch = dynamic_shared_memory<int64_t>();
  const Tile tile(p.rule);
  int64_t count = 0, first_invalid = kNoRow;
  for (int step = 0; step < kRowsPerThread; ++step) {
    if (!tile.holds(step)) continue;
    const TargetRule::Location at = tile.locate(p.rule, step);
    if (!p.rule.counts(at)) continue;
    ++count;
    const int64_t target = p.rule.target(at);
    const bool invalid = target < 0 || target >= p.vocab_size;
    if (invalid && first_invalid == kNoRow) first_invalid = tile.flat(step);
  }
  count = block_reduce<kThreads>(count, Sum{}, scratch);
  first_invalid = block_reduce<kThreads>(first_invalid, Minimum{}, scratch + kWarps);
  if (threadIdx.x == 0) p.tiles[blockIdx.y * static_cast<int64_t>(gridDim.x) + blockIdx.x] = {first_invalid, count};
}

// Totals over all tiles, by a whole block: rows before this block's tile, all rows, rows of its head.
struct TileTotals {
  int64_t before = 0, all = 0, of_head = 0, first_invalid_row = kNoRow;
};

__device__ __forceinline__ TileTotals read_tiles(const SelectRowsParams& p, int64_t* scratch) {
  const int64_t per_head = gridDim.x, own = blockIdx.y * per_head + blockIdx.x;
  TileTotals totals;
  for (int64_t i = threadIdx.x; i < per_head * gridDim.y; i += kThreads) {
    const SelectedTile tile = p.tiles[i];
    totals.all += tile.count;
    if (i < own) totals.before += tile.count;
    if (i / per_head == blockIdx.y) totals.of_head += tile.count;
    totals.first_invalid_row = Minimum{}(totals.first_invalid_row, tile.first_invalid_row);
  }
  totals.before = block_reduce<kThreads>(totals.before, Sum{}, scratch);
  totals.all = block_reduce<kThreads>(totals.all, Sum{}, scratch + kWarps);
  totals.of_head = block_reduce<kThreads>(totals.of_head, Sum{}, scratch + 2 * kWarps);
  totals.first_invalid_row = block_reduce<kThreads>(totals.first_invalid_row, Minimum{}, scratch + 3 * kWarps);
  return totals;
}

constexpr size_t kPlaceScratch = 4 * kWarps * sizeof(int64_t) + 2 * kWarps * sizeof(int);

__global__ void __launch_bounds__(kThreads) place_rows_kernel(const __grid_constant__ SelectRowsParams p) {
  int64_t* const scratch = dynamic_shared_memory<int64_t>();
  int* const warp_counts = reinterpret_cast<int*>(scratch + 4 * kWarps);  // [2][kWarps]
  const TileTotals totals = read_tiles(p, scratch);
  if (threadIdx.x == 0 && blockIdx.x == 0) p.counts[blockIdx.y] = totals.of_head;
  if (threadIdx.x == 0 && blockIdx.x == 0 && blockIdx.y == 0) {
    const int64_t row = totals.first_invalid_row;
    *p.first_invalid = -1;
    if (row != kNoRow) {
      const TargetRule::Location at = p.rule.locate(row);
      *p.first_invalid = at.b * p.rule.label_len + p.rule.column(at);
    }
  }
  const Tile tile(p.rule);
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  int64_t position = totals.before;
  for (int step = 0; step < kRowsPerThread; ++step) {
    const bool selected = tile.holds(step) && p.rule.counts(tile.locate(p.rule, step));
    if (p.marked) {
      if (tile.holds(step)) p.rows[tile.flat(step)] = selected ? tile.flat(step) : -1;
      continue;
    }
    const unsigned votes = __ballot_sync(kFullMask, selected ? 1 : 0);
    int* const counts = warp_counts + step % 2 * kWarps;  // double-buffered: one barrier per step
    if (lane == 0) counts[warp] = __popc(votes);
    __syncthreads();
    int before = __popc(votes & ((1u << lane) - 1)), in_step = 0;
    for (int i = 0; i < kWarps; ++i) {
      if (i < warp) before += counts[i];
      in_step += counts[i];
    }
    if (selected) p.rows[position + before] = tile.flat(step);
    if (tile.holds(step) && tile.flat(step) >= totals.all) p.rows[tile.flat(step)] = -1;
    position += in_step;
  }
}

}  // namespace

int64_t select_rows_tiles(int64_t num_heads, int64_t rows_per_head) { return num_heads * tiles_of(rows_per_head); }

cudaError_t launch_select_rows(const SelectRowsParams& p, cudaStream_t stream) {
  constexpr int64_t kLargestGridX = 0x7fffffff, kLargestGridY = 0xffff;
  const int64_t tiles = tiles_of(p.rule.batch * p.rule.seq_len);
  if (p.num_heads < 1 || tiles > kLargestGridX || p.num_heads > kLargestGridY) return cudaErrorInvalidValue;
  LaunchShape shape;
  shape.grid = dim3(static_cast<unsigned>(tiles), static_cast<unsigned>(p.num_heads));
  shape.block = dim3(kThreads);
  shape.shared_bytes = 2 * kWarps * sizeof(int64_t);
  const cudaError_t error = launch_kernel(count_rows_kernel, shape, stream, p);
  if (error != cudaSuccess) return error;
  shape.shared_bytes = kPlaceScratch;
  return launch_kernel(place_rows_kernel, shape, stream, p);
}

}  // namespace mtp
