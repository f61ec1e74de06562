// AVX-512 with products of bfloat16 pairs: the shapes of avx512.cpp, and pairs multiplied by dots or by a matrix unit.
#include "numoe/kernels/avx512.h"
#include "numoe/kernels/elementwise.h"

namespace numoe {
namespace {

bool has_avx512_bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }

}  // namespace

extern const KernelTable amx_bf16_table, avx512_bf16_table;
const KernelTable amx_bf16_table = {"amx_bf16",
                                    "the vectors of avx512 and bfloat16 products on the matrix unit (AMX-BF16)",
                                    [] { return has_avx512_bf16() && has_amx_bf16(); },
                                    make_matrix_kernels<Amx, 16, 14>(), make_kernels<double, 8, 14>()};
const KernelTable avx512_bf16_table = {"avx512_bf16", "the vectors of avx512 and bfloat16 dot products (AVX-512 BF16)",
                                       has_avx512_bf16, make_dot_kernels<16, 14>(), make_kernels<double, 8, 14>()};

}  // namespace numoe
