// RMSNorm of n heads, forward and backward, under the emulator, against the definition in float64.
#include <cmath>
#include <random>
#include <vector>

#include "check.h"
#include "element.h"
#include "emulator/device.h"
#include "emulator/guarded_memory.h"
#include "kernels/rms_norm.h"

namespace {

using emulator::DeviceArray;
using emulator::Order;
constexpr double kEps = 1e-5;

template <typename scalar_t>
struct Problem {
  Problem(int64_t heads, int64_t rows, int64_t width, unsigned seed)
      : heads(heads),
        rows(rows),
        width(width),
        x(size(rows, width)),
        grad_x(size(rows, width)),
        y(size(heads * rows, width)),
        grad_y(size(heads * rows, width)),
        weight(size(heads, width)),
        grad_weight(size(heads, width)),
        rstd(static_cast<size_t>(rows)),
        partial(static_cast<size_t>(mtp::rms_norm_partials(rows, heads, width))) {
    std::mt19937 rng(seed);
    std::normal_distribution<double> normal(0, 1);
    for (const auto* array : {&x, &grad_y})
      for (scalar_t& value : *array) value = Element<scalar_t>::store(normal(rng));
    for (float& value : weight) value = static_cast<float>(1 + 0.3 * normal(rng));
  }

  static size_t size(int64_t a, int64_t b) { return static_cast<size_t>(a * b); }

  void run() {
    mtp::RmsNormForwardParams forward{};
    forward.x = x.data(), forward.weight = weight.data(), forward.y = y.data(), forward.rstd = rstd.data();
    forward.heads = heads, forward.rows = rows, forward.width = width;
    forward.eps = static_cast<float>(kEps), forward.dtype = Element<scalar_t>::dtype;
    CHECK(mtp::launch_rms_norm_forward(forward, nullptr) == cudaSuccess);
    mtp::RmsNormBackwardParams backward{};
    backward.grad_y = grad_y.data(), backward.x = x.data(), backward.weight = weight.data();
    backward.rstd = rstd.data(), backward.grad_x = grad_x.data(), backward.grad_weight = grad_weight.data();
    backward.partial = partial.data(), backward.heads = heads, backward.rows = rows, backward.width = width;
    backward.dtype = Element<scalar_t>::dtype;
    CHECK(mtp::launch_rms_norm_backward(backward, nullptr) == cudaSuccess);
  }

  void compare() {
    constexpr double eps = 2e-6 + Element<scalar_t>::rounding;
    const auto load = [&](const DeviceArray<scalar_t>& from, int64_t row, int64_t d) {
      return Element<scalar_t>::load(from[size(row, width) + static_cast<size_t>(d)]);
    };
    std::vector<double> expected_weight(size(heads, width)), magnitude(size(heads, width));
    bool near = true;
    const auto expect = [&](double got, double expected, double scale) {
      near = near && std::fabs(got - expected) <= eps * (std::fabs(expected) + scale) + Element<scalar_t>::smallest;
    };
    for (int64_t t = 0; t < rows; ++t) {
      std::vector<double> h(static_cast<size_t>(width)), g(static_cast<size_t>(width));
      double squares = 0, along = 0;
      for (int64_t d = 0; d < width; ++d) {
        const double value = load(x, t, d);
        h[static_cast<size_t>(d)] = value;
        squares += value * value;
      }
      const double scale = 1 / std::sqrt(squares / static_cast<double>(width) + kEps);
      for (int64_t k = 0; k < heads; ++k) {
        for (int64_t d = 0; d < width; ++d) {
          const auto at = size(k, width) + static_cast<size_t>(d);
          const double normed = h[static_cast<size_t>(d)] * scale, grad = load(grad_y, k * rows + t, d);
          expect(load(y, k * rows + t, d), normed * weight[at], 0.0);
          g[static_cast<size_t>(d)] += weight[at] * grad;
          expected_weight[at] += grad * normed;
          magnitude[at] += std::fabs(grad * normed);
        }
      }
      for (int64_t d = 0; d < width; ++d) along += g[static_cast<size_t>(d)] * h[static_cast<size_t>(d)];
      for (int64_t d = 0; d < width; ++d) {
        const auto at = static_cast<size_t>(d);
        expect(load(grad_x, t, d), scale * (g[at] - h[at] * along * scale * scale / static_cast<double>(width)), 1.0);
      }
    }
    for (size_t i = 0; i < expected_weight.size(); ++i)
      near = near && std::fabs(grad_weight[i] - expected_weight[i]) <= 4e-6 * (magnitude[i] + 1e-6);
    CHECK(near);
  }

  int64_t heads, rows, width;
  DeviceArray<scalar_t> x, grad_x, y, grad_y;
  DeviceArray<float> weight, grad_weight, rstd, partial;
};

template <typename scalar_t>
void run(unsigned* seed) {
  for (const Order order : {Order::kForward, Order::kReverse, Order::kShuffled}) {
    emulator::device().order = order;
    for (const int64_t heads : {1, 4})
      for (const int64_t width : {8, 264, 1032})
        for (const int64_t rows : {0, 2}) {
          Problem<scalar_t> p(heads, rows, width, ++*seed);
          p.run();
          p.compare();
        }
    Problem<scalar_t> segments(1, 1030, 16, ++*seed);  // three segments of the weight gradient
    segments.run();
    segments.compare();
  }
  mtp::RmsNormForwardParams refused{};
  refused.width = 9, refused.dtype = Element<scalar_t>::dtype;
  CHECK(mtp::launch_rms_norm_forward(refused, nullptr) == cudaErrorInvalidValue);
}

}  // namespace

int main() {
  unsigned seed = 0;
  run<float>(&seed);
  run<__nv_bfloat16>(&seed);
  run<__half>(&seed);
  return check::summary();
}
