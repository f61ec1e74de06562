// The choice of a target on CPUs that this machine is not, and what products of bfloat16 pairs are.
#include <algorithm>
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

// ── products of bfloat16 pairs ──────────────────────────────────────────────────────────────────────────────────────

using Kernel = const numoe::Kernels<float>;

template <class Test>
void with_every_target_that_has_pairs(Test test) {
  for (const auto tables : {numoe::kernel_tables(), numoe::emulated_tables()}) {
    for (const KernelTable* table : tables) {
      if (table->supported() && table->f32.pairs) test(table->f32);
    }
  }
}
bool has_matrix_unit(Kernel& kernel) { return kernel.pairs.together > 1; }

float pair(float even, float odd) {
  const std::uint32_t low = numoe::round_to_bfloat16(even).bits, high = numoe::round_to_bfloat16(odd).bits;
  return std::bit_cast<float>(high << 16 | low);
}
std::uint32_t bits(float value) { return std::bit_cast<std::uint32_t>(value); }

// a(k, r) for a tile of `height` rows, in the order of the kernel's tiles.
template <class Number>
std::vector<float> packed_rows(Kernel& kernel, Index depth, Index height, Number number) {
  const Index group = kernel.pairs.together, groups = (depth + group - 1) / group;
  std::vector<float> a(static_cast<std::size_t>(groups * height * group + 1));
  for (Index k = 0; k < depth; ++k) {
    for (Index r = 0; r < height; ++r) {
      a[static_cast<std::size_t>(k / group * height * group + r * group + k % group)] = number(k, r);
    }
  }
  return a;
}

// sum + a · b as every lane of a tile computes it.
float product(Kernel& kernel, float sum, float a, float b) {
  const auto rows = packed_rows(kernel, 1, 1, [=](Index, Index) { return a; });
  std::vector<float> panel(static_cast<std::size_t>(kernel.tile_cols), b), c(panel.size(), sum);
  numoe::TileArgs<float> args{.depth = 1, .a = rows.data(), .b = panel.data(), .c = c.data()};
  args.c_stride = kernel.tile_cols;
  args.store = numoe::Store::accumulate;
  kernel.pairs.tile(1, args);
  for (const float value : c) CHECK(bits(value) == bits(c[0]));
  return c[0];
}

void test_the_order_of_a_pair(Kernel& kernel) {
  // A dot adds the odd product first: 1 + 2^24 is a tie and rounds to 2^24.  A matrix adds both products to each other.
  const float expected = has_matrix_unit(kernel) ? 1.0f : 0.0f;
  CHECK(product(kernel, 1, pair(-4096, 4096), pair(4096, 4096)) == expected);
  CHECK(product(kernel, 1, pair(4096, 0), pair(4096, 0)) == 0x1p24f);
  CHECK(product(kernel, 3, pair(4096, 0), pair(4096, 0)) == 0x1p24f + 4);
}

void test_dots_are_fused_with_the_sum(Kernel& kernel) {
  const float largest = std::numeric_limits<float>::max();  // 2^128 alone is infinite
  const float expected = has_matrix_unit(kernel) ? std::numeric_limits<float>::infinity() : 0x1p104f;
  CHECK(product(kernel, -largest, pair(0, 0x1p64f), pair(0, 0x1p64f)) == expected);
  CHECK(product(kernel, -largest, pair(0x1p64f, 0), pair(0x1p64f, 0)) == expected);
}

void test_subnormal_numbers_count_as_zero(Kernel& kernel) {
  constexpr float subnormal = 0x1p-130f, large = 0x1p100f, small = 0x1p-64f;
  CHECK(product(kernel, 0, pair(subnormal, subnormal), pair(large, large)) == 0);
  CHECK(product(kernel, 0, pair(large, large), pair(subnormal, subnormal)) == 0);
  CHECK(product(kernel, subnormal, pair(0, 0), pair(1, 1)) == 0);
  CHECK(product(kernel, 0, pair(0, small), pair(0, small)) == 0);  // a subnormal result
  CHECK(product(kernel, 0, pair(0, 2 * small), pair(0, small / 2)) == 0);
  CHECK(product(kernel, 0, pair(0, small), pair(0, 0x1p-62f)) == 0x1p-126f);
}

void test_what_is_no_number_is_passed_on(Kernel& kernel) {
  constexpr float inf = std::numeric_limits<float>::infinity(), nan = std::numeric_limits<float>::quiet_NaN();
  CHECK(product(kernel, 1, pair(0, inf), pair(0, 1)) == inf);
  CHECK(std::isnan(product(kernel, 1, pair(inf, 0), pair(0, 0))));
  CHECK(std::isnan(product(kernel, 1, pair(0, nan), pair(0, 1))));
  CHECK(std::isnan(product(kernel, nan, pair(0, 0), pair(0, 0))));
}

// c of a tile, or of panels side by side.
std::vector<float> tile_of(Kernel& kernel, Index height, Index depth, Index panels, numoe::Store store,
                           const std::vector<float>& a, const std::vector<float>& b, float before) {
  const Index width = kernel.tile_cols;
  std::vector<float> c(static_cast<std::size_t>(panels * height * width), before);
  numoe::TileArgs<float> args{.depth = depth, .a = a.data(), .b = b.data(), .c = c.data()};
  args.c_stride = width;
  args.store = store;
  if (panels == 1) {
    kernel.pairs.tile(height, args);
  } else {
    kernel.pairs.broad_tile(height, args, {.panels = panels, .b_step = depth * width, .c_step = height * width});
  }
  return c;
}

// Of a broad tile.
Index panels_beside(Kernel& kernel, Index height) {
  if (!kernel.pairs.broad_tile) return 1;
  return std::min(kernel.pairs.tile_rows / height, numoe::max_side_by_side);
}
// All of most targets' tiles, and some of a matrix unit's, which are cut into tiles of 32 rows.
std::vector<Index> heights_of(Kernel& kernel) {
  std::vector<Index> heights;
  for (Index height = 1; height <= kernel.pairs.tile_rows; height += height < 34 ? 1 : height < 67 ? 8 : 61) {
    heights.push_back(height);
  }
  return heights;
}

// Many heights, every number of panels, and depths around those that are multiplied at once: integers, so that sums are
// exact.
void test_tiles_of_pairs(Kernel& kernel) {
  const Index width = kernel.tile_cols;
  const auto number = [](Index k, Index i) { return static_cast<float>((k * 7 + i * 3) % 11 - 5); };
  for (const Index height : heights_of(kernel)) {
    for (const Index depth : {0, 1, 2, 3, 7, 16, 40}) {
      const auto a = packed_rows(kernel, depth, height,
                                 [&](Index k, Index r) { return pair(number(2 * k, r), number(2 * k + 1, r)); });
      for (Index panels = 1; panels <= panels_beside(kernel, height); ++panels) {
        std::vector<float> b(static_cast<std::size_t>(panels * depth * width));
        for (Index i = 0; i < panels * depth * width; ++i) {
          const Index k = i / width % depth, j = i % width + i / width / depth;
          b[static_cast<std::size_t>(i)] = pair(number(j, 2 * k), number(j, 2 * k + 1));
        }
        b.resize(b.size() + 64, std::numeric_limits<float>::quiet_NaN());
        const auto store = depth % 2 ? numoe::Store::accumulate : numoe::Store::overwrite;
        const auto c = tile_of(kernel, height, depth, panels, store, a, b, 1.0f);
        for (Index i = 0; i < panels * height * width; ++i) {
          const Index p = i / width / height, r = i / width % height, j = i % width + p;
          float sum = depth % 2 ? 1.0f : 0.0f;
          for (Index k = 0; k < 2 * depth; ++k) sum += number(k, r) * number(j, k);
          CHECK(c[static_cast<std::size_t>(i)] == sum);
        }
      }
    }
  }
}

// What the emulated targets compute is what the manual says; the CPU has to agree, on numbers of all sizes.
void test_emulated_pairs_have_the_bits_of_real_ones() {
  for (const KernelTable* real : numoe::kernel_tables()) {
    for (const KernelTable* pretends : numoe::emulated_tables()) {
      if (!real->supported() || !real->f32.pairs || pretends->name != "emulated-" + std::string(real->name)) continue;
      std::uint32_t state = 1;
      const auto any = [&] { return std::bit_cast<float>(state = state * 1664525u + 1013904223u); };
      const auto usual = [&](Index, Index) {  // most of them near 1, so that few sums are infinite
        const float wild = any();
        return state >> 28 == 0 ? wild : std::bit_cast<float>((bits(wild) & 0xc3ffc3ffu) | 0x3c003c00u);
      };
      constexpr Index depth = 53;
      for (const Index height : heights_of(real->f32)) {
        const auto a = packed_rows(real->f32, depth, height, usual);
        std::vector<float> b(static_cast<std::size_t>(depth * real->f32.tile_cols));
        for (float& value : b) value = usual(0, 0);
        const auto tile = [&](const KernelTable* table) {
          return tile_of(table->f32, height, depth, 1, numoe::Store::accumulate, a, b, 0.3f);
        };
        const auto c = tile(real), expected = tile(pretends);
        for (std::size_t i = 0; i < c.size(); ++i) {
          CHECK(bits(c[i]) == bits(expected[i]) || (std::isnan(c[i]) && std::isnan(expected[i])));
        }
      }
    }
  }
}

void test_pairs_are_rounded(Kernel& kernel) {
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
      kernel.pairs.round(static_cast<Index>(n), factor, x.data(), pairs.data());
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
    kernel.pairs.round(static_cast<Index>(n), 1.0f, x.data(), pairs.data());
    kernel.pairs.round(static_cast<Index>(n), 1.0f, x.data(), x.data());
    CHECK(std::memcmp(x.data(), pairs.data(), (n + 1) / 2 * sizeof(float)) == 0);
  }
}

}  // namespace

int main() {
  test_the_best_that_the_cpu_has_is_the_default();
  test_a_name_chooses();
  test_what_the_cpu_lacks_is_refused_with_what_it_has();
  test_supported_tables_run();
  with_every_target_that_has_pairs(test_the_order_of_a_pair);
  with_every_target_that_has_pairs(test_dots_are_fused_with_the_sum);
  with_every_target_that_has_pairs(test_subnormal_numbers_count_as_zero);
  with_every_target_that_has_pairs(test_what_is_no_number_is_passed_on);
  with_every_target_that_has_pairs(test_tiles_of_pairs);
  with_every_target_that_has_pairs(test_pairs_are_rounded);
  test_emulated_pairs_have_the_bits_of_real_ones();
  return 0;
}
