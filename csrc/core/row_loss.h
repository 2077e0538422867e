// The scalar mathematics of one row of the loss, shared by all kernels. With logits l (after scale, bias, softcap),
// p = softmax(l), target y, row weight w, class weights c (default 1), label smoothing e over V classes, z-loss z, and
// incoming gradient u of lse:
//
//   loss                    = (1 - e) c_y (lse - l_y) + (e / V) sum_v c_v (lse - l_v) + z lse^2     (torch's smoothing)
//   d(w loss + u lse)/d l_v = A p_v - (w e / V) c_v - [v = y] w (1 - e) c_y
//   A                       = w ((1 - e) c_y + (e / V) sum_v c_v + 2 z lse) + u
//
// Terms at the target use the sum over the OTHER classes, so that the loss and p_y - 1 keep their relative accuracy as
// p_y -> 1, where subtracting 1 from a rounded p_y leaves none.
#pragma once
#include <cmath>
#include <cstdint>

#include "core/macros.h"

namespace mtp {

// Result of one pass over a row, or over one shard of it. The two target fields are 0 if another shard holds the
// target, so shards combine by addition once `sum_others` is rescaled to the common maximum.
template <typename real_t>
struct BasicRowStatistics {
  real_t max;                  // largest logit
  real_t sum_others;           // sum over v != y of exp(l_v - max)
  real_t target_logit;         // l_y
  real_t target_class_weight;  // c_y
  real_t weighted_sum;         // sum_v c_v l_v, used only with smoothing
  real_t argmax;               // first index of max in the whole vocabulary
};
using RowStatistics = BasicRowStatistics<double>;
constexpr int kRowStatistics = 6;

// Options of the loss, and the class totals that they need.
struct RowOptions {
  double label_smoothing = 0.0;
  double z_loss = 0.0;
  double softcap = 0.0;  // l = softcap tanh(t / softcap); 0: l = t
  double logit_scale = 1.0;
  double class_weight_sum = 0.0;  // sum_v c_v; V without class weights
  int64_t vocab_size = 0;         // classes of all shards

  // Unpacks `RowOptions.pack()` of mtp_ext/ops/loss/options.py; the class totals stay 0.
  static constexpr int64_t kPacked = 4;
  static RowOptions of(const double* packed) {
    RowOptions options;
    options.label_smoothing = packed[0];
    options.z_loss = packed[1];
    options.softcap = packed[2];
    options.logit_scale = packed[3];
    return options;
  }
};

template <typename real_t>
struct BasicRowLoss {
  real_t loss;         // without the row weight
  real_t lse;          // log sum_v exp(l_v)
  real_t prob_scale;   // A / sum: d l_v = prob_scale * exp(l_v - max) - uniform * c_v for v != y
  real_t uniform;      // w e / V
  real_t target_grad;  // d l_y, complete
};
using RowLoss = BasicRowLoss<double>;

// The CPU uses float64. A GPU uses float32, because the registers of a float64 logarithm would cost a third of the
// threads; the terms are arranged so that each keeps its relative accuracy.
template <typename real_t>
MTP_HD BasicRowLoss<real_t> finish_row(const BasicRowStatistics<real_t>& row, const RowOptions& opt, real_t weight,
                                       real_t lse_grad) {
  const auto smoothing = static_cast<real_t>(opt.label_smoothing), z_loss = static_cast<real_t>(opt.z_loss);
  const real_t shifted = row.target_logit - row.max;  // <= 0
  const real_t target_exp = std::exp(shifted);
  const real_t sum = row.sum_others + target_exp;
  // sum >= 1 unless the target is the largest logit; then sum - 1 would round away what log1p keeps.
  const real_t log_sum = std::log1p(shifted == 0 ? row.sum_others : sum - 1);
  const real_t nll = log_sum - shifted;
  const real_t lse = row.max + log_sum;
  const real_t hard = (1 - smoothing) * row.target_class_weight;
  real_t loss = hard * nll + z_loss * lse * lse;
  real_t uniform = 0, class_weight_sum = 0;
  if (smoothing > 0) {
    const real_t share = smoothing / static_cast<real_t>(opt.vocab_size);
    class_weight_sum = static_cast<real_t>(opt.class_weight_sum);
    loss += share * (class_weight_sum * lse - row.weighted_sum);
    uniform = weight * share;
  }
  const real_t of_lse = 2 * weight * z_loss * lse + lse_grad;
  const real_t p = target_exp / sum, p_minus_one = -row.sum_others / sum;
  return {loss, lse, (weight * hard + of_lse + uniform * class_weight_sum) / sum, uniform,
          weight * hard * p_minus_one + of_lse * p + uniform * (class_weight_sum * p - row.target_class_weight)};
}

}  // namespace mtp
