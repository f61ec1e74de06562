#include "numoe/bfloat16.h"

#include "numoe/kernels/kernels.h"
#include "numoe/parallel.h"

namespace numoe {
namespace {

constexpr Index numbers_per_task = 1 << 16;  // some 10 us

}  // namespace

void widen(Index n, const bfloat16* narrow, float* wide) {
  parallel_ranges(n, numbers_per_task, [&](Index begin, Index end) {
    kernels<float>().widen(1, end - begin, narrow + begin, end - begin, wide + begin, end - begin);
  });
}

void narrow(Index n, const float* wide, bfloat16* narrow) {
  parallel_ranges(n, numbers_per_task,
                  [&](Index begin, Index end) { kernels<float>().narrow(end - begin, wide + begin, narrow + begin); });
}

}  // namespace numoe
