// The float32/bfloat16 row kernel in compiler vector extensions. Each loss_rows_<isa>.cpp includes the standard headers
// (cpu/loss_rows_isa.h), defines kLanes, switches on its instruction set with a pragma, and then includes this file.
// Everything here has internal linkage: an inline function with external linkage would be merged across the three
// translation units, and a processor without AVX-512 could get the AVX-512 copy. No include guard.
//
// A row is processed in blocks that fit the L1 cache. The first pass finds the maximum and the sum, with each block's
// exponentials relative to the running maximum; the second turns them into the gradient and corrects each block's
// factor. With a softcap the row keeps its logits, which the gradient needs, and the exponentials are computed twice.
#include "cpu/simd.h"

namespace mtp {
namespace {

constexpr int64_t kBlock = 1024;  // elements per float32 partial sum
constexpr int64_t kCacheLine = 64 / sizeof(float);
static_assert(kBlock % kStride == 0, "a block is a whole number of unrolled strides");

int64_t block_count(int64_t vocab_size) { return (vocab_size + kBlock - 1) / kBlock; }

// Per-thread scratch, shared by all rows of the thread.
struct Scratch {
  std::unique_ptr<float[]> shifts;   // [blocks], shift of each block's exponentials
  std::unique_ptr<float[]> widened;  // [V], a bfloat16 row in float32
  float largest[kBlock];             // copy of the block with the maximum: the row itself is overwritten
  int64_t largest_begin;
  float largest_logit;
  bool finds_argmax;

  explicit Scratch(const LossRowsParams<float>& p)
      : shifts(new float[static_cast<size_t>(block_count(p.vocab_size))]),
        finds_argmax(p.tables.predicted != nullptr || p.stage == Stage::kStatistics) {
    if (p.dtype == DType::kBFloat16) widened.reset(new float[static_cast<size_t>(p.vocab_size)]);
  }

  // Records the block if it raises the maximum.
  void offer(const float* x, int64_t begin, int64_t end, float block_max) {
    if (!(block_max > largest_logit)) return;
    largest_logit = block_max;
    if (!finds_argmax) return;
    largest_begin = begin;
    std::memcpy(largest, x + begin, static_cast<size_t>(end - begin) * sizeof(float));
  }

  // Whether the maximum is among the kStride elements from v; branch-free, so that it vectorises.
  bool holds_largest(int64_t v) const {
    int found = 0;
    for (int64_t i = v; i < v + kStride; ++i) found |= static_cast<int>(largest[i] == largest_logit);
    return found != 0;
  }

  // First index of the maximum; 0 for a row of NaN or -inf, or if it is not needed.
  int64_t argmax() const {
    if (!finds_argmax || largest_logit == -INFINITY) return 0;
    int64_t v = 0;
    while (!holds_largest(v)) v += kStride;
    while (largest[v] != largest_logit) ++v;
    return largest_begin + v;
  }
};

// x <- cap(scale * (x + bias)).
template <bool kCapped>
void transform_logits(float* x, const LossRowsParams<float>& p, int64_t begin, int64_t end) {
  const VFloat scale = splat(static_cast<float>(p.options.logit_scale));
  const VFloat cap = splat(static_cast<float>(p.options.softcap));
  const VFloat two_over_cap = splat(kCapped ? static_cast<float>(2.0 / p.options.softcap) : 0.0f);
  for_each_vector(begin, end, [&](int64_t v, int64_t count) {
    VFloat l = load(x + v, count, 0.0f);
    if (p.bias != nullptr) l = l + load(p.bias + v, count, 0.0f);
    l = l * scale;
    if (kCapped) l = cap * tanh_of_half(l * two_over_cap);
    store(x + v, l, count);
  });
}

float find_max(const float* x, int64_t begin, int64_t end) {
  VFloat m[kUnroll];
  for (VFloat& acc : m) acc = splat(-INFINITY);
  int64_t v = begin;
  for (; v + kStride <= end; v += kStride)
    for (int i = 0; i < kUnroll; ++i) m[i] = max(m[i], load(x + v + i * kLanes));
  for_each_vector(v, end, [&](int64_t at, int64_t count) { m[0] = max(m[0], load(x + at, count, -INFINITY)); });
  return reduce_max(max(max(m[0], m[1]), max(m[2], m[3])));
}

// sum_v exp(x_v - shift) over a block; kStore keeps the exponentials in x.
template <bool kStore>
double sum_exp(float* x, int64_t begin, int64_t end, float max_logit) {
  const VFloat shift = splat(max_logit);
  VFloat sum[kUnroll];
  for (VFloat& acc : sum) acc = splat(0.0f);
  int64_t v = begin;
  for (; v + kStride <= end; v += kStride) {
    // The row comes from memory, and the hardware prefetcher stops at a page boundary, that is, after every block.
    for (int64_t line = 0; line < kStride; line += kCacheLine) __builtin_prefetch(x + v + kBlock + line);
    for (int i = 0; i < kUnroll; ++i) {
      const VFloat e = exp_nonpositive(load(x + v + i * kLanes) - shift);
      if (kStore) store(x + v + i * kLanes, e);
      sum[i] = sum[i] + e;
    }
  }
  for_each_vector(v, end, [&](int64_t at, int64_t count) {
    const VFloat e = exp_nonpositive(load(x + at, count, -INFINITY) - shift);
    if (kStore) store(x + at, e, count);
    sum[0] = sum[0] + e;
  });
  return reduce_add((sum[0] + sum[1]) + (sum[2] + sum[3]));
}

// sum_v c_v x_v over a block, for label smoothing.
double weighted_logit_sum(const float* x, const float* class_weights, int64_t begin, int64_t end) {
  VFloat sum = splat(0.0f);
  for_each_vector(begin, end, [&](int64_t v, int64_t count) {
    const VFloat l = load(x + v, count, 0.0f);
    sum = sum + (class_weights == nullptr ? l : l * load(class_weights + v, count, 0.0f));
  });
  return reduce_add(sum);
}

// Turns a block of raw logits into l, and updates the maximum and the weighted sum.
void read_block(float* x, const LossRowsParams<float>& p, int64_t begin, int64_t end, Scratch& scratch,
                RowStatistics& stats) {
  if (p.options.softcap > 0.0) {
    transform_logits<true>(x, p, begin, end);
  } else if (p.bias != nullptr || p.options.logit_scale != 1.0) {
    transform_logits<false>(x, p, begin, end);
  }
  scratch.offer(x, begin, end, find_max(x, begin, end));
  if (p.options.label_smoothing > 0.0) stats.weighted_sum += weighted_logit_sum(x, p.class_weights, begin, end);
}

// Returns the sum of a block relative to `shift`, which it records; leaves the target's element undefined.
double sum_block(float* x, const LossRowsParams<float>& p, int64_t begin, int64_t end, int64_t target, float shift,
                 Scratch& scratch, RowStatistics& stats) {
  if (target >= begin && target < end) {
    stats.target_logit = x[target];
    stats.target_class_weight = p.class_weight(target);
    x[target] = -INFINITY;  // the sum excludes the target: see core/row_loss.h
  }
  scratch.shifts[static_cast<size_t>(begin / kBlock)] = shift;
  // All logits so far may be -inf, with the maximum in a later block or another shard; (-inf) - (-inf) would be NaN.
  if (shift == -INFINITY) shift = 0.0f;
  const bool store = p.gradient == Gradient::kWrite && p.options.softcap == 0.0;
  return store ? sum_exp<true>(x, begin, end, shift) : sum_exp<false>(x, begin, end, shift);
}

// Reads a row of logits; leaves exp(l - shift) of each block in x, or l itself with a softcap.
RowStatistics row_statistics(float* x, const LossRowsParams<float>& p, int64_t target, Scratch& scratch) {
  RowStatistics stats{-INFINITY, 0.0, 0.0, 0.0, 0.0, 0.0};
  scratch.largest_logit = -INFINITY;
  const int64_t local = p.holds(target) ? target - p.vocab_start : -1;
  const bool whole = p.stage == Stage::kWhole;
  float summed_to = -INFINITY;  // the shift of sum_others
  for (int64_t begin = 0; begin < p.vocab_size; begin += kBlock) {
    const int64_t end = std::min(p.vocab_size, begin + kBlock);
    read_block(x, p, begin, end, scratch, stats);
    if (!whole) continue;
    const float shift = scratch.largest_logit;
    if (shift > summed_to) {
      stats.sum_others *= std::exp(static_cast<double>(summed_to) - shift);
      summed_to = shift;
    }
    stats.sum_others += sum_block(x, p, begin, end, local, shift, scratch, stats);
  }
  stats.max = scratch.largest_logit;
  stats.argmax = static_cast<double>(p.vocab_start + scratch.argmax());
  if (whole) return stats;
  // The blocks of a shard share one shift, known to both stages.
  for (int64_t begin = 0; begin < p.vocab_size; begin += kBlock)
    stats.sum_others +=
        sum_block(x, p, begin, std::min(p.vocab_size, begin + kBlock), local, scratch.largest_logit, scratch, stats);
  return stats;
}

// Replaces exp(l - shift), or l if kCapped, by d/dx over a block. `exp_scale` is the factor of exp(l - shift) in d l.
template <bool kCapped>
void write_gradient(float* x, const LossRowsParams<float>& p, int64_t begin, int64_t end, double exp_scale,
                    float shift_by, double uniform) {
  const VFloat shift = splat(shift_by), factor = splat(static_cast<float>(exp_scale * p.options.logit_scale));
  const VFloat share = splat(static_cast<float>(uniform * p.options.logit_scale));
  const VFloat inverse_cap = splat(kCapped ? static_cast<float>(1.0 / p.options.softcap) : 0.0f);
  if (!kCapped && uniform == 0.0)
    return for_each_vector(begin, end,
                           [&](int64_t v, int64_t count) { store(x + v, load(x + v, count, 0.0f) * factor, count); });
  const float* class_weights = uniform == 0.0 ? nullptr : p.class_weights;
  for_each_vector(begin, end, [&](int64_t v, int64_t count) {
    const VFloat l = load(x + v, count, 0.0f);
    VFloat g = (kCapped ? exp_nonpositive(l - shift) : l) * factor;
    g = g - (class_weights == nullptr ? share : share * load(class_weights + v, count, 0.0f));
    if (kCapped) g = g - g * ((l * inverse_cap) * (l * inverse_cap));
    store(x + v, g, count);
  });
}

// Finishes a row: writes the tables, and the gradient over what row_statistics left in x. `shifts` holds the shift of
// each block's exponentials; null: all blocks use `local_max`.
void finish(float* x, const LossRowsParams<float>& p, int64_t row, TargetRule::Location at, const RowStatistics& stats,
            const float* shifts, double local_max) {
  const double lse_grad = p.lse_grad == nullptr ? 0.0 : static_cast<double>(p.lse_grad[row]);
  const RowLoss result = finish_row(stats, p.options, p.row_weight(row, at), lse_grad);
  p.tables.write(row, result, static_cast<int64_t>(stats.argmax));
  if (p.gradient == Gradient::kSkip) return;
  const bool capped = p.options.softcap > 0.0;
  double known_shift = stats.max, correction = 1.0;
  for (int64_t begin = 0; begin < p.vocab_size; begin += kBlock) {
    const int64_t end = std::min(p.vocab_size, begin + kBlock);
    if (capped) {
      write_gradient<true>(x, p, begin, end, result.prob_scale, static_cast<float>(stats.max), result.uniform);
      continue;
    }
    const double shift = shifts == nullptr ? local_max : static_cast<double>(shifts[begin / kBlock]);
    if (shift != known_shift) {  // the shift rises only a few times per row
      known_shift = shift;
      correction = std::exp(shift - stats.max);
    }
    write_gradient<false>(x, p, begin, end, result.prob_scale * correction, 0.0f, result.uniform);
  }
  const int64_t target = p.targets.target(at);
  if (!p.holds(target)) return;
  const double t = capped ? stats.target_logit / p.options.softcap : 0.0;
  x[target - p.vocab_start] = static_cast<float>(result.target_grad * p.options.logit_scale * (1.0 - t * t));
}

void process_row(float* x, const LossRowsParams<float>& p, int64_t r, Scratch& scratch) {
  const int64_t row = p.rows[r];
  if (row < 0) {
    if (p.writes_gradient()) std::memset(x, 0, static_cast<size_t>(p.vocab_size) * sizeof(float));
    return;
  }
  const TargetRule::Location at = p.targets.locate(row);
  if (p.stage == Stage::kGradient) {
    RowStatistics stats;
    std::memcpy(&stats, p.statistics + r * kRowStatistics, sizeof(stats));
    return finish(x, p, row, at, stats, nullptr, p.local_max[r]);
  }
  const RowStatistics stats = row_statistics(x, p, p.targets.target(at), scratch);
  if (p.stage == Stage::kWhole) return finish(x, p, row, at, stats, scratch.shifts.get(), stats.max);
  std::memcpy(p.statistics + r * kRowStatistics, &stats, sizeof(stats));
  p.local_max[r] = stats.max;
}

void widen(const BFloat16Bits* from, float* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t bits = static_cast<uint32_t>(from[i].bits) << 16;
    std::memcpy(to + i, &bits, sizeof(bits));
  }
}

// Branch-free, so that it vectorises; NaN as in core/dtype.h.
void narrow(const float* from, BFloat16Bits* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    uint32_t bits;
    std::memcpy(&bits, from + i, sizeof(bits));
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const uint32_t quiet_nan = (bits >> 16) | 0x40u;
    to[i].bits = static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? quiet_nan : rounded);
  }
}

void loss_rows(const LossRowsParams<float>& p, int64_t begin, int64_t end) {
  Scratch scratch(p);
  if (p.dtype == DType::kFloat32) {
    for (int64_t r = begin; r < end; ++r) process_row(static_cast<float*>(p.logits) + r * p.row_stride, p, r, scratch);
    return;
  }
  for (int64_t r = begin; r < end; ++r) {
    BFloat16Bits* row = static_cast<BFloat16Bits*>(p.logits) + r * p.row_stride;
    widen(row, scratch.widened.get(), p.vocab_size);
    process_row(scratch.widened.get(), p, r, scratch);
    if (p.gradient == Gradient::kWrite) narrow(scratch.widened.get(), row, p.vocab_size);
  }
}

}  // namespace
}  // namespace mtp
