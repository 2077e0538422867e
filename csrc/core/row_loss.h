// The scalar mathematics of one row of the loss, shared by every kernel. With logits l (after scale, bias, softcap),
// p = softmax(l), target y, row weight w, class weights c (1 where there are none), smoothing e over V classes:
//
//   loss = (1 - e) c_y (lse - l_y) + (e / V) sum_v c_v (lse - l_v) + z lse^2            (torch's smoothing; z-loss)
//   d(w loss)/d l_v = A p_v - (w e / V) c_v - [v = y] w (1 - e) c_y                     A = w ((1-e) c_y + (e/V) sum c
//                                                                                           + 2 z lse) + u
// u is an incoming gradient of lse itself. Everything at the target is formed from the sum over the OTHER classes, so
// both the loss and p_y - 1 keep their relative accuracy as p_y -> 1, where `p_y - 1` of a rounded p_y has none.
#pragma once
#include <cmath>

#include "core/macros.h"

namespace mtp {

// What one pass over a row, or over one shard of it, finds. Where the target lies in another shard, its two fields are
// 0, so that shards combine by sums once `sum_others` is brought to the common maximum.
struct RowStatistics {
  double max;                  // largest logit
  double sum_others;           // sum over v != y of exp(l_v - max)
  double target_logit;         // l_y
  double target_class_weight;  // c_y
  double weighted_sum;         // sum_v c_v l_v, read only with smoothing
  double argmax;               // first index of max, counted over the whole vocabulary
};
constexpr int kRowStatistics = 6;

struct RowOptions {
  double label_smoothing = 0.0;
  double z_loss = 0.0;
  double class_weight_sum = 0.0;  // sum_v c_v; V without class weights
  int64_t vocab_size = 0;         // classes in all, over every shard
};

struct RowLoss {
  double loss;         // without the row weight
  double lse;          // log sum_v exp(l_v)
  double prob_scale;   // A / sum: d l_v = prob_scale * exp(l_v - max) - uniform * c_v for v != y
  double uniform;      // w e / V
  double target_grad;  // d l_y, complete
};

MTP_HD RowLoss finish_row(const RowStatistics& row, const RowOptions& opt, double weight, double lse_grad) {
  const double shifted = row.target_logit - row.max;  // <= 0
  const double target_exp = exp(shifted);
  const double sum = row.sum_others + target_exp;
  // shifted == 0: the target is the largest logit, and log1p keeps what log(1 + tiny) would round away.
  const double log_sum = shifted == 0.0 ? log1p(row.sum_others) : log(sum);
  const double nll = log_sum - shifted;
  const double lse = row.max + log_sum;
  const double hard = (1.0 - opt.label_smoothing) * row.target_class_weight;
  double loss = hard * nll + opt.z_loss * lse * lse;
  double rest = 2.0 * opt.z_loss * lse;  // coefficient of p beside the hard target's
  double uniform = 0.0;
  if (opt.label_smoothing > 0.0) {
    const double share = opt.label_smoothing / static_cast<double>(opt.vocab_size);
    loss += share * (opt.class_weight_sum * lse - row.weighted_sum);
    rest += share * opt.class_weight_sum;
    uniform = weight * share;
  }
  const double soft = weight * rest + lse_grad;
  const double p_minus_one = -row.sum_others / sum;
  return {loss, lse, (weight * hard + soft) / sum, uniform,
          weight * hard * p_minus_one + soft * (target_exp / sum) - uniform * row.target_class_weight};
}

}  // namespace mtp
