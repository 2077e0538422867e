// The parameters of the row kernels of the loss: one contract for the CPU (cpu/loss_rows.h) and CUDA
// (kernels/loss_rows.h).
#pragma once
#include <cstdint>

#include "core/dtype.h"
#include "core/macros.h"
#include "core/row_loss.h"
#include "core/target_rule.h"

namespace mtp {

enum class Gradient { kSkip, kWrite };

// kWhole does a row at once. Where the vocabulary is sharded over processes, kStatistics reads this shard's logits (and
// leaves in them what kGradient needs), the caller combines the statistics of all shards, and kGradient ends the row.
enum class Stage { kWhole, kStatistics, kGradient };

template <typename acc_t>  // double for float64 logits, else float
struct LossRowsParams {
  void* logits;
  DType dtype;
  int64_t row_stride, vocab_size;
  const int64_t* rows;  // -1: no row; its gradient is zeros, and nothing else of it is read or written
  TargetRule targets;
  const acc_t* head_scale;
  const acc_t* row_scale;       // or null: 1
  const acc_t* lse_grad;        // or null: 0
  const float* class_weights;   // or null: 1
  const acc_t* bias;            // or null: 0
  double logit_scale, softcap;  // softcap 0: none
  RowOptions options;
  const float* class_weight_total;  // a device's sum_v c_v, which no host has waited for; or null: options'
  Gradient gradient;
  Stage stage;
  int64_t vocab_start;  // class of the first column
  double* statistics;   // [R, kRowStatistics]: written by kStatistics, read (combined) by kGradient
  double* local_max;    // [R]: the shard's own maximum, kept from kStatistics to kGradient
  acc_t* loss;
  acc_t* lse;          // on the CPU null where nobody reads it
  int32_t* predicted;  // likewise

  MTP_HD double class_weight(int64_t v) const { return class_weights == nullptr ? 1.0 : class_weights[v]; }

  MTP_HD bool writes_gradient() const { return gradient == Gradient::kWrite && stage != Stage::kStatistics; }

  MTP_HD bool holds(int64_t target) const { return target >= vocab_start && target < vocab_start + vocab_size; }

  MTP_HD double row_weight(int64_t row, TargetRule::Location at) const {
    const double w = static_cast<double>(head_scale[at.head]) * targets.token_weight(at);
    return row_scale == nullptr ? w : w * row_scale[row];
  }
};

}  // namespace mtp
