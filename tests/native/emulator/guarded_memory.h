// Memory that ends at an inaccessible page, so that an access past its end faults at once, with or without
// AddressSanitizer. An access before its start faults only outside the first page.
#pragma once
#include <algorithm>
#include <cstddef>
#include <vector>

namespace emulator {

class GuardedMemory {
 public:
  // `bytes` bytes, aligned to `alignment`; the gap before the guard page is smaller than `alignment`. Every byte is
  // 0xff: floats are NaN.
  explicit GuardedMemory(size_t bytes, size_t alignment);
  ~GuardedMemory();
  GuardedMemory(GuardedMemory&& other) noexcept;
  GuardedMemory(const GuardedMemory&) = delete;
  GuardedMemory& operator=(const GuardedMemory&) = delete;
  GuardedMemory& operator=(GuardedMemory&&) = delete;

  unsigned char* data() const { return data_; }
  size_t bytes() const { return bytes_; }
  void poison();

 private:
  void* mapping_ = nullptr;
  size_t mapping_bytes_ = 0, bytes_ = 0;
  unsigned char* data_ = nullptr;
};

// Test memory in place of cudaMalloc's: `size` elements; with an offset, that many elements after a 256-byte boundary,
// else at a multiple of `alignment` bytes.
template <typename T>
class DeviceArray {
 public:
  explicit DeviceArray(size_t size, size_t offset = 0, size_t alignment = alignof(T))
      : memory_((size + offset) * sizeof(T), offset == 0 ? alignment : 256), size_(size), offset_(offset) {}
  explicit DeviceArray(const std::vector<T>& values, size_t offset = 0, size_t alignment = alignof(T))
      : DeviceArray(values.size(), offset, alignment) {
    std::copy(values.begin(), values.end(), data());
  }

  T* data() const { return reinterpret_cast<T*>(memory_.data()) + offset_; }
  size_t size() const { return size_; }
  T& operator[](size_t i) const { return data()[i]; }
  T* begin() const { return data(); }
  T* end() const { return data() + size_; }

 private:
  GuardedMemory memory_;
  size_t size_, offset_;
};

}  // namespace emulator
