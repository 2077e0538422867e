// The float32/bfloat16 row kernel of every instruction set that this processor has, and the float64 kernel, against the
// definition in long double.
#include "cpu/loss_rows.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "check.h"
#include "cpu/capability.h"
#include "loss_problem.h"

namespace {

using loss_problem::Expected;
using loss_problem::Options;
using loss_problem::Problem;

constexpr double kInf = std::numeric_limits<double>::infinity();

template <typename acc_t>
struct Buffers {
  std::vector<acc_t> head_scale, row_scale, lse_grad, bias, class_weights, token_weights, loss, lse;
  std::vector<int32_t> predicted;
  mtp::LossRowsParams<acc_t> params{};

  explicit Buffers(const Problem& p, mtp::Gradient gradient) {
    const auto narrow = [](const std::vector<double>& x) { return std::vector<acc_t>(x.begin(), x.end()); };
    head_scale = narrow(p.head_scale), row_scale = narrow(p.row_scale);
    lse_grad = narrow(p.lse_grad), bias = narrow(p.bias);
    class_weights = narrow(p.class_weights), token_weights = narrow(p.token_weights);
    loss.assign(p.rows.size(), acc_t(-7)), lse = loss;
    predicted.assign(p.rows.size(), -7);
    params.vocab_size = p.vocab;
    params.rows = p.rows.data();
    params.targets.labels = p.labels.data();
    params.targets.label_type = mtp::IndexType::kInt64;
    params.targets.batch = 1;
    params.targets.seq_len = p.seq;
    params.targets.label_len = params.targets.label_stride = p.seq + p.heads;
    params.targets.first_shift = 1;
    params.targets.ignore_index = -100;
    params.targets.token_weights = p.opt.token_weights ? token_weights.data() : nullptr;
    params.head_scale = head_scale.data();
    params.row_scale = p.opt.row_scale ? row_scale.data() : nullptr;
    params.lse_grad = p.opt.lse_grad ? lse_grad.data() : nullptr;
    params.bias = p.opt.bias ? bias.data() : nullptr;
    params.class_weights = p.opt.class_weights ? class_weights.data() : nullptr;
    double sum = 0;
    for (int64_t v = 0; v < p.vocab; ++v) sum += p.class_weight(v);
    params.options = {p.opt.smoothing, p.opt.z_loss, p.opt.softcap, p.opt.scale, sum, p.vocab};
    params.gradient = gradient;
    params.tables.loss = loss.data();
    params.tables.lse = lse.data();
    params.tables.predicted = predicted.data();
  }
};

// Compares the tables and, if written, the gradient `grad(r, v)` of the r-th row of the block.
template <typename acc_t, typename Grad>
void compare(const Problem& p, const Buffers<acc_t>& out, double eps, double grad_eps, const Grad& grad) {
  for (size_t r = 0; r < p.rows.size(); ++r) {
    const int64_t row = p.rows[r];
    const Expected e = p.expect(p.logits.data() + static_cast<int64_t>(r) * p.vocab, row);
    const auto at = static_cast<size_t>(row);
    CHECK_NEAR(out.loss[at], e.loss, eps * (1 + std::fabs(e.loss)));
    CHECK_NEAR(out.lse[at], e.lse, eps * (1 + std::fabs(e.lse)));
    CHECK(out.predicted[at] == e.predicted);
    if (out.params.gradient == mtp::Gradient::kSkip) continue;
    double largest = 0;
    for (const double g : e.grad) largest = std::max(largest, std::fabs(g));
    for (int64_t v = 0; v < p.vocab; ++v) {
      const double expected = e.grad[static_cast<size_t>(v)];
      CHECK_NEAR(grad(r, v), expected, grad_eps * std::fabs(expected) + eps * largest);
    }
  }
}

void run_float32(const Problem& p, mtp::CpuCapability isa, mtp::Gradient gradient) {
  Buffers<float> out(p, gradient);
  const int64_t stride = p.vocab + 3;  // rows need not be adjacent; the padding must not change
  std::vector<float> logits(p.rows.size() * static_cast<size_t>(stride), -12345.0f);
  for (size_t r = 0; r < p.rows.size(); ++r)
    std::copy_n(p.logits.begin() + static_cast<int64_t>(r) * p.vocab, p.vocab,
                logits.begin() + static_cast<int64_t>(r) * stride);
  out.params.logits = logits.data();
  out.params.row_stride = stride;
  out.params.dtype = mtp::DType::kFloat32;
  const auto rows = static_cast<int64_t>(p.rows.size());
  mtp::loss_rows_kernel(isa)(out.params, 0, rows / 2);  // two ranges, as two threads would
  mtp::loss_rows_kernel(isa)(out.params, rows / 2, rows);
  compare(p, out, 1e-6, 2e-5, [&](size_t r, int64_t v) { return logits[r * static_cast<size_t>(stride) + v]; });
  for (size_t r = 0; r < p.rows.size(); ++r)
    for (int64_t v = p.vocab; v < stride; ++v) CHECK(logits[r * static_cast<size_t>(stride) + v] == -12345.0f);
}

void run_bfloat16(const Problem& p, mtp::CpuCapability isa) {
  Buffers<float> out(p, mtp::Gradient::kWrite);
  std::vector<mtp::BFloat16Bits> logits;
  for (const double x : p.logits) logits.push_back(mtp::to_bfloat16(static_cast<float>(x)));
  out.params.logits = logits.data();
  out.params.row_stride = p.vocab;
  out.params.dtype = mtp::DType::kBFloat16;
  mtp::loss_rows_kernel(isa)(out.params, 0, static_cast<int64_t>(p.rows.size()));
  compare(p, out, 1e-6, 0.004, [&](size_t r, int64_t v) {  // twice 2^-9 = 0.002, one rounding to 8 bits
    return mtp::to_float(logits[r * static_cast<size_t>(p.vocab) + static_cast<size_t>(v)]);
  });
}

// Two shards, combined as by a caller over processes, must equal the whole row.
void run_sharded(const Problem& p, mtp::CpuCapability isa, int64_t split) {
  Buffers<float> out(p, mtp::Gradient::kWrite);
  const size_t rows = p.rows.size();
  const int64_t widths[] = {split, p.vocab - split}, starts[] = {0, split};
  std::vector<float> shards[2];
  std::vector<double> statistics[2], local_max[2];
  const auto run = [&](int i, mtp::Stage stage) {
    auto params = out.params;
    params.stage = stage;
    params.dtype = mtp::DType::kFloat32;
    params.vocab_size = params.row_stride = widths[i];
    params.vocab_start = starts[i];
    params.logits = shards[i].data();
    params.statistics = statistics[i].data();
    params.local_max = local_max[i].data();
    if (params.bias != nullptr) params.bias += starts[i];
    if (params.class_weights != nullptr) params.class_weights += starts[i];
    mtp::loss_rows_kernel(isa)(params, 0, static_cast<int64_t>(rows));
  };
  for (int i = 0; i < 2; ++i) {
    for (size_t r = 0; r < rows; ++r)
      for (int64_t v = 0; v < widths[i]; ++v)
        shards[i].push_back(
            static_cast<float>(p.logits[r * static_cast<size_t>(p.vocab) + static_cast<size_t>(starts[i] + v)]));
    statistics[i].resize(rows * mtp::kRowStatistics);
    local_max[i].resize(rows);
    run(i, mtp::Stage::kStatistics);
  }
  for (size_t r = 0; r < rows; ++r) {
    double* a = statistics[0].data() + r * mtp::kRowStatistics;
    double* b = statistics[1].data() + r * mtp::kRowStatistics;
    const double max = std::max(a[0], b[0]);
    a[1] = a[1] * std::exp(a[0] - max) + b[1] * std::exp(b[0] - max);
    for (const int field : {2, 3, 4}) a[field] += b[field];
    a[5] = a[0] >= b[0] ? a[5] : b[5];
    a[0] = max;
    std::copy_n(a, mtp::kRowStatistics, b);
  }
  for (int i = 0; i < 2; ++i) run(i, mtp::Stage::kGradient);
  compare(p, out, 1e-6, 2e-5, [&](size_t r, int64_t v) {
    const int i = v < split ? 0 : 1;
    return shards[i][r * static_cast<size_t>(widths[i]) + static_cast<size_t>(v - starts[i])];
  });
}

void run_float64(const Problem& p) {
  Buffers<double> out(p, mtp::Gradient::kWrite);
  std::vector<double> logits = p.logits;
  out.params.logits = logits.data();
  out.params.row_stride = p.vocab;
  out.params.dtype = mtp::DType::kFloat64;
  mtp::loss_rows_double(out.params, 0, static_cast<int64_t>(p.rows.size()));
  compare(p, out, 1e-13, 1e-12, [&](size_t r, int64_t v) { return logits[r * static_cast<size_t>(p.vocab) + v]; });
}

std::vector<mtp::CpuCapability> available() {
  std::vector<mtp::CpuCapability> all{mtp::CpuCapability::kPlain};
  if (mtp::cpu_capability() >= mtp::CpuCapability::kAvx2) all.push_back(mtp::CpuCapability::kAvx2);
  if (mtp::cpu_capability() >= mtp::CpuCapability::kAvx512) all.push_back(mtp::CpuCapability::kAvx512);
  return all;
}

// Rows whose maximum moves from block to block of the kernel: rising, falling, and after whole blocks of -inf.
void run_moving_maximum(mtp::CpuCapability isa) {
  const auto run = [&](auto logit_of) {
    Problem p(3 * 1024 + 5, 2, 1, Options{}, loss_problem::keep, 1);
    for (size_t i = 0; i < p.logits.size(); ++i)
      p.logits[i] = static_cast<float>(logit_of(static_cast<int64_t>(i) % p.vocab, p.logits[i]));
    p.labels = {0, p.vocab - 2, p.vocab - 1};  // in the last block: the target's logit is finite in every row
    run_float32(p, isa, mtp::Gradient::kWrite);
    run_sharded(p, isa, 2048);
  };
  run([](int64_t v, double x) { return x + 0.01 * static_cast<double>(v); });
  run([](int64_t v, double x) { return x - 0.01 * static_cast<double>(v); });
  run([](int64_t v, double x) { return v < 2048 ? -kInf : x - 1000.0; });
}

// A row of -1 has a zero gradient and unchanged tables.
void run_absent_row(mtp::CpuCapability isa) {
  const Problem p(100, 3, 1, Options{}, loss_problem::keep, 1);
  Buffers<float> out(p, mtp::Gradient::kWrite);
  const std::vector<int64_t> rows{2, -1, 0};
  std::vector<float> x(p.logits.begin(), p.logits.end());
  std::fill(x.begin() + 100, x.begin() + 200, NAN);
  out.params.rows = rows.data();
  out.params.logits = x.data();
  out.params.row_stride = p.vocab;
  out.params.dtype = mtp::DType::kFloat32;
  mtp::loss_rows_kernel(isa)(out.params, 0, 3);
  CHECK(std::all_of(x.begin() + 100, x.begin() + 200, [](float g) { return g == 0.0f; }));
  CHECK(out.loss[1] == -7.0f && out.predicted[1] == -7 && out.loss[0] > 0 && out.loss[2] > 0);
}

// Without the optional tables, loss and gradient are the same.
void run_without_tables(mtp::CpuCapability isa) {
  const Problem p(2 * 1024 + 7, 3, 2, Options{}, loss_problem::keep, 1);
  std::vector<float> losses[2], gradients[2];
  for (const bool absent : {false, true}) {
    Buffers<float> out(p, mtp::Gradient::kWrite);
    std::vector<float>& x = gradients[absent ? 1 : 0];
    x.assign(p.logits.begin(), p.logits.end());
    if (absent) out.params.tables.lse = nullptr, out.params.tables.predicted = nullptr;
    out.params.logits = x.data();
    out.params.row_stride = p.vocab;
    out.params.dtype = mtp::DType::kFloat32;
    mtp::loss_rows_kernel(isa)(out.params, 0, static_cast<int64_t>(p.rows.size()));
    losses[absent ? 1 : 0] = out.loss;
  }
  CHECK(losses[0] == losses[1] && gradients[0] == gradients[1]);
}

// Edge cases: a near-certain target, -inf, NaN, a row of one class.
void run_extremes(mtp::CpuCapability isa) {
  const auto grads_of = [&](std::vector<double> logits, int64_t target, double* loss) {
    Problem p(static_cast<int64_t>(logits.size()), 1, 1, Options{}, loss_problem::keep, 1);
    p.logits = logits;
    p.labels = {0, target};
    p.head_scale = {1.0};
    Buffers<float> out(p, mtp::Gradient::kWrite);
    std::vector<float> x(logits.begin(), logits.end());
    out.params.logits = x.data();
    out.params.row_stride = p.vocab;
    out.params.dtype = mtp::DType::kFloat32;
    mtp::loss_rows_kernel(isa)(out.params, 0, 1);
    *loss = out.loss[0];
    return x;
  };
  double loss;
  std::vector<double> certain(1000, 0.0);
  certain[17] = 25.0;  // 1 - p_y = 999 e^-25 = 1.4e-8 would vanish if p_y were rounded to float32
  const double rest = 999 * std::exp(-25.0);
  std::vector<float> g = grads_of(certain, 17, &loss);
  CHECK_NEAR(loss, std::log1p(rest), 1e-5 * rest);
  CHECK_NEAR(g[17], -rest / (1 + rest), 1e-5 * rest);
  g = grads_of({1.0, -kInf, 2.0, -kInf, 0.5}, 0, &loss);
  CHECK(std::isfinite(loss) && g[1] == 0.0f && g[3] == 0.0f);
  g = grads_of({1.0, 2.0, -kInf}, 2, &loss);
  CHECK(loss == kInf && g[2] == -1.0f);
  g = grads_of({1.0, std::nan(""), 2.0}, 0, &loss);
  CHECK(std::isnan(loss) && std::isnan(g[0]) && std::isnan(g[2]));
  g = grads_of({3.0}, 0, &loss);
  CHECK(loss == 0.0 && g[0] == 0.0f);
}

}  // namespace

int main() {
  unsigned seed = 0;
  for (const mtp::CpuCapability isa : available()) {
    std::printf("instruction set: %s\n", mtp::capability_name(isa));
    for (const Options& opt : loss_problem::option_sets())
      for (const int64_t vocab : {1, 3, 7, 8, 31, 33, 64, 127, 1023, 1024, 1025, 4099}) {
        run_float32({vocab, 3, 2, opt, loss_problem::keep, ++seed}, isa, mtp::Gradient::kWrite);
        run_bfloat16({vocab, 3, 2, opt, loss_problem::to_bfloat16, ++seed}, isa);
      }
    for (const Options& opt : loss_problem::option_sets())
      for (const int64_t split : {0, 1, 40, 64}) run_sharded({65, 3, 2, opt, loss_problem::keep, ++seed}, isa, split);
    run_float32({515, 2, 3, Options{}, loss_problem::keep, ++seed}, isa, mtp::Gradient::kSkip);
    run_moving_maximum(isa);
    run_absent_row(isa);
    run_without_tables(isa);
    run_extremes(isa);
  }
  for (const Options& opt : loss_problem::option_sets())
    for (const int64_t vocab : {1, 5, 1025}) run_float64({vocab, 3, 2, opt, loss_problem::keep, ++seed});
  return check::summary();
}
