// Which kernels run: the only place that asks the CPU or reads the environment.
#include <charconv>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "numoe/kernels/kernels.h"

namespace numoe {

extern const KernelTable portable_table;
#ifdef NUMOE_X86
extern const KernelTable avx2_table, avx512_table;
#endif

namespace {

constexpr const KernelTable* tables[] = {// best first
#ifdef NUMOE_X86
                                         &avx512_table, &avx2_table,
#endif
                                         &portable_table};

const KernelTable& choose() {
  const char* wanted = std::getenv("NUMOE_TARGET");
  std::string names;
  for (const KernelTable* table : tables) {
    if (!table->supported()) continue;
    if (!wanted || !*wanted || std::strcmp(wanted, table->name) == 0) return *table;
    names += (names.empty() ? "" : ", ") + std::string(table->name);
  }
  throw std::runtime_error("NUMOE_TARGET='" + std::string(wanted) +
                           "' is not a target that this CPU and this build have; set it to one of: " + names +
                           ", or unset it");
}

}  // namespace

std::span<const KernelTable* const> kernel_tables() { return tables; }

const KernelTable& kernel_table() {
  static const KernelTable& chosen = choose();
  return chosen;
}

int num_threads_from_environment(const char** complaint) {
  const char* text = std::getenv("NUMOE_NUM_THREADS");
  *complaint = nullptr;
  if (!text || !*text) return 0;
  int value = 0;
  const char* end = text + std::strlen(text);
  const auto [stop, error] = std::from_chars(text, end, value);
  if (error == std::errc{} && stop == end && value >= 1) return value;
  *complaint = text;
  return 0;
}

}  // namespace numoe
