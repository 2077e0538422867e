#include "emulator/device.h"

#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <vector>

#include "emulator/fiber.h"
#include "emulator/guarded_memory.h"

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {
namespace {

#if defined(__SANITIZE_ADDRESS__)
constexpr size_t kStackBytes = 64 << 10;  // redzones make frames several times larger
#else
constexpr size_t kStackBytes = 32 << 10;
#endif
constexpr size_t kSharedAlignment = 16;

struct Barrier {
  int arrived = 0;
  unsigned generation = 0;
  Site site{nullptr, 0};
};

struct Warp {
  Barrier barrier;
  unsigned mask = 0;  // of the exchange in progress
  // Double-buffered: a lane may publish its next value before a slow one has read the last.
  unsigned char slots[2][kWarpSize][kExchangeBytes];
  unsigned turn[kWarpSize] = {};
};

struct Block {
  explicit Block(size_t shared_bytes) : shared(shared_bytes, kSharedAlignment) {}
  GuardedMemory shared;
  std::vector<Warp> warps;
  Barrier barrier;
  int alive = 0;
};

struct Thread {
  Fiber fiber;
  dim3 index, block_index;
  int lane = 0;
  unsigned rank = 0;  // of the block in its cluster
  Block* block = nullptr;
  Warp* warp = nullptr;
  bool done = false;
  const Barrier* waits_at = nullptr;
  unsigned waits_for = 0;    // the generation that ends the wait
  bool has_arrived = false;  // at the cluster's barrier, and not waited yet
  unsigned arrived_for = 0;
};

struct Cluster {
  std::vector<Block> blocks;
  Barrier barrier;
};

Thread* current = nullptr;
Cluster* cluster_of_current = nullptr;
const std::function<void()>* kernel_body = nullptr;

// Counts the running thread in, and returns the generation that begins when `expected` threads have arrived.
unsigned count_in(Barrier& barrier, int expected, Site site) {
  if (barrier.arrived == 0) barrier.site = site;
  if (barrier.site.line != site.line || std::strcmp(barrier.site.file, site.file) != 0)
    fail("divergent barrier: threads meet from two places in the source");
  const unsigned next = barrier.generation + 1;
  if (++barrier.arrived == expected) {
    barrier.arrived = 0;
    barrier.generation = next;
  }
  return next;
}

void wait_for(const Barrier& barrier, unsigned generation) {
  if (barrier.generation == generation) return;
  Thread& self = *current;
  self.waits_at = &barrier;
  self.waits_for = generation;
  self.fiber.suspend();
  self.waits_at = nullptr;
}

void arrive(Barrier& barrier, int expected, Site site) { wait_for(barrier, count_in(barrier, expected, site)); }

int cluster_threads() { return static_cast<int>(cluster_size() * blockDim.x * blockDim.y * blockDim.z); }

void thread_main() {
  Fiber::started();
  (*kernel_body)();
  Thread& self = *current;
  if (self.has_arrived) fail("a thread ends between the halves of a cluster barrier");
  self.done = true;
  // Shared memory dies with the block's last thread: another block of the cluster that still reads it gets NaN.
  if (--self.block->alive == 0) self.block->shared.poison();
  self.fiber.finish();
}

void on_signal(int signal) {
  if (current == nullptr) {
    static const char message[] = "emulator: a fault of the host's own\n";
    if (write(STDERR_FILENO, message, sizeof(message) - 1) < 0) _exit(kErrorStatus + 1);
    _exit(kErrorStatus);
  }
  fail(signal == SIGFPE ? "arithmetic fault" : "out-of-bounds access");
}

void catch_faults() {
  static std::vector<char> stack(64 << 10);
  static bool installed = false;
  if (installed) return;
  installed = true;
  stack_t alternative{};
  alternative.ss_sp = stack.data();
  alternative.ss_size = stack.size();
  sigaltstack(&alternative, nullptr);
  struct sigaction action{};
  action.sa_handler = on_signal;
  action.sa_flags = SA_ONSTACK;
  sigaction(SIGSEGV, &action, nullptr);
  sigaction(SIGBUS, &action, nullptr);
  sigaction(SIGFPE, &action, nullptr);
}

class Scheduler {
 public:
  Scheduler(dim3 grid, dim3 block, size_t shared_bytes, unsigned cluster)
      : grid_(grid), block_(block), cluster_size_(cluster), rng_(device().seed) {
    const size_t block_threads = size_t{block.x} * block.y * block.z;
    threads_.resize(block_threads * cluster);
    stacks_.reset(new char[threads_.size() * kStackBytes]);
    for (unsigned i = 0; i < cluster; ++i) blocks_.blocks.emplace_back(shared_bytes);
  }

  void run() {
    gridDim = grid_;
    blockDim = block_;
    std::vector<dim3> first_blocks;
    for (unsigned z = 0; z < grid_.z; ++z)
      for (unsigned y = 0; y < grid_.y; ++y)
        for (unsigned x = 0; x < grid_.x; x += cluster_size_) first_blocks.emplace_back(x, y, z);
    arrange(first_blocks);
    for (const dim3 first : first_blocks) {
      start(first);
      finish();
    }
    current = nullptr;
  }

 private:
  template <typename T>
  void arrange(std::vector<T>& items) {
    if (device().order == Order::kReverse) std::reverse(items.begin(), items.end());
    if (device().order == Order::kShuffled) std::shuffle(items.begin(), items.end(), rng_);
  }

  void start(dim3 first) {
    const size_t block_threads = threads_.size() / cluster_size_;
    blocks_.barrier = Barrier{};
    cluster_of_current = &blocks_;
    for (size_t i = 0; i < threads_.size(); ++i) {
      const auto rank = static_cast<unsigned>(i / block_threads);
      const auto index = static_cast<unsigned>(i % block_threads);
      Block& block = blocks_.blocks[rank];
      if (index == 0) {
        block.shared.poison();
        block.barrier = Barrier{};
        block.alive = static_cast<int>(block_threads);
        block.warps.assign((block_threads + kWarpSize - 1) / kWarpSize, Warp{});
      }
      Thread& thread = threads_[i];
      thread = Thread{};
      thread.block = &block;
      thread.warp = &block.warps[index / kWarpSize];
      thread.index = dim3(index % block_.x, index / block_.x % block_.y, index / (block_.x * block_.y));
      thread.block_index = dim3(first.x + rank, first.y, first.z);
      thread.lane = static_cast<int>(index % kWarpSize);
      thread.rank = rank;
      thread.fiber.prepare(stacks_.get() + i * kStackBytes, kStackBytes, thread_main);
    }
  }

  // Runs a warp as long as one of its threads can run, and a block as long as one of its warps can. The first past a
  // barrier gets far ahead of the others, which exposes a missing barrier.
  void finish() {
    std::vector<std::vector<std::vector<Thread*>>> blocks(cluster_size_);
    for (Thread& thread : threads_) {
      auto& warps = blocks[thread.rank];
      if (thread.lane == 0) warps.emplace_back();
      warps.back().push_back(&thread);
    }
    for (auto& warps : blocks) {
      for (auto& warp : warps) arrange(warp);
      arrange(warps);
    }
    arrange(blocks);
    running_ = threads_.size();
    while (running_ > 0) {
      bool progress = false;
      for (auto& warps : blocks) progress = run_block(warps) || progress;
      if (!progress) report_deadlock();
      if (device().order == Order::kShuffled) arrange(blocks);
    }
  }

  bool run_block(std::vector<std::vector<Thread*>>& warps) {
    bool any = false;
    for (bool progress = true; progress; any = any || progress) {
      progress = false;
      for (auto& warp : warps) progress = run_warp(warp) || progress;
      if (device().order == Order::kShuffled) arrange(warps);
    }
    return any;
  }

  bool run_warp(std::vector<Thread*>& warp) {
    bool any = false;
    for (bool progress = true; progress; any = any || progress) {
      progress = false;
      for (Thread* thread : warp) {
        if (thread->done || (thread->waits_at != nullptr && thread->waits_at->generation != thread->waits_for))
          continue;
        progress = true;
        enter(*thread);
        thread->fiber.resume();
        if (thread->done) --running_;
      }
      if (device().order == Order::kShuffled) arrange(warp);
    }
    return any;
  }

  static void enter(Thread& thread) {
    current = &thread;
    threadIdx = thread.index;
    blockIdx = thread.block_index;
  }

  [[noreturn]] void report_deadlock() {
    for (Thread& thread : threads_) {
      if (thread.done) continue;
      enter(thread);
      const Site site = thread.waits_at->site;
      std::fprintf(stderr, "emulator: %d threads have arrived at %s:%d\n", thread.waits_at->arrived, site.file,
                   site.line);
      fail("divergent barrier: not every thread arrives");
    }
    std::abort();
  }

  dim3 grid_, block_;
  unsigned cluster_size_;
  std::mt19937 rng_;
  std::vector<Thread> threads_;
  std::unique_ptr<char[]> stacks_;
  Cluster blocks_;
  size_t running_ = 0;  // threads still alive
};

}  // namespace

Device& device() {
  static Device instance;
  return instance;
}

LaunchRecord& launch_record() {
  static LaunchRecord record;
  return record;
}

void run_grid(dim3 grid, dim3 block, size_t shared_bytes, unsigned cluster, const std::function<void()>& body) {
  catch_faults();
  kernel_body = &body;
  launch_record() = {launch_record().launches + 1, cluster, shared_bytes, block.x * block.y * block.z};
  Scheduler(grid, block, shared_bytes, cluster).run();
}

int lane() { return current->lane; }

unsigned cluster_rank() { return current->rank; }

unsigned cluster_size() { return static_cast<unsigned>(cluster_of_current->blocks.size()); }

void* shared_memory() { return current->block->shared.data(); }

void* map_shared_rank(const void* address, unsigned rank) {
  const GuardedMemory& own = current->block->shared;
  const ptrdiff_t offset = static_cast<const unsigned char*>(address) - own.data();
  if (offset < 0 || offset >= static_cast<ptrdiff_t>(own.bytes())) fail("map_shared_rank of what is not shared memory");
  if (rank >= cluster_of_current->blocks.size()) fail("map_shared_rank of a block outside the cluster");
  if (cluster_of_current->blocks[rank].alive == 0) fail("map_shared_rank of a block that has ended");
  return cluster_of_current->blocks[rank].shared.data() + offset;
}

void fail(const char* what) {
  std::fprintf(stderr, "emulator: %s (block %u,%u,%u, thread %u,%u,%u)\n", what, blockIdx.x, blockIdx.y, blockIdx.z,
               threadIdx.x, threadIdx.y, threadIdx.z);
  _exit(kErrorStatus);
}

// The hardware does not wait for threads that have exited. No kernel here relies on that, so it is an error.
void block_barrier(Site site) {
  arrive(current->block->barrier, static_cast<int>(blockDim.x * blockDim.y * blockDim.z), site);
}

void cluster_barrier(Site site) {
  cluster_arrive(site);
  cluster_wait();
}

void cluster_arrive(Site site) {
  if (current->has_arrived) fail("a thread arrives twice at a cluster barrier");
  current->has_arrived = true;
  current->arrived_for = count_in(cluster_of_current->barrier, cluster_threads(), site);
}

void cluster_wait() {
  if (!current->has_arrived) fail("a thread waits at a cluster barrier without having arrived");
  wait_for(cluster_of_current->barrier, current->arrived_for);
  current->has_arrived = false;
}

void warp_barrier(unsigned mask, Site site) {
  const char nothing = 0;
  warp_exchange(mask, &nothing, sizeof(nothing), site);
}

const unsigned char* warp_exchange(unsigned mask, const void* value, size_t bytes, Site site) {
  Warp& warp = *current->warp;
  const int lane = current->lane;
  if ((mask >> lane & 1u) == 0) fail("a warp operation's mask leaves out the lane that calls it");
  if (warp.barrier.arrived == 0) warp.mask = mask;
  if (warp.mask != mask) fail("the lanes of a warp operation name different masks");
  auto& slots = warp.slots[warp.turn[lane]++ % 2];
  std::memcpy(slots[lane], value, bytes);
  arrive(warp.barrier, __builtin_popcount(mask), site);
  return slots[0];
}

}  // namespace emulator
