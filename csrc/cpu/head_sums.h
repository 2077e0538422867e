// Sums over the rows of one head: the denominator of its loss, and the loss.
//
// Shapes    rows [count]: flat rows of one head with a target (cpu/select_rows.h); class_weights [V] or null;
//           loss: a table over all flat rows.
// Cost      one read of the rows and of what they index.
// Numerics  float64 sums: in float32 the weights of a large batch would lose digits.
#pragma once
#include <cstdint>

#include "core/target_rule.h"

namespace mtp {

// Sum of token_weight * class_weight over the rows' targets; `count` without weights.
template <typename acc_t>
double sum_of_weights(const BasicTargetRule<acc_t>& rule, const int64_t* rows, int64_t count,
                      const acc_t* class_weights) {
  if (rule.token_weights == nullptr && class_weights == nullptr) return static_cast<double>(count);
  double sum = 0.0;
  for (int64_t i = 0; i < count; ++i) {
    const RowLocation at = rule.locate(rows[i]);
    const double class_weight = class_weights == nullptr ? 1.0 : class_weights[rule.target(at)];
    sum += class_weight * rule.token_weight(at);
  }
  return sum;
}

// Multiplies the rows' losses by their token weights in place and returns their sum.
template <typename acc_t>
double weigh_losses(const BasicTargetRule<acc_t>& rule, const int64_t* rows, int64_t count, acc_t* loss) {
  double sum = 0.0;
  for (int64_t i = 0; i < count; ++i) {
    acc_t& value = loss[rows[i]];
    if (rule.token_weights != nullptr) value *= rule.token_weight(rule.locate(rows[i]));
    sum += static_cast<double>(value);
  }
  return sum;
}

}  // namespace mtp
