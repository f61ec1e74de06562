// Choosing experts and weighing them: the k largest of n, softmax, and the other scores, on vector lanes.
#pragma once

#include "numoe/kernels/kernels.h"
#include "numoe/kernels/lanes.h"

namespace numoe {
namespace {

template <class V>
inline V larger(V a, V b) {
  return a > b ? a : b;  // b if one is NaN
}
template <class T>
constexpr T minus_infinity = static_cast<T>(-__builtin_inf());

// ── the k largest ───────────────────────────────────────────────────────────────────────────────────────────────────

// Floats as integers of the same order, with -0 = +0 and NaN below everything: a total order for any bit pattern, in any
// floating-point mode.
template <class T, int N>
inline Lanes<typename Float<T>::Int, N> order_keys(Lanes<T, N> values) {
  using Int = typename Float<T>::Int;
  using I = Lanes<Int, N>;
  constexpr int top = 8 * sizeof(Int) - 1;
  constexpr Int lowest = static_cast<Int>(Int{1} << (top - 1)) * -2;
  const I bits = reinterpret<I>(values), sign = bits >> top, magnitude = bits & ~lowest;
  return values == values ? (magnitude ^ sign) - sign : I{} + lowest;
}

// The least number above `value`: -inf for NaN, NaN for inf.
template <class T>
inline T next_above(T value) {
  using Int = typename Float<T>::Int;
  if (value != value) return minus_infinity<T>;
  const Int bits = reinterpret<Int>(value == 0 ? T(0) : value);  // +0 for -0
  return reinterpret<T>(static_cast<Int>(bits < 0 ? bits - 1 : bits + 1));
}

// A few values with their positions, ranked on demand.
template <class T, int N>
struct Candidates {
  using Int = typename Float<T>::Int;
  using I = Lanes<Int, N>;
  static constexpr int capacity = 2 * max_top_k;  // a multiple of N

  T value[capacity];
  std::int32_t position[capacity];
  int count = 0;

  // rank[i] = how many stand before i by (value descending, place ascending).  O(count² / N); no branch depends on a
  // value.
  void rank_all(Int* rank) {
    Int key[capacity];
    for (int i = count; i % N != 0; ++i) value[i] = 0;  // ranked, never looked at
    for (int i = 0; i < count; i += N) store(key + i, order_keys<T, N>(load<Lanes<T, N>>(value + i)));
    for (int i = 0; i < count; i += N) {
      const I mine = load<I>(key + i), place = lane_numbers<Int, N>() + i;
      I before{};
      for (int j = 0; j < count; ++j) before -= (key[j] > mine) | ((key[j] == mine) & (place > j));
      store(rank + i, before);
    }
  }

  T value_of_rank(Index wanted) {
    Int rank[capacity];
    rank_all(rank);
    int i = 0;
    while (rank[i] != wanted) ++i;
    return value[i];
  }

  void positions_in_order(Index n, std::int32_t* best) {
    Int rank[capacity];
    std::int32_t sorted[capacity];
    rank_all(rank);
    for (int i = 0; i < count; ++i) sorted[rank[i]] = position[i];
    for (Index i = 0; i < n; ++i) best[i] = sorted[i];
  }

  // Keeps the n best, in their order.
  void keep(Index n) {
    Int rank[capacity];
    rank_all(rank);
    const Candidates all = *this;
    for (int i = 0; i < count; ++i) {
      if (rank[i] >= n) continue;
      value[rank[i]] = all.value[i];
      position[rank[i]] = all.position[i];
    }
    count = static_cast<int>(n);
  }
};

template <class T, int N>
class TopK {
 public:
  static void run(Index n, Index k, const T* values, std::int32_t* best) {
    if (n <= N && k <= 4) return take_maxima(static_cast<int>(n), k, values, best);
    Candidates<T, N> found;
    if (n <= 2 * k || n * n <= 64 * N) {
      take_all(n, values, found);
    } else {
      take_from(n, k, values, floor_of_best(n, k, values), found);
    }
    found.positions_in_order(k, best);
  }

 private:
  using V = Lanes<T, N>;
  using Int = typename Float<T>::Int;

  // One after the other, of as many values as a register holds: each costs a chain of shuffles, so only a few.
  static void take_maxima(int n, Index k, const T* values, std::int32_t* best) {
    using I = Lanes<Int, N>;
    const I gone = order_keys<T, N>(V{} + static_cast<T>(__builtin_nan("")));  // below everything
    I keys = order_keys<T, N>(load_some<T, N>(values, n));
    keys = lane_numbers<Int, N>() < n ? keys : gone;
    unsigned left = (1u << n) - 1;
    for (Index i = 0; i < k; ++i) {
      const int lane = __builtin_ctz(lane_bits<Int, N>(keys == max_of<Int, N>(keys)) & left);
      best[i] = lane;
      left &= ~(1u << lane);
      keys = lane_numbers<Int, N>() == lane ? gone : keys;
    }
  }

  static void take_all(Index n, const T* values, Candidates<T, N>& found) {
    for (Index i = 0; i < n; ++i) {
      found.value[i] = values[i];
      found.position[i] = static_cast<std::int32_t>(i);
    }
    found.count = static_cast<int>(n);
  }

  // A number that at least k values reach, and not many more: the k-th largest of the maxima of 5/4 k columns or more.
  // -inf if there is none above.
  static T floor_of_best(Index n, Index k, const T* values) {
    const Index columns = 5 * k / (4 * N) + 1, whole = n / N;  // of N lanes each
    Candidates<T, N> maxima;
    for (Index column = 0; column < columns; ++column) {
      V most = V{} + minus_infinity<T>;
      for (Index i = column; i < whole; i += columns) most = larger(load<V>(values + i * N), most);
      store(maxima.value + column * N, most);
    }
    maxima.count = static_cast<int>(columns * N);
    return maxima.value_of_rank(k - 1);
  }

  // All values that reach `floor`, or the k best of them so far whenever there are too many.  Where the floating-point
  // mode takes subnormal numbers for 0, a few more: the ranks are exact in any mode.
  static void take_from(Index n, Index k, const T* values, T floor, Candidates<T, N>& found) {
    constexpr int block = 64;  // values with one bit each in `reached`
    bool all = !(floor > minus_infinity<T>);
    for_lanes<block>(n, [&](Index begin, int left) {
      std::uint64_t reached = 0;
      for (int i = 0; i < left; i += N) {
        const V v = load_some<T, N>(values + begin + i, left - i < N ? left - i : N);
        reached |= static_cast<std::uint64_t>(lane_bits<Int, N>(v >= floor)) << i;
      }
      if (all) reached = ~std::uint64_t{0};
      if (left < block) reached &= (std::uint64_t{1} << left) - 1;
      for (; reached != 0; reached &= reached - 1) {
        const Index i = begin + __builtin_ctzll(reached);
        found.value[found.count] = values[i];
        found.position[found.count++] = static_cast<std::int32_t>(i);
      }
      if (found.count + block <= Candidates<T, N>::capacity) return;
      found.keep(k);
      floor = next_above(found.value[k - 1]);  // a later equal loses to an earlier one
      all = false;
    });
  }
};

// ── scores ──────────────────────────────────────────────────────────────────────────────────────────────────────────

template <class T, int N>
inline Lanes<T, N> first_lanes(Lanes<T, N> v, int count, T otherwise) {
  return lane_numbers<typename Float<T>::Int, N>() < count ? v : Lanes<T, N>{} + otherwise;
}

template <class T, int N>
void two_largest(Index n, const T* values, T* two) {
  using V = Lanes<T, N>;
  using Int = typename Float<T>::Int;
  constexpr T lowest = minus_infinity<T>;
  V first = V{} + lowest, second = first;  // lane by lane
  Lanes<Int, N> nan{};
  for_lanes<N>(n, [&](Index i, int count) {
    const V v = first_lanes<T, N>(load_some<T, N>(values + i, count), count, lowest);
    nan |= v != v;
    second = larger(v < first ? v : first, second);
    first = larger(v, first);
  });
  two[0] = max_of<T, N>(first);
  first[__builtin_ctz(lane_bits<Int, N>(first == two[0]))] = lowest;
  two[1] = max_of<T, N>(larger(first, second));
  if (lane_bits<Int, N>(nan)) two[0] = two[1] = static_cast<T>(__builtin_nan(""));
}

// e^(z - max), where z = max counts as e⁰ even if infinite.
template <class T, int N>
inline Lanes<T, N> exp_below(Lanes<T, N> z, T max) {
  return z == max ? Lanes<T, N>{} + T(1) : exp<T, N>(z - max);
}

template <class T, int N>
inline Lanes<T, N> share(Lanes<T, N> power, T sum, T max) {
  const bool empty = max == minus_infinity<T> && sum == sum;  // nothing but -inf
  return empty ? Lanes<T, N>{} : power / sum;
}

template <class T, int N>
void softmax(Index n, const T* z, T* p) {
  using V = Lanes<T, N>;
  if (n <= N) {  // the K chosen: the same sums, without a detour through memory
    const int count = static_cast<int>(n);
    const V v = load_some<T, N>(z, count);
    const T max = max_of<T, N>(larger(first_lanes<T, N>(v, count, minus_infinity<T>), V{} + minus_infinity<T>));
    const V power = exp_below<T, N>(v, max);
    const T sum = sum_of<T, N>(first_lanes<T, N>(power, count, T(0)));
    return store_some<T, N>(p, share<T, N>(power, sum, max), count);
  }
  V most = V{} + minus_infinity<T>, sums{};
  for_lanes<N>(n, [&](Index i, int count) {
    most = larger(first_lanes<T, N>(load_some<T, N>(z + i, count), count, minus_infinity<T>), most);
  });
  const T max = max_of<T, N>(most);
  for_lanes<N>(n, [&](Index i, int count) {
    const V power = exp_below<T, N>(load_some<T, N>(z + i, count), max);
    sums += first_lanes<T, N>(power, count, T(0));
    store_some<T, N>(p + i, power, count);
  });
  const T sum = sum_of<T, N>(sums);
  for_lanes<N>(n, [=](Index i, int count) {
    store_some<T, N>(p + i, share<T, N>(load_some<T, N>(p + i, count), sum, max), count);
  });
}

// ln(1 + u) for u in [0, 1], as 2 artanh(u / (2 + u)): the argument is at most 1/3, so the series converges by 9 a term.
template <class T, int N>
inline Lanes<T, N> log1p(Lanes<T, N> u) {
  constexpr int terms = sizeof(T) == sizeof(float) ? 8 : 17;  // the first left out is below half an eps
  const Lanes<T, N> s = u / (T(2) + u), square = s * s;
  Lanes<T, N> series = Lanes<T, N>{} + T(1.0 / (2 * terms - 1));
#pragma GCC unroll 16
  for (int i = terms - 2; i >= 0; --i) series = series * square + T(1.0 / (2 * i + 1));
  return T(2) * s * series;
}

inline float root(float v) { return __builtin_sqrtf(v); }
inline double root(double v) { return __builtin_sqrt(v); }
template <class T, int N>
inline Lanes<T, N> root(Lanes<T, N> v) {
  Lanes<T, N> roots;
  for (int i = 0; i < N; ++i) roots[i] = root(v[i]);
  return roots;
}

// With h = exp(-|z| / 2): σ, ln σ and √softplus all follow from h² = exp(-|z|), and √softplus(z) → h as z → -inf.
template <Curve C, class T, int N>
inline Lanes<T, N> curve_of(Lanes<T, N> z) {
  using V = Lanes<T, N>;
  if constexpr (C == Curve::sigmoid) {
    return sigmoid<T, N>(z);
  } else if constexpr (C == Curve::log_sigmoid) {
    const V log = log1p<T, N>(exp<T, N>(z < V{} ? z : -z));
    return (z < V{} ? z : (z == z ? V{} : z)) - log;
  } else {
    const V h = exp<T, N>(T(0.5) * (z < V{} ? z : -z));
    const V softplus = (z > V{} ? z : V{}) + log1p<T, N>(h * h);
    return z < V{} - T(40) ? h : root<T, N>(softplus);
  }
}

template <Curve C, class T, int N>
void curve_as(Index n, const T* z, T* s) {
  for_lanes<N>(
      n, [=](Index i, int count) { store_some<T, N>(s + i, curve_of<C, T, N>(load_some<T, N>(z + i, count)), count); });
}
template <class T, int N>
void curve(Curve which, Index n, const T* z, T* s) {
  switch (which) {
    case Curve::sigmoid:
      return curve_as<Curve::sigmoid, T, N>(n, z, s);
    case Curve::log_sigmoid:
      return curve_as<Curve::log_sigmoid, T, N>(n, z, s);
    case Curve::sqrt_softplus:
      return curve_as<Curve::sqrt_softplus, T, N>(n, z, s);
  }
}

template <class T, int N>
constexpr RoutingKernels<T> make_routing_kernels() {
  return {TopK<T, N>::run, two_largest<T, N>, softmax<T, N>, curve<T, N>};
}

}  // namespace
}  // namespace numoe
