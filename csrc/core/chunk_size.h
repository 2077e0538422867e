// How many rows of logits are held at once, on either device.
#pragma once
#include <algorithm>
#include <cstdint>

namespace mtp {

struct ChunkLimits {
  int64_t rows = 0;   // most rows, as the caller said; 0: not said. Takes precedence.
  int64_t bytes = 0;  // most bytes of logits (at least one row is held); 0: not said
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Chunks of nearly equal sizes, none larger than `limit`.
inline int64_t balanced_chunk(int64_t num_rows, int64_t limit) {
  const int64_t chunks = std::max<int64_t>(1, ceil_div(num_rows, limit));
  return std::max<int64_t>(1, ceil_div(num_rows, chunks));
}

// 128 MiB of logits, which is 1024 float32 rows at V = 32k. Fewer than 512 rows leave the GEMMs inefficient (128 rows
// lose 20-40 %); more than 1024 gain nothing, except 2 % where a chunk of short rows is small.
inline int64_t cpu_chunk_limit(int64_t row_bytes) {
  constexpr int64_t kBytes = 128 << 20, kSmallBytes = 8 << 20, kFewestRows = 512, kMostRows = 1024;
  const int64_t fits = std::clamp(kBytes / row_bytes, kFewestRows, kMostRows);
  return std::max(fits, kSmallBytes / row_bytes);
}

// A GPU needs more rows before the GEMMs outweigh the row pass and the float32 sum of the weight's gradient: with 760
// TFLOP/s and 3 TB/s those cost 167 / D and 333 / C of the GEMMs. The logits may take half of what that gradient takes,
// within bounds.
constexpr int64_t kGpuTileRows = 128;
inline int64_t gpu_chunk_limit(int64_t row_bytes, int64_t vocab_size, int64_t width) {
  constexpr int64_t kFewestBytes = 256 << 20, kMostBytes = 1 << 30, kFewestRows = 2048, kMostRows = 8192;
  const int64_t half_of_gradient = vocab_size * width * 4 / 2;
  const int64_t fits = std::clamp(half_of_gradient, kFewestBytes, kMostBytes) / row_bytes;
  return std::clamp(fits, kFewestRows, kMostRows) / kGpuTileRows * kGpuTileRows;
}

// Rows of one chunk of `num_rows` rows of logits [V]; `width` is D where a GPU multiplies them, in whole tiles, else 0.
inline int64_t chunk_size(int64_t num_rows, int64_t vocab_size, int64_t item_size, int64_t width,
                          const ChunkLimits& limits) {
  const int64_t row_bytes = std::max<int64_t>(1, vocab_size * item_size);
  if (limits.rows > 0) return balanced_chunk(num_rows, limits.rows);
  if (limits.bytes > 0) return balanced_chunk(num_rows, std::max<int64_t>(1, limits.bytes / row_bytes));
  if (width == 0) return balanced_chunk(num_rows, cpu_chunk_limit(row_bytes));
  const int64_t balanced = balanced_chunk(num_rows, gpu_chunk_limit(row_bytes, vocab_size, width));
  return std::max<int64_t>(1, std::min(num_rows, ceil_div(balanced, kGpuTileRows) * kGpuTileRows));
}

}  // namespace mtp
