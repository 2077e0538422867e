// Parameters of the loss row kernels: one contract for the CPU (cpu/loss_rows.h) and CUDA (kernels/loss_rows.h).
#pragma once
#include <cstdint>

#include "core/dtype.h"
#include "core/macros.h"
#include "core/row_loss.h"
#include "core/target_rule.h"

namespace mtp {

enum class Gradient { kSkip, kWrite };

// kWhole processes a row in one call. With the vocabulary sharded over processes, kStatistics reads this shard's logits
// (and leaves in them what kGradient needs), the caller combines the statistics of all shards, and kGradient finishes
// the row.
enum class Stage { kWhole, kStatistics, kGradient };

// Per-row results, one entry for EVERY flat row. On the CPU, lse and predicted may be null if they are not needed.
template <typename acc_t>
struct RowTables {
  acc_t* loss;         // without the row's weight
  acc_t* lse;          // log-sum-exp of the logits
  int32_t* predicted;  // argmax; ties go to the lowest class

  template <typename real_t>
  MTP_HD void write(int64_t row, const BasicRowLoss<real_t>& result, int64_t argmax) const {
    loss[row] = static_cast<acc_t>(result.loss);
    if (lse != nullptr) lse[row] = static_cast<acc_t>(result.lse);
    if (predicted != nullptr) predicted[row] = static_cast<int32_t>(argmax);
  }

  // Calls f(table, value of a row without a target), in the order of `RowTables` in mtp_ext/ops/common/result.py.
  template <typename F>
  void for_each(F&& f) {
    f(loss, acc_t{0});
    f(lse, acc_t{0});
    f(predicted, int32_t{-1});
  }
};

template <typename acc_t>  // double for float64 logits, else float
struct LossRowsParams {
  void* logits;
  DType dtype;
  int64_t row_stride, vocab_size;
  const int64_t* rows;  // flat indices; -1: no target, the gradient row is zeroed and nothing else is read or written
  BasicTargetRule<acc_t> targets;
  const acc_t* head_scale;
  const acc_t* row_scale;      // or null: 1
  const acc_t* lse_grad;       // or null: 0
  const acc_t* class_weights;  // or null: 1
  const acc_t* bias;           // or null: 0
  RowOptions options;
  const double* class_weight_total;  // sum_v c_v on the device, read without a GPU sync; or null: that of options
  Gradient gradient;
  Stage stage;
  int64_t vocab_start;  // class of the first column
  double* statistics;   // [R, kRowStatistics]: written by kStatistics, read (combined) by kGradient
  double* local_max;    // [R]: the shard's own maximum, kept from kStatistics to kGradient
  RowTables<acc_t> tables;

  MTP_HD double class_weight(int64_t v) const { return class_weights == nullptr ? 1.0 : class_weights[v]; }

  MTP_HD bool writes_gradient() const { return gradient == Gradient::kWrite && stage != Stage::kStatistics; }

  MTP_HD bool holds(int64_t target) const { return target >= vocab_start && target < vocab_start + vocab_size; }

  MTP_HD double row_weight(int64_t row, RowLocation at) const {
    const double w = static_cast<double>(head_scale[at.head]) * targets.token_weight(at);
    return row_scale == nullptr ? w : w * row_scale[row];
  }
};

}  // namespace mtp
