// AVX2 + FMA: 32-byte vectors, 16 registers: 6 × 2 accumulators, 2 of B, 1 broadcast.
#include "numoe/kernels/elementwise.h"

namespace numoe {

extern const KernelTable avx2_table;
const KernelTable avx2_table = {"avx2", "32-byte vectors and fused multiply-add (AVX2, FMA)",
                                [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); },
                                make_kernels<float, 8, 6>(), make_kernels<double, 4, 6>()};

}  // namespace numoe
