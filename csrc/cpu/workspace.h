// Scratch memory that outlives a call: of all threads together one block is kept, for the next call that it suffices.
//
// torch caches freed memory on a GPU and not on a CPU, where touching 128 MiB of fresh pages costs 10 ms, and up to 80
// where a hypervisor has to find them; the loss would pay that in every step.
#pragma once
#include <cstddef>

namespace mtp {

constexpr size_t kKeptBytes = 256 << 20;  // the largest block that is kept: a default chunk of logits at V = 128k

class Workspace {
 public:
  // Uninitialised, aligned to 64 bytes; where it is large, on huge pages. Throws std::bad_alloc.
  explicit Workspace(size_t bytes);
  ~Workspace();
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;

  void* data() const { return data_; }

 private:
  void* data_;
  size_t bytes_;
};

// Frees the block that is kept; returns its bytes.
size_t release_workspace();

}  // namespace mtp
