// Lanes<T, N>: N numbers in one vector register, and the few functions on them that the kernels need.
//
// Included by one .cpp file per CPU target and compiled there with that target's flags, so everything lives in an
// anonymous namespace: the linker must never merge two targets' code.  No standard headers with templates here.
#pragma once

#ifdef __AVX512F__
#include <immintrin.h>
#endif

#include <cstddef>
#include <cstdint>

#include "numoe/view.h"

namespace numoe {
namespace {

template <class T, int N>
struct LanesOf {
  using Real [[gnu::vector_size(N * sizeof(T))]] = T;
};
template <class T, int N>
using Lanes = typename LanesOf<T, N>::Real;

template <class T>
struct Float;  // the integers and constants that belong to a floating-point type
template <>
struct Float<float> {
  using Int = std::int32_t;
  using Word = std::uint32_t;
  static constexpr int mantissa_bits = 23;
  static constexpr float log2e = 1.44269504088896341f;
  static constexpr float ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f;  // high has 9 bits: n * high is exact
  static constexpr float round_magic = 12582912.0f;  // 1.5 · 2^23: adding it rounds to an integer
  static constexpr float exp_min = -87.3f, exp_max = 88.7f;
  static constexpr float saturation = 104.0f;  // σ(-v) underflows beyond
  static constexpr int exp_degree = 7;         // Taylor on |r| <= ln2/2: remainder < 2^-26
};
template <>
struct Float<double> {
  using Int = std::int64_t;
  using Word = std::uint64_t;
  static constexpr int mantissa_bits = 52;
  static constexpr double log2e = 1.44269504088896340736;
  static constexpr double ln2_high = 6.93147180369123816490e-01, ln2_low = 1.90821492927058770002e-10;
  static constexpr double round_magic = 6755399441055744.0;  // 1.5 · 2^52
  static constexpr double exp_min = -708.0, exp_max = 709.7;
  static constexpr double saturation = 746.0;
  static constexpr int exp_degree = 13;  // remainder < 2^-56
};

// The same pointer, of unknown origin: keeps the compiler from computing the addresses of all rows before the loop and
// parking them on the stack.
template <class T>
inline T* forget(T* p) {
  asm("" : "+r"(p));
  return p;
}

// No load or store moves across: there are no registers to hold what is early.
inline void in_order() { asm volatile("" ::: "memory"); }

template <class To, class From>
inline To reinterpret(From v) {
  static_assert(sizeof(To) == sizeof(From));
  To w;
  __builtin_memcpy(&w, &v, sizeof w);
  return w;
}

template <class V, class T>
inline V load(const T* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
template <class V, class T>
inline void store(T* p, V v) {
  __builtin_memcpy(p, &v, sizeof v);
}

// Past the caches where the CPU can; p is aligned to the vector.
template <class V, class T>
inline void stream(T* p, V v) {
#if defined(__x86_64__)
  V* const place = reinterpret_cast<V*>(p);
  if constexpr (sizeof(V) == 16) {
    asm volatile("movntps %1, %0" : "=m"(*place) : "x"(v));
#ifdef __AVX__
  } else if constexpr (sizeof(V) == 32) {
    asm volatile("vmovntps %1, %0" : "=m"(*place) : "x"(v));
#endif
#ifdef __AVX512F__
  } else if constexpr (sizeof(V) == 64) {
    asm volatile("vmovntps %1, %0" : "=m"(*place) : "v"(v));
#endif
  } else {
    store(p, v);
  }
#else
  store(p, v);
#endif
}
inline void stream_end() {
#if defined(__x86_64__)
  __builtin_ia32_sfence();
#endif
}

// Whether multiply_add keeps its sum in place.
#if defined(__AVX512F__)
constexpr std::size_t in_place_bytes = 64;
#elif defined(__FMA__)
constexpr std::size_t in_place_bytes = 32;
#else
constexpr std::size_t in_place_bytes = 0;
#endif
template <class V>
constexpr bool in_place = sizeof(V) == in_place_bytes;

// Whether a core issues hardly more instructions than the multiply-adds need that keep it busy, and waits for an L2 in
// between.  64-byte vectors without bfloat16 dots are those of Intel's cores that issue 4 instructions a cycle (or 5), 2 where
// another thread shares them: 14 × 2 sums take 14 cycles and, with all they need, 46 instructions.
#if defined(__AVX512F__) && !defined(__AVX512BF16__)
template <class V>
constexpr bool narrow_issue = sizeof(V) == 64;
#else
template <class V>
constexpr bool narrow_issue = false;
#endif

// sum += a · b for every lane, rounded once where the target can.
//
// The instruction is spelled out so that a sum stays in its register: compilers that may move sums on from register to
// register do so in unrolled loops, until they run out of them.
template <class V, class T>
inline void multiply_add(V& sum, T a, V b) {
  const V all = a - V{};  // not a + V{}, which is no copy of -0
#if defined(__FMA__)
  if constexpr (in_place<V> && sizeof(T) == 4) {
    asm("vfmadd231ps %2, %1, %0" : "+v"(sum) : "v"(all), "v"(b));
    return;
  } else if constexpr (in_place<V>) {
    asm("vfmadd231pd %2, %1, %0" : "+v"(sum) : "v"(all), "v"(b));
    return;
  }
#endif
  sum += all * b;
}
// The same by an instruction that takes a from memory: one fewer to issue, one more read.
template <class V, class T>
inline void multiply_add_from(V& sum, const T* a, V b) {
#if defined(__AVX512F__)
  if constexpr (sizeof(V) == 64 && sizeof(T) == 4) {
    asm("vfmadd231ps %1%{1to16%}, %2, %0" : "+v"(sum) : "m"(*a), "v"(b));
    return;
  } else if constexpr (sizeof(V) == 64) {
    asm("vfmadd231pd %1%{1to8%}, %2, %0" : "+v"(sum) : "m"(*a), "v"(b));
    return;
  }
#endif
  multiply_add(sum, *a, b);
}

// Calls f(position, count) for whole vectors and once for the tail.
template <int N, class F>
inline void for_lanes(Index n, F f) {
  Index i = 0;
  for (; i + N <= n; i += N) f(i, N);
  if (i < n) f(i, static_cast<int>(n - i));
}

// The first `count` <= N numbers, and zeros: masked, or through memory, which is slow.
template <class T, int N>
inline Lanes<T, N> load_some(const T* p, int count) {
  if (count == N) return load<Lanes<T, N>>(p);
#ifdef __AVX512F__
  const auto mask = static_cast<std::uint16_t>((1u << count) - 1);
  if constexpr (sizeof(T) == 4 && N == 16) return reinterpret<Lanes<T, N>>(_mm512_maskz_loadu_epi32(mask, p));
  if constexpr (sizeof(T) == 8 && N == 8) {
    return reinterpret<Lanes<T, N>>(_mm512_maskz_loadu_epi64(static_cast<std::uint8_t>(mask), p));
  }
#endif
  Lanes<T, N> v{};
  __builtin_memcpy(&v, p, static_cast<std::size_t>(count) * sizeof(T));
  return v;
}
template <class T, int N>
inline void store_some(T* p, Lanes<T, N> v, int count) {
#ifdef __AVX512F__
  const auto mask = static_cast<std::uint16_t>((1u << count) - 1);
  if constexpr (sizeof(T) == 4 && N == 16) return _mm512_mask_storeu_epi32(p, mask, reinterpret<__m512i>(v));
  if constexpr (sizeof(T) == 8 && N == 8) {
    return _mm512_mask_storeu_epi64(p, static_cast<std::uint8_t>(mask), reinterpret<__m512i>(v));
  }
#endif
  __builtin_memcpy(p, &v, static_cast<std::size_t>(count) * sizeof(T));
}

// f over all lanes, pairwise: halves, quarters, ... - one fixed order.  f takes vectors and numbers alike.
template <class T, int N, class F>
inline T fold(Lanes<T, N> v, F f) {
  if constexpr (N == 1) {
    return v[0];
  } else {
    Lanes<T, N / 2> low, high;
    __builtin_memcpy(&low, &v, sizeof low);
    __builtin_memcpy(&high, reinterpret_cast<const char*>(&v) + sizeof low, sizeof high);
    return fold<T, N / 2>(f(low, high), f);
  }
}
template <class T, int N>
inline T sum_of(Lanes<T, N> v) {
  return fold<T, N>(v, [](auto a, auto b) { return a + b; });
}
template <class T, int N>
inline T max_of(Lanes<T, N> v) {
  return fold<T, N>(v, [](auto a, auto b) { return a > b ? a : b; });
}

// 0, 1, 2, ...
template <class I, int N>
inline Lanes<I, N> lane_numbers() {
  Lanes<I, N> numbers;
  for (int i = 0; i < N; ++i) numbers[i] = i;
  return numbers;
}

// Bit i is set where lane i of a comparison is true.
template <class I, int N>
inline unsigned lane_bits(Lanes<I, N> truth) {
  [[maybe_unused]] constexpr bool narrow = sizeof(I) == 4;
#ifdef __AVX512DQ__
  if constexpr (sizeof truth == 64 && narrow) return __builtin_ia32_cvtd2mask512(reinterpret<Lanes<int, 16>>(truth));
  if constexpr (sizeof truth == 64) return __builtin_ia32_cvtq2mask512(reinterpret<Lanes<long long, 8>>(truth));
#endif
#ifdef __AVX__
  if constexpr (sizeof truth == 32 && narrow) {
    return static_cast<unsigned>(__builtin_ia32_movmskps256(reinterpret<Lanes<float, 8>>(truth)));
  }
  if constexpr (sizeof truth == 32) {
    return static_cast<unsigned>(__builtin_ia32_movmskpd256(reinterpret<Lanes<double, 4>>(truth)));
  }
#endif
#ifdef __SSE2__
  if constexpr (sizeof truth == 16 && narrow) {
    return static_cast<unsigned>(__builtin_ia32_movmskps(reinterpret<Lanes<float, 4>>(truth)));
  }
  if constexpr (sizeof truth == 16) {
    return static_cast<unsigned>(__builtin_ia32_movmskpd(reinterpret<Lanes<double, 2>>(truth)));
  }
#endif
  const Lanes<I, N> bit = (Lanes<I, N>{} + I(1)) << lane_numbers<I, N>();
  return static_cast<unsigned>(fold<I, N>(truth & bit, [](auto x, auto y) { return x | y; }));
}

constexpr double factorial(int n) { return n < 2 ? 1.0 : n * factorial(n - 1); }

// eˣ to about 1 ulp; 0 below exp_min (results there would be subnormal), inf above exp_max, NaN for NaN.
template <class T, int N>
[[gnu::always_inline]] inline Lanes<T, N> exp(Lanes<T, N> x) {
  using F = Float<T>;
  using V = Lanes<T, N>;
  using Word = Lanes<typename F::Word, N>;
  const V shifted = x * F::log2e + F::round_magic;  // n = round(x / ln 2) in its low bits
  const V n = shifted - F::round_magic;
  const V r = (x - n * F::ln2_high) - n * F::ln2_low;
  V series = V{} + T(1.0 / factorial(F::exp_degree));
#pragma GCC unroll 16
  for (int k = F::exp_degree - 1; k >= 0; --k) series = series * r + T(1.0 / factorial(k));
  // series · 2ⁿ: between exp_min and exp_max no exponent leaves its bits
  const V value = reinterpret<V>(reinterpret<Word>(series) + (reinterpret<Word>(shifted) << F::mantissa_bits));
  const V infinite = V{} + static_cast<T>(__builtin_inf());
  return x < F::exp_min ? V{} : (x <= F::exp_max ? value : x + infinite);
}

// 1 / (1 + e⁻ˣ)
template <class T, int N>
[[gnu::always_inline]] inline Lanes<T, N> sigmoid(Lanes<T, N> x) {
  return T(1) / (T(1) + exp<T, N>(-x));
}

}  // namespace
}  // namespace numoe
