// Asks the operating system to back a fresh allocation with huge pages (2 MiB), if it supports them.
//
// The first touch of fresh memory costs one fault per page: for 128 MiB of logits 44 ms with 4 KiB pages and 10 ms with
// 2 MiB pages, against 2.3 s for the GEMMs of the loss (N = 4096, D = 512, V = 32000, two cores).
#pragma once
#include <cstddef>

namespace mtp {

// The allocator recycles smaller blocks; from this size on, every allocation maps, and faults in, fresh pages.
constexpr size_t kHugePageBytes = 4 << 20;

// Only a hint: the memory is neither read nor written, and systems without support ignore it.
void advise_huge_pages(void* begin, size_t bytes);

}  // namespace mtp
