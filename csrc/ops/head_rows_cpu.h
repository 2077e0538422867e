// The rows of all heads with a target, on one axis; gather from the hidden states into a chunk, scatter of gradients.
#pragma once
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <vector>

#include "core/chunk_size.h"
#include "cpu/select_rows.h"
#include "ops/cpu_tensor.h"

namespace mtp {

using torch::stable::parallel_for;

// Grain of parallel_for: the fewest rows that are worth a second thread.
inline int64_t grain_of(int64_t elements_per_row) {
  constexpr int64_t kGrain = 1 << 15;
  return std::max<int64_t>(1, kGrain / std::max<int64_t>(1, elements_per_row));
}

// The rows of one head within a chunk.
struct Piece {
  int64_t head, in_chunk, size;
  const int64_t* rows;  // their flat indices
  bool consecutive;     // every row of the head has a target
};

class HeadRows {
 public:
  template <typename weight_t>
  HeadRows(const BasicTargetRule<weight_t>& rule, int64_t heads, int64_t vocab_size)
      : per_head_(rule.batch * rule.seq_len), rows_(new int64_t[static_cast<size_t>(heads * per_head_)]) {
    std::vector<int64_t> counts(static_cast<size_t>(heads));
    first_invalid_ = select_rows(rule, heads, vocab_size, false, rows_.get(), counts.data());
    for (const int64_t count : counts) offsets_.push_back(offsets_.back() + count);
  }

  int64_t first_invalid() const { return first_invalid_; }  // index in labels of a target outside the vocabulary, or -1
  int64_t heads() const { return static_cast<int64_t>(offsets_.size()) - 1; }
  int64_t per_head() const { return per_head_; }
  int64_t begin(int64_t head) const { return offsets_[static_cast<size_t>(head)]; }
  int64_t count(int64_t head) const { return begin(head + 1) - begin(head); }
  bool all_count() const { return offsets_.back() == heads() * per_head_; }
  const int64_t* at(int64_t i) const { return rows_.get() + i; }

  // Splits rows [low, high) by head.
  std::vector<Piece> pieces(int64_t low, int64_t high) const {
    std::vector<Piece> found;
    for (int64_t k = 0; k < heads(); ++k) {
      const int64_t first = std::max(low, begin(k)), last = std::min(high, begin(k + 1));
      if (first < last) found.push_back({k, first - low, last - first, at(first), count(k) == per_head_});
    }
    return found;
  }

  int64_t in_head(const Piece& piece, int64_t i) const { return piece.rows[i] - piece.head * per_head_; }

 private:
  int64_t per_head_, first_invalid_ = -1;
  std::unique_ptr<int64_t[]> rows_;  // flat indices, head by head
  std::vector<int64_t> offsets_{0};
};

// Gathers the hidden states, n of [B * S, D], into the operands [C, D] of a chunk's GEMMs, and scatters the gradients.
// Consecutive rows that need no conversion are views; others go through buffers that all chunks share.
class HiddenChunks {
 public:
  HiddenChunks(const HeadRows& rows, const std::vector<Tensor>& hidden, const std::vector<Tensor>& grads,
               ScalarType compute, ScalarType logits, bool pads)
      : rows_(rows), hidden_(hidden), grads_(grads), compute_(compute), logits_(logits), pads_(pads) {}

  bool need_grad() const { return !grads_.empty(); }

  // The rows of `pieces`, rounded to `compute`, stored as `logits`. Where they are picked, their number varies from call
  // to call: then zeros follow, with `pads` up to `padded_rows`.
  Tensor gather(const std::vector<Piece>& pieces, int64_t size) {
    const Piece& first = pieces.front();
    const ScalarType from = hidden_[0].scalar_type();
    Tensor picked;
    if (pieces.size() == 1 && first.consecutive) {
      picked = slice(hidden_[static_cast<size_t>(first.head)], 0, rows_.in_head(first, 0), size);
    } else {
      const int64_t padded = pads_ ? padded_rows(size) : size;
      picked = buffer(picked_, padded, from);
      if (padded > size) zero(slice(picked, 0, size, padded - size));
      size = padded;
      for (const Piece& piece : pieces)
        copy_rows(torch::stable::contiguous(hidden_[static_cast<size_t>(piece.head)]), picked, piece, Copy::kGather);
    }
    if (from != compute_) picked = copy(picked, buffer(rounded_, size, compute_));
    if (logits_ != compute_) picked = copy(picked, buffer(widened_, size, logits_));
    return picked;
  }

  // Output of the GEMM for the chunk's gradient: `grads` itself or a buffer, which `scatter` copies to `grads`.
  Tensor destination(const std::vector<Piece>& pieces, int64_t size) {
    if (!in_place(pieces)) return buffer(product_, size, logits_);
    return slice(grads_[static_cast<size_t>(pieces[0].head)], 0, rows_.in_head(pieces[0], 0), size);
  }

  void scatter(const std::vector<Piece>& pieces, Tensor grad) {
    if (in_place(pieces)) return;
    const ScalarType dtype = grads_[0].scalar_type();
    if (dtype != grad.scalar_type()) grad = copy(grad, buffer(narrowed_, grad.size(0), dtype));
    for (const Piece& piece : pieces) copy_rows(grad, grads_[static_cast<size_t>(piece.head)], piece, Copy::kScatter);
  }

  // Rows without a target have gradient 0.
  void zero_partial_heads() const {
    for (int64_t k = 0; k < rows_.heads(); ++k)
      if (need_grad() && rows_.count(k) < rows_.per_head()) zero(grads_[static_cast<size_t>(k)]);
  }

 private:
  enum class Copy { kGather, kScatter };

  static Tensor copy(const Tensor& x, Tensor to) { return torch::stable::copy_(to, x); }

  bool in_place(const std::vector<Piece>& pieces) const {
    return pieces.size() == 1 && pieces[0].consecutive && grads_[0].scalar_type() == logits_;
  }

  Tensor buffer(Tensor& held, int64_t size, ScalarType dtype) const {
    if (!held.defined() || held.size(0) < size) held = empty_cpu({size, hidden_[0].size(1)}, dtype);
    return slice(held, 0, 0, size);
  }

  // `from` and `to` are contiguous and of one dtype.
  void copy_rows(const Tensor& from, const Tensor& to, const Piece& piece, Copy direction) const {
    const int64_t bytes = from.size(1) * static_cast<int64_t>(from.element_size());
    const auto* source = static_cast<const char*>(from.const_data_ptr());
    auto* target = static_cast<char*>(to.mutable_data_ptr());
    parallel_for(0, piece.size, grain_of(from.size(1)), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t whole = rows_.in_head(piece, i), part = piece.in_chunk + i;
        const bool gather = direction == Copy::kGather;
        std::memcpy(target + (gather ? part : whole) * bytes, source + (gather ? whole : part) * bytes,
                    static_cast<size_t>(bytes));
      }
    });
  }

  const HeadRows& rows_;
  const std::vector<Tensor>&hidden_, &grads_;
  ScalarType compute_, logits_;
  bool pads_;
  Tensor picked_, rounded_, widened_, product_, narrowed_;
};

}  // namespace mtp
