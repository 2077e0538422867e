// Cross-entropy of a block of logit rows and its gradient, in place.
//
//   loss, lse, predicted: see core/row_loss.h; predicted = argmax_v l_v (the first of equals)
//   l_v = cap(scale * (x_v + bias_v)),  cap(t) = softcap * tanh(t / softcap) if softcap > 0, else t
//   x_v <- d(w loss + u lse)/d x_v      if gradient == Gradient::kWrite; else the row is scratch and left undefined
//
// Shapes    V columns of the whole vocabulary or of a shard; logits [R, V] (row stride >= V); rows [R] flat (head, b,
// s) indices; loss, lse, predicted are tables over
//           ALL flat rows, written at rows[r]; head_scale [n]; row_scale, lse_grad over all flat rows;
//           class_weights, bias [V].
// Cost      in float32 three passes over a row that stays in the L2 cache (128 KiB at V = 32k): maximum, exponential
//           and sum, scaling; one exponential per element (two with softcap). Compute bound, 1-2 % of the GEMMs.
// Launch    rows [begin, end) on the calling thread; threads own disjoint rows, so results do not depend on their
// count. Numerics  float32 sums over blocks of 1024, then float64; bfloat16 rows are widened to float32 once and
// rounded once.
//           -inf logits contribute 0; NaN propagates into the row's loss and gradient.
// Caller    every rows[r] counts (TargetRule::counts) and its target is a class of the whole vocabulary.
#pragma once
#include <cstdint>

#include "core/dtype.h"
#include "core/row_loss.h"
#include "core/target_rule.h"

namespace mtp {

enum class Gradient { kSkip, kWrite };

// kWhole does a row at once. Where the vocabulary is sharded over processes, kStatistics reads this shard's logits (and
// leaves in them what kGradient needs), the caller combines the statistics of all shards, and kGradient ends the row.
enum class Stage { kWhole, kStatistics, kGradient };

template <typename acc_t>  // float for float32 and bfloat16 logits, double for float64
struct LossRowsParams {
  void* logits;
  DType dtype;
  int64_t row_stride, vocab_size;
  const int64_t* rows;
  TargetRule targets;
  const acc_t* head_scale;
  const acc_t* row_scale;       // or null: 1
  const acc_t* lse_grad;        // or null: 0
  const float* class_weights;   // or null: 1
  const acc_t* bias;            // or null: 0
  double logit_scale, softcap;  // softcap 0: none
  RowOptions options;
  Gradient gradient;
  Stage stage;
  int64_t vocab_start;  // class of the first column
  double* statistics;   // [R, kRowStatistics]: written by kStatistics, read (combined) by kGradient
  double* local_max;    // [R]: the shard's own maximum, kept from kStatistics to kGradient
  acc_t* loss;
  acc_t* lse;
  int32_t* predicted;

  double class_weight(int64_t v) const { return class_weights == nullptr ? 1.0 : class_weights[v]; }

  bool holds(int64_t target) const { return target >= vocab_start && target < vocab_start + vocab_size; }

  double row_weight(int64_t row, TargetRule::Location at) const {
    const double w = static_cast<double>(head_scale[at.head]) * targets.token_weight(at);
    return row_scale == nullptr ? w : w * row_scale[row];
  }
};

using LossRowsFloat = void (*)(const LossRowsParams<float>& params, int64_t begin, int64_t end);

// The float32 and bfloat16 kernel for one instruction set.
void loss_rows_plain(const LossRowsParams<float>& params, int64_t begin, int64_t end);
#if defined(__x86_64__)
void loss_rows_avx2(const LossRowsParams<float>& params, int64_t begin, int64_t end);
void loss_rows_avx512(const LossRowsParams<float>& params, int64_t begin, int64_t end);
#endif

// The float64 kernel: the same contract, written for exactness and not for speed.
void loss_rows_double(const LossRowsParams<double>& params, int64_t begin, int64_t end);

}  // namespace mtp
