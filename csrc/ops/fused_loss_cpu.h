// The loss of all heads on the CPU in one call: row selection, chunks, GEMMs and sums. Native because the same steps
// from Python (ops/loss/loop/row_loop.py) cost 0.4 ms per call, more than the GEMMs of a small vocabulary.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "core/chunk_size.h"
#include "core/row_loss.h"
#include "cpu/capability.h"
#include "cpu/column_sum.h"
#include "cpu/head_sums.h"
#include "cpu/workspace.h"
#include "ops/check.h"
#include "ops/chunk_gemms_cpu.h"
#include "ops/head_rows_cpu.h"
#include "ops/loss_rows.h"

namespace mtp {

struct FusedLossArguments {
  std::vector<Tensor> hidden;  // n of [B * S, D]
  Tensor weight;               // [V, D] or [n, V, D]
  Tensor labels;               // [B, label_len]
  OptionalTensor document_ids, token_weights, class_weights, bias, head_weights;
  OptionalTensor row_scale, lse_grad;  // [n * B * S]
  RowOptions options;
  std::optional<double> normalizer;  // divisor of every head's sum; none: its sum of weights
  int64_t seq_len = 0, first_shift = 0, ignore_index = 0;
  std::vector<int64_t> detach_weight;  // 1-based heads
  ScalarType compute_dtype = ScalarType::Float, logits_dtype = ScalarType::Float;
  ChunkLimits limits;
  std::vector<Tensor> tables;       // of RowTables, [n * B * S] each, or empty
  std::vector<Tensor> grad_hidden;  // n of [B * S, D], or empty
  OptionalTensor grad_weight, grad_bias;
  bool accumulate = false;  // add to grad_weight instead of overwriting it
  bool one_chunk = false;   // for all rows of an unembedding, beyond the usual limit
};

// The part of a GEMM that one thread computes alone: the fewest rows (of hidden states) and columns (of the weight
// gradient) for which this beats a GEMM shared by the threads, and the most bytes of logits.
inline constexpr int64_t kPartRows = 128, kPartColumns = 512, kPartBytes = 512 << 10;

template <typename acc_t>
class FusedLoss {
 public:
  explicit FusedLoss(const FusedLossArguments& arguments)
      : a_(arguments),
        rule_(target_rule<acc_t>(a_.labels, a_.document_ids, a_.token_weights, a_.seq_len, a_.first_shift,
                                 a_.ignore_index)),
        vocab_(a_.weight.size(-2)),
        replicated_(a_.weight.dim() == 3),
        rows_(rule_, static_cast<int64_t>(a_.hidden.size()), vocab_),
        pads_(a_.logits_dtype == ScalarType::BFloat16 && a_.limits.rows == 0 && a_.limits.bytes == 0),
        chunks_(rows_, a_.hidden, a_.grad_hidden, a_.compute_dtype, a_.logits_dtype, pads_) {
    check();
  }

  // Returns -1, or the flat index into labels of a target outside the vocabulary; nothing is computed then.
  int64_t run() {
    if (rows_.first_invalid() >= 0) return rows_.first_invalid();
    const int64_t item = element_size(a_.logits_dtype);
    chunk_ = a_.one_chunk ? std::max<int64_t>(1, most_joint_rows())
                          : chunk_size(most_joint_rows(), vocab_, item, 0, a_.limits);
    const int64_t most = pads_ ? padded_rows(chunk_) : chunk_;
    const Workspace workspace(static_cast<size_t>(most * vocab_ * item));
    logits_ = matrix_of(workspace.data(), most, vocab_, a_.logits_dtype);
    set_tables();
    set_scales();
    set_row_pass();
    run_heads();
    logits_ = Tensor();
    return -1;
  }

  // After run() has returned -1: loss 0-d and, with `of_heads`, head_loss, n_valid and divisors [n].
  std::vector<Tensor> sums(bool of_heads) const {
    const int64_t heads = rows_.heads();
    std::vector<double> head_loss;
    double total = 0.0;
    for (int64_t k = 0; k < heads; ++k) {
      head_loss.push_back(weigh_losses(rule_, rows_.at(rows_.begin(k)), rows_.count(k), row_pass_.tables.loss) /
                          divisors_[k]);
      total += head_loss.back() * head_weight(k);
    }
    std::vector<Tensor> found{filled<acc_t>({}, kAcc, [&](int64_t) { return total; })};
    if (!of_heads) return found;
    found.push_back(filled<acc_t>({heads}, kAcc, [&](int64_t k) { return head_loss[k]; }));
    found.push_back(filled<int64_t>({heads}, ScalarType::Long, [&](int64_t k) { return rows_.count(k); }));
    found.push_back(filled<acc_t>({heads}, kAcc, [&](int64_t k) { return divisors_[k]; }));
    return found;
  }

 private:
  static constexpr ScalarType kAcc = kScalarType<acc_t>;

  void check() const {
    const int64_t heads = rows_.heads(), width = a_.weight.size(-1);
    STD_TORCH_CHECK(heads > 0, "hidden must hold at least one head");
    const auto is_rows = [&](const Tensor& x) {
      return x.dim() == 2 && x.size(0) == rows_.per_head() && x.size(1) == width;
    };
    for (const Tensor& h : a_.hidden)
      STD_TORCH_CHECK(is_rows(h) && h.scalar_type() == a_.hidden[0].scalar_type(),
                      "hidden must be n tensors [B * S, D] of one dtype");
    STD_TORCH_CHECK(a_.grad_hidden.empty() || a_.grad_hidden.size() == a_.hidden.size(),
                    "grad_hidden must be empty or hold n tensors");
    for (const Tensor& g : a_.grad_hidden)
      STD_TORCH_CHECK(is_rows(g) && g.is_contiguous() && g.scalar_type() == a_.grad_hidden[0].scalar_type(),
                      "grad_hidden must be n contiguous tensors [B * S, D] of one dtype");
    const ScalarType weight_sum = a_.one_chunk ? a_.logits_dtype : kAcc;
    if (a_.grad_weight.has_value()) check_vector(*a_.grad_weight, a_.weight.numel(), weight_sum, "grad_weight");
    if (a_.grad_bias.has_value()) check_vector(*a_.grad_bias, vocab_, kAcc, "grad_bias");
    if (a_.head_weights.has_value()) check_vector(*a_.head_weights, heads, ScalarType::Double, "head_weights");
  }

  void set_tables() {
    const int64_t all = rows_.heads() * rows_.per_head();
    if (a_.tables.empty()) {
      losses_ = empty_cpu({all}, kAcc);
      row_pass_.tables.loss = losses_.mutable_data_ptr<acc_t>();
      return;
    }
    row_pass_.tables = row_tables<acc_t>(a_.tables, all);
    if (rows_.all_count()) return;
    row_pass_.tables.for_each([&](auto* table, auto nothing) { std::fill_n(table, all, nothing); });
  }

  const acc_t* class_weights() const { return optional_vector<acc_t>(a_.class_weights, vocab_, "class_weights"); }

  double head_weight(int64_t head) const {
    return a_.head_weights.has_value() ? a_.head_weights->const_data_ptr<double>()[head] : 1.0;
  }

  void set_scales() {
    for (int64_t k = 0; k < rows_.heads(); ++k) {
      divisors_.push_back(a_.normalizer.has_value()
                              ? *a_.normalizer
                              : mean_divisor(rule_, rows_.at(rows_.begin(k)), rows_.count(k), class_weights()));
      head_scale_.push_back(static_cast<acc_t>(head_weight(k) / divisors_[k]));
    }
  }

  void set_row_pass() {
    const int64_t all = rows_.heads() * rows_.per_head();
    row_pass_.logits = logits_.mutable_data_ptr();
    row_pass_.dtype = dtype_of(logits_);
    row_pass_.row_stride = row_pass_.vocab_size = vocab_;
    row_pass_.targets = rule_;
    row_pass_.head_scale = head_scale_.data();
    row_pass_.row_scale = optional_vector<acc_t>(a_.row_scale, all, "row_scale");
    row_pass_.lse_grad = optional_vector<acc_t>(a_.lse_grad, all, "lse_grad");
    row_pass_.class_weights = class_weights();
    row_pass_.bias = optional_vector<acc_t>(a_.bias, vocab_, "bias");
    row_pass_.options = a_.options;
    row_pass_.options.vocab_size = vocab_;
    row_pass_.options.class_weight_sum = static_cast<double>(vocab_);
    if (const acc_t* weights = class_weights()) {
      double& sum = row_pass_.options.class_weight_sum = 0.0;
      for (int64_t v = 0; v < vocab_; ++v) sum += weights[v];
    }
    row_pass_.stage = Stage::kWhole;
  }

  // The most rows that may share chunks.
  int64_t most_joint_rows() const {
    int64_t most = 0;
    for (int64_t k = 0; k < rows_.heads(); ++k) most = std::max(most, rows_.count(k));
    return replicated_ ? most : rows_.begin(rows_.heads());
  }

  bool detached(int64_t head) const {
    return std::find(a_.detach_weight.begin(), a_.detach_weight.end(), head + 1) != a_.detach_weight.end();
  }

  // Consecutive heads share chunks if they share the unembedding and are alike in detach_weight.
  void run_heads() {
    chunks_.zero_partial_heads();
    bool written = a_.accumulate;
    for (int64_t first = 0, last; first < rows_.heads(); first = last) {
      last = first + 1;
      while (!replicated_ && last < rows_.heads() && detached(last) == detached(first)) ++last;
      OptionalTensor grad_weight = a_.grad_weight;
      if (replicated_ && grad_weight.has_value()) {
        written = a_.accumulate;
        grad_weight = torch::stable::select(*grad_weight, 0, first);
      }
      const OptionalTensor destination = detached(first) ? OptionalTensor() : grad_weight;
      written = run_range(first, last, destination, written) || written;
      if (replicated_ && grad_weight.has_value() && !written) zero(*grad_weight);
    }
    if (!replicated_ && a_.grad_weight.has_value() && !written) zero(*a_.grad_weight);
  }

  // Returns whether grad_weight was written.
  bool run_range(int64_t first, int64_t last, const OptionalTensor& grad_weight, bool accumulate) {
    const int64_t begin = rows_.begin(first), end = rows_.begin(last);
    if (begin == end) return false;
    const Tensor weight = replicated_ ? torch::stable::select(a_.weight, 0, first) : a_.weight;
    ChunkGemmsCpu gemms(weight, a_.compute_dtype, a_.logits_dtype);
    const int64_t size = balanced_chunk(end - begin, chunk_);
    for (int64_t low = begin; low < end; low += size) {
      run_chunk(low, std::min(low + size, end), gemms, grad_weight, accumulate);
      accumulate = true;
    }
    return grad_weight.has_value();
  }

  void run_chunk(int64_t low, int64_t high, ChunkGemmsCpu& gemms, const OptionalTensor& grad_weight, bool accumulate) {
    const std::vector<Piece> pieces = rows_.pieces(low, high);
    const Tensor h = chunks_.gather(pieces, high - low), z = slice(logits_, 0, 0, h.size(0));
    const bool need_hidden = chunks_.need_grad();
    const bool with_gradient = need_hidden || grad_weight.has_value() || a_.grad_bias.has_value();
    row_pass_.rows = rows_.at(low);
    row_pass_.gradient = with_gradient ? Gradient::kWrite : Gradient::kSkip;
    const Tensor grad_hidden = need_hidden ? chunks_.destination(pieces, z.size(0)) : Tensor();
    const bool share = fits_caches(z, gemms);
    share_out(share, z.size(0), kPartRows, [&](int64_t begin, int64_t end) {
      const Tensor part = slice(z, 0, begin, end - begin);
      gemms.logits(slice(h, 0, begin, end - begin), part);
      parallel_for(begin, std::min(end, high - low), grain_of(vocab_),
                   [&](int64_t first, int64_t last) { loss_rows_cpu(row_pass_, first, last); });
      if (need_hidden) gemms.grad_hidden(part, slice(grad_hidden, 0, begin, end - begin));
    });
    if (need_hidden) chunks_.scatter(pieces, grad_hidden);
    if (grad_weight.has_value()) {
      share_out(share, h.size(1), kPartColumns, [&](int64_t begin, int64_t end) {
        const int64_t size = end - begin;
        gemms.add_grad_weight(z, slice(h, 1, begin, size), slice(*grad_weight, 1, begin, size), accumulate);
      });
    }
    if (a_.grad_bias.has_value()) add_grad_bias(z);
  }

  // Whether each thread's part of a chunk's logits fits its L2 cache. Then threads do not share GEMMs: each multiplies
  // its own rows (columns, for the weight gradient), with two barriers instead of four. Saves 3 % of a call at
  // N = D = 1024, V = 256, and nothing for larger GEMMs.
  static bool fits_caches(const Tensor& z, const ChunkGemmsCpu& gemms) {
    const int64_t bytes = z.numel() * static_cast<int64_t>(z.element_size());
    return bytes <= kPartBytes * torch::stable::get_num_threads() && gemms.shareable();
  }

  // Runs body(begin, end) over [0, size): one part of at least `fewest` per thread, or all at once.
  template <typename Body>
  static void share_out(bool share, int64_t size, int64_t fewest, const Body& body) {
    const int64_t threads = torch::stable::get_num_threads(), part = (size + threads - 1) / threads;
    if (!share || threads == 1 || part < fewest) return body(0, size);
    parallel_for(0, size, part, body);
  }

  void add_grad_bias(const Tensor& z) const {
    acc_t* out = a_.grad_bias->mutable_data_ptr<acc_t>();
    const int64_t rows = z.size(0);
    const bool bfloat16 = z.scalar_type() == ScalarType::BFloat16;
    parallel_for(0, vocab_, grain_of(rows), [&](int64_t begin, int64_t end) {
      if (bfloat16) {
        add_column_sum(static_cast<const BFloat16Bits*>(z.const_data_ptr()), rows, vocab_, begin, end, out);
      } else {
        add_column_sum(static_cast<const acc_t*>(z.const_data_ptr()), rows, vocab_, begin, end, out);
      }
    });
  }

  template <typename scalar_t, typename Value>
  static Tensor filled(std::initializer_list<int64_t> sizes, ScalarType dtype, const Value& value) {
    Tensor x = empty_cpu(sizes, dtype);
    const int64_t numel = x.numel();
    for (int64_t i = 0; i < numel; ++i) x.mutable_data_ptr<scalar_t>()[i] = static_cast<scalar_t>(value(i));
    return x;
  }

  const FusedLossArguments& a_;
  const BasicTargetRule<acc_t> rule_;
  const int64_t vocab_;
  const bool replicated_;
  const HeadRows rows_;
  const bool pads_;  // chunks to few different sizes; not beyond a limit that the caller set
  HiddenChunks chunks_;
  int64_t chunk_ = 0;  // C, the most rows of a chunk
  Tensor logits_;      // [C, V], scratch
  Tensor losses_;      // if the caller passes no tables
  std::vector<double> divisors_;
  std::vector<acc_t> head_scale_;
  LossRowsParams<acc_t> row_pass_{};
};

}  // namespace mtp
