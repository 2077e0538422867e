// Lists or marks the loss rows with a target, and counts them per head: the CUDA form of cpu/select_rows.h.
//
// Shapes    rows [heads * B * seq_len]: the flat (head, b, s) index of every row that counts, ascending, padded with
//           -1; with `marked`, every row's own index, or -1 if it does not count; counts [heads]; first_invalid [1]: flat index into labels of the first of these rows' targets outside
//           [0, vocab_size), or -1; tiles [select_rows_tiles()]: workspace.
// Cost      two reads of the labels (and document ids) per head, one write of rows; a few microseconds.
// Launch    two kernels, count and place, with one block of 256 threads per tile of 4096 rows. Deterministic: no
//           atomics. No GPU sync: the grid depends on the sizes alone.
// Numerics  integers.
// Caller    1 <= heads < 2^16.
#pragma once
#include <cuda_runtime_api.h>

#include "core/target_rule.h"

namespace mtp {

struct SelectedTile {
  int64_t first_invalid_row;  // INT64_MAX: none
  int64_t count;
};

struct SelectRowsParams {
  TargetRule rule;
  int64_t num_heads, vocab_size;
  bool marked;
  int64_t* rows;
  int64_t* counts;
  int64_t* first_invalid;
  SelectedTile* tiles;
};

int64_t select_rows_tiles(int64_t num_heads, int64_t rows_per_head);

cudaError_t launch_select_rows(const SelectRowsParams& params, cudaStream_t stream);

}  // namespace mtp
