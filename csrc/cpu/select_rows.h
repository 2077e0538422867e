// Lists or marks the loss rows with a target, and counts them per head.
//
// Shapes    rows [heads * B * seq_len]: the flat (head, b, s) index of every row that counts, ascending, padded with
//           -1; with `marked`, every row's own index, or -1 if it does not count; counts [heads].
// Cost      one read of the labels (and document ids) per head; O(heads * B * seq_len).
// Returns   the flat index into labels of the first target outside [0, vocab_size), or -1.
#pragma once
#include <cstdint>

#include "core/target_rule.h"

namespace mtp {

template <typename weight_t>
int64_t select_rows(const BasicTargetRule<weight_t>& rule, int64_t num_heads, int64_t vocab_size, bool marked,
                    int64_t* rows, int64_t* counts);

}  // namespace mtp
