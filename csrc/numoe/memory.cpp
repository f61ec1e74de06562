#include "numoe/memory.h"

#include <new>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace numoe {
namespace {

constexpr std::size_t cache_line = 64, huge_page = std::size_t{2} << 20;

std::align_val_t alignment(std::size_t bytes) {
  return std::align_val_t{bytes >= huge_page / 2 ? huge_page : cache_line};
}

}  // namespace

void* allocate(std::size_t bytes) {
  const std::align_val_t align = alignment(bytes);
  const bool huge = align == std::align_val_t{huge_page};
  const std::size_t size = huge ? (bytes + huge_page - 1) / huge_page * huge_page : bytes;  // whole pages can be huge
  if (size < bytes) throw std::bad_alloc();
  void* memory = ::operator new(size, align);
#ifdef MADV_HUGEPAGE
  if (huge) madvise(memory, size, MADV_HUGEPAGE);  // a wish; without it the system's default applies
#endif
  return memory;
}

void release(void* memory, std::size_t bytes) noexcept { ::operator delete(memory, alignment(bytes)); }

}  // namespace numoe
