// AVX-512 (F, BW, DQ, VL): 64-byte vectors, 32 registers: 14 × 2 accumulators, 2 of B, 1 broadcast.
#include "numoe/kernels/avx512.h"

#include "numoe/kernels/elementwise.h"

namespace numoe {

extern const KernelTable avx512_table;
const KernelTable avx512_table = {"avx512", "64-byte vectors and fused multiply-add (AVX-512 F, BW, DQ, VL)",
                                  has_avx512, make_kernels<float, 16, 14>(), make_kernels<double, 8, 14>()};

}  // namespace numoe
