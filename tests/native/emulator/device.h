// The emulated device: blocks of fibers, their barriers, and warp exchanges. Kernels do not include this header but
// <cuda_runtime.h> and the like, which emulator/include implements with these functions.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <type_traits>

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

// Of the running thread.
extern dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {

constexpr int kWarpSize = 32;

// Order of threads between barriers, and of blocks. A kernel whose result depends on it has a race. kShuffled draws a
// new order after every barrier.
enum class Order { kForward, kReverse, kShuffled };

struct Device {
  Order order = Order::kForward;
  unsigned seed = 1;
  int compute_capability_major = 9;
  int shared_bytes_per_multiprocessor = 228 << 10;
  int shared_bytes_per_block = 227 << 10;  // with the opt-in attribute
  bool refuses_clusters = false;           // like a partition with too few multiprocessors
};
Device& device();

// Runs every block of the grid, `cluster` consecutive ones (along x) at a time; `body` calls the kernel.
void run_grid(dim3 grid, dim3 block, size_t shared_bytes, unsigned cluster, const std::function<void()>& body);

// Number of grids run, and the shape of the last one, which tells the path that a launcher took.
struct LaunchRecord {
  int launches = 0;
  unsigned cluster = 1;
  size_t shared_bytes = 0;
  unsigned threads = 0;  // per block
};
LaunchRecord& launch_record();

// Source location at which a thread waits. Threads that reach one barrier from two places have diverged.
struct Site {
  const char* file;
  int line;
};

// Of the running thread.
int lane();
unsigned cluster_rank();
unsigned cluster_size();
void* shared_memory();
void* map_shared_rank(const void* address, unsigned rank);

// Ends the program: `emulator: <what> (block x,y,z, thread x,y,z)`, exit status kErrorStatus.
constexpr int kErrorStatus = 70;
[[noreturn]] void fail(const char* what);

void block_barrier(Site site);
void cluster_barrier(Site site);
void cluster_arrive(Site site);  // the barrier's first half: does not wait
void cluster_wait();             // its second half
void warp_barrier(unsigned mask, Site site);

// Every lane of `mask` publishes `bytes` bytes; the result points at 32 slots of kExchangeBytes, valid until the lane's
// next exchange but one.
constexpr size_t kExchangeBytes = 32;
const unsigned char* warp_exchange(unsigned mask, const void* value, size_t bytes, Site site);

// The value of lane `source`, or the caller's own if the shuffle reaches past its segment (`reaches` is false).
template <typename T>
T shuffle(unsigned mask, T value, int source, bool reaches, Site site) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= 8, "a shuffle moves 4 or 8 bytes");
  const unsigned char* slots = warp_exchange(mask, &value, sizeof(T), site);
  if (!reaches) return value;
  if ((mask >> source & 1u) == 0) fail("a shuffle reads a lane that its mask leaves out");
  T result;
  std::memcpy(&result, slots + static_cast<size_t>(source) * kExchangeBytes, sizeof(T));
  return result;
}

}  // namespace emulator

// Trailing parameters that capture the call site.
#define EMULATOR_CALLER const char *file = __builtin_FILE(), int line = __builtin_LINE()
