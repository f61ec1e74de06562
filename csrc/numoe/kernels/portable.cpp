// The target that runs everywhere: 16-byte vectors, which every 64-bit x86 and ARM has.
#include "numoe/kernels/elementwise.h"

namespace numoe {

extern const KernelTable portable_table;
const KernelTable portable_table = {"portable", "16-byte vectors, no CPU features beyond the 64-bit baseline",
                                    [] { return true; }, make_kernels<float, 4, 5>(), make_kernels<double, 2, 5>()};

}  // namespace numoe
