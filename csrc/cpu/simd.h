// Vectors of kLanes floats, with exp and tanh, in compiler vector extensions. Part of cpu/loss_rows_simd.h, whose rules
// apply: internal linkage, no include guard, standard headers from cpu/loss_rows_isa.h.
namespace mtp {
namespace {

typedef float VFloat __attribute__((vector_size(kLanes * sizeof(float))));
typedef int32_t VInt __attribute__((vector_size(kLanes * sizeof(float))));

constexpr int kUnroll = 4;  // independent accumulators, to hide the latency of add and max
constexpr int64_t kStride = kUnroll * kLanes;

inline VFloat splat(float x) { return x - VFloat{}; }

inline VFloat load(const float* p) {
  VFloat v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

inline void store(float* p, VFloat v) { std::memcpy(p, &v, sizeof(v)); }

// Loads count < kLanes elements; the other lanes hold `fill`.
inline VFloat load_partial(const float* p, int64_t count, float fill) {
  VFloat v = splat(fill);
  std::memcpy(&v, p, static_cast<size_t>(count) * sizeof(float));
  return v;
}

inline void store_partial(float* p, VFloat v, int64_t count) {
  std::memcpy(p, &v, static_cast<size_t>(count) * sizeof(float));
}

// For any count <= kLanes; for_each_vector passes kLanes as a constant, so the test folds away.
inline VFloat load(const float* p, int64_t count, float fill) {
  return count == kLanes ? load(p) : load_partial(p, count, fill);
}

inline void store(float* p, VFloat v, int64_t count) { count == kLanes ? store(p, v) : store_partial(p, v, count); }

// Calls body(index, count) over [begin, end) in vectors; count < kLanes only at the end of the row.
template <typename Body>
inline void for_each_vector(int64_t begin, int64_t end, const Body& body) {
  int64_t v = begin;
  for (; v + kLanes <= end; v += kLanes) body(v, static_cast<int64_t>(kLanes));
  if (v < end) body(v, end - v);
}

inline VInt bits_of(VFloat x) {
  VInt bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits;
}

inline VFloat from_bits(VInt bits) {
  VFloat x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
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

struct ReducedExp {
  VInt shifted_exponent;  // n in the exponent field of a float
  VFloat fraction;        // e^r - 1, |r| <= ln2 / 2
};

// e^x = 2^n e^r: n, and e^r - 1 by a minimax polynomial (relative error 3e-9 before rounding).
inline ReducedExp reduce_exp(VFloat x) {
  const VFloat kMagic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer, held in the low bits
  const VFloat shifted = x * splat(1.44269504f) + kMagic;
  const VFloat n = shifted - kMagic;
  VFloat r = x - n * splat(0.693359375f);  // ln 2 in two parts; n times the first is exact
  r = r - n * splat(-2.12194440e-4f);
  VFloat q = splat(1.38145e-3f);
  q = q * r + splat(8.36875e-3f);
  q = q * r + splat(4.166839e-2f);
  q = q * r + splat(1.666652e-1f);
  q = q * r + splat(4.9999993e-1f);
  return {bits_of(shifted) << 23, q * (r * r) + r};
}

// exp(x) for x <= ~0, relative error 1.2e-7. 0 below -87.3 (where it would be subnormal) and for -inf; NaN propagates.
inline VFloat exp_nonpositive(VFloat x) {
  const ReducedExp e = reduce_exp(x);
  // e^r is in [0.7, 1.42] and 2^n at least 2^-126: adding n to the exponent field multiplies exactly.
  const VFloat product = from_bits(bits_of(e.fraction + splat(1.0f)) + e.shifted_exponent);
  return x < splat(-87.3f) ? splat(0.0f) : product;
}

// tanh(y / 2) = (e^y - 1) / (2 + (e^y - 1)). e^y - 1 is computed without cancellation, so small y keep their relative
// accuracy (3e-7).
inline VFloat tanh_of_half(VFloat y) {
  const VFloat low = splat(-20.0f), high = splat(20.0f);  // tanh(10) rounds to 1; NaN passes through both
  y = low > y ? low : y;
  y = high < y ? high : y;
  const ReducedExp e = reduce_exp(y);
  const VFloat power = from_bits(e.shifted_exponent + (127 << 23));
  const VFloat minus_one = power * e.fraction + (power - splat(1.0f));
  return minus_one / (splat(2.0f) + minus_one);
}

}  // namespace
}  // namespace mtp
