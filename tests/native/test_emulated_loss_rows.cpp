// The CUDA loss row kernels, from their own source under the emulator, against the definition in long double.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <iterator>
#include <limits>
#include <vector>

#include "check.h"
#include "element.h"
#include "emulator/device.h"
#include "emulator/guarded_memory.h"
#include "kernels/loss_rows.h"
#include "loss_problem.h"

namespace {

using emulator::DeviceArray;
using emulator::Order;
using loss_problem::Expected;
using loss_problem::Options;
using loss_problem::Problem;

constexpr double kInf = std::numeric_limits<double>::infinity();
constexpr float kUntouched = -7.0f;
constexpr Order kOrders[] = {Order::kForward, Order::kReverse, Order::kShuffled};

// A problem in device memory. Every array ends at a guard page.
template <typename scalar_t>
struct OnDevice {
  static std::vector<float> narrow(const std::vector<double>& x) { return {x.begin(), x.end()}; }

  static constexpr int64_t kWidth = 16 / sizeof(scalar_t);
  static constexpr size_t kAligned = 16;

  // With so many vectors of padding beyond the end of the last vector of a row.
  explicit OnDevice(const Problem& p, int64_t padding = 0)
      : stride(((p.vocab + kWidth - 1) / kWidth + padding) * kWidth),
        logits(static_cast<size_t>(stride) * p.rows.size(), 0, kAligned),
        rows(p.rows),
        labels(p.labels),
        head_scale(narrow(p.head_scale)),
        row_scale(narrow(p.row_scale)),
        lse_grad(narrow(p.lse_grad)),
        bias(narrow(p.bias), 0, kAligned),
        class_weights(narrow(p.class_weights), 0, kAligned),
        token_weights(narrow(p.token_weights)),
        loss(p.rows.size()),
        lse(p.rows.size()),
        total(1),
        predicted(p.rows.size()) {
    std::fill(loss.begin(), loss.end(), kUntouched);
    std::fill(lse.begin(), lse.end(), kUntouched);
    std::fill(predicted.begin(), predicted.end(), -7);
    std::fill(logits.begin(), logits.end(), Element<scalar_t>::store(-1234.0));
    for (size_t r = 0; r < p.rows.size(); ++r)
      for (int64_t v = 0; v < p.vocab; ++v)
        at(r, v) = Element<scalar_t>::store(p.logits[r * static_cast<size_t>(p.vocab) + static_cast<size_t>(v)]);
    params.logits = logits.data();
    params.dtype = Element<scalar_t>::dtype;
    params.row_stride = stride;
    params.vocab_size = p.vocab;
    params.rows = rows.data();
    params.targets.labels = labels.data();
    params.targets.label_type = mtp::IndexType::kInt64;
    params.targets.token_weights = p.opt.token_weights ? token_weights.data() : nullptr;
    params.targets.batch = 1;
    params.targets.seq_len = p.seq;
    params.targets.label_len = params.targets.label_stride = p.seq + p.heads;
    params.targets.first_shift = 1;
    params.targets.ignore_index = -100;
    params.head_scale = head_scale.data();
    params.row_scale = p.opt.row_scale ? row_scale.data() : nullptr;
    params.lse_grad = p.opt.lse_grad ? lse_grad.data() : nullptr;
    params.bias = p.opt.bias ? bias.data() : nullptr;
    params.class_weights = p.opt.class_weights ? class_weights.data() : nullptr;
    double sum = 0;
    for (int64_t v = 0; v < p.vocab; ++v) sum += p.class_weight(v);
    total[0] = sum;
    params.class_weight_total = p.opt.row_scale ? total.data() : nullptr;  // tied to an arbitrary option
    params.options = {p.opt.smoothing, p.opt.z_loss, p.opt.softcap, p.opt.scale, p.opt.row_scale ? NAN : sum, p.vocab};
    params.gradient = mtp::Gradient::kWrite;
    params.tables.loss = loss.data();
    params.tables.lse = lse.data();
    params.tables.predicted = predicted.data();
  }

  scalar_t& at(size_t r, int64_t v) { return logits[r * static_cast<size_t>(stride) + static_cast<size_t>(v)]; }

  // Whether the padding beyond the rows' last vectors is unchanged.
  bool gaps_untouched(const Problem& p) {
    for (size_t r = 0; r < p.rows.size(); ++r)
      for (int64_t v = (p.vocab + kWidth - 1) / kWidth * kWidth; v < stride; ++v)
        if (Element<scalar_t>::load(at(r, v)) != Element<scalar_t>::load(Element<scalar_t>::store(-1234.0)))
          return false;
    return true;
  }

  int64_t stride;
  DeviceArray<scalar_t> logits;
  DeviceArray<int64_t> rows, labels;
  DeviceArray<float> head_scale, row_scale, lse_grad, bias, class_weights, token_weights, loss, lse;
  DeviceArray<double> total;
  DeviceArray<int32_t> predicted;
  mtp::LossRowsParams<float> params{};
};

template <typename scalar_t, typename Gradient>
void compare(const Problem& p, const OnDevice<scalar_t>& out, const Gradient& gradient) {
  constexpr double eps = 4e-6, own = 2e-5 + Element<scalar_t>::rounding;
  constexpr double smallest = Element<scalar_t>::smallest;
  bool gradients_near = true;
  for (size_t r = 0; r < p.rows.size(); ++r) {
    const Expected e = p.expect(p.logits.data() + static_cast<int64_t>(r) * p.vocab, p.rows[r]);
    const auto at = static_cast<size_t>(p.rows[r]);
    CHECK_NEAR(out.loss[at], e.loss, eps * (1 + std::fabs(e.loss)));
    CHECK_NEAR(out.lse[at], e.lse, eps * (1 + std::fabs(e.lse)));
    CHECK(out.predicted[at] == e.predicted);
    if (out.params.gradient == mtp::Gradient::kSkip) continue;
    double largest = 0;
    for (const double g : e.grad) largest = std::max(largest, std::fabs(g));
    for (int64_t v = 0; v < p.vocab; ++v) {
      const double expected = e.grad[static_cast<size_t>(v)];
      const bool near = std::fabs(gradient(r, v) - expected) <= own * std::fabs(expected) + eps * largest + smallest;
      if (!near && gradients_near)
        std::fprintf(stderr, "  row %zu, class %lld: got %.9g, expected %.9g\n", r, static_cast<long long>(v),
                     static_cast<double>(gradient(r, v)), expected);
      gradients_near = gradients_near && near;
    }
  }
  CHECK(gradients_near);
}

// Gives the emulated device the shared memory for which the launcher takes a path at a given row length.
enum class Path { kOneBlock, kCluster, kStreaming };
template <typename scalar_t>
void choose(Path path, int64_t vocab, unsigned cluster) {
  emulator::Device& device = emulator::device();
  device = emulator::Device{};
  if (path == Path::kStreaming) device.shared_bytes_per_multiprocessor = 2048;
  if (path == Path::kCluster) {
    constexpr size_t kScratchAndReserve = 3000;
    const size_t slice = (static_cast<size_t>(vocab) * sizeof(scalar_t) / 16 + 2 + cluster - 1) / cluster * 16;
    device.shared_bytes_per_multiprocessor = static_cast<int>((cluster == 8 ? 2 : 3) * (slice + kScratchAndReserve));
  }
}

// Cycles through the three thread orders: every path runs in each of them many times.
template <typename scalar_t>
void run(const Problem& p, Path path, unsigned cluster, int64_t padding = 0) {
  constexpr size_t kStreamingScratch = 400;  // bytes, rounded up; a cache needs more even for one class
  static size_t turn = 0;
  OnDevice<scalar_t> out(p, padding);
  choose<scalar_t>(path, p.vocab, cluster);
  emulator::device().order = kOrders[turn++ % std::size(kOrders)];
  CHECK(mtp::launch_loss_rows(out.params, static_cast<int64_t>(p.rows.size()), nullptr) == cudaSuccess);
  CHECK(emulator::launch_record().cluster == (path == Path::kCluster ? cluster : 1u));
  CHECK((emulator::launch_record().shared_bytes < kStreamingScratch) == (path == Path::kStreaming));
  compare(p, out, [&](size_t r, int64_t v) { return Element<scalar_t>::load(out.at(r, v)); });
  CHECK(out.gaps_untouched(p));
}

template <typename scalar_t>
void run_paths(unsigned* seed) {
  for (const Options& opt : loss_problem::option_sets()) {
    for (const int64_t vocab : {1, 7, 8, 9, 513, 2067, 9001}) {  // blocks of 32, 128 and 512 threads
      const Problem p(vocab, 2, 2, opt, rounded<scalar_t>, ++*seed);
      run<scalar_t>(p, Path::kOneBlock, 1);
      run<scalar_t>(p, Path::kStreaming, 1);
    }
    const Problem odd(1003, 5, 2, opt, rounded<scalar_t>, ++*seed);
    run<scalar_t>(odd, Path::kOneBlock, 1, 1);
    run<scalar_t>(odd, Path::kStreaming, 1, 3);
    const Problem p(20003, 1, 2, opt, rounded<scalar_t>, ++*seed);
    for (const unsigned cluster : {2u, 4u, 8u}) run<scalar_t>(p, Path::kCluster, cluster, cluster - 1);
  }
}

// Two shards, combined as by a caller over processes, must equal the whole row.
template <typename scalar_t>
void run_sharded(const Problem& p, int64_t split) {
  OnDevice<scalar_t> whole(p);
  const int64_t widths[] = {split, p.vocab - split}, starts[] = {0, split};
  const size_t rows = p.rows.size();
  const auto stride_of = [&](int i) { return (widths[i] + whole.kWidth - 1) / whole.kWidth * whole.kWidth; };
  std::vector<DeviceArray<scalar_t>> shards;
  std::vector<DeviceArray<float>> biases, class_weights;
  std::vector<double> statistics[2];
  const auto stage = [&](int i, mtp::Stage stage) {
    auto params = whole.params;
    params.stage = stage;
    params.vocab_size = widths[i];
    params.row_stride = stride_of(i);
    params.vocab_start = starts[i];
    params.logits = shards[static_cast<size_t>(i)].data();
    params.statistics = statistics[i].data();
    if (params.bias != nullptr) params.bias = biases[static_cast<size_t>(i)].data();
    if (params.class_weights != nullptr) params.class_weights = class_weights[static_cast<size_t>(i)].data();
    CHECK(mtp::launch_loss_rows(params, static_cast<int64_t>(rows), nullptr) == cudaSuccess);
  };
  for (int i = 0; i < 2; ++i) {
    const auto size = static_cast<size_t>(stride_of(i)), own = static_cast<size_t>(widths[i]);
    shards.emplace_back(rows * size, 0, whole.kAligned);
    biases.emplace_back(own, 0, whole.kAligned);
    class_weights.emplace_back(own, 0, whole.kAligned);
    std::copy_n(whole.bias.begin() + starts[i], own, biases.back().begin());
    std::copy_n(whole.class_weights.begin() + starts[i], own, class_weights.back().begin());
    for (size_t r = 0; r < rows; ++r)
      for (int64_t v = 0; v < widths[i]; ++v)
        shards.back()[r * size + static_cast<size_t>(v)] = whole.at(r, starts[i] + v);
    statistics[i].resize(rows * mtp::kRowStatistics);
    stage(i, mtp::Stage::kStatistics);
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
  for (int i = 0; i < 2; ++i) stage(i, mtp::Stage::kGradient);
  compare(p, whole, [&](size_t r, int64_t v) {
    const int i = v < split ? 0 : 1;
    const size_t at = r * static_cast<size_t>(stride_of(i)) + static_cast<size_t>(v - starts[i]);
    return Element<scalar_t>::load(shards[static_cast<size_t>(i)][at]);
  });
}

// Rows of -1 are zeroed; nothing else of them is read or written.
void run_absent_rows(Path path, unsigned cluster) {
  Problem p(2001, 3, 1, Options{}, rounded<__nv_bfloat16>, 5);
  OnDevice<__nv_bfloat16> out(p);
  out.rows[0] = out.rows[2] = -1;
  out.labels[static_cast<size_t>(p.rows[1]) + 1] = 2000;
  for (int64_t v = 0; v < p.vocab; ++v) out.at(0, v) = Element<__nv_bfloat16>::store(NAN);
  choose<__nv_bfloat16>(path, p.vocab, cluster);
  CHECK(mtp::launch_loss_rows(out.params, 3, nullptr) == cudaSuccess);
  bool zeros = true;
  for (int64_t v = 0; v < p.vocab; ++v) zeros = zeros && out.at(0, v).bits == 0 && out.at(2, v).bits == 0;
  CHECK(zeros);
  for (const int64_t row : {p.rows[0], p.rows[2]}) {
    CHECK(out.loss[static_cast<size_t>(row)] == kUntouched && out.predicted[static_cast<size_t>(row)] == -7);
  }
  CHECK(std::isfinite(out.loss[static_cast<size_t>(p.rows[1])]) && out.loss[static_cast<size_t>(p.rows[1])] > 0);
}

struct OneRow {
  double loss, lse;
  int predicted;
  std::vector<float> gradient;
};

OneRow run_one(const std::vector<double>& logits, int64_t target, Path path, unsigned cluster) {
  Problem p(static_cast<int64_t>(logits.size()), 1, 1, Options{}, rounded<float>, 1);
  p.logits = logits;
  p.labels = {0, target};
  p.head_scale = {1.0};
  OnDevice<float> out(p);
  choose<float>(path, p.vocab, cluster);
  CHECK(mtp::launch_loss_rows(out.params, 1, nullptr) == cudaSuccess);
  return {out.loss[0], out.lse[0], out.predicted[0], {out.logits.begin(), out.logits.end()}};
}

// Edge cases: a near-certain target, -inf, NaN, ties, a target outside the vocabulary.
void run_extremes(Path path, unsigned cluster) {
  std::vector<double> row(4000, 0.0);
  row[1700] = 25.0;  // 1 - p_y = 3999 e^-25 would vanish if p_y were rounded to float32
  const double rest = 3999 * std::exp(-25.0);
  OneRow out = run_one(row, 1700, path, cluster);
  CHECK_NEAR(out.loss, std::log1p(rest), 1e-5 * rest);
  CHECK_NEAR(out.gradient[1700], -rest / (1 + rest), 1e-5 * rest);
  for (const int64_t target : {int64_t{-1}, int64_t{4000}, int64_t{1} << 40, -(int64_t{1} << 40)}) {
    out = run_one(row, target, path, cluster);
    CHECK(std::isnan(out.loss) && std::isnan(out.gradient[0]) && std::isnan(out.gradient[3999]));
  }
  row[1800] = row[3999] = row[2] = 25.0;
  CHECK(run_one(row, 0, path, cluster).predicted == 2);
  row[5] = kInf;
  CHECK(std::isnan(run_one(row, 0, path, cluster).loss));
  row[5] = NAN;
  out = run_one(row, 0, path, cluster);
  CHECK(std::isnan(out.loss) && std::isnan(out.gradient[0]) && std::isnan(out.gradient[3000]) && out.predicted == 2);
  std::fill(row.begin(), row.end(), -kInf);
  CHECK(std::isnan(run_one(row, 7, path, cluster).loss));
  row[3] = 1.5;
  out = run_one(row, 3, path, cluster);
  CHECK(out.loss == 0.0 && out.gradient[3] == 0.0f && out.gradient[4] == 0.0f && out.predicted == 3);
  out = run_one(row, 4, path, cluster);
  CHECK(out.loss == kInf && out.gradient[4] == -1.0f && out.gradient[3] == 1.0f);
}

void run_limits() {
  Problem p(16, 1, 1, Options{}, rounded<float>, 1);
  OnDevice<float> out(p);
  const int launches = emulator::launch_record().launches;
  const auto refused = [&](auto change) {
    auto params = out.params;
    change(params);
    return mtp::launch_loss_rows(params, 1, nullptr) == cudaErrorInvalidValue;
  };
  CHECK(refused([](auto& params) { params.row_stride = 17; }));
  CHECK(refused([](auto& params) { params.row_stride = 12, params.vocab_size = 13; }));
  CHECK(refused([](auto& params) { params.logits = static_cast<float*>(params.logits) + 1; }));
  CHECK(refused([&](auto& params) { params.bias = out.bias.data() + 1; }));
  CHECK(refused([&](auto& params) { params.class_weights = out.class_weights.data() + 1; }));
  CHECK(mtp::launch_loss_rows(out.params, 0, nullptr) == cudaSuccess);
  CHECK(mtp::launch_loss_rows(out.params, int64_t{1} << 30, nullptr) == cudaErrorInvalidValue);
  out.params.dtype = mtp::DType::kFloat64;
  CHECK(mtp::launch_loss_rows(out.params, 1, nullptr) == cudaErrorInvalidValue);
  CHECK(emulator::launch_record().launches == launches);
}

// How the launcher splits a row on an H100: warps, blocks and clusters so that three or more share a multiprocessor.
void run_shapes() {
  struct Shape {
    int64_t vocab;
    unsigned threads, cluster;
  };
  for (const Shape shape : {Shape{256, 32, 1}, Shape{2048, 32, 1}, Shape{8192, 128, 1}, Shape{32000, 512, 1},
                            Shape{50304, 512, 2}, Shape{128256, 512, 4}}) {
    const Problem p(shape.vocab, 1, 1, Options{}, rounded<__nv_bfloat16>, 3);
    OnDevice<__nv_bfloat16> out(p);
    emulator::device() = emulator::Device{};
    CHECK(mtp::launch_loss_rows(out.params, 1, nullptr) == cudaSuccess);
    CHECK(emulator::launch_record().threads == shape.threads && emulator::launch_record().cluster == shape.cluster);
    compare(p, out, [&](size_t r, int64_t v) { return Element<__nv_bfloat16>::load(out.at(r, v)); });
  }
}

// sm_80 has no clusters, and a small partition of a newer device cannot run one: the row is read twice. No cluster
// launch is attempted first: a launch captured in a graph may fail only when the graph is created.
void run_without_clusters() {
  constexpr int64_t kTwoFit = 50304, kNoneFits = 128256;
  for (const int major : {8, 9})
    for (const int64_t vocab : {kTwoFit, kNoneFits}) {
      const Problem p(vocab, 1, 1, Options{}, rounded<__nv_bfloat16>, 3);
      OnDevice<__nv_bfloat16> out(p);
      emulator::device() = emulator::Device{};
      emulator::device().compute_capability_major = major;
      emulator::device().refuses_clusters = true;
      CHECK(mtp::launch_loss_rows(out.params, 1, nullptr) == cudaSuccess);
      CHECK(emulator::launch_record().cluster == 1 && cudaGetLastError() == cudaSuccess);
      CHECK((emulator::launch_record().shared_bytes > 100000) == (vocab == kTwoFit));
      compare(p, out, [&](size_t r, int64_t v) { return Element<__nv_bfloat16>::load(out.at(r, v)); });
    }
}

}  // namespace

int main() {
  unsigned seed = 0;
  run_paths<float>(&seed);
  run_paths<__nv_bfloat16>(&seed);
  run_paths<__half>(&seed);
  // Vocabularies used in training, split as on an H100.
  run<__nv_bfloat16>({32000, 1, 1, Options{}, rounded<__nv_bfloat16>, ++seed}, Path::kOneBlock, 1);
  run<__nv_bfloat16>({128256, 1, 1, Options{}, rounded<__nv_bfloat16>, ++seed}, Path::kCluster, 4);
  run<float>({128256, 1, 1, Options{}, rounded<float>, ++seed}, Path::kCluster, 8);
  for (const Options& opt : loss_problem::option_sets())
    for (const int64_t split : {0, 1, 40, 64}) {
      run_sharded<float>({65, 3, 2, opt, rounded<float>, ++seed}, split);
      run_sharded<__nv_bfloat16>({65, 3, 2, opt, rounded<__nv_bfloat16>, ++seed}, split);
    }
  const Problem p(515, 2, 3, Options{}, rounded<float>, ++seed);
  OnDevice<float> forward(p);
  forward.params.gradient = mtp::Gradient::kSkip;
  CHECK(mtp::launch_loss_rows(forward.params, 6, nullptr) == cudaSuccess);
  compare(p, forward, [](size_t, int64_t) { return 0.0; });
  run_absent_rows(Path::kOneBlock, 1);
  run_absent_rows(Path::kStreaming, 1);
  run_absent_rows(Path::kCluster, 4);
  run_extremes(Path::kOneBlock, 1);
  run_extremes(Path::kStreaming, 1);
  run_extremes(Path::kCluster, 4);
  run_limits();
  run_shapes();
  run_without_clusters();
  return check::summary();
}
