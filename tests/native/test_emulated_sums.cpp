// Column sums and scaling by a device scalar, under the emulator, against float64.
#include <algorithm>
#include <cmath>
#include <random>
#include <vector>

#include "check.h"
#include "element.h"
#include "emulator/device.h"
#include "emulator/guarded_memory.h"
#include "kernels/column_sum.h"
#include "kernels/scale.h"

namespace {

using emulator::DeviceArray;
using emulator::Order;

template <typename scalar_t>
void fill(const DeviceArray<scalar_t>& x, unsigned seed) {
  std::mt19937 rng(seed);
  std::normal_distribution<double> normal(0, 1);
  for (scalar_t& value : x) value = Element<scalar_t>::store(normal(rng));
}

template <typename scalar_t>
void test_column_sum(int64_t rows, int64_t columns, int64_t stride, size_t offset) {
  const auto at = [&](int64_t r, int64_t c) { return static_cast<size_t>(r * stride + c); };
  const DeviceArray<scalar_t> x(rows == 0 ? 0 : at(rows - 1, columns), offset);
  fill(x, 7);
  for (const mtp::Destination destination : {mtp::Destination::kOverwrite, mtp::Destination::kAccumulate}) {
    const DeviceArray<float> out(static_cast<size_t>(columns));
    const bool adds = destination == mtp::Destination::kAccumulate;
    if (adds) std::fill(out.begin(), out.end(), 3.0f);  // else out stays NaN
    CHECK(mtp::launch_column_sum({x.data(), Element<scalar_t>::dtype, rows, columns, stride, out.data(), destination},
                                 nullptr) == cudaSuccess);
    for (int64_t c = 0; c < columns; ++c) {
      double sum = adds ? 3.0 : 0.0, magnitude = 4.0;
      for (int64_t r = 0; r < rows; ++r) {
        sum += Element<scalar_t>::load(x[at(r, c)]);
        magnitude += std::fabs(Element<scalar_t>::load(x[at(r, c)]));
      }
      CHECK_NEAR(out[static_cast<size_t>(c)], sum, 1e-6 * magnitude);
    }
  }
}

template <typename scalar_t>
void test_column_sums() {
  for (const int64_t rows : {0, 1, 17, 100})
    for (const int64_t columns : {0, 7, 8, 257}) {
      test_column_sum<scalar_t>(rows, columns, (columns + 7) / 8 * 8, 0);  // aligned rows, a partial last vector
      test_column_sum<scalar_t>(rows, columns, columns + 3, 1);            // no alignment
    }
}

template <typename in_t, typename out_t>
void test_scale(size_t size, size_t offset, float factor) {
  const DeviceArray<in_t> x(size, offset);
  const DeviceArray<out_t> out(size, offset);
  const DeviceArray<float> scale(std::vector<float>{factor});
  fill(x, 3);
  CHECK(mtp::launch_scale({x.data(), out.data(), Element<in_t>::dtype, Element<out_t>::dtype,
                           static_cast<int64_t>(size), scale.data()},
                          nullptr) == cudaSuccess);
  bool equal = true;
  for (size_t i = 0; i < size; ++i) {
    const float product = factor * static_cast<float>(Element<in_t>::load(x[i]));
    equal = equal && Element<out_t>::load(out[i]) == Element<out_t>::load(Element<out_t>::store(product));
  }
  CHECK(equal);
}

void test_scale_in_place() {
  for (const float factor : {1.0f, 0.5f}) {
    const DeviceArray<float> x(std::vector<float>(1000, 2.0f)), scale(std::vector<float>{factor});
    CHECK(mtp::launch_scale({x.data(), x.data(), mtp::DType::kFloat32, mtp::DType::kFloat32, 1000, scale.data()},
                            nullptr) == cudaSuccess);
    CHECK(std::all_of(x.begin(), x.end(), [&](float value) { return value == 2.0f * factor; }));
  }
}

}  // namespace

int main() {
  for (const Order order : {Order::kForward, Order::kReverse, Order::kShuffled}) {
    emulator::device().order = order;
    test_column_sums<float>();
    test_column_sums<__nv_bfloat16>();
    test_column_sums<__half>();
    for (const size_t size : {size_t{0}, size_t{1}, size_t{8}, size_t{2049}, size_t{40001}})
      for (const size_t offset : {size_t{0}, size_t{1}}) {
        test_scale<float, float>(size, offset, 0.7f);
        test_scale<float, __nv_bfloat16>(size, offset, 0.7f);
        test_scale<__nv_bfloat16, __nv_bfloat16>(size, offset, -3.0f);
        test_scale<__half, float>(size, offset, 1.0f);
        test_scale<float, __half>(size, offset, 1e-9f);
      }
  }
  test_scale_in_place();
  return check::summary();
}
