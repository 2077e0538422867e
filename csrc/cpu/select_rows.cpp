#include "cpu/select_rows.h"

#include <algorithm>

namespace mtp {

template <typename weight_t>
int64_t select_rows(const BasicTargetRule<weight_t>& rule, int64_t num_heads, int64_t vocab_size, bool marked,
                    int64_t* rows, int64_t* counts) {
  int64_t row = 0, selected = 0, first_invalid = -1;
  for (int64_t head = 0; head < num_heads; ++head) {
    const int64_t before = selected;
    for (int64_t b = 0; b < rule.batch; ++b) {
      for (int64_t s = 0; s < rule.seq_len; ++s, ++row) {
        const RowLocation at{head, b, s};
        if (marked) rows[row] = -1;
        if (!rule.counts(at)) continue;
        const int64_t target = rule.target(at);
        if (first_invalid < 0 && (target < 0 || target >= vocab_size))
          first_invalid = b * rule.label_len + rule.column(at);
        rows[marked ? row : selected] = row;
        ++selected;
      }
    }
    counts[head] = selected - before;
  }
  if (!marked) std::fill(rows + selected, rows + row, int64_t{-1});
  return first_invalid;
}

template int64_t select_rows(const BasicTargetRule<float>&, int64_t, int64_t, bool, int64_t*, int64_t*);
template int64_t select_rows(const BasicTargetRule<double>&, int64_t, int64_t, bool, int64_t*, int64_t*);

}  // namespace mtp
