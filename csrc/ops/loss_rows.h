// The op `_loss_rows_` of both devices: checks the arguments and turns them into the parameters of a row kernel.
#pragma once
#include <optional>
#include <string>
#include <vector>

#include "core/loss_rows_params.h"
#include "ops/check.h"

namespace mtp {

inline RowOptions row_options(const std::vector<double>& packed) {
  STD_TORCH_CHECK(static_cast<int64_t>(packed.size()) == RowOptions::kPacked, "row_options must hold ",
                  RowOptions::kPacked, " numbers, got ", packed.size());
  return RowOptions::of(packed.data());
}

// Tables in the order of `RowTables` of mtp_ext/ops/common/result.py.
template <typename acc_t>
RowTables<acc_t> row_tables(const std::vector<Tensor>& tables, int64_t num_rows) {
  RowTables<acc_t> found{};
  size_t i = 0;
  found.for_each([&](auto*& table, auto nothing) {
    STD_TORCH_CHECK(i < tables.size(), "tables must be those of RowTables, got ", tables.size());
    check_vector(tables[i], num_rows, kScalarType<decltype(nothing)>, "tables");
    table = tables[i++].mutable_data_ptr<decltype(nothing)>();
  });
  return found;
}

template <typename acc_t>
const acc_t* optional_vector(const OptionalTensor& x, int64_t size, const char* name) {
  if (!x.has_value()) return nullptr;
  check_vector(*x, size, kScalarType<acc_t>, name);
  return x->const_data_ptr<acc_t>();
}

inline Stage parse_stage(const std::string& stage) {
  if (stage == "whole") return Stage::kWhole;
  if (stage == "statistics") return Stage::kStatistics;
  STD_TORCH_CHECK(stage == "gradient", "stage must be whole, statistics or gradient, got ", stage);
  return Stage::kGradient;
}

// Order of the schema's lists `tensors` and `sizes` (`loss_rows_` of mtp_ext/ops/loss/row_kernels.py).
enum LossRowsTensor {
  kHeadScale,
  kRowScale,
  kLseGrad,
  kTokenWeights,
  kClassWeights,
  kBias,
  kClassWeightTotal,
  kLossRowsTensors
};
enum LossRowsSize { kSeqLen, kFirstShift, kVocabStart, kTotalVocab, kLossRowsSizes };

// `Device::check` checks what the device's kernels require, `Device::run(params, num_rows, logits)` launches one;
// `Device::kFloat64`: whether there is one for float64.
template <typename Device>
void loss_rows(const Tensor& logits, const Tensor& rows, const Tensor& labels,
               const std::vector<OptionalTensor>& tensors, const std::vector<double>& options, double class_weight_sum,
               const std::vector<int64_t>& sizes, bool write_gradient, const std::vector<Tensor>& tables,
               std::string stage, const std::vector<Tensor>& statistics) {
  STD_TORCH_CHECK(
      tensors.size() == kLossRowsTensors && tensors[kHeadScale].has_value() && sizes.size() == kLossRowsSizes,
      "expected ", kLossRowsTensors, " tensors, of them head_scale, and ", kLossRowsSizes, " sizes");
  STD_TORCH_CHECK(logits.dim() == 2, "logits must be [R, V]");
  const int64_t num_rows = logits.size(0), vocab = logits.size(1), heads = tensors[kHeadScale]->numel();
  const int64_t all_rows = heads * labels.size(0) * sizes[kSeqLen];
  STD_TORCH_CHECK(logits.stride(1) == 1 || vocab <= 1, "logits must have unit stride over the vocabulary");
  check_vector(rows, num_rows, ScalarType::Long, "rows");
  Device::check(logits, rows, labels, tensors, tables, statistics);
  const auto run = [&](auto zero) {
    using acc_t = decltype(zero);
    LossRowsParams<acc_t> p{};
    p.logits = logits.mutable_data_ptr();
    p.dtype = dtype_of(logits);
    p.row_stride = logits.stride(0);
    p.vocab_size = vocab;
    p.rows = rows.const_data_ptr<int64_t>();
    p.targets = target_rule<acc_t>(labels, std::nullopt, tensors[kTokenWeights], sizes[kSeqLen], sizes[kFirstShift], 0);
    p.head_scale = optional_vector<acc_t>(tensors[kHeadScale], heads, "head_scale");
    p.row_scale = optional_vector<acc_t>(tensors[kRowScale], all_rows, "row_scale");
    p.lse_grad = optional_vector<acc_t>(tensors[kLseGrad], all_rows, "lse_grad");
    p.class_weights = optional_vector<acc_t>(tensors[kClassWeights], vocab, "class_weights");
    p.bias = optional_vector<acc_t>(tensors[kBias], vocab, "bias");
    p.class_weight_total = optional_vector<double>(tensors[kClassWeightTotal], 1, "class_weight_total");
    p.options = row_options(options);
    p.options.class_weight_sum = class_weight_sum;
    p.options.vocab_size = sizes[kTotalVocab];
    p.gradient = write_gradient ? Gradient::kWrite : Gradient::kSkip;
    p.stage = parse_stage(stage);
    p.vocab_start = sizes[kVocabStart];
    p.tables = row_tables<acc_t>(tables, all_rows);
    if (p.stage != Stage::kWhole) {
      STD_TORCH_CHECK(statistics.size() == 2, "a stage needs statistics [R, ", kRowStatistics,
                      "] and local maxima [R]");
      check_vector(statistics[0], num_rows * kRowStatistics, ScalarType::Double, "statistics");
      check_vector(statistics[1], num_rows, ScalarType::Double, "local maxima");
      p.statistics = statistics[0].mutable_data_ptr<double>();
      p.local_max = statistics[1].mutable_data_ptr<double>();
    }
    Device::run(p, num_rows, logits);
  };
  if constexpr (Device::kFloat64) {
    if (dtype_of(logits) == DType::kFloat64) return run(double{});
  }
  run(float{});
}

}  // namespace mtp
