// The decoding kernel under the emulator, tensor-core products included, against float64.
#include <algorithm>
#include <cmath>
#include <numeric>
#include <random>
#include <vector>

#include "check.h"
#include "element.h"
#include "emulator/device.h"
#include "emulator/guarded_memory.h"
#include "kernels/decode.h"

namespace {

using emulator::DeviceArray;
using emulator::Order;

template <typename scalar_t>
struct Case {
  int64_t rows, vocab, width;
  int top;
  DeviceArray<scalar_t> hidden, weight;
  DeviceArray<float> top_logits, lse;
  DeviceArray<int32_t> top_ids;
  DeviceArray<double> workspace;
  mtp::DecodeParams params{};

  Case(int64_t rows, int64_t vocab, int64_t width, int top, unsigned seed)
      : rows(rows),
        vocab(vocab),
        width(width),
        top(top),
        hidden(static_cast<size_t>(rows * width)),
        weight(static_cast<size_t>(vocab * width)),
        top_logits(static_cast<size_t>(rows * top)),
        lse(static_cast<size_t>(rows)),
        top_ids(static_cast<size_t>(rows * top)),
        workspace(mtp::decode_workspace_bytes(rows, vocab, top) / sizeof(double)) {
    std::mt19937 rng(seed);
    std::normal_distribution<double> normal(0, 1);
    for (const auto* array : {&hidden, &weight})
      for (scalar_t& value : *array) value = Element<scalar_t>::store(normal(rng));
    params = {
        hidden.data(), weight.data(), Element<scalar_t>::dtype, rows,           vocab,      width,           width,
        width,         top,           top_logits.data(),        top_ids.data(), lse.data(), workspace.data()};
  }

  std::vector<double> logits(int64_t row) const {
    std::vector<double> l(static_cast<size_t>(vocab));
    for (int64_t v = 0; v < vocab; ++v)
      for (int64_t d = 0; d < width; ++d)
        l[static_cast<size_t>(v)] += Element<scalar_t>::load(hidden[static_cast<size_t>(row * width + d)]) *
                                     Element<scalar_t>::load(weight[static_cast<size_t>(v * width + d)]);
    return l;
  }

  void compare() const {
    const double eps = 1e-6 * std::sqrt(static_cast<double>(width)) * 10;
    for (int64_t row = 0; row < rows; ++row) {
      const std::vector<double> l = logits(row);
      const double max = *std::max_element(l.begin(), l.end());
      double sum = 0;
      for (const double x : l) sum += std::exp(x - max);
      CHECK_NEAR(lse[static_cast<size_t>(row)], max + std::log(sum), eps);
      std::vector<double> sorted = l;
      std::sort(sorted.begin(), sorted.end(), std::greater<>());
      std::vector<int> seen;
      for (int k = 0; k < top; ++k) {
        const auto at = static_cast<size_t>(row * top + k);
        const int id = top_ids[at];
        if (!CHECK(id >= 0 && id < vocab)) return;
        CHECK_NEAR(top_logits[at], sorted[static_cast<size_t>(k)], eps);
        CHECK_NEAR(top_logits[at], l[static_cast<size_t>(id)], eps);
        CHECK(std::find(seen.begin(), seen.end(), id) == seen.end());
        seen.push_back(id);
      }
    }
  }
};

template <typename scalar_t>
void run(int64_t rows, int64_t vocab, int64_t width, int top) {
  static unsigned seed = 0;
  constexpr Order kOrders[] = {Order::kForward, Order::kReverse, Order::kShuffled};
  emulator::device().order = kOrders[seed % 3];
  const Case<scalar_t> c(rows, vocab, width, top, ++seed);
  CHECK(mtp::launch_decode(c.params, nullptr) == cudaSuccess);
  c.compare();
}

// Ties go to the lowest class, within a block and across blocks.
void test_ties() {
  Case<__nv_bfloat16> c(3, 1000, 16, 4, 1);
  std::fill(c.weight.begin(), c.weight.end(), Element<__nv_bfloat16>::store(0.0));
  std::fill(c.hidden.begin(), c.hidden.end(), Element<__nv_bfloat16>::store(1.0));
  for (const size_t id : {900u, 300u, 17u, 13u})
    for (size_t d = 0; d < 16; ++d) c.weight[id * 16 + d] = Element<__nv_bfloat16>::store(1.0);
  CHECK(mtp::launch_decode(c.params, nullptr) == cudaSuccess);
  const int expected[] = {13, 17, 300, 900};
  for (size_t i = 0; i < 12; ++i) CHECK(c.top_ids[i] == expected[i % 4] && c.top_logits[i] == 16.0f);
}

// NaN logits are never selected, and every id is a valid class.
void test_nan() {
  Case<__nv_bfloat16> c(2, 300, 16, 3, 1);
  const auto nan = Element<__nv_bfloat16>::store(NAN);
  std::fill(c.hidden.begin(), c.hidden.begin() + 16, nan);
  std::fill(c.weight.begin() + 16, c.weight.end(), nan);  // only class 0 of the second row is not NaN
  CHECK(mtp::launch_decode(c.params, nullptr) == cudaSuccess);
  for (size_t i = 0; i < 6; ++i) CHECK(c.top_ids[i] == 0 && std::isnan(c.top_logits[i]) == (i != 3));
  CHECK(std::isnan(c.lse[0]) && std::isnan(c.lse[1]));
}

void test_limits() {
  const Case<__half> c(2, 300, 16, 2, 1);
  const auto status = [&](auto change) {
    mtp::DecodeParams p = c.params;
    change(p);
    return mtp::launch_decode(p, nullptr);
  };
  CHECK(status([](mtp::DecodeParams& p) { p.rows = 0; }) == cudaSuccess);
  CHECK(status([](mtp::DecodeParams& p) { p.rows = 65; }) == cudaErrorInvalidValue);
  CHECK(status([](mtp::DecodeParams& p) { p.width = 12; }) == cudaErrorInvalidValue);
  CHECK(status([](mtp::DecodeParams& p) { p.top = 17; }) == cudaErrorInvalidValue);
  CHECK(status([](mtp::DecodeParams& p) { p.vocab_size = 1; }) == cudaErrorInvalidValue);
  CHECK(status([](mtp::DecodeParams& p) { p.dtype = mtp::DType::kFloat32; }) == cudaErrorInvalidValue);
}

}  // namespace

int main() {
  for (const int64_t rows : {1, 8, 9, 17, 64}) {
    run<__nv_bfloat16>(rows, 700, 264, 1);
    run<__half>(rows, 257, 40, 16);
  }
  for (const int64_t vocab : {1, 16, 255, 256, 2049}) run<__nv_bfloat16>(3, vocab, 64, 1);
  for (const int64_t width : {8, 32, 256, 1032}) run<__half>(5, 300, width, 5);
  run<__nv_bfloat16>(4, 16, 64, 16);
  test_ties();
  test_nan();
  test_limits();
  return check::summary();
}
