// Asks the kernel to back a fresh allocation with huge pages (2 MiB), where it has them and is willing.
//
// A chunk of logits is allocated anew in every call. Its first touch costs one fault a page: with 4 KiB pages 44 ms for
// 128 MiB, with 2 MiB pages 10 ms, of 2.3 s that the GEMMs of the loss take (N = 4096, D = 512, V = 32000, two cores).
#pragma once
#include <cstddef>

namespace mtp {

// Smaller blocks are the allocator's to recycle; at this size every call maps, and faults in, fresh pages.
constexpr size_t kHugePageBytes = 4 << 20;

// Advice only: nothing is read or written, and a system that does not know it ignores it.
void advise_huge_pages(void* begin, size_t bytes);

}  // namespace mtp
