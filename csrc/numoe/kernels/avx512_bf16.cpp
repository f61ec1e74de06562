// AVX-512 with dot products of bfloat16 pairs: the shapes of avx512.cpp, and the same tile on pairs.
#include "numoe/kernels/avx512.h"
#include "numoe/kernels/elementwise.h"

namespace numoe {

extern const KernelTable avx512_bf16_table;
const KernelTable avx512_bf16_table = {"avx512_bf16", "the vectors of avx512 and bfloat16 dot products (AVX-512 BF16)",
                                       [] { return has_avx512() && __builtin_cpu_supports("avx512bf16"); },
                                       make_dot_kernels<16, 14>(), make_kernels<double, 8, 14>()};

}  // namespace numoe
