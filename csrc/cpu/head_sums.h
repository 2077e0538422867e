// Sums over the rows of one head: the divisor of its loss, and the loss.
//
// Shapes    rows [count]: flat rows of one head with a target (cpu/select_rows.h); class_weights [V] or null;
//           loss: a table over all flat rows.
// Cost      one read of the rows and of what they index.
// Numerics  float64 sums: in float32 the weights of a large batch would lose digits.
#pragma once
#include <cmath>
#include <cstdint>

#include "core/target_rule.h"

namespace mtp {

// Divisor of a head's mean: the sum of token_weight * class_weight over the rows' targets (`count` without weights).
// Infinite if no target carries weight, so that the mean is 0; NaN if weights of both signs cancel.
template <typename acc_t>
double mean_divisor(const BasicTargetRule<acc_t>& rule, const int64_t* rows, int64_t count,
                    const acc_t* class_weights) {
  const bool weighted = rule.token_weights != nullptr || class_weights != nullptr;
  double sum = weighted ? 0.0 : static_cast<double>(count);
  bool carries_weight = false;
  for (int64_t i = 0; weighted && i < count; ++i) {
    const RowLocation at = rule.locate(rows[i]);
    const double class_weight = class_weights == nullptr ? 1.0 : class_weights[rule.target(at)];
    const double weight = class_weight * rule.token_weight(at);
    carries_weight |= weight != 0.0;
    sum += weight;
  }
  if (sum != 0.0) return sum;
  return carries_weight ? NAN : INFINITY;
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
