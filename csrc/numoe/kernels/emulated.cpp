// The shapes of the wide targets under baseline flags: the compiler cuts every wide vector into narrow ones.
#include "numoe/kernels/elementwise.h"

namespace numoe {
namespace {

bool everywhere() { return true; }

}  // namespace

extern const KernelTable emulated_amx_bf16_table, emulated_avx512_bf16_table, emulated_avx512_table,
    emulated_avx2_table;
const KernelTable emulated_amx_bf16_table = {
    "emulated-amx_bf16", "the shapes of amx_bf16 on the baseline's vectors, its products number by number: for tests",
    everywhere, make_matrix_kernels<EmulatedMatrix, 16, 14>(), make_kernels<double, 8, 14>()};
const KernelTable emulated_avx512_bf16_table = {
    "emulated-avx512_bf16", "the shapes of avx512_bf16 on the baseline's vectors, its dots number by number: for tests",
    everywhere, make_dot_kernels<16, 14>(), make_kernels<double, 8, 14>()};
const KernelTable emulated_avx512_table = {"emulated-avx512",
                                           "the shapes of avx512 on the baseline's vectors: for tests", everywhere,
                                           make_kernels<float, 16, 14>(), make_kernels<double, 8, 14>()};
const KernelTable emulated_avx2_table = {"emulated-avx2", "the shapes of avx2 on the baseline's vectors: for tests",
                                         everywhere, make_kernels<float, 8, 6>(), make_kernels<double, 4, 6>()};

}  // namespace numoe
