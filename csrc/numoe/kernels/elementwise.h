// Activations, their derivatives, axpy and dot on vector lanes.
//
// Tails run through the same vector code on a padded copy, so an element's bits do not depend on where it stands.
#pragma once

#include "numoe/kernels/kernels.h"
#include "numoe/kernels/lanes.h"
#include "numoe/kernels/matrix_tile.h"
#include "numoe/kernels/routing.h"
#include "numoe/kernels/tile.h"
#include "numoe/kernels/transpose.h"

namespace numoe {
namespace {

// act(v) and act'(v), lane by lane.
template <class V>
struct Activated {
  V value, slope;
};

// v·σ(scale·v) and its slope, from s = σ(scale·v) and the slope of scale·v.  Beyond ±saturation the limits, so that
// infinities give 0, inf and 1 instead of inf·0; the value of a large v is v as it is.
template <class T, int N>
inline Activated<Lanes<T, N>> gated(Lanes<T, N> v, Lanes<T, N> s, Lanes<T, N> inner_slope) {
  using V = Lanes<T, N>;
  const V limit = V{} + Float<T>::saturation;
  const V value = v * s;
  const V slope = s + value * (T(1) - s) * inner_slope;
  return {v < -limit ? V{} : value, v < -limit ? V{} : (v > limit ? V{} + T(1) : slope)};
}

inline float erfc_of(float v) { return __builtin_erfcf(v); }
inline double erfc_of(double v) { return __builtin_erfc(v); }

template <class T, int N>
inline Activated<Lanes<T, N>> gelu_erf(Lanes<T, N> v) {
  using V = Lanes<T, N>;
  V cdf;
  for (int i = 0; i < N; ++i) cdf[i] = T(0.5) * erfc_of(-v[i] * T(0.70710678118654752440));  // Φ(v)
  const V density = T(0.39894228040143267794) * exp<T, N>(T(-0.5) * v * v);                  // φ(v)
  const V limit = V{} + Float<T>::saturation;
  const V value = v * cdf, slope = cdf + v * density;
  return {v < -limit ? V{} : (v > limit ? v : value), v < -limit ? V{} : (v > limit ? V{} + T(1) : slope)};
}

template <Activation A, class T, int N>
inline Activated<Lanes<T, N>> act(Lanes<T, N> v) {
  using V = Lanes<T, N>;
  const V one = V{} + T(1);
  if constexpr (A == Activation::silu) {
    return gated<T, N>(v, sigmoid<T, N>(v), one);
  } else if constexpr (A == Activation::quick_gelu) {
    return gated<T, N>(v, sigmoid<T, N>(T(1.702) * v), T(1.702) * one);
  } else if constexpr (A == Activation::gelu_tanh) {  // ½(1 + tanh u) = σ(2u)
    const T c = T(1.59576912160573071176);            // 2·√(2/π)
    return gated<T, N>(v, sigmoid<T, N>(c * (v + T(0.044715) * v * v * v)), c * (one + T(3 * 0.044715) * v * v));
  } else if constexpr (A == Activation::gelu) {
    return gelu_erf<T, N>(v);
  } else if constexpr (A == Activation::relu) {
    return {v < V{} ? V{} : v, v > V{} ? one : V{}};
  } else {
    const V positive = v < V{} ? V{} : v;
    return {positive * positive, T(2) * positive};
  }
}

template <int N>
void widen(Index rows, Index n, const bfloat16* narrow, Index stride, float* wide, Index wide_stride) {
  using Half = Lanes<std::uint16_t, N>;
  using Word = Lanes<std::uint32_t, N>;
  for (Index r = 0; r < rows; ++r, narrow += stride, wide += wide_stride) {
    Index i = 0;
    for (; i + N <= n; i += N) store(wide + i, __builtin_convertvector(load<Half>(narrow + i), Word) << 16);
    for (; i < n; ++i) {
      const std::uint32_t bits = std::uint32_t{narrow[i].bits} << 16;
      __builtin_memcpy(wide + i, &bits, sizeof bits);
    }
  }
}

template <int N>
void narrow(Index n, const float* wide, bfloat16* narrow) {
  for_lanes<N>(n, [=](Index i, int count) {
    const auto half = nearest<N>(load_some<float, N>(wide + i, count));
    __builtin_memcpy(narrow + i, &half, sizeof *narrow * static_cast<std::size_t>(count));
  });
}

template <Activation A, class T, int N>
void activate_as(Index n, const T* pre, const T* linear, T* h) {
  for_lanes<N>(n, [=](Index i, int count) {
    const auto a = act<A, T, N>(load_some<T, N>(pre + i, count)).value;
    store_some<T, N>(h + i, linear ? a * load_some<T, N>(linear + i, count) : a, count);
  });
}

// h = act(pre) * linear  ⇒  dpre = dh * linear * act'(pre), dlinear = dh * act(pre)
template <Activation A, class T, int N>
T activate_backward_as(Index n, T weight, const T* pre, const T* linear, const T* dh, T* h, T* dpre, T* dlinear) {
  Lanes<T, N> products{};
  for_lanes<N>(n, [&](Index i, int count) {
    const auto a = act<A, T, N>(load_some<T, N>(pre + i, count));
    const auto d = load_some<T, N>(dh + i, count), weighted = weight * d;
    const auto l = linear ? load_some<T, N>(linear + i, count) : Lanes<T, N>{} + T(1);
    const auto value = a.value * l;
    products += d * value;
    store_some<T, N>(h + i, weight * value, count);
    store_some<T, N>(dpre + i, weighted * l * a.slope, count);
    if (linear) store_some<T, N>(dlinear + i, weighted * a.value, count);
  });
  return sum_of<T, N>(products);
}

// Turns the run-time Activation into the compile-time one: f.template operator()<A>().
template <class F>
inline auto with_activation(Activation activation, F f) {
  switch (activation) {
    case Activation::gelu:
      return f.template operator()<Activation::gelu>();
    case Activation::gelu_tanh:
      return f.template operator()<Activation::gelu_tanh>();
    case Activation::relu:
      return f.template operator()<Activation::relu>();
    case Activation::relu2:
      return f.template operator()<Activation::relu2>();
    case Activation::quick_gelu:
      return f.template operator()<Activation::quick_gelu>();
    case Activation::silu:
    default:
      return f.template operator()<Activation::silu>();
  }
}

template <class T, int N>
void activate(Activation activation, Index n, const T* pre, const T* linear, T* h) {
  with_activation(activation, [=]<Activation A>() { activate_as<A, T, N>(n, pre, linear, h); });
}
template <class T, int N>
T activate_backward(Activation activation, Index n, T weight, const T* pre, const T* linear, const T* dh, T* h, T* dpre,
                    T* dlinear) {
  return with_activation(activation, [=]<Activation A>() {
    return activate_backward_as<A, T, N>(n, weight, pre, linear, dh, h, dpre, dlinear);
  });
}

template <class T, int N>
void stream_zeros(Index n, T* p) {
  using V = Lanes<T, N>;
  for (; n > 0 && reinterpret_cast<std::uintptr_t>(p) % sizeof(V) != 0; --n, ++p) *p = T(0);
  for (; n >= N; n -= N, p += N) stream(p, V{});
  for (; n > 0; --n, ++p) *p = T(0);
  stream_end();
}

template <class T, int N>
void axpy(Index n, T alpha, const T* x, T* y) {
  for_lanes<N>(n, [=](Index i, int count) {
    store_some<T, N>(y + i, load_some<T, N>(y + i, count) + alpha * load_some<T, N>(x + i, count), count);
  });
}

template <class T, int N>
void add_rows(Index rows, Index n, const T* weight, const T* sums, Index sums_stride, const std::int32_t* token, T* y,
              Index y_stride) {
  constexpr Index rows_ahead = 8;
  for (Index r = 0; r < rows; ++r, sums += sums_stride) {
    const T* later = y + token[r + rows_ahead < rows ? r + rows_ahead : r] * y_stride;
    __builtin_prefetch(later, 1);
    __builtin_prefetch(later + N, 1);
    T* target = y + token[r] * y_stride;
    const T factor = weight ? weight[r] : T(1);
    if (n == 2 * N) {  // a whole panel
      store(target, load<Lanes<T, N>>(target) + factor * load<Lanes<T, N>>(sums));
      store(target + N, load<Lanes<T, N>>(target + N) + factor * load<Lanes<T, N>>(sums + N));
    } else {
      axpy<T, N>(n, factor, sums, target);
    }
  }
}

template <class T, int N>
T dot(Index n, const T* a, const T* b) {
  Lanes<T, N> sums{};
  for_lanes<N>(n, [&](Index i, int count) { sums += load_some<T, N>(a + i, count) * load_some<T, N>(b + i, count); });
  return sum_of<T, N>(sums);
}

// The whole table of one target: N lanes per vector register, tiles of R rows.
template <class T, int N, int R>
constexpr Kernels<T> make_kernels() {
  Kernels<T> table{.tile_rows = R,
                   .tile_cols = 2 * N,
                   .tile = Tile<T, N, R>::run,
                   .sweeping_tile = Tile<T, N, R>::run_sweeping,
                   .unpacked_rows = Tile<T, N, R>::unpacked_rows,
                   .unpacked_part = unpacked_part<T, N>,
                   .unpacked_tile = Tile<T, N, R>::run_unpacked,
                   .broad_tile = Tile<T, N, R>::run_broad,
                   .carrying_tile = Tile<T, N, R>::run_carrying,
                   .carry = carry<T, N>,
                   .tile_bf16 = nullptr,
                   .broad_tile_bf16 = nullptr,
                   .sweeping_tile_narrow = nullptr,
                   .pairs = {},
                   .copy_panel = copy_panel<T, N>,
                   .widen = nullptr,
                   .narrow = nullptr,
                   .widen_panel = nullptr,
                   .transpose = transpose<T, N>,
                   .stream_end = stream_end,
                   .stream_zeros = stream_zeros<T, N>,
                   .activate = activate<T, N>,
                   .activate_backward = activate_backward<T, N>,
                   .axpy = axpy<T, N>,
                   .add_rows = add_rows<T, N>,
                   .dot = dot<T, N>,
                   .routing = make_routing_kernels<T, N>()};
  if constexpr (sizeof(T) == sizeof(float)) {
    table.tile_bf16 = Tile<T, N, R>::run_bf16;
    table.broad_tile_bf16 = Tile<T, N, R>::run_broad_bf16;
    table.sweeping_tile_narrow = Tile<T, N, R>::run_sweeping_narrow;
    table.widen = widen<N>;
    table.narrow = narrow<N>;
    table.widen_panel = widen_panel<N>;
  }
  return table;
}

// The float32 table of a target with dot products of bfloat16 pairs.
template <int N, int R>
constexpr Kernels<float> make_dot_kernels() {
  Kernels<float> table = make_kernels<float, N, R>();
  table.pairs = {.tile_rows = R,
                 .rows_at_once = R,
                 .tile = Tile<float, N, R>::run_dot,
                 .sweeping_tile = Tile<float, N, R>::run_sweeping_dot,
                 .broad_tile = Tile<float, N, R>::run_broad_dot,
                 .unpacked_rows = Tile<float, N, R>::unpacked_rows,
                 .unpacked_part = unpacked_part<float, N>,
                 .unpacked_tile = Tile<float, N, R>::run_unpacked_dot,
                 .zipping_rows = most_zipping_rows,
                 .zipping_tile = Tile<float, N, R>::run_zipping,
                 .carrying_tile = Tile<float, N, R>::run_carrying_dot,
                 .carry = carry_zipped<N>,
                 .round = round_pairs<N>,
                 .zip_rounded = zip_rounded<N>,
                 .zip = zip<N>};
  return table;
}

// The float32 table of a target with products of whole tiles of bfloat16 pairs, on `Unit`.
template <class Unit, int N, int R>
constexpr Kernels<float> make_matrix_kernels() {
  Kernels<float> table = make_kernels<float, N, R>();
  static_assert(N == MatrixTile<Unit>::side);
  table.pairs = {.tile_rows = MatrixTile<Unit>::rows,
                 .rows_at_once = MatrixTile<Unit>::most,
                 .together = MatrixTile<Unit>::side,
                 .tile = MatrixTile<Unit>::run,
                 .sweeping_tile = MatrixTile<Unit>::run_sweeping,
                 .unpacked_rows = MatrixTile<Unit>::rows,
                 .unpacked_part = 2 * N,
                 .unpacked_tile = MatrixTile<Unit>::run_unpacked,
                 .round = round_pairs<N>,
                 .zip_rounded = zip_rounded<N>,
                 .zip = zip<N>};
  return table;
}

}  // namespace
}  // namespace numoe
