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

constexpr Index prefetch_bytes = 3072;  // how far ahead of a panel's reader its next lines are asked for

// left, right (+)= a · b for one k
template <class T, int R, class V>
inline void multiply_add(const T* a, V b_left, V b_right, V (&left)[R], V (&right)[R]) {
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    left[r] += a[r] * b_left;
    right[r] += a[r] * b_right;
  }
}
template <class T, int N, int R, class V>
inline void store_rows(T* c, Index stride, const V (&left)[R], const V (&right)[R]) {
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    store(c + r * stride, left[r]);
    store(c + r * stride + N, right[r]);
  }
}

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
    __builtin_prefetch(reinterpret_cast<const char*>(b) + prefetch_bytes);
    __builtin_prefetch(reinterpret_cast<const char*>(b) + prefetch_bytes + N * sizeof(T));
    multiply_add<T, R>(a, load<V>(b), load<V>(b + N), left, right);
  }
  store_rows<T, N>(c, c_stride, left, right);
}

// Lanes hold pairs (k even in the low half, k odd in the high half): a shift and a mask widen them.
template <int N, int R>
void tile_bf16_of_height(Index depth, const float* a, const bfloat16* b, float* c, Index c_stride) {
  using V = Lanes<float, N>;
  using I = Lanes<std::uint32_t, N>;
  const I high_half = I{} + 0xffff0000u;
  V left[R], right[R];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) left[r] = right[r] = V{};
  for (Index k = 0; k < depth; k += 2, a += 2 * R, b += 4 * N) {
    __builtin_prefetch(reinterpret_cast<const char*>(b) + prefetch_bytes);
    __builtin_prefetch(reinterpret_cast<const char*>(b) + prefetch_bytes + 4 * N);
    const I pairs_left = load<I>(b), pairs_right = load<I>(b + 2 * N);
    multiply_add<float, R>(a, reinterpret<V>(pairs_left << 16), reinterpret<V>(pairs_right << 16), left, right);
    if (k + 1 == depth) break;
    multiply_add<float, R>(a + R, reinterpret<V>(pairs_left & high_half), reinterpret<V>(pairs_right & high_half), left,
                           right);
  }
  store_rows<float, N>(c, c_stride, left, right);
}

template <int N>
void widen_panel(Index depth, const bfloat16* narrow, float* wide) {
  using I = Lanes<std::uint32_t, N>;
  const I high_half = I{} + 0xffff0000u;
  for (Index k = 0; k < depth; k += 2, narrow += 4 * N, wide += 4 * N) {
    const I left = load<I>(narrow), right = load<I>(narrow + 2 * N);
    store(wide, reinterpret<Lanes<float, N>>(left << 16));
    store(wide + N, reinterpret<Lanes<float, N>>(right << 16));
    if (k + 1 == depth) return;
    store(wide + 2 * N, reinterpret<Lanes<float, N>>(left & high_half));
    store(wide + 3 * N, reinterpret<Lanes<float, N>>(right & high_half));
  }
}

template <class T, int N, int R>
struct Tile {
  static void run(Index depth, Index rows, const T* a, const T* b, T* c, Index c_stride, bool accumulate) {
    heights(std::make_integer_sequence<int, R>{})[rows - 1](depth, a, b, c, c_stride, accumulate);
  }
  static void run_bf16(Index depth, Index rows, const float* a, const bfloat16* b, float* c, Index c_stride) {
    bf16_heights(std::make_integer_sequence<int, R>{})[rows - 1](depth, a, b, c, c_stride);
  }

 private:
  using Function = void (*)(Index, const T*, const T*, T*, Index, bool);
  using Bf16Function = void (*)(Index, const float*, const bfloat16*, float*, Index);
  template <int... H>
  static const Function* heights(std::integer_sequence<int, H...>) {
    static constexpr Function table[] = {tile_of_height<T, N, H + 1>...};
    return table;
  }
  template <int... H>
  static const Bf16Function* bf16_heights(std::integer_sequence<int, H...>) {
    static constexpr Bf16Function table[] = {tile_bf16_of_height<N, H + 1>...};
    return table;
  }
};

}  // namespace
}  // namespace numoe
