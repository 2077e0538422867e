// A row of logits in memory: how its elements become logits, and what is computed from each.
#pragma once
#include <cmath>
#include <cstdint>
#include <type_traits>

#include "core/loss_rows_params.h"
#include "kernels/numeric.cuh"
#include "kernels/vector_row.cuh"

namespace mtp {

constexpr int kNowhere = 0x7fffffff;  // no position yet; loses every tie

// How a logit l follows from an element x of the GEMM's output. Each form computes what the one before leaves out.
//   kScaled   l = scale x, scale > 0; no label smoothing
//   kAffine   u = scale (x + bias); l = u
//   kCapped   u = to_u (x + bias); l = cap tanh(ln(2) u / 2) = cap - 2 cap r, r = 1 / (1 + 2^u)
enum class Logits { kScaled, kAffine, kCapped };

// The options as factors of the element loops. With y = x, u or r of the form, exp(l - max) = 2^(to_exponent y - high)
// for a constant `high` of the row: one multiply-add and one exponential.
struct LogitMap {
  float scale, cap;
  float to_u, to_exponent;
  bool smoothed;

  static LogitMap of(const RowOptions& options, Logits logits) {
    constexpr double kLog2EExact = 1.4426950408889634;
    const bool capped = logits == Logits::kCapped;
    const double to_u = capped ? 2.0 * kLog2EExact / options.softcap : 1.0;
    const double slope = logits == Logits::kScaled ? options.logit_scale : capped ? -2.0 * options.softcap : 1.0;
    return {static_cast<float>(options.logit_scale), static_cast<float>(options.softcap),
            static_cast<float>(options.logit_scale * to_u), static_cast<float>(slope * kLog2EExact),
            options.label_smoothing > 0.0};
  }
};

// Partial result of some of a row's elements. `position` is the first column of the maximum, or a vector that holds it.
struct RowPart {
  float max = -INFINITY;
  float sum = 0.0f;  // over v != y of exp(l_v - max); 0 while max is -inf
  float weighted_sum = 0.0f;
  float target_logit = 0.0f;
  int position = kNowhere;
};

// Where the exponents of a row start: exp(l - max) = correction 2^(to_exponent y - high). `high` is rounded; the
// correction, which goes into the factors of a row instead of its elements, keeps the error of that out of the sums.
struct Shift {
  float high, correction;
};

// Results of a finished row that its gradient needs: prob_scale 2^(to_exponent y - high) - uniform c, and that of the
// target; in a capped row times a slope of each element.
struct RowGradient {
  float high, prob_scale, uniform, target_grad;
};

// The vectors [begin, end) of a row; the last vector of the row may not be whole.
struct Slice {
  int begin, end, whole_end;

  template <typename Row>
  __device__ __forceinline__ Slice(const Row& row, int rank, int blocks) {
    const int size = (row.count() + blocks - 1) / blocks;
    begin = rank * size;
    end = begin + size < row.count() ? begin + size : row.count();
    whole_end = end < row.whole() ? end : row.whole();
  }

  // Calls visit(vector, whole) for this thread's vectors, in order; `whole` is a std::bool_constant.
  template <int kThreads, int kUnroll, typename Visit>
  __device__ __forceinline__ void for_own(const Visit& visit) const {
    const int first = begin + static_cast<int>(threadIdx.x);
#pragma unroll kUnroll
    for (int i = first; i < whole_end; i += kThreads) visit(i, std::true_type{});
    if (owns_ragged<kThreads>()) visit(whole_end, std::false_type{});
  }

  // Whether this thread has the row's last vector, not being whole.
  template <int kThreads>
  __device__ __forceinline__ bool owns_ragged() const {
    return whole_end < end && owns<kThreads>(whole_end);
  }

  template <int kThreads>
  __device__ __forceinline__ bool owns(int vector) const {
    return vector >= begin && vector < end && (vector - begin) % kThreads == static_cast<int>(threadIdx.x);
  }
};

__device__ __forceinline__ float sum_of(const float (&values)[4]) {
  return (values[0] + values[1]) + (values[2] + values[3]);
}
__device__ __forceinline__ float sum_of(const float (&values)[8]) {
  return ((values[0] + values[1]) + (values[2] + values[3])) + ((values[4] + values[5]) + (values[6] + values[7]));
}

template <int kWidth>
__device__ __forceinline__ float max_of(const float (&values)[kWidth]) {
  float max = values[0];
#pragma unroll
  for (int j = 1; j < kWidth; ++j) max = fmaxf(max, values[j]);
  return max;
}

// One row of logits: its vectors in memory, and what becomes of their elements. `kWhole`: the vector has no padding, and
// is not to be searched for the target.
template <typename scalar_t, Logits kLogits>
class LogitRow {
 public:
  static constexpr int kWidth = kVectorWidth<scalar_t>;
  static constexpr bool kScaled = kLogits == Logits::kScaled, kCapped = kLogits == Logits::kCapped;

  __device__ __forceinline__ LogitRow(const LossRowsParams<float>& p, const LogitMap& map, int64_t r)
      : memory(static_cast<scalar_t*>(p.logits) + r * p.row_stride, static_cast<int>(p.vocab_size)), p_(p), map_(map) {}

  // The logit of an element, from its u.
  __device__ __forceinline__ float logit(float u) const {
    const float y = variable(u);
    return kCapped ? map_.cap - 2.0f * map_.cap * y : (kScaled ? map_.scale * y : y);
  }
  __device__ __forceinline__ float logit_at(float x, int column) const { return logit(u_at(x, column)); }
  // Its derivative in u.
  __device__ __forceinline__ float slope_at(float x, int column) const {
    return kCapped ? 4.0f * Ratio<true>(u_at(x, column)).product() : 1.0f;
  }

  __device__ __forceinline__ Shift shift(float max) const {
    const float top = kCapped ? max - map_.cap : max;
    if (top == -INFINITY) return {0.0f, 1.0f};
    const float high = top * kLog2E;
    return {high, exp2_approx(-fmaf(top, kLog2E, -high))};
  }

  // u, which grows with l; -inf outside the row.
  template <bool kWhole>
  __device__ __forceinline__ void load_u(uint4 bits, int vector, float (&u)[kWidth]) const {
    unpack<scalar_t>(bits, u);
    if constexpr (!kScaled) {
      float bias[kWidth];
      load_table<kWhole>(p_.bias, vector, 0.0f, bias);
#pragma unroll
      for (int j = 0; j < kWidth; ++j) u[j] = map_.to_u * (u[j] + bias[j]);
    }
    if constexpr (!kWhole) {
#pragma unroll
      for (int j = 0; j < kWidth; ++j)
        if (!holds(vector, j)) u[j] = -INFINITY;
    }
  }

  // The largest u of several vectors: of a scaled row as pairs of elements, which halves the work.
  using Largest = std::conditional_t<kScaled, unsigned, float>;
  static __device__ __forceinline__ Largest nothing() {
    const float none[kWidth] = {-INFINITY, -INFINITY, -INFINITY, -INFINITY};
    return kScaled ? static_cast<Largest>(pack<scalar_t>(none).x) : static_cast<Largest>(-INFINITY);
  }
  static __device__ __forceinline__ float value(Largest largest) {
    if constexpr (kScaled) {
      return largest_of_word<scalar_t>(largest);
    } else {
      return largest;
    }
  }
  template <bool kWhole>
  __device__ __forceinline__ void add_largest(uint4 bits, int vector, Largest* largest) const {
    if constexpr (kScaled && kWhole) {
      const unsigned low = max_word<scalar_t>(bits.x, bits.y), high = max_word<scalar_t>(bits.z, bits.w);
      *largest = max_word<scalar_t>(*largest, max_word<scalar_t>(low, high));
    } else {
      float u[kWidth];
      load_u<kWhole>(bits, vector, u);
      if constexpr (kScaled) {
        add_largest<true>(pack<scalar_t>(u), vector, largest);
      } else {
        *largest = fmaxf(*largest, max_of(u));
      }
    }
  }

  // Lowers *position to the first column of the largest u of a vector, if that is larger than *largest.
  template <bool kWhole>
  __device__ __forceinline__ void find_largest(uint4 bits, int vector, float* largest, int* position) const {
    float u[kWidth];
    load_u<kWhole>(bits, vector, u);
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
      if (u[j] > *largest) {
        *largest = u[j];
        *position = memory.first_column(vector) + j;
      }
    }
  }

  // Adds a vector's terms to the sums of a part; without kWhole, all but the target's to `sum`.
  template <bool kWhole>
  __device__ __forceinline__ void add_terms(uint4 bits, int vector, float high, int target, RowPart* part) const {
    float u[kWidth];
    load_u<kWhole>(bits, vector, u);
    add_terms_of<kWhole>(u, vector, high, target, part);
  }
  template <bool kWhole>
  __device__ __forceinline__ void add_terms_of(const float (&u)[kWidth], int vector, float high, int target,
                                               RowPart* part) const {
    float terms[kWidth], y[kWidth];
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
      y[j] = variable(u[j]);
      terms[j] = exp2_approx(fmaf(y[j], map_.to_exponent, -high));
      if constexpr (!kWhole) {
        if (!holds(vector, j) || memory.first_column(vector) + j == target) terms[j] = 0.0f;
      }
    }
    part->sum += sum_of(terms);
    if constexpr (!kScaled) {
      if (!map_.smoothed) return;
      float weights[kWidth];
      load_table<kWhole>(p_.class_weights, vector, 1.0f, weights);
#pragma unroll
      for (int j = 0; j < kWidth; ++j) {
        const float l = kCapped ? fmaf(-2.0f * map_.cap, y[j], map_.cap) : y[j];
        if (kWhole || holds(vector, j)) part->weighted_sum += weights[j] * l;
      }
    }
  }

  // Overwrites a vector with its gradient. The target's element is wrong: the caller must write it.
  template <bool kWhole>
  __device__ __forceinline__ void write_gradient(uint4 bits, int vector, const RowGradient& row) const {
    float u[kWidth], gradient[kWidth], weights[kWidth];
    load_u<kWhole>(bits, vector, u);
    const bool weighted = !kScaled && map_.smoothed;
    if (weighted) load_table<kWhole>(p_.class_weights, vector, 1.0f, weights);
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
      const Ratio<sizeof(scalar_t) == 4> ratio(u[j]);
      float g = exp2_approx(fmaf(kCapped ? ratio.r : u[j], map_.to_exponent, -row.high)) * row.prob_scale;
      if (weighted) g -= row.uniform * weights[j];
      if constexpr (kCapped) g *= ratio.product();
      gradient[j] = g;
    }
    memory.store(vector, pack<scalar_t>(gradient));
  }

  __device__ __forceinline__ void write_zeros(int vector) const { memory.store(vector, make_uint4(0, 0, 0, 0)); }

  VectorRow<scalar_t> memory;

 private:
  // r of a capped logit, and r (1 - r). kPrecise keeps the relative accuracy of the product as r -> 1, where it is too
  // small for the rounding to 16 bits to show the difference.
  template <bool kPrecise>
  struct Ratio {
    float power, r;
    // Beyond 2^126 r^2 is 0, and the power must be finite.
    __device__ __forceinline__ explicit Ratio(float u)
        : power(exp2_approx(kPrecise ? fminf(u, 126.0f) : u)), r(reciprocal_approx(1.0f + power)) {}
    __device__ __forceinline__ float product() const { return kPrecise ? power * r * r : fmaf(-r, r, r); }
  };

  __device__ __forceinline__ float u_at(float x, int column) const {
    return kScaled ? x : map_.to_u * (x + (p_.bias == nullptr ? 0.0f : p_.bias[column]));
  }

  __device__ __forceinline__ bool holds(int vector, int j) const {
    return memory.first_column(vector) + j < memory.size();
  }

  __device__ __forceinline__ float variable(float u) const { return kCapped ? Ratio<false>(u).r : u; }

  // The entries of a table [V], 16-byte aligned, at a vector's elements; `fill` outside the row, or if there is none.
  template <bool kWhole>
  __device__ __forceinline__ void load_table(const float* table, int vector, float fill,
                                             float (&values)[kWidth]) const {
    const int first = memory.first_column(vector);
    if constexpr (kWhole) {
      if (table != nullptr) {
#pragma unroll
        for (int j = 0; j < kWidth; j += 4) {
          const float4 four = __ldg(reinterpret_cast<const float4*>(table + first + j));
          values[j] = four.x, values[j + 1] = four.y, values[j + 2] = four.z, values[j + 3] = four.w;
        }
        return;
      }
    }
#pragma unroll
    for (int j = 0; j < kWidth; ++j)
      values[j] = !kWhole && table != nullptr && holds(vector, j) ? __ldg(table + first + j) : fill;
  }

  const LossRowsParams<float>& p_;
  const LogitMap& map_;
};

}  // namespace mtp
