// The loss of all heads on the CPU, in one call: what ops/head_loss.py does a step at a time for devices whose row
// counts no host sees and for sharded vocabularies. One op, because its steps through Python cost 0.4 ms a call, which
// is more than the products of a small vocabulary.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <vector>

#include "cpu/capability.h"
#include "cpu/column_sum.h"
#include "cpu/head_sums.h"
#include "cpu/loss_rows.h"
#include "cpu/select_rows.h"
#include "ops/chunk_gemms_cpu.h"
#include "ops/cpu_tensor.h"
#include "ops/fused_loss_arguments.h"

namespace mtp {

using torch::stable::parallel_for;

constexpr int64_t kGrain = 1 << 15;  // elements for which a second thread pays

// Of a part of a product that a thread does by itself: the fewest rows (of hidden states) and columns (of the weight's
// gradient), below which it loses to a product that threads do together; and the most bytes of logits.
constexpr int64_t kPartRows = 128, kPartColumns = 512, kPartBytes = 512 << 10;

inline int64_t grain_of(int64_t elements_per_row) {
  return std::max<int64_t>(1, kGrain / std::max<int64_t>(1, elements_per_row));
}

inline Tensor copy(const Tensor& x, Tensor to) { return torch::stable::copy_(to, x); }

inline void zero(Tensor x) { torch::stable::zero_(x); }

// Part of a chunk: rows of one head.
struct Piece {
  int64_t head, in_chunk, size;
  const int64_t* rows;  // their flat indices
  bool consecutive;     // every row of the head counts
};

template <typename acc_t>
class FusedLoss {
 public:
  explicit FusedLoss(const FusedLossArguments& arguments)
      : a_(arguments),
        rule_(target_rule(a_.labels, a_.document_ids, a_.token_weights, a_.seq_len, a_.first_shift, a_.ignore_index)),
        heads_(static_cast<int64_t>(a_.hidden.size())),
        head_rows_(rule_.batch * rule_.seq_len),
        vocab_(a_.weight.size(-2)),
        replicated_(a_.weight.dim() == 3) {
    check();
  }

  // The flat index into labels of a target that is no class, and nothing else is computed; or -1.
  int64_t run() {
    rows_.reset(new int64_t[static_cast<size_t>(heads_ * head_rows_)]);
    std::vector<int64_t> counts(static_cast<size_t>(heads_));
    const int64_t invalid = select_rows(rule_, heads_, vocab_, rows_.get(), counts.data());
    if (invalid >= 0) return invalid;
    for (const int64_t count : counts) offsets_.push_back(offsets_.back() + count);
    make_tables();
    set_scales();
    set_row_pass();
    run_heads();
    for (int64_t k = 0; k < heads_; ++k)
      head_loss_.push_back(weigh_losses(rule_, rows(offsets_[k]), count(k), losses_.mutable_data_ptr<acc_t>()) /
                           divisor(k));
    return -1;
  }

  // What follows is good after a run() that returned -1.
  Tensor loss() const {
    double total = 0.0;
    for (int64_t k = 0; k < heads_; ++k) total += head_loss_[k] * head_weight(k);
    return filled<acc_t>({}, kAcc, [&](int64_t) { return total; });
  }

  FusedLossResult result() const {
    return {loss(),
            filled<acc_t>({heads_}, kAcc, [&](int64_t k) { return head_loss_[k]; }),
            filled<int64_t>({heads_}, ScalarType::Long, [&](int64_t k) { return count(k); }),
            filled<acc_t>({heads_}, kAcc, [&](int64_t k) { return denominators_[k]; }),
            losses_,
            lse_,
            predicted_,
            -1};
  }

 private:
  static constexpr ScalarType kAcc = sizeof(acc_t) == 8 ? ScalarType::Double : ScalarType::Float;

  template <typename scalar_t, typename Value>
  static Tensor filled(std::initializer_list<int64_t> sizes, ScalarType dtype, const Value& value) {
    Tensor x = empty_cpu(sizes, dtype);
    const int64_t numel = x.numel();
    for (int64_t i = 0; i < numel; ++i) x.mutable_data_ptr<scalar_t>()[i] = static_cast<scalar_t>(value(i));
    return x;
  }

  const int64_t* rows(int64_t i) const { return rows_.get() + i; }
  int64_t count(int64_t head) const { return offsets_[head + 1] - offsets_[head]; }

  void check() const {
    const Tensor& w = a_.workspace;
    STD_TORCH_CHECK(heads_ > 0 && w.dim() == 2 && w.size(1) == vocab_ && w.is_contiguous(),
                    "workspace must be contiguous [C, V], for at least one head");
    STD_TORCH_CHECK(w.size(0) > 0 || heads_ * head_rows_ == 0, "workspace must hold at least one row");
    const int64_t width = a_.weight.size(-1);
    const auto is_rows = [&](const Tensor& x) { return x.dim() == 2 && x.size(0) == head_rows_ && x.size(1) == width; };
    for (const Tensor& h : a_.hidden)
      STD_TORCH_CHECK(is_rows(h) && h.scalar_type() == a_.hidden[0].scalar_type(),
                      "hidden must be n tensors [B * S, D] of one dtype");
    STD_TORCH_CHECK(a_.grad_hidden.empty() || a_.grad_hidden.size() == a_.hidden.size(),
                    "grad_hidden must be empty or hold n tensors");
    for (const Tensor& g : a_.grad_hidden)
      STD_TORCH_CHECK(is_rows(g) && g.is_contiguous() && g.scalar_type() == a_.grad_hidden[0].scalar_type(),
                      "grad_hidden must be n contiguous tensors [B * S, D] of one dtype");
    if (a_.grad_weight.has_value()) check_vector(*a_.grad_weight, a_.weight.numel(), kAcc, "grad_weight");
    if (a_.grad_bias.has_value()) check_vector(*a_.grad_bias, vocab_, kAcc, "grad_bias");
    if (a_.head_weights.has_value()) check_vector(*a_.head_weights, heads_, ScalarType::Double, "head_weights");
  }

  // Rows that do not count keep 0, 0 and -1, where somebody reads them.
  void make_tables() {
    const int64_t all = heads_ * head_rows_;
    losses_ = empty_cpu({all}, kAcc);
    if (a_.tables == Tables::kNone) return;
    lse_ = empty_cpu({all}, kAcc);
    predicted_ = empty_cpu({all}, ScalarType::Int);
    if (offsets_.back() == all) return;
    zero(losses_);
    zero(lse_);
    std::fill_n(predicted_.mutable_data_ptr<int32_t>(), all, -1);
  }

  const float* class_weights() const {
    return a_.class_weights.has_value() ? a_.class_weights->const_data_ptr<float>() : nullptr;
  }

  double head_weight(int64_t head) const {
    return a_.head_weights.has_value() ? a_.head_weights->const_data_ptr<double>()[head] : 1.0;
  }

  // What a head's sum is divided by. Behind a denominator of 0 are no rows, or rows of weight 0: their sum is 0.
  double divisor(int64_t head) const { return denominators_[head] == 0.0 ? 1.0 : denominators_[head]; }

  void set_scales() {
    for (int64_t k = 0; k < heads_; ++k) {
      denominators_.push_back(a_.normalizer.has_value()
                                  ? *a_.normalizer
                                  : sum_of_weights(rule_, rows(offsets_[k]), count(k), class_weights()));
      head_scale_.push_back(static_cast<acc_t>(head_weight(k) / divisor(k)));
    }
  }

  const acc_t* optional(const OptionalTensor& x, int64_t size, const char* name) const {
    if (!x.has_value()) return nullptr;
    check_vector(*x, size, kAcc, name);
    return x->const_data_ptr<acc_t>();
  }

  void set_row_pass() {
    if (a_.class_weights.has_value()) check_vector(*a_.class_weights, vocab_, ScalarType::Float, "class_weights");
    double class_weight_sum = static_cast<double>(vocab_);
    if (const float* weights = class_weights()) {
      class_weight_sum = 0.0;
      for (int64_t v = 0; v < vocab_; ++v) class_weight_sum += weights[v];
    }
    row_pass_.logits = a_.workspace.mutable_data_ptr();
    row_pass_.dtype = dtype_of(a_.workspace);
    row_pass_.row_stride = row_pass_.vocab_size = vocab_;
    row_pass_.targets = rule_;
    row_pass_.head_scale = head_scale_.data();
    row_pass_.row_scale = optional(a_.row_scale, losses_.numel(), "row_scale");
    row_pass_.lse_grad = optional(a_.lse_grad, losses_.numel(), "lse_grad");
    row_pass_.class_weights = class_weights();
    row_pass_.bias = optional(a_.bias, vocab_, "bias");
    row_pass_.logit_scale = a_.logit_scale;
    row_pass_.softcap = a_.softcap;
    row_pass_.options = {a_.label_smoothing, a_.z_loss, class_weight_sum, vocab_};
    row_pass_.stage = Stage::kWhole;
    row_pass_.loss = losses_.mutable_data_ptr<acc_t>();
    if (a_.tables == Tables::kNone) return;
    row_pass_.lse = lse_.mutable_data_ptr<acc_t>();
    row_pass_.predicted = predicted_.mutable_data_ptr<int32_t>();
  }

  bool detached(int64_t head) const {
    return std::find(a_.detach_weight.begin(), a_.detach_weight.end(), head + 1) != a_.detach_weight.end();
  }

  // Heads share chunks where they share the unembedding and the answer to detach_weight.
  void run_heads() {
    for (int64_t k = 0; k < heads_; ++k)
      if (!a_.grad_hidden.empty() && count(k) < head_rows_) zero(a_.grad_hidden[k]);
    bool written = false;
    for (int64_t first = 0, last; first < heads_; first = last) {
      last = first + 1;
      while (!replicated_ && last < heads_ && detached(last) == detached(first)) ++last;
      if (replicated_) written = false;
      OptionalTensor grad_weight;
      if (a_.grad_weight.has_value() && !(detached(first) && !replicated_))
        grad_weight = replicated_ ? torch::stable::select(*a_.grad_weight, 0, first) : *a_.grad_weight;
      if (replicated_ && detached(first) && grad_weight.has_value()) {
        zero(*grad_weight);
        grad_weight.reset();
        written = true;
      }
      written = run_range(first, last, grad_weight, written) || written;
      if (replicated_ && grad_weight.has_value() && !written) zero(*grad_weight);
    }
    if (!replicated_ && a_.grad_weight.has_value() && !written) zero(*a_.grad_weight);
  }

  // Whether grad_weight was written.
  bool run_range(int64_t first, int64_t last, const OptionalTensor& grad_weight, bool accumulate) {
    const int64_t begin = offsets_[first], end = offsets_[last];
    if (begin == end) return false;
    const Tensor weight = replicated_ ? torch::stable::select(a_.weight, 0, first) : a_.weight;
    ChunkGemmsCpu gemms(weight, a_.compute_dtype, a_.workspace.scalar_type());
    const int64_t chunks = (end - begin + a_.workspace.size(0) - 1) / a_.workspace.size(0);
    const int64_t size = (end - begin + chunks - 1) / chunks;
    for (int64_t low = begin; low < end; low += size) {
      run_chunk(low, std::min(low + size, end), gemms, grad_weight, accumulate);
      accumulate = true;
    }
    return grad_weight.has_value();
  }

  void run_chunk(int64_t low, int64_t high, ChunkGemmsCpu& gemms, const OptionalTensor& grad_weight, bool accumulate) {
    const std::vector<Piece> pieces = pieces_of(low, high);
    const Tensor h = gathered(pieces, high - low), z = slice(a_.workspace, 0, 0, high - low);
    const bool need_hidden = !a_.grad_hidden.empty();
    const bool with_gradient = need_hidden || grad_weight.has_value() || a_.grad_bias.has_value();
    row_pass_.rows = rows(low);
    row_pass_.gradient = with_gradient ? Gradient::kWrite : Gradient::kSkip;
    const Tensor grad_hidden = need_hidden ? grad_hidden_of(pieces, z) : Tensor();
    const bool share = fits_caches(z, gemms);
    share_out(share, z.size(0), kPartRows, [&](int64_t begin, int64_t end) {
      const Tensor part = slice(z, 0, begin, end - begin);
      gemms.logits(slice(h, 0, begin, end - begin), part);
      parallel_for(begin, end, grain_of(vocab_), [&](int64_t first, int64_t last) { pass(first, last); });
      if (need_hidden) gemms.grad_hidden(part, slice(grad_hidden, 0, begin, end - begin));
    });
    if (need_hidden) scatter_grad_hidden(pieces, grad_hidden);
    if (grad_weight.has_value()) {
      share_out(share, h.size(1), kPartColumns, [&](int64_t begin, int64_t end) {
        const int64_t size = end - begin;
        gemms.add_grad_weight(z, slice(h, 1, begin, size), slice(*grad_weight, 1, begin, size), accumulate);
      });
    }
    if (a_.grad_bias.has_value()) add_grad_bias(z);
  }

  // Whether the logits of a chunk are few enough for each thread to keep its part of them in its L2 cache. Then threads
  // do not multiply together but each a part of the rows (of the columns for the weight's gradient): they wait for each
  // other twice in place of four times. 3 % of a call at N = D = 1024, V = 256; none where products are larger.
  static bool fits_caches(const Tensor& z, const ChunkGemmsCpu& gemms) {
    const int64_t bytes = z.numel() * static_cast<int64_t>(z.element_size());
    return bytes <= kPartBytes * torch::stable::get_num_threads() && gemms.shareable();
  }

  // body(begin, end) over [0, size): on every thread a part of at least `fewest`, or all at once.
  template <typename Body>
  static void share_out(bool share, int64_t size, int64_t fewest, const Body& body) {
    const int64_t threads = torch::stable::get_num_threads(), part = (size + threads - 1) / threads;
    if (!share || threads == 1 || part < fewest) return body(0, size);
    parallel_for(0, size, part, body);
  }

  void pass(int64_t begin, int64_t end) const {
    if constexpr (sizeof(acc_t) == 8) {
      loss_rows_double(row_pass_, begin, end);
    } else {
      loss_rows_kernel(cpu_capability())(row_pass_, begin, end);
    }
  }

  std::vector<Piece> pieces_of(int64_t low, int64_t high) const {
    std::vector<Piece> found;
    for (int64_t k = 0; k < heads_; ++k) {
      const int64_t begin = std::max(low, offsets_[k]), end = std::min(high, offsets_[k + 1]);
      if (begin < end) found.push_back({k, begin - low, end - begin, rows(begin), count(k) == head_rows_});
    }
    return found;
  }

  // A buffer [C, D] for one use in every chunk, made when the first needs it.
  Tensor buffer(Tensor& held, int64_t size, ScalarType dtype) const {
    if (!held.defined() || held.size(0) < size) held = empty_cpu({size, a_.weight.size(-1)}, dtype);
    return slice(held, 0, 0, size);
  }

  int64_t in_head(const Piece& piece, int64_t i) const { return piece.rows[i] - piece.head * head_rows_; }

  // The chunk's rows of `hidden` as a GEMM operand: a view where they are consecutive and need no conversion.
  Tensor gathered(const std::vector<Piece>& pieces, int64_t size) {
    const ScalarType from = a_.hidden[0].scalar_type(), logits = a_.workspace.scalar_type();
    const Piece& first = pieces.front();
    Tensor picked;
    if (pieces.size() == 1 && first.consecutive) {
      picked = slice(a_.hidden[first.head], 0, in_head(first, 0), size);
    } else {
      picked = buffer(picked_, size, from);
      for (const Piece& piece : pieces) {
        const Tensor source = torch::stable::contiguous(a_.hidden[piece.head]);
        copy_rows(source, picked, piece, /*gather=*/true);
      }
    }
    if (from != a_.compute_dtype) picked = copy(picked, buffer(rounded_, size, a_.compute_dtype));
    if (logits != a_.compute_dtype) picked = copy(picked, buffer(widened_, size, logits));
    return picked;
  }

  // Whether the chunk's part of the gradient of `hidden` can be written where it belongs.
  bool in_place(const std::vector<Piece>& pieces) const {
    return pieces.size() == 1 && pieces[0].consecutive && a_.grad_hidden[0].scalar_type() == a_.workspace.scalar_type();
  }

  // What the chunk's gradient of `hidden` is written to.
  Tensor grad_hidden_of(const std::vector<Piece>& pieces, const Tensor& z) {
    if (!in_place(pieces)) return buffer(product_, z.size(0), z.scalar_type());
    return slice(a_.grad_hidden[pieces[0].head], 0, in_head(pieces[0], 0), z.size(0));
  }

  void scatter_grad_hidden(const std::vector<Piece>& pieces, Tensor grad) {
    if (in_place(pieces)) return;
    const ScalarType dtype = a_.grad_hidden[0].scalar_type();
    if (dtype != grad.scalar_type()) grad = copy(grad, buffer(narrowed_, grad.size(0), dtype));
    for (const Piece& piece : pieces) copy_rows(grad, a_.grad_hidden[piece.head], piece, /*gather=*/false);
  }

  // Rows of a head to their places in the chunk, or back; both contiguous and of one dtype.
  void copy_rows(const Tensor& from, const Tensor& to, const Piece& piece, bool gather) const {
    const int64_t bytes = from.size(1) * static_cast<int64_t>(from.element_size());
    const auto* source = static_cast<const char*>(from.const_data_ptr());
    auto* target = static_cast<char*>(to.mutable_data_ptr());
    parallel_for(0, piece.size, grain_of(from.size(1)), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t whole = in_head(piece, i), part = piece.in_chunk + i;
        std::memcpy(target + (gather ? part : whole) * bytes, source + (gather ? whole : part) * bytes, bytes);
      }
    });
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

  const FusedLossArguments& a_;
  const TargetRule rule_;
  const int64_t heads_, head_rows_, vocab_;
  const bool replicated_;
  std::unique_ptr<int64_t[]> rows_;
  std::vector<int64_t> offsets_{0};  // of each head in rows_
  Tensor losses_, lse_, predicted_;
  std::vector<double> denominators_, head_loss_;
  std::vector<acc_t> head_scale_;
  LossRowsParams<acc_t> row_pass_{};
  Tensor picked_, rounded_, widened_, product_, narrowed_;
};

}  // namespace mtp
