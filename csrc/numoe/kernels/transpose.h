// Rows → columns, N × N numbers at a time in registers.
#pragma once

#include "numoe/kernels/lanes.h"
#include "numoe/view.h"

namespace numoe {
namespace {

// The lower (H = 0) or upper halves of a and b, alternating: a0 b0 a1 b1 ...
template <int H, class V, std::size_t... I>
inline V interleave(V a, V b, std::index_sequence<I...>) {
  constexpr int n = sizeof...(I);
  return __builtin_shufflevector(a, b, static_cast<int>(H * n / 2 + I / 2 + I % 2 * n)...);
}

// v[r][k] → v[k][r].  Interleaving row i with row i + N/2 rotates the bits of (row, lane) by one place; log2(N) times
// exchanges row and lane.
template <class T, int N>
inline void transpose_square(Lanes<T, N> (&v)[N]) {
  using V = Lanes<T, N>;
  constexpr std::make_index_sequence<N> lanes{};
#pragma GCC unroll 4
  for (int turn = 1; turn < N; turn *= 2) {
    V w[N];
#pragma GCC unroll 8
    for (int i = 0; i < N / 2; ++i) {
      w[2 * i] = interleave<0>(v[i], v[i + N / 2], lanes);
      w[2 * i + 1] = interleave<1>(v[i], v[i + N / 2], lanes);
    }
#pragma GCC unroll 16
    for (int i = 0; i < N; ++i) v[i] = w[i];
  }
}

// packed[k * stride + r] = row[r][k] for r < rows, k < depth.  A panel (stride 2N) is padded with zeros; a tile
// (stride = rows) ends where its last number ends.
template <class T, int N>
void transpose(Index depth, Index rows, const T* const* row, T* packed, Index stride) {
  using V = Lanes<T, N>;
  const bool panel = stride == 2 * N;
  const T* const end = packed + depth * stride;
  Index k = 0;
  for (; k + N <= depth; k += N) {
    for (Index first = 0; first < (panel ? stride : rows); first += N) {
      const Index valid = rows - first;
      V v[N];
#pragma GCC unroll 16
      for (int r = 0; r < N; ++r) v[r] = r < valid ? load<V>(row[first + r] + k) : V{};
      transpose_square<T, N>(v);
#pragma GCC unroll 16
      for (int i = 0; i < N; ++i) {  // what a tile of few rows writes too much is written again by the next k
        T* const target = packed + (k + i) * stride + first;
        const bool whole = panel || (first == 0 && target + N <= end);
        if (whole) {
          store(target, v[i]);
        } else {
          __builtin_memcpy(target, &v[i], static_cast<std::size_t>(valid < N ? valid : N) * sizeof(T));
        }
      }
    }
  }
  for (; k < depth; ++k) {
    for (Index r = 0; r < rows; ++r) packed[k * stride + r] = row[r][k];
    for (Index r = rows; r < stride; ++r) packed[k * stride + r] = T(0);
  }
}

// Rows of W = 2N numbers, `stride` apart, side by side: a panel of a row-major matrix.
template <class T, int N>
void copy_panel(Index depth, const T* b, Index stride, T* packed) {
  using V = Lanes<T, N>;
  constexpr Index rows_ahead = 8;  // rows may be pages apart, and the hardware does not prefetch across pages
  for (Index k = 0; k < depth; ++k, b += stride, packed += 2 * N) {
    __builtin_prefetch(b + rows_ahead * stride);
    __builtin_prefetch(b + rows_ahead * stride + N);
    const V left = load<V>(b), right = load<V>(b + N);
    store(packed, left);
    store(packed + N, right);
  }
}

}  // namespace
}  // namespace numoe
