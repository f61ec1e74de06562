// The targets only tests ask for, and the choice itself, apart from the CPU and the environment it is made for.
#pragma once

#include "numoe/kernels/kernels.h"

namespace numoe {

// "emulated-amx_bf16", "emulated-avx512_bf16", "emulated-avx512" and "emulated-avx2": lanes and tile heights of the targets
// they are named after, in baseline instructions, and the habits of some CPU that has it, so that a CPU without the wide
// vectors runs every shape, edge, tail and way through memory of theirs.  Bits differ from the real target's only because that one fuses multiplications with additions; products of
// bfloat16 pairs are the same here.  Slow; only NUMOE_TARGET chooses them.
std::span<const KernelTable* const> emulated_tables();

// The first of `tables` that the CPU supports if `wanted` is null or empty, else the one of that name, of either list;
// std::runtime_error with a sentence if this CPU or this build lacks it.
const KernelTable& choose_table(std::span<const KernelTable* const> tables,
                                std::span<const KernelTable* const> emulated, const char* wanted);

}  // namespace numoe
