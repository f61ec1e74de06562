// Which kernels run: the only place that chooses, and the only one that reads the environment.  Each table says what it needs
// of the CPU.
//
// A target whose instructions the CPU has is still unusable if the operating system (or a hypervisor) does not save the
// wide registers.  __builtin_cpu_supports answers for both: libgcc (since 8; gcc.gnu.org/PR85100) and compiler-rt read
// XCR0 with XGETBV and report no AVX without saved YMM state, no AVX-512 without saved mask and ZMM state.  (On macOS
// compiler-rt leaves the latter out, because that kernel saves ZMM state from its first use on.)
#include "numoe/kernels/target.h"

#include <algorithm>
#include <array>
#include <charconv>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#if defined(NUMOE_X86)
#include <cpuid.h>
#endif

namespace numoe {

extern const KernelTable portable_table, emulated_amx_bf16_table, emulated_avx512_bf16_table, emulated_avx512_table,
    emulated_avx2_table;
#if defined(NUMOE_X86)
extern const KernelTable avx2_table, avx512_table, avx512_bf16_table, amx_bf16_table;
#elif defined(NUMOE_ARM64)
extern const KernelTable neon_table;
#endif

namespace {

constexpr const KernelTable* known[] = {// best first
#if defined(NUMOE_X86)
                                        &amx_bf16_table, &avx512_bf16_table, &avx512_table, &avx2_table,
#elif defined(NUMOE_ARM64)
                                        &neon_table,
#endif
                                        &portable_table};
constexpr const KernelTable* known_emulated[] = {&emulated_amx_bf16_table, &emulated_avx512_bf16_table,
                                                 &emulated_avx512_table, &emulated_avx2_table};

bool is_intel() {
#if defined(NUMOE_X86)
  return __builtin_cpu_is("intel");
#else
  return false;
#endif
}
// Skylake's server cores and those after them up to the first with bfloat16 products.
bool is_skylake() {
#if defined(NUMOE_X86)
  return is_intel() && __builtin_cpu_supports("avx512f") && !__builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}
// Zen 5 and what came after it: AMD's families from 1Ah on, which older compilers do not know by name.
bool is_zen5() {
#if defined(NUMOE_X86)
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  if (!__builtin_cpu_is("amd") || !__get_cpuid(1, &eax, &ebx, &ecx, &edx)) return false;
  const unsigned family = (eax >> 8 & 0xf) + (eax >> 20 & 0xff);
  return family >= 0x1a;
#else
  return false;
#endif
}

}  // namespace

// Best first.  Intel's cores take two cycles for dot products of bfloat16 pairs, in which they multiply twice as many numbers
// in float32 (measured: 105 and 211 GFLOP/s).
std::span<const KernelTable* const> kernel_tables() {
#if defined(NUMOE_X86)
  static const auto by_speed = [] {
    auto tables = std::to_array(known);
    if (is_intel()) {
      std::swap(*std::ranges::find(tables, &avx512_bf16_table), *std::ranges::find(tables, &avx512_table));
    }
    return tables;
  }();
  return by_speed;
#else
  return known;
#endif
}
std::span<const KernelTable* const> emulated_tables() { return known_emulated; }

const KernelTable& choose_table(std::span<const KernelTable* const> tables,
                                std::span<const KernelTable* const> emulated, const char* wanted) {
  const bool any = !wanted || !*wanted;
  // Others are not even asked for: AMX has to be requested from the system.
  for (const KernelTable* table : tables) {
    if ((any || std::strcmp(wanted, table->name) == 0) && table->supported()) return *table;
  }
  for (const KernelTable* table : emulated) {
    if (!any && std::strcmp(wanted, table->name) == 0) return *table;
  }
  std::string names;
  for (const KernelTable* table : tables) {
    if (table->supported()) names += (names.empty() ? "" : ", ") + std::string(table->name);
  }
  throw std::runtime_error("NUMOE_TARGET='" + std::string(any ? "" : wanted) +
                           "' is not a target that this CPU and this build have; set it to one of: " + names +
                           ", or unset it");
}

const KernelTable& kernel_table() {
  static const KernelTable& chosen = choose_table(kernel_tables(), known_emulated, std::getenv("NUMOE_TARGET"));
  return chosen;
}

// Measured on Zen 3 and 4; on a Xeon with AMX, whose prefetchers follow 32 pages: one stream with lines asked for ahead
// draws 18.8 GB/s there, four streams 12 to 15, and a sweep over 64 rows half of one over 16; and on a Zen 5, where rows
// one after the other give 39 GB/s, two side by side, 128 bytes of each in turns, 24 to 32, eight 22 to 27.  A
// Cascade Lake has 12 requests under way, each of which brings two lines: asking for one of two was 1.01 to 1.1 times as fast
// with 16 to 96 rows of packed panels.
const Habits& habits() {
  static constexpr Habits usual{};
  static constexpr Habits intel{.streams = 1, .rows_of_a_sweep = 16, .tiles_on_matrices = 2};
  static constexpr Habits skylake{.streams = 1,
                                  .rows_of_a_sweep = 16,
                                  .tiles_on_matrices = 2,
                                  .request = 2 * Carry::line,
                                  .bursts_past_caches = false,
                                  .half_vectors = false};
  static constexpr Habits zen5{.tiles_on_matrices = 1,
                               .row_by_row = true,
                               .lines_ahead = 128,
                               .to_stage = Route::through_l1,
                               .half_vectors = false};
  static const Habits& here = []() -> const Habits& {
    const KernelTable* const table = &kernel_table();
    if (table == &emulated_amx_bf16_table) return intel;
    if (table == &emulated_avx512_bf16_table) return zen5;
    if (table == &emulated_avx512_table || table == &emulated_avx2_table) return usual;
    return is_intel() ? (is_skylake() ? skylake : intel) : is_zen5() ? zen5 : usual;
  }();
  return here;
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
