// Choosing experts and weighing them: the k largest of n, softmax, and the other scores, on vector lanes.
#pragma once

#include "numoe/kernels/kernels.h"
#include "numoe/kernels/lanes.h"

namespace numoe {
namespace {

// ── the k largest ───────────────────────────────────────────────────────────────────────────────────────────────────

// Floats as integers of the same order, with -0 = +0 and NaN below everything: a total order for any bit pattern, in any
// floating-point mode.  `nothing` is below the keys of all values.
template <class T, int N>
struct OrderKeys {
  using Int = typename Float<T>::Int;
  using I = Lanes<Int, N>;
  static constexpr Int nothing = sizeof(Int) == 4 ? Int{INT32_MIN} : static_cast<Int>(INT64_MIN);
  static constexpr Int nan = nothing + 1;

  static I of(Lanes<T, N> values) {
    constexpr Int infinity = ((Int{1} << (8 * sizeof(Int) - 1 - Float<T>::mantissa_bits)) - 1)
                             << Float<T>::mantissa_bits;
    const I bits = reinterpret<I>(values);
    const I magnitude = bits & ~nothing;
    const I key = bits < 0 ? -magnitude : magnitude;
    return magnitude > infinity ? I{} + nan : key;
  }
  // The keys of `count` values, then `nothing`.
  static I some(const T* values, int count) {
    const I keys = of(load_some<T, N>(values, count));
    return lane_numbers<Int, N>() < count ? keys : I{} + nothing;
  }
};

// A few keys with their positions, sorted on demand.
template <class T, int N>
struct Candidates {
  using Int = typename Float<T>::Int;
  using I = Lanes<Int, N>;
  static constexpr int capacity = 2 * max_top_k;  // a multiple of N

  Int key[capacity];
  Int position[capacity];
  int count = 0;

  void add(Int new_key, Int new_position) {
    key[count] = new_key;
    position[count++] = new_position;
  }

  // By (key descending, place ascending): a key's rank is the number of keys before it.  O(count² / N), no branch
  // depends on a key.
  void sort() {
    Int rank[capacity], sorted_key[capacity], sorted_position[capacity];
    for (int i = count; i % N != 0; ++i) key[i] = 0;  // ranked, never looked at
    for (int i = 0; i < count; i += N) {
      const I mine = load<I>(key + i), place = lane_numbers<Int, N>() + i;
      I before{};
      // other > mine, or other == mine at an earlier place
      for (int j = 0; j < count; ++j) before -= key[j] > mine + (place > j);
      store(rank + i, before);
    }
    for (int i = 0; i < count; ++i) {
      sorted_key[rank[i]] = key[i];
      sorted_position[rank[i]] = position[i];
    }
    __builtin_memcpy(key, sorted_key, static_cast<std::size_t>(count) * sizeof(Int));
    __builtin_memcpy(position, sorted_position, static_cast<std::size_t>(count) * sizeof(Int));
  }
};

template <class T, int N>
class TopK {
 public:
  static void run(Index n, Index k, const T* values, std::int32_t* best) {
    Candidates<T, N> found;
    if (n <= 2 * k || n * n <= 64 * N) {
      take_all(n, values, found);
    } else {
      take_from(n, k, values, floor_of_best(n, k, values), found);
    }
    found.sort();
    for (Index i = 0; i < k; ++i) best[i] = static_cast<std::int32_t>(found.position[i]);
  }

 private:
  using Keys = OrderKeys<T, N>;
  using Int = typename Keys::Int;
  using I = typename Keys::I;

  static void take_all(Index n, const T* values, Candidates<T, N>& found) {
    for_lanes<N>(n, [&](Index i, int count) {
      store(found.key + i, Keys::of(load_some<T, N>(values + i, count)));
      store(found.position + i, lane_numbers<Int, N>() + static_cast<Int>(i));
    });
    found.count = static_cast<int>(n);
  }

  // A key that at least k values reach, and not many more: the k-th largest of the maxima of 5/4 k columns or more.
  static Int floor_of_best(Index n, Index k, const T* values) {
    const Index columns = 5 * k / (4 * N) + 1, whole = n / N;  // of N lanes each
    Candidates<T, N> maxima;
    for (Index column = 0; column < columns; ++column) {
      I most = I{} + Keys::nan;
      for (Index i = column; i < whole; i += columns) {
        const I keys = Keys::of(load<Lanes<T, N>>(values + i * N));
        most = keys > most ? keys : most;
      }
      store(maxima.key + column * N, most);
      store(maxima.position + column * N, I{});
    }
    maxima.count = static_cast<int>(columns * N);
    maxima.sort();
    return maxima.key[k - 1];
  }

  // All values whose keys reach `floor`, or the k best of them so far whenever there are too many.
  static void take_from(Index n, Index k, const T* values, Int floor, Candidates<T, N>& found) {
    for_lanes<N>(n, [&](Index i, int count) {
      const I keys = Keys::some(values + i, count);
      unsigned reached = lane_bits<Int, N>(keys >= floor);
      if (reached == 0) return;
      Int key[N];
      store(key, keys);
      for (; reached != 0; reached &= reached - 1) {
        const int lane = __builtin_ctz(reached);
        found.add(key[lane], static_cast<Int>(i + lane));
      }
      if (found.count + N <= Candidates<T, N>::capacity) return;
      found.sort();
      found.count = static_cast<int>(k);
      floor = found.key[k - 1] + 1;  // a later equal loses to an earlier one
    });
  }
};

// ── scores ──────────────────────────────────────────────────────────────────────────────────────────────────────────

template <class T, int N>
inline Lanes<T, N> first_lanes(Lanes<T, N> v, int count, T otherwise) {
  return lane_numbers<typename Float<T>::Int, N>() < count ? v : Lanes<T, N>{} + otherwise;
}

template <class V>
inline V larger(V a, V b) {
  return a > b ? a : b;  // b if one is NaN
}

template <class T, int N>
void two_largest(Index n, const T* values, T* two) {
  using V = Lanes<T, N>;
  using Int = typename Float<T>::Int;
  const T lowest = static_cast<T>(-__builtin_inf());
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

template <class T, int N>
void softmax(Index n, const T* z, T* p) {
  using V = Lanes<T, N>;
  const T lowest = static_cast<T>(-__builtin_inf());
  V most = V{} + lowest;
  for_lanes<N>(n, [&](Index i, int count) {
    const V v = first_lanes<T, N>(load_some<T, N>(z + i, count), count, lowest);
    most = larger(v, most);
  });
  const T max = max_of<T, N>(most);
  V sums{};
  for_lanes<N>(n, [&](Index i, int count) {
    const V v = load_some<T, N>(z + i, count);
    const V power = v == max ? V{} + T(1) : exp<T, N>(v - max);
    sums += first_lanes<T, N>(power, count, T(0));
    store_some<T, N>(p + i, power, count);
  });
  const T sum = sum_of<T, N>(sums);
  const bool empty = max == lowest && sum == sum;
  for_lanes<N>(n, [=](Index i, int count) {
    store_some<T, N>(p + i, empty ? V{} : load_some<T, N>(p + i, count) / sum, count);
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
