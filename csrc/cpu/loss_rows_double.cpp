// The float64 row kernel: the definition, term by term. See cpu/loss_rows.h.
#include <cmath>
#include <cstring>

#include "cpu/loss_rows.h"

namespace mtp {
namespace {

double cap(double t, double softcap) { return softcap > 0.0 ? softcap * std::tanh(t / softcap) : t; }

RowStatistics row_statistics(double* x, const LossRowsParams<double>& p, int64_t target) {
  RowStatistics stats{-INFINITY, 0.0, 0.0, 0.0, 0.0, static_cast<double>(p.vocab_start)};
  for (int64_t v = 0; v < p.vocab_size; ++v) {
    x[v] = cap(p.options.logit_scale * (x[v] + (p.bias == nullptr ? 0.0 : p.bias[v])), p.options.softcap);
    if (x[v] > stats.max) {
      stats.max = x[v];
      stats.argmax = static_cast<double>(p.vocab_start + v);
    }
    if (p.options.label_smoothing > 0.0) stats.weighted_sum += p.class_weight(v) * x[v];
  }
  // A shard of a finite row may be all -inf; (-inf) - (-inf) would make its sum NaN.
  const double shift = stats.max == -INFINITY && p.stage == Stage::kStatistics ? 0.0 : stats.max;
  for (int64_t v = 0; v < p.vocab_size; ++v)
    if (v + p.vocab_start != target) stats.sum_others += std::exp(x[v] - shift);
  if (p.holds(target)) {
    stats.target_logit = x[target - p.vocab_start];
    stats.target_class_weight = p.class_weight(target - p.vocab_start);
  }
  return stats;
}

void finish(double* x, const LossRowsParams<double>& p, int64_t row, int64_t target, const RowStatistics& stats) {
  const double lse_grad = p.lse_grad == nullptr ? 0.0 : p.lse_grad[row];
  const RowLoss result = finish_row(stats, p.options, p.row_weight(row, p.targets.locate(row)), lse_grad);
  p.tables.write(row, result, static_cast<int64_t>(stats.argmax));
  if (p.gradient == Gradient::kSkip) return;
  for (int64_t v = 0; v < p.vocab_size; ++v) {
    double grad = v + p.vocab_start == target
                      ? result.target_grad
                      : result.prob_scale * std::exp(x[v] - stats.max) - result.uniform * p.class_weight(v);
    if (p.options.softcap > 0.0) grad *= 1.0 - (x[v] / p.options.softcap) * (x[v] / p.options.softcap);
    x[v] = grad * p.options.logit_scale;
  }
}

void process_row(double* x, const LossRowsParams<double>& p, int64_t r) {
  const int64_t row = p.rows[r];
  if (row < 0) {
    if (p.writes_gradient()) std::memset(x, 0, static_cast<size_t>(p.vocab_size) * sizeof(double));
    return;
  }
  const int64_t target = p.targets.target(p.targets.locate(row));
  RowStatistics stats;
  if (p.stage == Stage::kGradient) {
    std::memcpy(&stats, p.statistics + r * kRowStatistics, sizeof(stats));
  } else {
    stats = row_statistics(x, p, target);
  }
  if (p.stage != Stage::kStatistics) return finish(x, p, row, target, stats);
  std::memcpy(p.statistics + r * kRowStatistics, &stats, sizeof(stats));
}

}  // namespace

void loss_rows_double(const LossRowsParams<double>& p, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; ++r) process_row(static_cast<double*>(p.logits) + r * p.row_stride, p, r);
}

}  // namespace mtp
