// Chunk size: the rows of logits held at once, on either device.
#pragma once
#include <algorithm>
#include <cstdint>

namespace mtp {

struct ChunkLimits {
  int64_t rows = 0;   // most rows; 0: unset. Takes precedence.
  int64_t bytes = 0;  // most bytes of logits, but at least one row; 0: unset
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Size of nearly equal chunks of at most `limit` rows.
inline int64_t balanced_chunk(int64_t num_rows, int64_t limit) {
  const int64_t chunks = std::max<int64_t>(1, ceil_div(num_rows, limit));
  return std::max<int64_t>(1, ceil_div(num_rows, chunks));
}

// 128 MiB of logits: 1024 float32 or 2048 bfloat16 rows at V = 32k. Below 512 rows the GEMMs are inefficient (128 rows
// lose 20-40 %); above 1024 float32 rows nothing is gained, except 2 % for small chunks of short rows. bfloat16 gains
// 5 % from 2048: its products take half as long, and each chunk's weight gradient is rounded once.
inline int64_t cpu_chunk_limit(int64_t row_bytes, int64_t item_size) {
  constexpr int64_t kBytes = 128 << 20, kSmallBytes = 8 << 20, kFewestRows = 512;
  const int64_t most_rows = item_size == 2 ? 2048 : 1024;
  const int64_t fits = std::clamp(kBytes / row_bytes, kFewestRows, most_rows);
  return std::max(fits, kSmallBytes / row_bytes);
}

// Rows of the GEMMs for `rows` rows: at most 1/32 more, 32 sizes per doubling. oneDNN compiles a kernel for each shape of
// bfloat16 operands and keeps 1024 of them; the three products of a new number of rows hold 2 MiB (V = 4096, D = 256).
inline int64_t padded_rows(int64_t rows) {
  int64_t step = 1;
  while (step * 64 <= rows) step *= 2;
  return ceil_div(rows, step) * step;
}

// A GPU needs larger chunks for the GEMMs to outweigh the row pass and the float32 accumulation of the weight gradient,
// which cost 167 / D and 333 / C of the GEMM time at 760 TFLOP/s and 3 TB/s: predicted, not measured. The logits may use
// half as much memory as that gradient, within bounds: 512 MiB hold 8192 rows at V = 32k (333 / C = 4 %, 8 % at 4096).
constexpr int64_t kGpuTileRows = 128;
inline int64_t gpu_chunk_limit(int64_t row_bytes, int64_t vocab_size, int64_t width) {
  constexpr int64_t kFewestBytes = 512 << 20, kMostBytes = 1 << 30, kFewestRows = 2048, kMostRows = 8192;
  const int64_t half_of_gradient = vocab_size * width * 4 / 2;
  const int64_t fits = std::clamp(half_of_gradient, kFewestBytes, kMostBytes) / row_bytes;
  return std::clamp(fits, kFewestRows, kMostRows) / kGpuTileRows * kGpuTileRows;
}

// Rows per chunk for `num_rows` rows of logits [V]. `gpu_width` is D on a GPU, where chunks are whole tiles, else 0.
//
// `sum_width` is D where a single chunk makes the float32 sum [V, D] of the weight's gradient unnecessary, else 0: its
// product is then stored in the weight's 16 bits. That saves 2 V D bytes, as much as the 2 V bytes of D more rows.
inline int64_t chunk_size(int64_t num_rows, int64_t vocab_size, int64_t item_size, int64_t gpu_width,
                          const ChunkLimits& limits, int64_t sum_width = 0) {
  const int64_t row_bytes = std::max<int64_t>(1, vocab_size * item_size);
  if (limits.rows > 0) return balanced_chunk(num_rows, limits.rows);
  if (limits.bytes > 0) return balanced_chunk(num_rows, std::max<int64_t>(1, limits.bytes / row_bytes));
  const int64_t limit =
      gpu_width == 0 ? cpu_chunk_limit(row_bytes, item_size) : gpu_chunk_limit(row_bytes, vocab_size, gpu_width);
  if (num_rows <= limit + sum_width) return std::max<int64_t>(1, num_rows);
  const int64_t balanced = balanced_chunk(num_rows, limit);
  return gpu_width == 0 ? balanced : ceil_div(balanced, kGpuTileRows) * kGpuTileRows;
}

}  // namespace mtp
