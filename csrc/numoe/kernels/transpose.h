// Rows → columns: how row-major numbers become tiles and panels.
#pragma once

#include <utility>

#include "numoe/kernels/lanes.h"
#include "numoe/view.h"

namespace numoe {
namespace {

// 16 bytes of each of N / G rows, side by side: G numbers of row 0, then of row G, 2G, ...  (inserts, no shuffles)
template <class T, int N, int G>
inline Lanes<T, N> load_pieces(const T* const* row, Index k) {
  if constexpr (N == G) {
    return load<Lanes<T, N>>(*row + k);
  } else {
    const auto low = load_pieces<T, N / 2, G>(row, k);
    const auto high = load_pieces<T, N / 2, G>(row + N / 2, k);
    return [&]<std::size_t... I>(std::index_sequence<I...>) {
      return __builtin_shufflevector(low, high, static_cast<int>(I)...);
    }(std::make_index_sequence<N>{});
  }
}

// Within each group of G lanes: the lower (H = 0) or upper halves of a and b, alternating.
template <int H, int G, class V, std::size_t... I>
inline V interleave(V a, V b, std::index_sequence<I...>) {
  constexpr auto from = [](std::size_t i) {
    const int lane = static_cast<int>(i), n = static_cast<int>(sizeof...(I));
    return lane / G * G + H * G / 2 + lane % G / 2 + lane % 2 * n;
  };
  return __builtin_shufflevector(a, b, from(I)...);
}

// v[i] lane g·G + j → v[j] lane g·G + i.  Interleaving vector i with vector i + G/2 rotates the bits of (i, j) by one
// place; log2(G) times exchanges them.
template <class T, int N, int G>
inline void transpose_groups(Lanes<T, N> (&v)[G]) {
  constexpr std::make_index_sequence<N> lanes{};
#pragma GCC unroll 4
  for (int turn = 1; turn < G; turn *= 2) {
    Lanes<T, N> w[G];
#pragma GCC unroll 4
    for (int i = 0; i < G / 2; ++i) {
      w[2 * i] = interleave<0, G>(v[i], v[i + G / 2], lanes);
      w[2 * i + 1] = interleave<1, G>(v[i], v[i + G / 2], lanes);
    }
#pragma GCC unroll 4
    for (int i = 0; i < G; ++i) v[i] = w[i];
  }
}

// n numbers, the next n asked for.
template <class T, int N>
inline void copy_numbers(const T* source, Index n, T* target) {
  Index i = 0;
  for (; i + N <= n; i += N) {
    __builtin_prefetch(source + i + n);
    store(target + i, load<Lanes<T, N>>(source + i));
  }
  for (; i < n; ++i) target[i] = source[i];
}

// packed[k * stride + r] = row[r][k] for r < rows <= N.  While there is room before `end`, N numbers are written at each k;
// those beyond `rows` are written again by the next k.
template <class T, int N>
inline void transpose_lines(Index depth, Index rows, const T* const* row, T* packed, Index stride, const T* end) {
  constexpr int G = 16 / sizeof(T);
  const T* line[N];
#pragma GCC unroll 16
  for (int r = 0; r < N; ++r) line[r] = row[r < rows ? r : 0];
  Index k = 0;
  for (; k + G <= depth && packed + (G - 1) * stride + N <= end; k += G, packed += G * stride) {
    Lanes<T, N> v[G];
#pragma GCC unroll 4
    for (int i = 0; i < G; ++i) v[i] = load_pieces<T, N, G>(line + i, k);
    transpose_groups<T, N, G>(v);
#pragma GCC unroll 4
    for (int i = 0; i < G; ++i) store(packed + i * stride, v[i]);
  }
  for (; k < depth; ++k, packed += stride) {
    for (Index r = 0; r < rows; ++r) packed[r] = line[r][k];
  }
}

// The same.  Some lines of long rows are copied side by side first: rows a power of two apart share a set of the cache, and
// would push each other out while they are read 16 bytes at a time.
template <class T, int N>
inline void transpose_band(Index depth, Index rows, const T* const* row, T* packed, Index stride, const T* end) {
  constexpr int chunk = 256 / sizeof(T), pitch = chunk + N;
  if (depth <= 2 * N) return transpose_lines<T, N>(depth, rows, row, packed, stride, end);
  alignas(64) T lines[N * pitch];
  const T* line[N];
  for (int r = 0; r < N; ++r) line[r] = lines + r * pitch;
  for (Index first = 0; first < depth; first += chunk, packed += chunk * stride) {
    const Index n = depth - first < chunk ? depth - first : chunk;
    for (Index r = 0; r < rows; ++r) copy_numbers<T, N>(row[r] + first, n, lines + r * pitch);
    transpose_lines<T, N>(n, rows, line, packed, stride, end);
  }
}

// packed[k * stride + r] = row[r][k] for r < rows, k < depth.  A panel (stride 2N) is padded with zeros; a tile (stride = rows)
// ends where its last number ends.  Bands of N rows, the last one first: what it writes beyond its rows, others write again.
template <class T, int N>
void transpose(Index depth, Index rows, const T* const* row, T* packed, Index stride) {
  const T* const end = packed + depth * stride;
  const bool panel = stride == 2 * N;
  for (Index r = (rows - 1) / N * N; r >= 0; r -= N) {
    transpose_band<T, N>(depth, rows - r < N ? rows - r : N, row + r, packed + r, stride, end);
  }
  for (Index k = 0; panel && rows < stride && k < depth; ++k) {
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
