// The rule that decides which loss rows have a target.
#include "cpu/select_rows.h"

#include <cstdint>
#include <vector>

#include "check.h"

namespace {

struct Selected {
  std::vector<int64_t> rows, counts;
  int64_t first_invalid;
};

template <typename label_t>
Selected select(const std::vector<label_t>& labels, const std::vector<int32_t>& documents, int64_t batch,
                int64_t seq_len, int64_t heads, int64_t first_shift, const std::vector<float>& weights = {}) {
  const auto label_len = static_cast<int64_t>(labels.size()) / batch;
  mtp::TargetRule rule{};
  rule.labels = labels.data();
  rule.label_type = sizeof(label_t) == 8 ? mtp::IndexType::kInt64 : mtp::IndexType::kInt32;
  rule.document_ids = documents.empty() ? nullptr : documents.data();
  rule.document_type = mtp::IndexType::kInt32;
  rule.token_weights = weights.empty() ? nullptr : weights.data();
  rule.batch = batch;
  rule.seq_len = seq_len;
  rule.label_len = rule.label_stride = rule.document_stride = label_len;
  rule.first_shift = first_shift;
  rule.ignore_index = -100;
  Selected out{std::vector<int64_t>(static_cast<size_t>(heads * batch * seq_len), -7),
               std::vector<int64_t>(static_cast<size_t>(heads)), 0};
  std::vector<int64_t> marked(out.rows.size(), -7), marked_counts(out.counts.size());
  const int64_t marked_invalid = mtp::select_rows(rule, heads, 10, true, marked.data(), marked_counts.data());
  out.first_invalid = mtp::select_rows(rule, heads, 10, false, out.rows.data(), out.counts.data());
  CHECK(marked_invalid == out.first_invalid && marked_counts == out.counts);
  std::vector<int64_t> expected(out.rows.size(), -1);
  for (const int64_t row : out.rows)
    if (row >= 0) expected[static_cast<size_t>(row)] = row;
  CHECK(marked == expected);
  int64_t total = 0;
  for (const int64_t count : out.counts) total += count;
  for (size_t i = static_cast<size_t>(total); i < out.rows.size(); ++i) CHECK(out.rows[i] == -1);
  out.rows.resize(static_cast<size_t>(total));
  return out;
}

using Rows = std::vector<int64_t>;

}  // namespace

int main() {
  // Labels as long as the sequence: head k loses its last k positions.
  Selected s = select<int64_t>({1, 2, 3, 4}, {}, 1, 4, 2, 1);
  CHECK((s.rows == Rows{0, 1, 2, 4, 5}) && (s.counts == Rows{3, 2}) && s.first_invalid == -1);
  // n extra labels: no position is lost; int32 labels behave the same.
  const Selected all = select<int32_t>({1, 2, 3, 4, 5, 6}, {}, 1, 4, 2, 1);
  CHECK((all.counts == Rows{4, 4}) && all.rows.size() == 8);
  // An ignored label removes the row one position before it from head 1 and two before it from head 2.
  s = select<int64_t>({1, 2, -100, 4, 5, 6}, {}, 1, 4, 2, 1);
  CHECK((s.rows == Rows{0, 2, 3, 5, 6, 7}) && (s.counts == Rows{3, 3}));
  // Documents [0 0 1 1 | 1 1]: a target in the next document does not count.
  s = select<int64_t>({1, 2, 3, 4, 5, 6}, {0, 0, 1, 1, 1, 1}, 1, 4, 2, 1);
  CHECK((s.rows == Rows{0, 2, 3, 6, 7}) && (s.counts == Rows{3, 2}));
  // Two batch rows, head-major; a label of weight 0 is not a target.
  s = select<int64_t>({1, 2, 3, 4, 5, 6}, {}, 2, 2, 1, 1, {1, 1, 0, 1, 1, 1});
  CHECK((s.rows == Rows{0, 2, 3}) && (s.counts == Rows{3}));
  // Aligned targets (no shift), and the first target outside the vocabulary: labels[0][2].
  s = select<int64_t>({1, 2, 10, 4}, {}, 1, 4, 1, 0);
  CHECK((s.counts == Rows{4}) && s.first_invalid == 2);
  s = select<int64_t>({1, 2, 3, -1}, {}, 1, 4, 1, 0);
  CHECK(s.first_invalid == 3);
  // Labels shorter than a head's shift: no rows, no read past the end.
  s = select<int64_t>({1, 2}, {}, 1, 2, 3, 1);
  CHECK((s.rows == Rows{0}) && (s.counts == Rows{1, 0, 0}));
  // No rows.
  s = select<int64_t>({1}, {}, 1, 0, 2, 1);
  CHECK(s.rows.empty() && (s.counts == Rows{0, 0}));
  return check::summary();
}
