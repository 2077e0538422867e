// Scratch memory reused across calls: the process keeps one block for the next call that fits in it.
//
// torch caches freed memory on a GPU but not on the CPU, where touching 128 MiB of fresh pages costs 10 ms, and up to
// 80 ms if a hypervisor has to supply them; the loss would pay that in every step.
#pragma once
#include <cstddef>

namespace mtp {

constexpr size_t kKeptBytes = 256 << 20;  // largest block kept: a default chunk of logits at V = 128k

class Workspace {
 public:
  // Uninitialised, aligned to 64 bytes, on huge pages if large. Throws std::bad_alloc.
  explicit Workspace(size_t bytes);
  ~Workspace();
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;

  void* data() const { return data_; }

 private:
  void* data_;
  size_t bytes_;
};

// Frees the kept block; returns its size in bytes.
size_t release_workspace();

}  // namespace mtp
