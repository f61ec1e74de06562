// A matrix unit for bfloat16 pairs: AMX, which multiplies 16 rows of 16 pairs by 16 columns at once.
//
// It has eight registers of up to 16 rows of 64 bytes.  A tile of up to 32 rows, of which a first register has up to 16 and
// a second one the others, uses them so:
//
//   sums, left and right half of a panel     0 1 for the first rows, 2 3 for the others
//   rows of a                                4                       5
//   a panel                                  6 for its left half, 7 for its right half
//
// Registers are shaped to the rows that there are; columns and pairs are always 16.
#pragma once

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "numoe/kernels/lanes.h"
#include "numoe/kernels/pairs.h"

namespace numoe {
namespace {

constexpr int matrix_side = 16;  // rows, columns, pairs

// How many rows register t has in a tile of `rows` rows; one, unused, if those of the others are none.
constexpr int rows_of_register(int t, int rows) {
  const bool of_b = t >= 6, others = t == 2 || t == 3 || t == 5;
  const int first = rows < matrix_side ? rows : matrix_side, rest = rows - first;
  return of_b ? matrix_side : !others ? first : rest > 0 ? rest : 1;
}

#if defined(__x86_64__)
// What shapes the registers: palette 1 of Intel's Software Developer's Manual, volume 1, chapter 18.
struct alignas(64) AmxShape {
  std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
  std::uint16_t bytes_of_a_row[16] = {};
  std::uint8_t rows[16] = {};
};
struct AmxShapes {
  AmxShape of_rows[2 * matrix_side];

  constexpr AmxShapes() {
    for (int rows = 1; rows <= 2 * matrix_side; ++rows) {
      for (int t = 0; t < 8; ++t) {
        of_rows[rows - 1].bytes_of_a_row[t] = 64;
        of_rows[rows - 1].rows[t] = static_cast<std::uint8_t>(rows_of_register(t, rows));
      }
    }
  }
};
constexpr AmxShapes amx_shapes;

// Whether this process may use AMX-BF16.  The system has to save its registers, 8 KB that not every signal stack has room
// for, and Linux does so only for processes that ask (ARCH_REQ_XCOMP_PERM, Documentation/arch/x86/xstate.rst).  Elsewhere it
// is not used.
inline bool has_amx_bf16() {
#if defined(__linux__)
  constexpr unsigned osxsave = 1u << 27, amx_tile = 1u << 24, amx_bf16 = 1u << 22, tile_state = 3u << 17;
  constexpr long request_permission = 0x1023, tile_data = 18;
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & osxsave)) return false;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d & amx_tile) || !(d & amx_bf16)) return false;
  unsigned low = 0, high = 0;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (low & tile_state) == tile_state && syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#else
  return false;
#endif
}

// AMX-BF16.  Other libraries of the process use it too, so its registers are given back after every call of a kernel.
// (No destructor does that: it would share the language's own symbols with other object files.)
struct Amx {
  inline void shape(Index rows) { asm volatile("ldtilecfg %0" : : "m"(amx_shapes.of_rows[rows - 1])); }
  inline void give_back() { asm volatile("tilerelease"); }

  template <int t>
  inline void clear() {
    asm volatile("tilezero %%tmm%c0" : : "i"(t));
  }
  // Rows `stride` bytes apart.
  template <int t>
  inline void load(const void* from, Index stride) {
    asm volatile("tileloadd (%1,%2,1), %%tmm%c0" : : "i"(t), "r"(from), "r"(stride) : "memory");
  }
  template <int t>
  inline void store(void* to, Index stride) {
    asm volatile("tilestored %%tmm%c0, (%1,%2,1)" : : "i"(t), "r"(to), "r"(stride) : "memory");
  }
  template <int sums, int a, int b>
  inline void multiply_add() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(sums), "i"(a), "i"(b));
  }
};
#endif

// The same on ordinary registers, bit for bit, for tests.  The manual says (TDPBF16PS): the products of even k's and those
// of odd k's are added up apart, each by fused multiply-adds from 0 on, then both sums to one another, then to the sums
// there were; to nearest even, with subnormal numbers and results as 0.
class EmulatedMatrix {
 public:
  void shape(Index rows) { rows_ = static_cast<int>(rows); }
  void give_back() {}

  template <int t>
  void clear() {
    for (V& row : tile_[t]) row = V{};
  }
  template <int t>
  void load(const void* from, Index stride) {
    const char* p = static_cast<const char*>(from);
    for (int r = 0; r < rows_of(t); ++r, p += stride) tile_[t][r] = numoe::load<V>(p);
  }
  template <int t>
  void store(void* to, Index stride) {
    char* p = static_cast<char*>(to);
    for (int r = 0; r < rows_of(t); ++r, p += stride) numoe::store(p, tile_[t][r]);
  }
  template <int sums, int a, int b>
  void multiply_add() {
    for (int r = 0; r < rows_of(sums); ++r) {
      const Words pairs = reinterpret<Words>(tile_[a][r]);
      V even{}, odd{};
      for (int k = 0; k < matrix_side; ++k) {
        const Words left = Words{} + pairs[k], right = reinterpret<Words>(tile_[b][k]);
        even = fused<16>(even, reinterpret<V>(left << 16), reinterpret<V>(right << 16));
        odd = fused<16>(odd, reinterpret<V>(left & 0xffff0000u), reinterpret<V>(right & 0xffff0000u));
      }
      tile_[sums][r] = flushed<16>(flushed<16>(tile_[sums][r]) + flushed<16>(even + odd));
    }
  }

 private:
  using V = Lanes<float, 16>;
  using Words = Lanes<std::uint32_t, 16>;
  int rows_of(int t) const { return rows_of_register(t, rows_); }

  int rows_ = 0;
  V tile_[8][matrix_side];
};

}  // namespace
}  // namespace numoe
