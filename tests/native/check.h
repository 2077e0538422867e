// Checks for the native tests. A failed check prints its location and condition, and the test continues; main ends with
// `return check::summary();`, which prints the counts and returns 0 only if something was checked and nothing failed.
#pragma once
#include <cmath>
#include <cstdio>
#include <cstdlib>

namespace check {

inline int passed = 0, failed = 0;

inline int summary() {
  std::printf("%d checks passed, %d failed\n", passed, failed);
  return failed == 0 && passed > 0 ? 0 : 1;
}

// With MTP_STOP_AT_FAILURE in the environment the first failure ends the program.
inline bool record(bool ok, const char* file, int line, const char* what) {
  ++(ok ? passed : failed);
  if (!ok) std::fprintf(stderr, "%s:%d: failed: %s\n", file, line, what);
  if (!ok && std::getenv("MTP_STOP_AT_FAILURE") != nullptr) std::exit(summary());
  return ok;
}

// |actual - expected| <= tolerance; equal infinities pass, NaN always fails.
inline bool near(double actual, double expected, double tolerance, const char* file, int line, const char* what) {
  const bool ok = actual == expected || std::fabs(actual - expected) <= tolerance;
  if (!record(ok, file, line, what)) {
    std::fprintf(stderr, "  got %.17g, expected %.17g, off by %.3g, allowed %.3g\n", actual, expected,
                 std::fabs(actual - expected), tolerance);
  }
  return ok;
}

}  // namespace check

#define CHECK(condition) ::check::record(static_cast<bool>(condition), __FILE__, __LINE__, #condition)
#define CHECK_NEAR(actual, expected, tolerance) \
  ::check::near((actual), (expected), (tolerance), __FILE__, __LINE__, #actual " near " #expected)
