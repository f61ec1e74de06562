// The register tile: the one loop in which an MoE layer spends its time.
//
// R rows of A times a panel of W = 2 vectors of B stay in registers while k runs; per k the tile loads 2 vectors of B
// and R scalars of A for 2·R multiply-adds.  Heights 1..R are separate instantiations, so no row is computed for nothing.
#pragma once

#include <utility>

#include "numoe/kernels/lanes.h"
#include "numoe/view.h"

namespace numoe {
namespace {

template <class T, int N, int R>
void tile_of_height(Index depth, const T* a, const T* b, T* c, Index c_stride, bool accumulate) {
  using V = Lanes<T, N>;
  V left[R], right[R];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) left[r] = right[r] = V{};
  if (accumulate) {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      left[r] = load<V>(c + r * c_stride);
      right[r] = load<V>(c + r * c_stride + N);
    }
  }
  for (Index k = 0; k < depth; ++k, a += R, b += 2 * N) {
    const V b_left = load<V>(b), b_right = load<V>(b + N);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      left[r] += a[r] * b_left;
      right[r] += a[r] * b_right;
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    store(c + r * c_stride, left[r]);
    store(c + r * c_stride + N, right[r]);
  }
}

template <class T, int N, int R>
struct Tile {
  static void run(Index depth, Index rows, const T* a, const T* b, T* c, Index c_stride, bool accumulate) {
    heights(std::make_integer_sequence<int, R>{})[rows - 1](depth, a, b, c, c_stride, accumulate);
  }

 private:
  using Function = void (*)(Index, const T*, const T*, T*, Index, bool);
  template <int... H>
  static const Function* heights(std::integer_sequence<int, H...>) {
    static constexpr Function table[] = {tile_of_height<T, N, H + 1>...};
    return table;
  }
};

}  // namespace
}  // namespace numoe
