// NEON, which every 64-bit ARM has: 16-byte vectors, 32 registers: 10 × 2 accumulators, 2 of B, the rest for A:
// compilers load several of its numbers ahead, and spill from 11 rows on.
#include "numoe/kernels/elementwise.h"

namespace numoe {

extern const KernelTable neon_table;
const KernelTable neon_table = {"neon", "16-byte vectors and fused multiply-add (AArch64)", [] { return true; },
                                make_kernels<float, 4, 10>(), make_kernels<double, 2, 10>()};

}  // namespace numoe
