// Arrays of bfloat16 numbers to float32 and back, by all threads.
#pragma once

#include "numoe/view.h"

namespace numoe {

void widen(Index n, const bfloat16* narrow, float* wide);
void narrow(Index n, const float* wide, bfloat16* narrow);  // to nearest, ties to even; NaN stays NaN

}  // namespace numoe
