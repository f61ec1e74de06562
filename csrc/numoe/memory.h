// Memory for numbers: aligned to cache lines, and on huge pages where it is large.
#pragma once

#include <cstddef>

namespace numoe {

// `bytes` uninitialised bytes; throws std::bad_alloc.  From half a huge page on, aligned to huge pages and asking the
// system for them: walking megabytes through 4 KB pages misses the TLB at every step, and pages that lie at random make
// caches collide.
void* allocate(std::size_t bytes);
void release(void* memory, std::size_t bytes) noexcept;

}  // namespace numoe
