// The op `_fused_loss_`: unpacks the lists, allocates the results, runs FusedLoss.
#include "ops/fused_loss_cpu.h"

#include <torch/csrc/stable/library.h>

#include <tuple>
#include <utility>
#include <vector>

namespace mtp {
namespace {

// n tensors [rows, width], from n of any shape with as many elements or from one that holds all heads.
std::vector<Tensor> rows_of_heads(const std::vector<Tensor>& given, int64_t heads, int64_t rows, int64_t width) {
  std::vector<Tensor> found;
  if (static_cast<int64_t>(given.size()) != 1 || heads == 1) {
    for (const Tensor& x : given) found.push_back(as_matrix(x, rows, width));
    return found;
  }
  const Tensor all = as_matrix(given[0], heads * rows, width);
  for (int64_t k = 0; k < heads; ++k) found.push_back(slice(all, 0, k * rows, rows));
  return found;
}

// Order of the schema's lists: that of `LossCall.pack()` in mtp_ext/ops/loss/arguments.py. The lists are few and short because each costs as much as a small GEMM.
// `tensors` may end early.
enum FusedLossTensor {
  kLabels,
  kDocumentIds,
  kTokenWeights,
  kClassWeights,
  kBias,
  kHeadWeights,
  kDivisor,  // 0-d: of every head's sum
  kRowScale,
  kLseGrad,
};
enum FusedLossSize {
  kSeqLen,
  kHeads,
  kFirstShift,
  kIgnoreIndex,
  kChunkRows,
  kWorkspaceBytes,
  kWithMetrics,
  kDetachWeight,  // appended: 1-based heads, to the end of the list
};
// The bits of `flags` (FLAG_* in mtp_ext/ops/loss/native_cpu.py).
enum FusedLossFlag : int64_t {
  kNeedMeasures = 1,  // tables, and sums per head
  kNeedHidden = 2,
  kNeedWeight = 4,
  kNeedBias = 8,
  kAccumulate = 16,  // add to the given weight gradient instead of overwriting it
  kWiden = 32,       // float32 logits for 16-bit operands
  kOneChunk = 64,    // one chunk for all rows, whose weight gradient has the dtype of the logits instead of float32
};

template <typename acc_t>
std::vector<Tensor> new_tables(int64_t heads, int64_t batch, int64_t seq_len) {
  std::vector<Tensor> tables;
  RowTables<acc_t>{}.for_each([&](auto*&, auto nothing) {
    tables.push_back(empty_cpu({heads, batch, seq_len}, kScalarType<decltype(nothing)>));
  });
  return tables;
}

// Prepends the sums to `results`; returns as FusedLoss::run().
template <typename acc_t>
int64_t run(const FusedLossArguments& arguments, bool measures, std::vector<Tensor>* results) {
  FusedLoss<acc_t> fused(arguments);
  const int64_t invalid = fused.run();
  if (invalid >= 0) return invalid;
  const std::vector<Tensor> sums = fused.sums(measures);
  results->insert(results->begin(), sums.begin(), sums.end());
  return -1;
}

// results: loss 0-d; with kNeedMeasures head_loss, n_valid, divisors [n] and the row tables [n, B, S];
// then the needed gradients of weight, bias and hidden (shaped as given). sums: none, or the memory of the needed
// gradients of weight (overwritten without kAccumulate) and bias (added to). first_invalid: -1, or the flat
// index into labels of a target outside the vocabulary; nothing was computed then.
std::tuple<std::vector<Tensor>, int64_t> fused_loss_cpu(const std::vector<Tensor>& hidden, const Tensor& weight,
                                                        const std::vector<OptionalTensor>& tensors,
                                                        const std::vector<double>& options,
                                                        const std::vector<int64_t>& sizes, ScalarType compute_dtype,
                                                        int64_t flags, const std::vector<Tensor>& sums) {
  STD_TORCH_CHECK(!tensors.empty() && tensors[kLabels].has_value() && sizes.size() >= kDetachWeight &&
                      static_cast<int64_t>(options.size()) == RowOptions::kPacked + 1,
                  "expected the lists of LossCall.pack()");
  const size_t needed = ((flags & kNeedWeight) != 0 ? 1 : 0) + ((flags & kNeedBias) != 0 ? 1 : 0);
  STD_TORCH_CHECK(sums.empty() || sums.size() == needed, "sums must hold ", needed, " tensors, got ", sums.size());
  const auto given = [&](size_t i) { return i < tensors.size() ? tensors[i] : OptionalTensor(); };
  const bool is_double = compute_dtype == ScalarType::Double, measures = (flags & kNeedMeasures) != 0;
  const ScalarType acc = is_double ? ScalarType::Double : ScalarType::Float;
  FusedLossArguments a;
  a.weight = weight;
  a.labels = *tensors[kLabels];
  a.seq_len = sizes[kSeqLen];
  if (a.seq_len < 0) {  // one head with a target per row, labels of any shape
    a.seq_len = a.labels.numel();
    a.labels = as_matrix(torch::stable::contiguous(a.labels), 1, a.seq_len);
  }
  const int64_t heads = sizes[kHeads], rows = a.labels.size(0) * a.seq_len, width = weight.size(-1);
  int64_t elements = 0;
  for (const Tensor& h : hidden) elements += h.numel();
  STD_TORCH_CHECK(elements == heads * rows * width, "hidden must hold ", heads * rows, " rows of ", width,
                  " elements, got ", elements, " elements");
  a.hidden = rows_of_heads(hidden, heads, rows, width);
  a.document_ids = given(kDocumentIds);
  a.token_weights = given(kTokenWeights);
  a.class_weights = given(kClassWeights);
  a.bias = given(kBias);
  a.head_weights = given(kHeadWeights);
  a.row_scale = given(kRowScale);
  a.lse_grad = given(kLseGrad);
  a.options = RowOptions::of(options.data());
  if (options.back() != 0.0) a.normalizer = options.back();
  if (const OptionalTensor divisor = given(kDivisor)) {
    check_vector(*divisor, 1, ScalarType::Double, "normalizer");
    a.normalizer = *divisor->const_data_ptr<double>();
  }
  a.first_shift = sizes[kFirstShift];
  a.ignore_index = sizes[kIgnoreIndex];
  a.limits = {sizes[kChunkRows], sizes[kWorkspaceBytes]};
  a.detach_weight = {sizes.begin() + kDetachWeight, sizes.end()};
  a.compute_dtype = compute_dtype;
  a.logits_dtype = (flags & kWiden) != 0 ? ScalarType::Float : compute_dtype;
  a.accumulate = (flags & kAccumulate) != 0;
  a.one_chunk = (flags & kOneChunk) != 0;
  if (measures) {
    a.tables = is_double ? new_tables<double>(heads, a.labels.size(0), a.seq_len)
                         : new_tables<float>(heads, a.labels.size(0), a.seq_len);
  }
  std::vector<Tensor> results = a.tables;
  if ((flags & kNeedWeight) != 0) {
    a.grad_weight = sums.empty() ? empty_like_cpu(weight, a.one_chunk ? a.logits_dtype : acc) : sums.front();
    results.push_back(*a.grad_weight);
  }
  if ((flags & kNeedBias) != 0) {
    a.grad_bias = sums.empty() ? empty_cpu({weight.size(-2)}, acc) : sums.back();
    if (sums.empty()) zero(*a.grad_bias);
    results.push_back(*a.grad_bias);
  }
  if ((flags & kNeedHidden) != 0) {
    const size_t first = results.size();
    for (const Tensor& h : hidden) {
      // float32 until backward applies the loss scale that keeps float16 gradients from underflowing.
      const bool is_half = h.scalar_type() == ScalarType::Half;
      results.push_back(empty_like_cpu(h, is_half ? ScalarType::Float : h.scalar_type()));
    }
    a.grad_hidden = rows_of_heads({results.begin() + static_cast<int64_t>(first), results.end()}, heads, rows, width);
  }
  const int64_t invalid = is_double ? run<double>(a, measures, &results) : run<float>(a, measures, &results);
  return {std::move(results), invalid};
}

}  // namespace
}  // namespace mtp

STABLE_TORCH_LIBRARY_IMPL(mtp_ext, CPU, m) { m.impl("_fused_loss_", TORCH_BOX(&mtp::fused_loss_cpu)); }
