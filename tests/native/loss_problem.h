// A test problem for the loss row kernels, with the reference result by definition in long double.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <random>
#include <vector>

#include "core/dtype.h"

namespace loss_problem {

// Rounds a float32 to the logits' type.
using Rounding = float (*)(float);
inline float keep(float x) { return x; }
inline float to_bfloat16(float x) { return mtp::to_float(mtp::to_bfloat16(x)); }

struct Options {
  double smoothing = 0, z_loss = 0, softcap = 0, scale = 1;
  bool bias = false, class_weights = false, token_weights = false, row_scale = false, lse_grad = false;
};

struct Expected {
  double loss, lse;
  int predicted;
  std::vector<double> grad;
};

// `heads` heads over one batch row, so that row s of head k predicts labels[s + 1 + k].
struct Problem {
  int64_t vocab, seq, heads;
  Options opt;
  std::vector<double> logits;  // [heads * seq, vocab], rounded to the kernel's dtype
  std::vector<int64_t> labels, rows;
  std::vector<double> head_scale, row_scale, lse_grad, bias, class_weights, token_weights;

  Problem(int64_t vocab, int64_t seq, int64_t heads, Options opt, Rounding round, unsigned seed)
      : vocab(vocab), seq(seq), heads(heads), opt(opt) {
    std::mt19937 rng(seed);
    std::normal_distribution<float> normal(0.0f, 4.0f);
    std::uniform_real_distribution<float> uniform(0.5f, 1.5f);
    const auto fill = [&](auto& values, int64_t size, auto draw) {
      values.resize(static_cast<size_t>(size));
      for (auto& value : values) value = draw();
    };
    fill(logits, heads * seq * vocab, [&] { return static_cast<double>(round(normal(rng))); });
    fill(labels, seq + heads, [&] { return static_cast<int64_t>(rng() % static_cast<uint64_t>(vocab)); });
    fill(head_scale, heads, [&] { return static_cast<double>(uniform(rng)); });
    fill(row_scale, heads * seq, [&] { return static_cast<double>(uniform(rng)); });
    fill(lse_grad, heads * seq, [&] { return static_cast<double>(uniform(rng)); });
    fill(bias, vocab, [&] { return static_cast<double>(uniform(rng)); });
    fill(class_weights, vocab, [&] { return static_cast<double>(uniform(rng)); });
    fill(token_weights, seq + heads, [&] { return static_cast<double>(uniform(rng)); });
    rows.resize(static_cast<size_t>(heads * seq));
    for (size_t r = 0; r < rows.size(); ++r) rows[r] = static_cast<int64_t>(r);
    std::reverse(rows.begin(), rows.end());  // results must follow the row table, not the position
  }

  double class_weight(int64_t v) const { return opt.class_weights ? class_weights[static_cast<size_t>(v)] : 1.0; }

  // The loss of flat row `row` with logits `x`, and d(w loss + u lse)/dx, term by term.
  Expected expect(const double* x, int64_t row) const {
    const int64_t head = row / seq, target = labels[static_cast<size_t>(row % seq + 1 + head)];
    const auto n = static_cast<size_t>(vocab);
    std::vector<long double> l(n), slope(n);
    for (size_t v = 0; v < n; ++v) {
      const long double t = static_cast<long double>(opt.scale) * (x[v] + (opt.bias ? bias[v] : 0.0));
      l[v] = opt.softcap > 0 ? opt.softcap * std::tanh(t / opt.softcap) : t;
      slope[v] = opt.scale * (opt.softcap > 0 ? 1 - (l[v] / opt.softcap) * (l[v] / opt.softcap) : 1.0L);
    }
    const auto best = std::max_element(l.begin(), l.end());
    long double sum = 0, weight_sum = 0, smooth = 0;
    for (size_t v = 0; v < n; ++v) sum += std::exp(l[v] - *best);
    const long double lse = *best + std::log(sum);
    for (size_t v = 0; v < n; ++v) {
      weight_sum += class_weight(static_cast<int64_t>(v));
      if (opt.smoothing > 0) smooth += class_weight(static_cast<int64_t>(v)) * (lse - l[v]);
    }
    const long double share = opt.smoothing / static_cast<long double>(vocab);
    const long double hard = (1 - opt.smoothing) * class_weight(target);
    Expected e{
        static_cast<double>(hard * (lse - l[static_cast<size_t>(target)]) + share * smooth + opt.z_loss * lse * lse),
        static_cast<double>(lse), static_cast<int>(best - l.begin()), std::vector<double>(n)};
    long double w = head_scale[static_cast<size_t>(head)];
    if (opt.token_weights) w *= token_weights[static_cast<size_t>(row % seq + 1 + head)];
    if (opt.row_scale) w *= row_scale[static_cast<size_t>(row)];
    const long double u = opt.lse_grad ? lse_grad[static_cast<size_t>(row)] : 0.0;
    const long double a = w * (hard + share * weight_sum + 2 * opt.z_loss * lse) + u;
    for (size_t v = 0; v < n; ++v) {
      const bool is_target = static_cast<int64_t>(v) == target;
      const long double p = std::exp(l[v] - lse);
      e.grad[v] = static_cast<double>(
          (a * p - w * share * class_weight(static_cast<int64_t>(v)) - (is_target ? w * hard : 0.0L)) * slope[v]);
    }
    return e;
  }
};

inline std::vector<Options> option_sets() {
  Options smoothing, everything, capped, affine, weighted, scaled, reversed, constant;
  smoothing.smoothing = 0.1, smoothing.z_loss = 1e-3;
  capped.softcap = 5.0;
  affine.scale = 0.5, affine.bias = true;
  weighted.class_weights = weighted.token_weights = weighted.row_scale = weighted.lse_grad = true;
  everything = weighted;
  everything.smoothing = 0.2, everything.z_loss = 1e-2, everything.softcap = 8.0, everything.scale = 1.5;
  everything.bias = true;
  scaled.scale = 2.5, scaled.z_loss = 1e-3;
  reversed.scale = -0.5;
  constant.scale = 0;
  return {Options{}, smoothing, capped, affine, weighted, scaled, reversed, constant, everything};
}

}  // namespace loss_problem
