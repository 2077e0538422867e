#include "cpu/workspace.h"

#include <cstdlib>
#include <mutex>
#include <new>
#include <utility>

#include "cpu/huge_pages.h"

namespace mtp {
namespace {

struct Block {
  void* data = nullptr;
  size_t bytes = 0;
};

std::mutex kept_mutex;
Block kept;

// Keeps `block` and returns the block kept before.
Block exchange_kept(Block block) {
  const std::lock_guard<std::mutex> lock(kept_mutex);
  return std::exchange(kept, block);
}

Block allocate(size_t bytes) {
  constexpr size_t kAlignment = 64;
  const size_t rounded = (bytes + kAlignment - 1) / kAlignment * kAlignment;
  void* data = std::aligned_alloc(kAlignment, rounded == 0 ? kAlignment : rounded);
  if (data == nullptr) throw std::bad_alloc();
  if (rounded >= kHugePageBytes) advise_huge_pages(data, rounded);
  return {data, bytes};
}

}  // namespace

Workspace::Workspace(size_t bytes) {
  Block block = exchange_kept({});
  if (block.bytes < bytes) {
    std::free(block.data);  // before allocating: memory may not hold both
    block = allocate(bytes);
  } else if (block.data == nullptr) {
    block = allocate(bytes);
  }
  data_ = block.data;
  bytes_ = block.bytes;
}

Workspace::~Workspace() {
  Block block{data_, bytes_};
  if (bytes_ <= kKeptBytes) block = exchange_kept(block);
  std::free(block.data);
}

size_t release_workspace() {
  const Block block = exchange_kept({});
  std::free(block.data);
  return block.bytes;
}

}  // namespace mtp
