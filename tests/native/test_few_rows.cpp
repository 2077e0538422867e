// Products of a few rows with a matrix, for every instruction set of this processor.
#include "cpu/few_rows.h"

#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <vector>

#include "check.h"

namespace {

using mtp::CpuCapability;

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

float narrowed(float, float value) { return value; }
mtp::BFloat16Bits narrowed(mtp::BFloat16Bits, float value) { return mtp::to_bfloat16(value); }
float widened(float value) { return value; }
float widened(mtp::BFloat16Bits value) { return mtp::to_float(value); }

template <typename scalar_t>
struct Problem {
  int64_t rows, width, columns;
  std::vector<scalar_t> x, w;

  Problem(int64_t r, int64_t i, int64_t o) : rows(r), width(i), columns(o) {
    std::mt19937 random(1);
    std::normal_distribution<float> normal;
    for (int64_t j = 0; j < r * i; ++j) x.push_back(narrowed(scalar_t{}, normal(random)));
    for (int64_t j = 0; j < o * i; ++j) w.push_back(narrowed(scalar_t{}, normal(random)));
  }

  // Columns [begin, end) of the product of the first `count` rows; the others stay NaN.
  std::vector<float> product(CpuCapability isa, int64_t count, int64_t begin, int64_t end) const {
    std::vector<scalar_t> y(static_cast<size_t>(rows * columns), narrowed(scalar_t{}, kNan));
    mtp::few_rows(isa, mtp::FewRowsParams<scalar_t>{x.data(), w.data(), y.data(), count, width, columns}, begin, end);
    std::vector<float> wide;
    for (const scalar_t value : y) wide.push_back(widened(value));
    return wide;
  }
};

template <typename scalar_t>
void test_sizes(CpuCapability isa, double rounding) {
  for (const int64_t rows : {1, 2, 3, 4, 7, 9})
    for (const int64_t width : {0, 1, 5, 16, 33, 100})
      for (const int64_t columns : {1, 3, 4, 11}) {
        const Problem<scalar_t> p(rows, width, columns);
        const std::vector<float> y = p.product(isa, rows, 0, columns);
        for (int64_t r = 0; r < rows; ++r)
          for (int64_t o = 0; o < columns; ++o) {
            double exact = 0, size = 0;
            for (int64_t i = 0; i < width; ++i) {
              const double term = static_cast<double>(widened(p.x[r * width + i])) * widened(p.w[o * width + i]);
              exact += term;
              size += std::fabs(term);
            }
            const double summed = static_cast<double>(width) * std::numeric_limits<float>::epsilon() * size;
            CHECK_NEAR(y[r * columns + o], exact, summed + rounding * (std::fabs(exact) + summed));
          }
      }
}

// Neither the rows nor the columns beside an element change a bit of it, and nothing else is written.
template <typename scalar_t>
void test_parts_are_those_of_the_whole(CpuCapability isa) {
  const Problem<scalar_t> p(7, 50, 11);
  const std::vector<float> whole = p.product(isa, 7, 0, 11);
  for (int64_t rows = 1; rows <= 7; ++rows)
    for (int64_t begin = 0; begin < 11; ++begin) {
      const int64_t end = begin + 1 + (rows + begin) % (11 - begin);
      const std::vector<float> part = p.product(isa, rows, begin, end);
      for (int64_t r = 0; r < 7; ++r)
        for (int64_t o = 0; o < 11; ++o) {
          const bool written = r < rows && o >= begin && o < end;
          CHECK(written ? part[r * 11 + o] == whole[r * 11 + o] : std::isnan(part[r * 11 + o]));
        }
    }
}

}  // namespace

int main() {
  for (const CpuCapability isa : {CpuCapability::kPlain, CpuCapability::kAvx2, CpuCapability::kAvx512}) {
    if (isa > mtp::cpu_capability()) continue;
    test_sizes<float>(isa, 0.0);
    test_sizes<mtp::BFloat16Bits>(isa, 1.0 / 256);
    test_parts_are_those_of_the_whole<float>(isa);
    test_parts_are_those_of_the_whole<mtp::BFloat16Bits>(isa);
  }
  return check::summary();
}
