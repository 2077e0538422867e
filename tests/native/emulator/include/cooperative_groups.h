// Thread-block clusters with distributed shared memory.
#pragma once
#include "cuda_runtime.h"

namespace cooperative_groups {

class cluster_group {
 public:
  static void sync(EMULATOR_CALLER) { emulator::cluster_barrier({file, line}); }
  static void barrier_arrive(EMULATOR_CALLER) { emulator::cluster_arrive({file, line}); }
  static void barrier_wait() { emulator::cluster_wait(); }
  static unsigned block_rank() { return emulator::cluster_rank(); }
  static unsigned num_blocks() { return emulator::cluster_size(); }
  template <typename T>
  static T* map_shared_rank(T* address, unsigned rank) {
    return static_cast<T*>(emulator::map_shared_rank(address, rank));
  }
};

inline cluster_group this_cluster() { return {}; }

}  // namespace cooperative_groups
