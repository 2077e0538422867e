// The float32/bfloat16 row kernel, written once in compiler vector extensions. Each loss_rows_<isa>.cpp defines kLanes,
// includes the standard headers, switches the target instruction set on with a pragma, and then includes this file. So
// everything here has internal linkage: an inline function with external linkage would be merged across the three
// translation units, and a processor without AVX-512 could be handed its AVX-512 copy.
// No include guard and no includes: see cpu/loss_rows_isa.h.
namespace mtp {
namespace {

typedef float VFloat __attribute__((vector_size(kLanes * sizeof(float))));
typedef int32_t VInt __attribute__((vector_size(kLanes * sizeof(float))));

constexpr int64_t kBlock = 1024;  // elements that one float32 partial sum covers; a multiple of every unrolled stride
constexpr int kUnroll = 4;        // independent accumulators, to hide the latency of add and max
constexpr int64_t kStride = kUnroll * kLanes;
static_assert(kBlock % kStride == 0, "a block is a whole number of unrolled strides");

inline VFloat splat(float x) { return x - VFloat{}; }

inline VFloat load(const float* p) {
  VFloat v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

inline void store(float* p, VFloat v) { std::memcpy(p, &v, sizeof(v)); }

// The last count < kLanes elements; the other lanes hold `fill`.
inline VFloat load_partial(const float* p, int64_t count, float fill) {
  VFloat v = splat(fill);
  std::memcpy(&v, p, static_cast<size_t>(count) * sizeof(float));
  return v;
}

inline void store_partial(float* p, VFloat v, int64_t count) {
  std::memcpy(p, &v, static_cast<size_t>(count) * sizeof(float));
}

inline VFloat max(VFloat a, VFloat b) { return b > a ? b : a; }  // keeps a where b is NaN

inline float reduce_max(VFloat v) {
  float m = v[0];
  for (int i = 1; i < kLanes; ++i) m = v[i] > m ? v[i] : m;
  return m;
}

inline double reduce_add(VFloat v) {
  double sum = 0.0;
  for (int i = 0; i < kLanes; ++i) sum += static_cast<double>(v[i]);
  return sum;
}

// exp(x) for x <= ~0: 2^n e^r with |r| <= ln2 / 2 and a minimax polynomial (relative error 3e-9 before rounding, 1.2e-7
// after). Below -87.3 the result would be subnormal and is 0, as for -inf; NaN stays NaN.
inline VFloat exp_nonpositive(VFloat x) {
  const VFloat kMagic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer, held in the low bits
  const VFloat shifted = x * splat(1.44269504f) + kMagic;
  const VFloat n = shifted - kMagic;
  VFloat r = x - n * splat(0.693359375f);  // ln 2 in two parts, the first exact in n * part
  r = r - n * splat(-2.12194440e-4f);
  VFloat q = splat(1.38145e-3f);
  q = q * r + splat(8.36875e-3f);
  q = q * r + splat(4.166839e-2f);
  q = q * r + splat(1.666652e-1f);
  q = q * r + splat(4.9999993e-1f);
  const VFloat p = q * (r * r) + r + splat(1.0f);
  VInt bits;
  std::memcpy(&bits, &shifted, sizeof(bits));
  bits = (bits << 23) + (127 << 23);
  VFloat scale;
  std::memcpy(&scale, &bits, sizeof(scale));
  return x < splat(-87.3f) ? splat(0.0f) : p * scale;
}

inline VFloat absolute(VFloat x) { return x < splat(0.0f) ? -x : x; }

inline VFloat tanh(VFloat x) {
  const VFloat a = absolute(x);
  const VFloat e = exp_nonpositive(a * splat(-2.0f));
  const VFloat large = (splat(1.0f) - e) / (splat(1.0f) + e);
  const VFloat u = a * a;  // near 0 the quotient cancels: an odd minimax polynomial, relative error 4e-9
  VFloat q = splat(-5.71704e-3f);
  q = q * u + splat(2.065059e-2f);
  q = q * u + splat(-5.37435e-2f);
  q = q * u + splat(1.3331491e-1f);
  q = q * u + splat(-3.3333284e-1f);
  const VFloat small = q * u * a + a;
  const VFloat magnitude = a < splat(0.625f) ? small : large;
  return x < splat(0.0f) ? -magnitude : magnitude;
}

// Calls body(index, count) over [begin, end) in vectors; count < kLanes only at the end of the row.
template <typename Body>
inline void for_each_vector(int64_t begin, int64_t end, const Body& body) {
  int64_t v = begin;
  for (; v + kLanes <= end; v += kLanes) body(v, static_cast<int64_t>(kLanes));
  if (v < end) body(v, end - v);
}

// x <- scale * (x + bias), then the cap. A pass of its own: only rows with these options pay for it.
void transform_logits(float* x, const LossRowsParams<float>& p) {
  const VFloat scale = splat(static_cast<float>(p.logit_scale));
  const bool capped = p.softcap > 0.0;
  const VFloat cap = splat(static_cast<float>(p.softcap)), inverse_cap = splat(static_cast<float>(1.0 / p.softcap));
  for_each_vector(0, p.vocab_size, [&](int64_t v, int64_t count) {
    const bool full = count == kLanes;
    VFloat l = full ? load(x + v) : load_partial(x + v, count, 0.0f);
    if (p.bias != nullptr) l = l + (full ? load(p.bias + v) : load_partial(p.bias + v, count, 0.0f));
    l = l * scale;
    if (capped) l = cap * tanh(l * inverse_cap);
    full ? store(x + v, l) : store_partial(x + v, l, count);
  });
}

// The largest logit and its first index. The index is searched only in the block that raised the maximum.
float find_max(const float* x, int64_t vocab_size, int32_t* index) {
  float best = -INFINITY;
  int64_t best_block = 0;
  for (int64_t begin = 0; begin < vocab_size; begin += kBlock) {
    const int64_t end = std::min(vocab_size, begin + kBlock);
    VFloat m[kUnroll];
    for (VFloat& acc : m) acc = splat(-INFINITY);
    int64_t v = begin;
    for (; v + kStride <= end; v += kStride)
      for (int i = 0; i < kUnroll; ++i) m[i] = max(m[i], load(x + v + i * kLanes));
    for_each_vector(v, end, [&](int64_t at, int64_t count) {
      m[0] = max(m[0], count == kLanes ? load(x + at) : load_partial(x + at, count, -INFINITY));
    });
    const float block_max = reduce_max(max(max(m[0], m[1]), max(m[2], m[3])));
    if (block_max > best) {
      best = block_max;
      best_block = begin;
    }
  }
  *index = 0;
  if (vocab_size == 0) return best;  // an empty shard
  int64_t v = best_block;
  const int64_t end = std::min(vocab_size, best_block + kBlock);
  while (v + 1 < end && x[v] != best) ++v;
  if (x[v] == best) *index = static_cast<int32_t>(v);  // a row of NaN has no maximum
  return best;
}

// sum_v exp(x_v - max), stored in place of x_v where asked.
template <bool kStore>
double sum_exp(float* x, int64_t vocab_size, float max_logit) {
  const VFloat shift = splat(max_logit);
  double total = 0.0;
  for (int64_t begin = 0; begin < vocab_size; begin += kBlock) {
    const int64_t end = std::min(vocab_size, begin + kBlock);
    VFloat sum[kUnroll];
    for (VFloat& acc : sum) acc = splat(0.0f);
    int64_t v = begin;
    for (; v + kStride <= end; v += kStride) {
      for (int i = 0; i < kUnroll; ++i) {
        const VFloat e = exp_nonpositive(load(x + v + i * kLanes) - shift);
        if (kStore) store(x + v + i * kLanes, e);
        sum[i] = sum[i] + e;
      }
    }
    for_each_vector(v, end, [&](int64_t at, int64_t count) {
      const bool full = count == kLanes;
      const VFloat e = exp_nonpositive((full ? load(x + at) : load_partial(x + at, count, -INFINITY)) - shift);
      if (kStore) full ? store(x + at, e) : store_partial(x + at, e, count);
      // A lane past the end holds exp(-inf - max): 0, or NaN for max = -inf, when the sum is NaN already.
      sum[0] = sum[0] + e;
    });
    total += reduce_add((sum[0] + sum[1]) + (sum[2] + sum[3]));
  }
  return total;
}

// sum_v c_v x_v, for label smoothing.
double weighted_logit_sum(const float* x, const float* class_weights, int64_t vocab_size) {
  double total = 0.0;
  for (int64_t begin = 0; begin < vocab_size; begin += kBlock) {
    VFloat sum = splat(0.0f);
    for_each_vector(begin, std::min(vocab_size, begin + kBlock), [&](int64_t v, int64_t count) {
      const bool full = count == kLanes;
      VFloat l = full ? load(x + v) : load_partial(x + v, count, 0.0f);
      if (class_weights != nullptr)
        l = l * (full ? load(class_weights + v) : load_partial(class_weights + v, count, 0.0f));
      sum = sum + l;
    });
    total += reduce_add(sum);
  }
  return total;
}

// x holds exp(l - max) (kRecompute false) or l (true); leaves d/dx. The target's element is the caller's.
template <bool kRecompute>
void write_gradient(float* x, const LossRowsParams<float>& p, const RowLoss& row, float max_logit) {
  const VFloat shift = splat(max_logit), scale = splat(static_cast<float>(p.logit_scale));
  const VFloat inverse_cap = splat(p.softcap > 0.0 ? static_cast<float>(1.0 / p.softcap) : 0.0f);
  const float uniform = static_cast<float>(row.uniform);
  const bool plain = uniform == 0.0f && !kRecompute;
  const VFloat factor = splat(static_cast<float>(plain ? row.prob_scale * p.logit_scale : row.prob_scale));
  for_each_vector(0, p.vocab_size, [&](int64_t v, int64_t count) {
    const bool full = count == kLanes;
    const VFloat l = full ? load(x + v) : load_partial(x + v, count, 0.0f);
    VFloat g = (kRecompute ? exp_nonpositive(l - shift) : l) * factor;
    if (!plain) {
      VFloat c = splat(uniform);
      if (uniform != 0.0f && p.class_weights != nullptr)
        c = c * (full ? load(p.class_weights + v) : load_partial(p.class_weights + v, count, 0.0f));
      g = (g - c) * scale;
      if (kRecompute) g = g * (splat(1.0f) - (l * inverse_cap) * (l * inverse_cap));
    }
    full ? store(x + v, g) : store_partial(x + v, g, count);
  });
}

// Reads a row of logits. Leaves exp(l - max), or with a cap l, in x; the target's own element is undefined.
RowStatistics row_statistics(float* x, const LossRowsParams<float>& p, int64_t target) {
  const bool capped = p.softcap > 0.0;
  if (capped || p.bias != nullptr || p.logit_scale != 1.0) transform_logits(x, p);
  int32_t argmax = 0;
  const float max_logit = find_max(x, p.vocab_size, &argmax);
  RowStatistics stats{max_logit, 0.0, 0.0, 0.0, 0.0, static_cast<double>(p.vocab_start + argmax)};
  if (p.options.label_smoothing > 0.0) stats.weighted_sum = weighted_logit_sum(x, p.class_weights, p.vocab_size);
  if (p.holds(target)) {
    const int64_t local = target - p.vocab_start;
    stats.target_logit = x[local];
    stats.target_class_weight = p.class_weight(local);
    x[local] = -INFINITY;  // the sum over the others keeps its own precision: see core/row_loss.h
  }
  const bool store = p.gradient == Gradient::kWrite && !capped;
  // A shard may be all -inf where the row is not; (-inf) - (-inf) would make it NaN.
  const float shift = max_logit == -INFINITY && p.stage == Stage::kStatistics ? 0.0f : max_logit;
  stats.sum_others = store ? sum_exp<true>(x, p.vocab_size, shift) : sum_exp<false>(x, p.vocab_size, shift);
  return stats;
}

// Ends a row: tables, and the gradient in place of what row_statistics left in x.
void finish(float* x, const LossRowsParams<float>& p, int64_t row, int64_t target, const RowStatistics& stats,
            double local_max) {
  const TargetRule::Location at = p.targets.locate(row);
  const double lse_grad = p.lse_grad == nullptr ? 0.0 : static_cast<double>(p.lse_grad[row]);
  RowLoss result = finish_row(stats, p.options, p.row_weight(row, at), lse_grad);
  p.loss[row] = static_cast<float>(result.loss);
  p.lse[row] = static_cast<float>(result.lse);
  p.predicted[row] = static_cast<int32_t>(stats.argmax);
  if (p.gradient == Gradient::kSkip) return;
  double target_grad = result.target_grad * p.logit_scale;
  if (p.softcap > 0.0) {
    const double t = stats.target_logit / p.softcap;
    target_grad *= 1.0 - t * t;
    write_gradient<true>(x, p, result, static_cast<float>(stats.max));
  } else {
    if (local_max != stats.max) result.prob_scale *= std::exp(local_max - stats.max);
    write_gradient<false>(x, p, result, static_cast<float>(stats.max));
  }
  if (p.holds(target)) x[target - p.vocab_start] = static_cast<float>(target_grad);
}

void process_row(float* x, const LossRowsParams<float>& p, int64_t r) {
  const int64_t row = p.rows[r], target = p.targets.target(p.targets.locate(row));
  if (p.stage == Stage::kGradient) {
    RowStatistics stats;
    std::memcpy(&stats, p.statistics + r * kRowStatistics, sizeof(stats));
    return finish(x, p, row, target, stats, p.local_max[r]);
  }
  const RowStatistics stats = row_statistics(x, p, target);
  if (p.stage == Stage::kWhole) return finish(x, p, row, target, stats, stats.max);
  std::memcpy(p.statistics + r * kRowStatistics, &stats, sizeof(stats));
  p.local_max[r] = stats.max;
}

void widen(const BFloat16Bits* from, float* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t bits = static_cast<uint32_t>(from[i].bits) << 16;
    std::memcpy(to + i, &bits, sizeof(bits));
  }
}

// Branch-free, so that it vectorises; the NaN rule is core/dtype.h's.
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
  if (p.dtype == DType::kFloat32) {
    for (int64_t r = begin; r < end; ++r) process_row(static_cast<float*>(p.logits) + r * p.row_stride, p, r);
    return;
  }
  std::unique_ptr<float[]> scratch(new float[static_cast<size_t>(p.vocab_size)]);
  for (int64_t r = begin; r < end; ++r) {
    BFloat16Bits* row = static_cast<BFloat16Bits*>(p.logits) + r * p.row_stride;
    widen(row, scratch.get(), p.vocab_size);
    process_row(scratch.get(), p, r);
    if (p.gradient == Gradient::kWrite) narrow(scratch.get(), row, p.vocab_size);
  }
}

}  // namespace
}  // namespace mtp
