// Sums over the rows of a head and over the rows of a matrix.
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "check.h"
#include "cpu/column_sum.h"
#include "cpu/head_sums.h"

namespace {

// Head 2 of 2 over two sequences of two positions with labels 0..3 | 4..7.
mtp::TargetRule make_rule(const std::vector<int64_t>& labels, const float* token_weights) {
  mtp::TargetRule rule{};
  rule.labels = labels.data();
  rule.label_type = mtp::IndexType::kInt64;
  rule.token_weights = token_weights;
  rule.batch = rule.seq_len = 2;
  rule.label_len = rule.label_stride = 4;
  rule.first_shift = 1;
  rule.ignore_index = -100;
  return rule;
}

void test_head_sums() {
  const std::vector<int64_t> labels{0, 1, 2, 3, 4, 5, 6, 7}, rows{4, 5, 7};  // targets 2, 3 and 7
  const std::vector<float> token_weights{9, 9, 0.5f, 2, 9, 9, 9, 4}, class_weights{0, 0, 1, 3, 0, 0, 0, 0.25f};
  const mtp::TargetRule plain = make_rule(labels, nullptr), weighted = make_rule(labels, token_weights.data());
  CHECK(mtp::mean_divisor<float>(plain, rows.data(), 3, nullptr) == 3.0);
  CHECK(mtp::mean_divisor<float>(weighted, rows.data(), 3, nullptr) == 6.5);
  CHECK(mtp::mean_divisor(plain, rows.data(), 3, class_weights.data()) == 4.25);
  CHECK(mtp::mean_divisor(weighted, rows.data(), 3, class_weights.data()) == 0.5 + 6.0 + 1.0);
  constexpr float kInf = std::numeric_limits<float>::infinity();
  const std::vector<float> nothing(8), cancelling{0, 0, 2, -2, 0, 0, 0, 1.5f}, both{9, 9, 1, 1, 9, 9, 9, 0};
  CHECK(mtp::mean_divisor<float>(plain, rows.data(), 0, nullptr) == kInf);
  CHECK(mtp::mean_divisor(weighted, rows.data(), 0, class_weights.data()) == kInf);
  CHECK(mtp::mean_divisor(weighted, rows.data(), 3, nothing.data()) == kInf);
  CHECK(std::isnan(mtp::mean_divisor(make_rule(labels, both.data()), rows.data(), 3, cancelling.data())));
  CHECK(mtp::mean_divisor(plain, rows.data(), 3, cancelling.data()) == 1.5);
  std::vector<float> loss{7, 7, 7, 7, 1, 2, 7, 3};
  CHECK(mtp::weigh_losses(weighted, rows.data(), 3, loss.data()) == 0.5 + 4.0 + 12.0);
  CHECK((loss == std::vector<float>{7, 7, 7, 7, 0.5f, 4, 7, 12}));
  CHECK(mtp::weigh_losses(plain, rows.data(), 3, loss.data()) == 16.5);
}

template <typename scalar_t, typename acc_t, typename Make>
void test_column_sum(Make make) {
  constexpr int64_t kRows = 5, kColumns = 1100, kStride = 1103;
  std::vector<scalar_t> x(kRows * kStride, make(std::numeric_limits<float>::quiet_NaN()));  // between the rows
  for (int64_t r = 0; r < kRows; ++r)
    for (int64_t v = 0; v < kColumns; ++v) x[r * kStride + v] = make(static_cast<float>(r * (v % 7) - 3));
  std::vector<acc_t> out(kColumns, acc_t{1});
  mtp::add_column_sum(x.data(), kRows, kStride, 1, kColumns - 1, out.data());
  for (int64_t v = 0; v < kColumns; ++v) {
    const bool inside = v > 0 && v < kColumns - 1;
    CHECK(out[v] == (inside ? acc_t(1 + 10 * (v % 7) - 3 * kRows) : acc_t{1}));
  }
}

// Added one by one in float32, a thousand ones after 2^24 would vanish.
void test_digits_are_kept() {
  std::vector<float> x(1001, 1.0f), out{0.0f};
  x[0] = 16777216.0f;
  mtp::add_column_sum(x.data(), 1001, 1, 0, 1, out.data());
  CHECK(out[0] == 16778216.0f);
}

}  // namespace

int main() {
  test_head_sums();
  test_column_sum<float, float>([](float x) { return x; });
  test_column_sum<double, double>([](float x) { return static_cast<double>(x); });
  test_column_sum<mtp::BFloat16Bits, float>([](float x) { return mtp::to_bfloat16(x); });
  test_digits_are_kept();
  return check::summary();
}
