// The target of a loss row. Rows are (head, batch, position), head-major, on one flat axis:
//   row = (head * batch + b) * seq_len + s      predicts      labels[b, s + first_shift + head]
// so neither shifted labels nor a mask is ever materialised.
//
// Shapes    labels [B, label_len] with label_len >= seq_len; document_ids, token_weights [B, label_len] or null.
// Rule      a target counts if it exists (s + shift < label_len), is not ignore_index, is in the same document as its
//           position and has a nonzero weight (Gloeckle et al. 2024, eq. 2, on packed sequences).
#pragma once
#include <cstdint>

#include "core/dtype.h"

namespace mtp {

// A flat row, taken apart.
struct RowLocation {
  int64_t head, b, s;
};

template <typename weight_t>  // double for a float64 loss, else float
struct BasicTargetRule {
  using Location = RowLocation;

  const void* labels;             // [B, label_len], unit stride over label_len
  const void* document_ids;       // same shape, or null: one document per batch row
  const weight_t* token_weights;  // [B, label_len] contiguous: the weight of labels[b, j] as a target; or null: 1
  IndexType label_type, document_type;
  int64_t batch, seq_len, label_len;
  int64_t label_stride, document_stride;  // elements between batch rows
  int64_t first_shift;                    // shift of head 0: 1 for the next token, 0 for aligned targets
  int64_t ignore_index;

  MTP_HD Location locate(int64_t row) const {
    const int64_t head_rows = batch * seq_len;
    const int64_t in_head = row % head_rows;
    return {row / head_rows, in_head / seq_len, in_head % seq_len};
  }

  // Column of the target in `labels`; may be past the end.
  MTP_HD int64_t column(Location at) const { return at.s + first_shift + at.head; }

  // Only for rows that count.
  MTP_HD int64_t target(Location at) const { return load_index(labels, label_type, at.b * label_stride + column(at)); }

  MTP_HD weight_t token_weight(Location at) const {
    return token_weights == nullptr ? weight_t{1} : token_weights[at.b * label_len + column(at)];
  }

  MTP_HD bool counts(Location at) const {
    const int64_t j = column(at);
    if (j >= label_len || target(at) == ignore_index || token_weight(at) == 0) return false;
    if (document_ids == nullptr) return true;
    const int64_t base = at.b * document_stride;
    return load_index(document_ids, document_type, base + j) == load_index(document_ids, document_type, base + at.s);
  }
};
using TargetRule = BasicTargetRule<float>;

}  // namespace mtp
