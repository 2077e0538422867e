// The emulator itself: what it computes, and that it catches the mistakes it is meant to catch. Each mistake is made in
// a child process, which must end with the emulator's error message; the same kernel without the mistake must pass.
#include <cooperative_groups.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmath>
#include <cstdlib>
#include <functional>
#include <string>
#include <vector>

#include "check.h"
#include "emulator/device.h"
#include "emulator/guarded_memory.h"
#include "kernels/launch.h"
#include "kernels/shared_memory.cuh"

namespace {

using emulator::DeviceArray;
using emulator::Order;
constexpr unsigned kThreads = 128;
constexpr unsigned kAllLanes = 0xffffffffu;

enum class Mistake { kNone, kMade };

// Each thread passes its number to its right neighbour.
void rotate_kernel(int* out, Mistake removed_barrier) {
  int* shared = mtp::dynamic_shared_memory<int>();
  shared[threadIdx.x] = static_cast<int>(threadIdx.x);
  if (removed_barrier == Mistake::kNone) __syncthreads();
  out[threadIdx.x] = shared[(threadIdx.x + kThreads - 1) % kThreads];
}

void sum_kernel(float* out, const float* in, int size, Mistake one_too_far) {
  float sum = 0.0f;
  const int last = one_too_far == Mistake::kMade ? size : size - 1;
  for (int i = static_cast<int>(threadIdx.x); i <= last; i += static_cast<int>(kThreads)) sum += in[i];
  for (int lanes = 16; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(kAllLanes, sum, lanes);
  if (threadIdx.x % 32 == 0) out[threadIdx.x / 32] = sum;
}

void shared_kernel(int* out, Mistake one_too_far) {
  int* shared = mtp::dynamic_shared_memory<int>();
  shared[threadIdx.x + (one_too_far == Mistake::kMade ? 1 : 0)] = 1;
  __syncthreads();
  out[threadIdx.x] = shared[threadIdx.x];
}

void divergent_kernel(int* out, Mistake divergent) {
  if (divergent == Mistake::kNone || threadIdx.x < 100) __syncthreads();
  out[threadIdx.x] = 1;
}

void two_places_kernel(int* out, Mistake divergent) {
  if (divergent == Mistake::kMade && threadIdx.x < 100) {
    __syncthreads();
  } else {
    __syncthreads();
    if (divergent == Mistake::kNone) out[threadIdx.x] = 1;
  }
}

void shuffle_kernel(int* out, unsigned mask, int distance) {
  if (threadIdx.x % 32 < 16) out[threadIdx.x] = __shfl_xor_sync(mask, static_cast<int>(threadIdx.x), distance);
}

// Block 0 of the cluster reads the last block's shared memory.
void cluster_kernel(float* out, Mistake leaves_early) {
  auto cluster = cooperative_groups::this_cluster();
  float* shared = mtp::dynamic_shared_memory<float>();
  if (threadIdx.x == 0) *shared = static_cast<float>(cluster.block_rank() + 1);
  cluster.sync();
  const float* last = cluster.map_shared_rank(shared, cluster.num_blocks() - 1);
  if (leaves_early == Mistake::kMade && cluster.block_rank() != 0) return;
  if (cluster.block_rank() == 0 && threadIdx.x == 0) out[blockIdx.x / cluster.num_blocks()] = *last;
  if (leaves_early == Mistake::kNone) cluster.sync();
}

template <typename... Formal, typename... Actual>
void run(void (*kernel)(Formal...), unsigned blocks, unsigned cluster, Actual... arguments) {
  mtp::LaunchShape shape;
  shape.grid = dim3(blocks);
  shape.block = dim3(kThreads);
  shape.shared_bytes = kThreads * sizeof(int);
  shape.cluster = cluster;
  CHECK(mtp::launch_kernel(kernel, shape, nullptr, arguments...) == cudaSuccess);
}

// Exit status and stderr of a child process.
struct Ending {
  int status;
  std::string message;
};
Ending in_child(const std::function<void()>& body) {
  int ends[2];
  if (pipe(ends) != 0) std::abort();
  const pid_t child = fork();
  if (child == 0) {
    dup2(ends[1], STDERR_FILENO);
    close(ends[0]);
    body();
    _exit(check::failed == 0 ? 0 : 1);
  }
  close(ends[1]);
  Ending ending{-1, ""};
  char buffer[256];
  for (ssize_t n; (n = read(ends[0], buffer, sizeof(buffer))) > 0;)
    ending.message.append(buffer, static_cast<size_t>(n));
  close(ends[0]);
  int status = 0;
  waitpid(child, &status, 0);
  if (WIFEXITED(status)) ending.status = WEXITSTATUS(status);
  return ending;
}

void expect_error(const char* sentence, const std::function<void()>& body) {
  const Ending ending = in_child(body);
  const bool caught = ending.status == emulator::kErrorStatus && ending.message.find(sentence) != std::string::npos;
  if (!CHECK(caught))
    std::fprintf(stderr, "  expected: %s\n  status %d: %s\n", sentence, ending.status, ending.message.c_str());
}

// A missing barrier must give a wrong result in at least two of the three orders.
void test_removed_barrier() {
  int wrong_orders = 0;
  for (const Order order : {Order::kForward, Order::kReverse, Order::kShuffled}) {
    emulator::device().order = order;
    for (const Mistake mistake : {Mistake::kNone, Mistake::kMade}) {
      DeviceArray<int> out(kThreads);
      run(rotate_kernel, 1, 1, out.data(), mistake);
      bool right = true;
      for (unsigned i = 0; i < kThreads; ++i)
        right = right && out[i] == static_cast<int>((i + kThreads - 1) % kThreads);
      if (mistake == Mistake::kNone) CHECK(right);
      if (mistake == Mistake::kMade && !right) ++wrong_orders;
    }
  }
  CHECK(wrong_orders >= 2);
  emulator::device().order = Order::kForward;
}

void test_out_of_bounds() {
  const DeviceArray<float> in(std::vector<float>(1000, 0.5f));
  const DeviceArray<float> sums(4);
  const DeviceArray<int> out(kThreads);
  run(sum_kernel, 1, 1, sums.data(), static_cast<const float*>(in.data()), 1000, Mistake::kNone);
  CHECK(sums[0] + sums[1] + sums[2] + sums[3] == 500.0f);
  expect_error("out-of-bounds access (block 0,0,0, thread 104,0,0)",
               [&] { run(sum_kernel, 1, 1, sums.data(), static_cast<const float*>(in.data()), 1000, Mistake::kMade); });
  run(shared_kernel, 1, 1, out.data(), Mistake::kNone);
  expect_error("out-of-bounds access (block 0,0,0, thread 127,0,0)",
               [&] { run(shared_kernel, 1, 1, out.data(), Mistake::kMade); });
}

void test_divergent_barriers() {
  const DeviceArray<int> out(kThreads);
  run(divergent_kernel, 1, 1, out.data(), Mistake::kNone);
  expect_error("divergent barrier: not every thread arrives",
               [&] { run(divergent_kernel, 1, 1, out.data(), Mistake::kMade); });
  run(two_places_kernel, 1, 1, out.data(), Mistake::kNone);
  expect_error("divergent barrier: threads meet from two places",
               [&] { run(two_places_kernel, 1, 1, out.data(), Mistake::kMade); });
}

void test_shuffle_masks() {
  const DeviceArray<int> out(kThreads);
  run(shuffle_kernel, 1, 1, out.data(), 0xffffu, 8);
  CHECK(out[3] == 11 && out[33] == 41);
  expect_error("reads a lane that its mask leaves out", [&] { run(shuffle_kernel, 1, 1, out.data(), 0xffffu, 16); });
  expect_error("mask leaves out the lane that calls it", [&] { run(shuffle_kernel, 1, 1, out.data(), 0xffu, 1); });
  expect_error("divergent barrier: not every thread arrives",
               [&] { run(shuffle_kernel, 1, 1, out.data(), kAllLanes, 1); });
}

void test_clusters() {
  const DeviceArray<float> out(2);
  run(cluster_kernel, 8, 4, out.data(), Mistake::kNone);
  CHECK(out[0] == 4.0f && out[1] == 4.0f);
  emulator::device().order = Order::kReverse;  // the other blocks exit first
  expect_error("map_shared_rank of a block that has ended",
               [&] { run(cluster_kernel, 8, 4, out.data(), Mistake::kMade); });
  emulator::device() = emulator::Device{};
}

// All 2^16 float16 values survive conversion to float32 and back; ties round to even.
void test_float16() {
  bool same = true;
  for (unsigned bits = 0; bits < 0x10000u; ++bits) {
    const float value = __half2float({static_cast<uint16_t>(bits)});
    if (!std::isnan(value)) same = same && __float2half_rn(value).bits == bits;
  }
  CHECK(same);
  CHECK(__float2half_rn(1.0f + 0.00048828125f).bits == 0x3c00 && __float2half_rn(1.0f + 0.0014648438f).bits == 0x3c02);
  CHECK(__float2half_rn(65519.0f).bits == 0x7bff && __float2half_rn(65520.0f).bits == 0x7c00);
  CHECK(__float2half_rn(2.0e-8f).bits == 0 && __float2half_rn(3.0e-8f).bits == 1);
  CHECK(std::isnan(__half2float(__float2half_rn(NAN))));
}

}  // namespace

int main() {
  test_removed_barrier();
  test_out_of_bounds();
  test_divergent_barriers();
  test_shuffle_masks();
  test_clusters();
  test_float16();
  return check::summary();
}
