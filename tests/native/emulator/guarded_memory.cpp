#include "emulator/guarded_memory.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <utility>

namespace emulator {

GuardedMemory::GuardedMemory(size_t bytes, size_t alignment) : bytes_(bytes) {
  const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  const size_t aligned = (bytes + alignment - 1) / alignment * alignment;
  const size_t usable = (aligned + page - 1) / page * page;
  mapping_bytes_ = usable + 2 * page;
  mapping_ = mmap(nullptr, mapping_bytes_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  unsigned char* first = static_cast<unsigned char*>(mapping_) + page;
  if (mapping_ == MAP_FAILED || (usable > 0 && mprotect(first, usable, PROT_READ | PROT_WRITE) != 0)) {
    std::perror("emulator: no guarded memory");
    std::exit(1);
  }
  data_ = first + usable - aligned;
  poison();
}

GuardedMemory::GuardedMemory(GuardedMemory&& other) noexcept
    : mapping_(std::exchange(other.mapping_, nullptr)),
      mapping_bytes_(other.mapping_bytes_),
      bytes_(other.bytes_),
      data_(other.data_) {}

GuardedMemory::~GuardedMemory() {
  if (mapping_ != nullptr) munmap(mapping_, mapping_bytes_);
}

void GuardedMemory::poison() {
  if (bytes_ > 0) std::memset(data_, 0xff, bytes_);
}

}  // namespace emulator
