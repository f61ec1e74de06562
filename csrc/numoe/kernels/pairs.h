// bfloat16: rounding to it, and pairs of it in the 32 bits of a float, that of the even k in the lower half.
#pragma once

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

#include <utility>

#include "numoe/kernels/lanes.h"

namespace numoe {
namespace {

// Zero, of the same sign, for subnormal numbers.
template <int N>
inline Lanes<float, N> flushed(Lanes<float, N> v) {
  using Word = Lanes<std::uint32_t, N>;
  const Word bits = reinterpret<Word>(v);
  return reinterpret<Lanes<float, N>>((bits & 0x7f800000u) == 0 ? bits & 0x80000000u : bits);
}

// Rounded to nearest, ties to even; NaN stays NaN (quiet).
template <int N>
inline Lanes<std::uint16_t, N> nearest(Lanes<float, N> v) {
  using Word = Lanes<std::uint32_t, N>;
  const Word bits = reinterpret<Word>(v), upper = bits >> 16;
  const Word even = (bits + 0x7fffu + (upper & 1u)) >> 16;
  return __builtin_convertvector(v == v ? even : upper | 0x40u, Lanes<std::uint16_t, N>);
}
// The same with subnormal numbers as 0: VCVTNEPS2BF16.
template <int N>
inline Lanes<std::uint16_t, N> rounded(Lanes<float, N> v) {
#ifdef __AVX512BF16__
  if constexpr (N == 16) return reinterpret<Lanes<std::uint16_t, N>>(_mm512_cvtneps_pbh(v));
#endif
  return nearest<N>(flushed<N>(v));
}

// pairs[i] = factor * x[2i] and factor * x[2i + 1], rounded.  The last number of an odd n is paired with 0.  Possibly in
// place: a vector of pairs never reaches what is still to be read.
template <int N>
void round_pairs(Index n, float factor, const float* x, float* pairs) {
  char* const halves = reinterpret_cast<char*>(pairs);
  for_lanes<N>(n, [=](Index i, int count) {
    const auto narrow = rounded<N>(factor * load_some<float, N>(x + i, count));
    __builtin_memcpy(halves + 2 * i, &narrow, 2 * static_cast<std::size_t>(count));
  });
  if (n % 2) __builtin_memset(halves + 2 * n, 0, 2);
}

// pairs[j] = even_factor * even[j] and odd_factor * odd[j], rounded; an absent row counts as 0.
template <int N>
void zip_rounded(Index n, float even_factor, const float* even, float odd_factor, const float* odd, float* pairs) {
  using Word = Lanes<std::uint32_t, N>;
  const auto half = [](float factor, const float* x, int count) {
    return __builtin_convertvector(rounded<N>(factor * load_some<float, N>(x, count)), Word);
  };
  for_lanes<N>(n, [=](Index i, int count) {
    const Word low = half(even_factor, even + i, count), high = odd ? half(odd_factor, odd + i, count) << 16 : Word{};
    store_some<float, N>(pairs + i, reinterpret<Lanes<float, N>>(low | high), count);
  });
}

// even[j] and odd[j] as the halves of a pair, for 2N columns.
template <int N>
struct Zipped {
  Lanes<float, N> left, right;

  Zipped(Lanes<std::uint16_t, 2 * N> even, Lanes<std::uint16_t, 2 * N> odd) {
    constexpr std::make_index_sequence<2 * N> lanes{};
    left = half<0>(even, odd, lanes);
    right = half<N>(even, odd, lanes);
  }

 private:
  template <int first, std::size_t... I>
  static Lanes<float, N> half(Lanes<std::uint16_t, 2 * N> even, Lanes<std::uint16_t, 2 * N> odd,
                              std::index_sequence<I...>) {
    return reinterpret<Lanes<float, N>>(
        __builtin_shufflevector(even, odd, static_cast<int>(first + I / 2 + I % 2 * 2 * N)...));
  }
};

// Columns of two rows side by side, for some rows and panels: pairs of panel p start at pairs + p * step, [rows / 2][2N].
template <int N>
void zip(Index rows, Index panels, const bfloat16* b, Index stride, float* pairs, Index step, Index near) {
  using Half = Lanes<std::uint16_t, 2 * N>;
  for (Index p = 0; p < panels; ++p, b += 2 * N, pairs += step) {
    const bfloat16* row = b;
    float* target = pairs;
    for (Index r = 0; r < rows; r += 2, row += 2 * stride, target += 2 * N) {
      const bool odd = r + 1 < rows;
      const bfloat16* const next = odd ? row + stride : row;
      __builtin_prefetch(reinterpret_cast<const char*>(row) + near, 0, 2);
      __builtin_prefetch(reinterpret_cast<const char*>(next) + near, 0, 2);
      const Zipped<N> pair(load<Half>(row), odd ? load<Half>(next) : Half{});
      store(target, pair.left);
      store(target + N, pair.right);
    }
  }
}

// sum + a · b, rounded once, for a and b of 8 bits.  In double the product is exact, and the sum too, unless one summand
// is so small beside the other that both ways give that other one.
template <int N>
inline Lanes<float, N> fused(Lanes<float, N> sum, Lanes<float, N> a, Lanes<float, N> b) {
  const auto wide = [](auto v) { return __builtin_convertvector(flushed<N>(v), Lanes<double, N>); };
  return flushed<N>(__builtin_convertvector(wide(sum) + wide(a) * wide(b), Lanes<float, N>));
}

// sum + a · b, pair by pair: VDPBF16PS.  Intel's Software Developer's Manual (volume 2, under that name) says what it
// does in each lane: the product of the odd numbers is added first, then that of the even ones, each by a fused
// multiply-add to nearest even, with subnormal numbers and results as 0, whatever MXCSR says.
template <int N>
inline Lanes<float, N> add_dots(Lanes<float, N> sum, Lanes<std::uint32_t, N> a, Lanes<std::uint32_t, N> b) {
  using V = Lanes<float, N>;
#ifdef __AVX512BF16__
  if constexpr (N == 16) return _mm512_dpbf16_ps(sum, reinterpret<__m512bh>(a), reinterpret<__m512bh>(b));
  if constexpr (N == 8) return _mm256_dpbf16_ps(sum, reinterpret<__m256bh>(a), reinterpret<__m256bh>(b));
#endif
  sum = fused<N>(sum, reinterpret<V>(a & 0xffff0000u), reinterpret<V>(b & 0xffff0000u));
  return fused<N>(sum, reinterpret<V>(a << 16), reinterpret<V>(b << 16));
}

}  // namespace
}  // namespace numoe
