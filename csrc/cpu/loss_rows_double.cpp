// The float64 row kernel: the definition, term by term. See cpu/loss_rows.h.
#include <cmath>

#include "cpu/loss_rows.h"

namespace mtp {
namespace {

double cap(double t, double softcap) { return softcap > 0.0 ? softcap * std::tanh(t / softcap) : t; }

void process_row(double* x, const LossRowsParams<double>& p, int64_t row) {
  const TargetRule::Location at = p.targets.locate(row);
  const int64_t target = p.targets.target(at);
  RowStatistics stats{-INFINITY, 0.0, 0.0, 0.0};
  int64_t predicted = 0;
  for (int64_t v = 0; v < p.vocab_size; ++v) {
    x[v] = cap(p.logit_scale * (x[v] + (p.bias == nullptr ? 0.0 : p.bias[v])), p.softcap);
    if (x[v] > stats.max) {
      stats.max = x[v];
      predicted = v;
    }
    if (p.options.label_smoothing > 0.0) stats.weighted_sum += p.class_weight(v) * x[v];
  }
  stats.target_logit = x[target];
  for (int64_t v = 0; v < p.vocab_size; ++v)
    if (v != target) stats.sum_others += std::exp(x[v] - stats.max);

  const RowLoss result = finish_row(stats, p.options, p.class_weight(target), p.row_weight(row, at),
                                    p.lse_grad == nullptr ? 0.0 : p.lse_grad[row]);
  p.loss[row] = result.loss;
  p.lse[row] = result.lse;
  p.predicted[row] = static_cast<int32_t>(predicted);
  if (p.gradient == Gradient::kSkip) return;
  for (int64_t v = 0; v < p.vocab_size; ++v) {
    double grad = v == target ? result.target_grad
                              : result.prob_scale * std::exp(x[v] - stats.max) - result.uniform * p.class_weight(v);
    if (p.softcap > 0.0) grad *= 1.0 - (x[v] / p.softcap) * (x[v] / p.softcap);
    x[v] = grad * p.logit_scale;
  }
}

}  // namespace

void loss_rows_double(const LossRowsParams<double>& p, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; ++r) process_row(static_cast<double*>(p.logits) + r * p.row_stride, p, p.rows[r]);
}

}  // namespace mtp
