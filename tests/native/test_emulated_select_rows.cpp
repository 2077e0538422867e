// The CUDA selection of rows with a target, against a plain implementation of the rule.
#include <algorithm>
#include <cstdint>
#include <random>
#include <vector>

#include "check.h"
#include "emulator/device.h"
#include "emulator/guarded_memory.h"
#include "kernels/select_rows.h"

namespace {

using emulator::DeviceArray;
using emulator::Order;

struct Case {
  int64_t heads, batch, seq_len, label_len, first_shift;
  bool documents = false, weights = false, int32_labels = false;
  double ignored = 0.3;
  int64_t vocab_size = 100;
};

template <typename label_t>
void run(const Case& c, Order order, unsigned seed, bool marked) {
  std::mt19937 rng(seed);
  std::uniform_real_distribution<double> uniform(0, 1);
  const auto size = static_cast<size_t>(c.batch * c.label_len);
  const DeviceArray<label_t> labels(size);
  const DeviceArray<int32_t> documents(size);
  const DeviceArray<float> weights(size);
  for (size_t i = 0; i < size; ++i) {
    labels[i] = uniform(rng) < c.ignored ? -100 : static_cast<label_t>(rng() % 100);
    documents[i] = static_cast<int32_t>(i / 7);
    weights[i] = uniform(rng) < 0.2 ? 0.0f : 1.0f;
  }
  const auto all = static_cast<size_t>(c.heads * c.batch * c.seq_len);
  const DeviceArray<int64_t> rows(all), counts(static_cast<size_t>(c.heads)), first_invalid(1);
  const DeviceArray<mtp::SelectedTile> tiles(static_cast<size_t>(mtp::select_rows_tiles(c.heads, c.batch * c.seq_len)));
  mtp::SelectRowsParams p{};
  p.rule.labels = labels.data();
  p.rule.label_type = sizeof(label_t) == 8 ? mtp::IndexType::kInt64 : mtp::IndexType::kInt32;
  p.rule.document_ids = c.documents ? documents.data() : nullptr;
  p.rule.document_type = mtp::IndexType::kInt32;
  p.rule.token_weights = c.weights ? weights.data() : nullptr;
  p.rule.batch = c.batch, p.rule.seq_len = c.seq_len;
  p.rule.label_len = p.rule.label_stride = p.rule.document_stride = c.label_len;
  p.rule.first_shift = c.first_shift;
  p.rule.ignore_index = -100;
  p.num_heads = c.heads, p.vocab_size = c.vocab_size, p.marked = marked;
  p.rows = rows.data(), p.counts = counts.data(), p.first_invalid = first_invalid.data(), p.tiles = tiles.data();
  emulator::device().order = order;
  CHECK(mtp::launch_select_rows(p, nullptr) == cudaSuccess);

  std::vector<int64_t> expected_rows, expected_counts;
  int64_t expected_invalid = -1;
  for (int64_t head = 0; head < c.heads; ++head) {
    expected_counts.push_back(0);
    for (int64_t b = 0; b < c.batch; ++b) {
      for (int64_t s = 0; s < c.seq_len; ++s) {
        const int64_t j = s + c.first_shift + head;
        if (j >= c.label_len) continue;
        const auto at = static_cast<size_t>(b * c.label_len + j), here = static_cast<size_t>(b * c.label_len + s);
        if (labels[at] == -100 || (c.documents && documents[at] != documents[here])) continue;
        if (c.weights && weights[at] == 0.0f) continue;
        if (labels[at] >= c.vocab_size && expected_invalid < 0) expected_invalid = static_cast<int64_t>(at);
        expected_rows.push_back((head * c.batch + b) * c.seq_len + s);
        ++expected_counts.back();
      }
    }
  }
  if (marked) {
    std::vector<int64_t> by_row(all, -1);
    for (const int64_t row : expected_rows) by_row[static_cast<size_t>(row)] = row;
    expected_rows = by_row;
  }
  expected_rows.resize(all, -1);
  CHECK(std::equal(rows.begin(), rows.end(), expected_rows.begin()));
  CHECK(std::equal(counts.begin(), counts.end(), expected_counts.begin()));
  CHECK(first_invalid[0] == expected_invalid);
}

}  // namespace

int main() {
  const Case cases[] = {
      {1, 1, 1, 1, 0},
      {1, 1, 1, 1, 1},
      {2, 0, 5, 6, 1},  // no rows
      {3, 2, 0, 4, 1},
      {4, 2, 63, 67, 1},
      {2, 1, 4096, 4098, 1},        // whole tiles
      {2, 1, 4097, 4097, 1},        // one row more
      {3, 5, 1000, 1003, 1, true},  // two tiles per head, documents
      {3, 5, 1000, 1001, 1, true, true},
      {2, 3, 300, 302, 1, false, true, true},
      {2, 3, 300, 302, 1, false, false, false, 1.0},       // no targets
      {2, 3, 300, 302, 1, false, false, false, 0.0},       // all labels are targets
      {3, 2, 500, 503, 1, true, false, false, 0.5, 90},    // some targets outside the vocabulary
      {2, 1, 9000, 9002, 1, false, false, false, 0.0, 2},  // most are not
  };
  unsigned seed = 0;
  for (const Case& c : cases)
    for (const Order order : {Order::kForward, Order::kReverse, Order::kShuffled})
      for (const bool marked : {false, true})
        c.int32_labels ? run<int32_t>(c, order, ++seed, marked) : run<int64_t>(c, order, ++seed, marked);
  mtp::SelectRowsParams none{};
  CHECK(mtp::launch_select_rows(none, nullptr) == cudaErrorInvalidValue);
  return check::summary();
}
