// The choice of a target on CPUs that this machine is not, and what dot products of bfloat16 pairs are.
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "check.h"
#include "numoe/kernels/target.h"

namespace {

using numoe::choose_table;
using numoe::Index;
using numoe::KernelTable;

bool yes() { return true; }
bool no() { return false; }

const KernelTable wide_here{"wide", "", yes, {}, {}}, wide_elsewhere{"wide", "", no, {}, {}};
const KernelTable middle{"middle", "", yes, {}, {}}, narrow{"narrow", "", yes, {}, {}};
const KernelTable pretended{"emulated-wide", "", yes, {}, {}};

const KernelTable* const new_cpu[] = {&wide_here, &middle, &narrow};
const KernelTable* const old_cpu[] = {&wide_elsewhere, &middle, &narrow};
const KernelTable* const emulated[] = {&pretended};

std::string refusal(const char* wanted) {
  try {
    choose_table(old_cpu, emulated, wanted);
  } catch (const std::runtime_error& error) {
    return error.what();
  }
  return "accepted";
}

void test_the_best_that_the_cpu_has_is_the_default() {
  for (const char* nothing : {static_cast<const char*>(nullptr), ""}) {
    CHECK(&choose_table(new_cpu, emulated, nothing) == &wide_here);
    CHECK(&choose_table(old_cpu, emulated, nothing) == &middle);
  }
}

void test_a_name_chooses() {
  CHECK(&choose_table(new_cpu, emulated, "narrow") == &narrow);
  CHECK(&choose_table(old_cpu, emulated, "middle") == &middle);
  CHECK(&choose_table(old_cpu, emulated, "emulated-wide") == &pretended);
}

void test_what_the_cpu_lacks_is_refused_with_what_it_has() {
  for (const char* name : {"wide", "Middle", "middle ", "emulated"}) {
    CHECK(refusal(name) == "NUMOE_TARGET='" + std::string(name) +
                               "' is not a target that this CPU and this build have; set it to one of: middle, narrow, "
                               "or unset it");
  }
}

// Every table of this build that this CPU supports computes: an illegal instruction would end the test here.
void test_supported_tables_run() {
  for (const auto tables : {numoe::kernel_tables(), numoe::emulated_tables()}) {
    for (const KernelTable* table : tables) {
      if (!table->supported()) continue;
      float x[37], y[37];
      for (int i = 0; i < 37; ++i) x[i] = y[i] = static_cast<float>(i);
      table->f32.axpy(37, 2.0f, x, y);
      for (int i = 0; i < 37; ++i) CHECK(y[i] == 3.0f * x[i]);
      CHECK(table->f32.dot(37, x, x) == 16206.0f);
    }
  }
  CHECK(std::strcmp(numoe::kernel_tables().back()->name, "portable") == 0);
  CHECK(numoe::kernel_tables().back()->supported());
}

// ── dot products ────────────────────────────────────────────────────────────────────────────────────────────────────

using Dots = const numoe::Kernels<float>;

template <class Test>
void with_every_target_that_has_dots(Test test) {
  for (const auto tables : {numoe::kernel_tables(), numoe::emulated_tables()}) {
    for (const KernelTable* table : tables) {
      if (table->supported() && table->f32.tile_dot) test(table->f32);
    }
  }
}

float pair(float even, float odd) {
  const std::uint32_t low = numoe::round_to_bfloat16(even).bits, high = numoe::round_to_bfloat16(odd).bits;
  return std::bit_cast<float>(high << 16 | low);
}

// sum + a · b as every lane of a tile computes it.
float dot(Dots& kernel, float sum, float a, float b) {
  std::vector<float> panel(static_cast<std::size_t>(kernel.tile_cols), b), c(panel.size(), sum);
  numoe::TileArgs<float> args{.depth = 1, .a = &a, .b = panel.data(), .b_stride = kernel.tile_cols, .c = c.data()};
  args.c_stride = kernel.tile_cols;
  args.store = numoe::Store::accumulate;
  kernel.tile_dot(1, args);
  for (const float value : c) CHECK(std::bit_cast<std::uint32_t>(value) == std::bit_cast<std::uint32_t>(c[0]));
  return c[0];
}

void test_a_dot_adds_the_odd_product_first(Dots& kernel) {
  CHECK(dot(kernel, 1, pair(-4096, 4096), pair(4096, 4096)) == 0);  // 1 + 2^24 is a tie and rounds to 2^24
  CHECK(dot(kernel, 1, pair(4096, 0), pair(4096, 0)) == 0x1p24f);
  CHECK(dot(kernel, 3, pair(4096, 0), pair(4096, 0)) == 0x1p24f + 4);
}

void test_a_dot_is_fused(Dots& kernel) {
  const float largest = std::numeric_limits<float>::max();
  CHECK(dot(kernel, -largest, pair(0, 0x1p64f), pair(0, 0x1p64f)) == 0x1p104f);  // 2^128 alone is infinite
  CHECK(dot(kernel, -largest, pair(0x1p64f, 0), pair(0x1p64f, 0)) == 0x1p104f);
}

void test_a_dot_takes_subnormal_numbers_for_zero(Dots& kernel) {
  constexpr float subnormal = 0x1p-130f, large = 0x1p100f, small = 0x1p-64f;
  CHECK(dot(kernel, 0, pair(subnormal, subnormal), pair(large, large)) == 0);
  CHECK(dot(kernel, 0, pair(large, large), pair(subnormal, subnormal)) == 0);
  CHECK(dot(kernel, subnormal, pair(0, 0), pair(1, 1)) == 0);
  CHECK(dot(kernel, 0, pair(0, small), pair(0, small)) == 0);  // a subnormal result
  CHECK(dot(kernel, 0, pair(0, 2 * small), pair(0, small / 2)) == 0);
  CHECK(dot(kernel, 0, pair(0, small), pair(0, 0x1p-62f)) == 0x1p-126f);
}

void test_a_dot_passes_on_what_is_no_number(Dots& kernel) {
  constexpr float inf = std::numeric_limits<float>::infinity(), nan = std::numeric_limits<float>::quiet_NaN();
  CHECK(dot(kernel, 1, pair(0, inf), pair(0, 1)) == inf);
  CHECK(std::isnan(dot(kernel, 1, pair(inf, 0), pair(0, 0))));
  CHECK(std::isnan(dot(kernel, 1, pair(0, nan), pair(0, 1))));
  CHECK(std::isnan(dot(kernel, nan, pair(0, 0), pair(0, 0))));
}

// Every height, and depths around the unrolled ones: integers, so that sums are exact.
void test_tiles_of_dots(Dots& kernel) {
  const Index width = kernel.tile_cols;
  for (Index height = 1; height <= kernel.tile_rows; ++height) {
    for (const Index depth : {0, 1, 2, 3, 7, 40}) {
      const auto number = [](Index k, Index i) { return static_cast<float>((k * 7 + i * 3) % 11 - 5); };
      std::vector<float> a(static_cast<std::size_t>(depth * height + 1)),
          b(static_cast<std::size_t>(depth * width + 1));
      std::vector<float> c(static_cast<std::size_t>(height * width), 1.0f);
      for (Index k = 0; k < depth; ++k) {
        for (Index r = 0; r < height; ++r) a[k * height + r] = pair(number(2 * k, r), number(2 * k + 1, r));
        for (Index j = 0; j < width; ++j) b[k * width + j] = pair(number(j, 2 * k), number(j, 2 * k + 1));
      }
      numoe::TileArgs<float> args{.depth = depth, .a = a.data(), .b = b.data(), .b_stride = width, .c = c.data()};
      args.c_stride = width;
      args.store = depth % 2 ? numoe::Store::accumulate : numoe::Store::overwrite;
      kernel.tile_dot(height, args);
      for (Index r = 0; r < height; ++r) {
        for (Index j = 0; j < width; ++j) {
          float sum = depth % 2 ? 1.0f : 0.0f;
          for (Index k = 0; k < 2 * depth; ++k) sum += number(k, r) * number(j, k);
          CHECK(c[r * width + j] == sum);
        }
      }
    }
  }
}

void test_pairs_are_rounded(Dots& kernel) {
  for (std::size_t n = 1; n < 70; ++n) {
    std::vector<float> x(n), pairs((n + 1) / 2 + 1, 7.0f);
    // all exponents, ties to even and to odd, just beside them, NaN with a payload that rounding would lose
    constexpr std::uint32_t tails[] = {0, 0x7fff, 0x8000, 0x8001, 0x17fff, 0x18000, 0x18001, 1};
    for (std::size_t i = 0; i < n; ++i) {
      const auto bits = static_cast<std::uint32_t>(i * 1021 % 512) << 23 | tails[i % 8];
      x[i] = std::bit_cast<float>(bits);
    }
    x[0] = std::bit_cast<float>(0x807fffffu);  // subnormal, and nearest to a number that is not
    x[n / 2] = std::bit_cast<float>(0x7f800001u);
    for (const float factor : {1.0f, -0.7f}) {
      kernel.round_pairs(static_cast<Index>(n), factor, x.data(), pairs.data());
      for (std::size_t i = 0; i < 2 * ((n + 1) / 2); ++i) {
        const std::uint32_t word = std::bit_cast<std::uint32_t>(pairs[i / 2]),
                            half = i % 2 ? word >> 16 : word & 0xffff;
        const float value = i < n ? factor * x[i] : 0.0f;
        const auto expected =
            numoe::round_to_bfloat16(std::fabs(value) < 0x1p-126f ? std::copysign(0.0f, value) : value);
        CHECK(half == expected.bits);
      }
      CHECK(pairs.back() == 7.0f);
    }
    kernel.round_pairs(static_cast<Index>(n), 1.0f, x.data(), pairs.data());
    kernel.round_pairs(static_cast<Index>(n), 1.0f, x.data(), x.data());
    CHECK(std::memcmp(x.data(), pairs.data(), (n + 1) / 2 * sizeof(float)) == 0);
  }
}

}  // namespace

int main() {
  test_the_best_that_the_cpu_has_is_the_default();
  test_a_name_chooses();
  test_what_the_cpu_lacks_is_refused_with_what_it_has();
  test_supported_tables_run();
  with_every_target_that_has_dots(test_a_dot_adds_the_odd_product_first);
  with_every_target_that_has_dots(test_a_dot_is_fused);
  with_every_target_that_has_dots(test_a_dot_takes_subnormal_numbers_for_zero);
  with_every_target_that_has_dots(test_a_dot_passes_on_what_is_no_number);
  with_every_target_that_has_dots(test_tiles_of_dots);
  with_every_target_that_has_dots(test_pairs_are_rounded);
  return 0;
}
