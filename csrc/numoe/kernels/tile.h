// The register tile: the one loop in which an MoE layer spends its time.
//
// R rows of A times a panel of W = 2 vectors of B stay in registers while k runs; per k the tile loads 2 vectors of B
// and R scalars of A for 2·R multiply-adds.  Heights 1..R are separate instantiations, so no row is computed for nothing.
#pragma once

#include <utility>

#include "numoe/kernels/carriers.h"
#include "numoe/kernels/kernels.h"
#include "numoe/kernels/lanes.h"
#include "numoe/kernels/pairs.h"

namespace numoe {
namespace {

// What the elements of a and b are, and so what sum += a · b means.
template <class T, int N>
struct Numbers {
  using V = Lanes<T, N>;
  static constexpr bool row_by_row = true;
  static inline void multiply_add(V& sum, const T* a, V b) { numoe::multiply_add(sum, *a, b); }
  static inline void multiply_add_from(V& sum, const T* a, V b) { numoe::multiply_add_from(sum, a, b); }
  // M lanes of it; 64-byte vectors can take the number from memory as they multiply.
  template <int M>
  static inline void multiply_alone(Lanes<T, M>& sum, T a, Lanes<T, M> b) {
    if constexpr (sizeof b == 32) return numoe::multiply_add(sum, a, b);
    sum += a * b;
  }
};
template <int N>
struct Widened {  // from bfloat16, by means of a register that a spelled-out instruction would not leave
  using V = Lanes<float, N>;
  static constexpr bool row_by_row = false;
  static inline void multiply_add(V& sum, const float* a, V b) { sum += *a * b; }
};
template <int N>
struct Pairs {  // of bfloat16, in the 32 bits of a float
  using V = Lanes<float, N>;
  using Words = Lanes<std::uint32_t, N>;
  static constexpr bool row_by_row = true;
  static inline void multiply_add(V& sum, const float* a, V b) {
    sum = add_dots<N>(sum, Words{} + load<std::uint32_t>(a), reinterpret<Words>(b));
  }
  template <int M>
  static inline void multiply_alone(Lanes<float, M>& sum, float a, Lanes<float, M> b) {
    using W = Lanes<std::uint32_t, M>;
    sum = add_dots<M>(sum, W{} + reinterpret<std::uint32_t>(a), reinterpret<W>(b));
  }
};

// Whether tiles of these elements spare instructions where they can: some multiply-adds read their numbers themselves, and
// because an instruction that waits for its number holds up those behind it, the tile asks the L2 for it before.
template <class Elements, class V>
constexpr bool spares_instructions = narrow_issue<V> && requires { &Elements::multiply_add_from; };

// Everything is inlined, or the sums would live in memory.
template <class T, int N, int R>
struct Accumulators {
  using V = Lanes<T, N>;
  V left[R], right[R];

  // (+)= a · b for one k.  sparing: every fourth row's number is read twice, by its multiply-adds, instead of once before; of
  // 28 reads in 14 cycles that leaves some (Cascade Lake, 3 to 8 of 14 rows: 1.00 to 0.95 times as fast from the L1 alone, 1.07
  // to 1.22 times while another thread shares the core).
  template <class Elements = Numbers<T, N>, bool sparing = false>
  [[gnu::always_inline]] inline void multiply_add(const T* a, V b_left, V b_right) {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      if constexpr (sparing) {
        if (r % 4 == 2) {
          Elements::multiply_add_from(left[r], a + r, b_left);
          Elements::multiply_add_from(right[r], a + r, b_right);
          continue;
        }
      }
      Elements::multiply_add(left[r], a + r, b_left);
      Elements::multiply_add(right[r], a + r, b_right);
      if constexpr (Elements::row_by_row) in_order();
    }
  }
  [[gnu::always_inline]] inline void start(T* c, Index stride, Store how) {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) left[r] = right[r] = V{};
    if (how != Store::accumulate) return;
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r, c = forget(c + stride)) {
      left[r] = load<V>(c);
      right[r] = load<V>(c + N);
    }
  }
  [[gnu::always_inline]] inline void finish(T* c, Index stride, Store how) const {
    if (how == Store::stream) {
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r, c = forget(c + stride)) {
        stream(c, left[r]);
        stream(c + N, right[r]);
      }
      return;
    }
    if (how == Store::add) {
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r, c = forget(c + stride)) {
        store(c, load<V>(c) + left[r]);
        store(c + N, load<V>(c + N) + right[r]);
      }
      return;
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r, c = forget(c + stride)) {
      store(c, left[r]);
      store(c + N, right[r]);
    }
  }
};

// round() once and step() for each of k_at_once k's, then step() for what remains of `depth`.
//
// What counts k's, moves pointers and asks for memory is issued once for all of a round.  It counts: 12 multiply-adds of
// AVX2 keep a core busy for 6 cycles, in which it issues 36 instructions, but only 18 where two threads share it.
template <bool unrolled, class Round, class Step>
[[gnu::always_inline]] inline void for_k(Index depth, Round round, Step step) {
  const std::size_t count = static_cast<std::size_t>(depth);  // unsigned: a division is a shift
  if constexpr (unrolled) {
    for (std::size_t left = count / k_at_once; left > 0; --left) {
      round();
#pragma GCC unroll 16
      for (Index k = 0; k < k_at_once; ++k) step();
    }
#pragma GCC unroll 1
    for (std::size_t left = count % k_at_once; left > 0; --left) step();
  } else {
#pragma GCC unroll 1
    for (std::size_t left = count; left > 0; --left) {
      if (left % k_at_once == 0) round();
      step();
    }
  }
}

// Asks for what lies ahead, some lines per call; if there are none, for one that is there.
class Asking {
 public:
  explicit Asking(const Ahead& ahead)
      : at_(static_cast<const char*>(ahead.lines > 0 ? ahead.at : &ahead)), step_(ahead.step), lines_(ahead.lines) {}

  [[gnu::always_inline]] inline void operator()(Index rounds = 1) {
    ask();  // as a rule there is one, which had better not cost a loop's instructions
    for (Index line = rounds * lines_; line > 1; --line) ask();
  }

 private:
  [[gnu::always_inline]] inline void ask() {
    __builtin_prefetch(at_, 0, 2);
    at_ += step_;
  }

  const char* at_;
  Index step_, lines_;
};

// Asks for the `bytes` that lie `near` bytes beyond b.  Into the L2: rows a power of two apart, which are read before, would
// drive them out of the L1.
template <Index bytes>
inline void ask_near(const void* b, Index near) {
  const char* p = static_cast<const char*>(b) + near;
  __builtin_prefetch(p, 0, 2);
  if constexpr (bytes > Carry::line) __builtin_prefetch(p + Carry::line, 0, 2);
}

// Asks for the `bytes` that lie `ahead` bytes beyond p, into the L1.
template <Index bytes>
[[gnu::always_inline]] inline void ask_soon(const void* p, Index ahead) {
  const char* const first = static_cast<const char*>(p) + ahead;
#pragma GCC unroll 16
  for (Index line = 0; line < bytes; line += Carry::line) __builtin_prefetch(first + line, 0, 3);
}
constexpr Index soon = 512;  // bytes that a tile reads of its rows while the L2 sends a line

// N numbers of b as lanes of the arithmetic.
template <class T, int N>
inline Lanes<T, N> wide(const T* b) {
  return load<Lanes<T, N>>(b);
}
template <class T, int N>
inline Lanes<float, N> wide(const bfloat16* b) {
  const auto half = load<Lanes<std::uint16_t, N>>(b);
  return reinterpret<Lanes<float, N>>(__builtin_convertvector(half, Lanes<std::uint32_t, N>) << 16);
}

template <class Elements, class T, int N, int R>
void tile_of_height(const TileArgs<T>& args) {
  using V = Lanes<T, N>;
  constexpr bool sparing = spares_instructions<Elements, V>;
  const T *a = args.a, *b = args.b;
  [[maybe_unused]] const Index near = args.near;
  Asking asking(args.ahead);
  Accumulators<T, N, R> sums;
  sums.start(args.c, args.c_stride, args.store);
  const auto ask = [&]() __attribute__((always_inline)) {
    asking();
    if constexpr (sparing) ask_soon<R * k_at_once * sizeof(T)>(a, soon);
  };
  for_k<in_place<V>>(args.depth, ask, [&]() __attribute__((always_inline)) {
    if constexpr (sparing) ask_soon<2 * N * sizeof(T)>(b, near);
    sums.template multiply_add<Elements, sparing>(a, load<V>(b), load<V>(b + N));
    a += R;
    b += 2 * N;
  });
  sums.finish(args.c, args.c_stride, args.store);
}

template <class Elements, class T, class B, int N, int R>
void sweeping_tile_of_height(const TileArgs<T, B>& args, const Neighbours& neighbours) {
  constexpr bool sparing = spares_instructions<Elements, Lanes<T, N>>;
  const B* panel = args.b;
  T* c = args.c;
  const Index stride = args.b_stride, near = args.near, step = neighbours.b_step;
  for (Index p = neighbours.panels; p > 0; --p, panel += step, c += neighbours.c_step) {
    const T* a = args.a;
    const B* b = panel;
    Accumulators<T, N, R> sums;
    sums.start(c, args.c_stride, args.store);
    for (Index k = args.depth; k > 0; --k, a += R, b += stride) {
      ask_near<2 * N * sizeof(B)>(b, near);
      sums.template multiply_add<Elements, sparing>(a, wide<T, N>(b), wide<T, N>(b + N));
    }
    sums.finish(c, args.c_stride, args.store);
  }
}

// Few, because pairing takes registers, and experts of more rows had better be paired once for all tiles.
constexpr int most_zipping_rows = 9;
template <int N, int R>
void zipping_tile_of_height(const TileArgs<float, bfloat16>& args, const Neighbours& neighbours) {
  using Half = Lanes<std::uint16_t, 2 * N>;
  const bfloat16* panel = args.b;
  float* c = args.c;
  const Index stride = args.b_stride, near = args.near;
  for (Index p = neighbours.panels; p > 0; --p, panel += neighbours.b_step, c += neighbours.c_step) {
    const float* a = args.a;
    const bfloat16* b = panel;
    Accumulators<float, N, R> sums;
    sums.start(c, args.c_stride, args.store);
    for (Index k = args.depth; k > 0; --k, a += R, b += 2 * stride) {
      ask_near<sizeof(Half)>(b, near);
      ask_near<sizeof(Half)>(b + stride, near);
      const Zipped<N> pair(load<Half>(b), load<Half>(b + stride));
      sums.template multiply_add<Pairs<N>>(a, pair.left, pair.right);
    }
    sums.finish(c, args.c_stride, args.store);
  }
}

// Rows that lie a power of two apart share the ways of one set of the L1, eight as a rule, of which the panel needs one.
constexpr int most_unpacked_rows = 7;

// The last panel need not be computed to its end.  Half a 64-byte vector is a step of its own, because there are CPUs that
// compute it in half the time.
template <class T, int N>
constexpr int unpacked_part = sizeof(T) * N == 64 ? N / 2 : N;

// N columns of a panel and the sums of R rows there; nothing for N = 0.
template <class Elements, class T, int N, int R>
struct Columns {
  using V = Lanes<T, N>;
  V sums[R], b;

  [[gnu::always_inline]] inline void start(const T* c, Index stride, Store how) {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) sums[r] = V{};
    if (how != Store::accumulate) return;
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r, c = forget(c + stride)) sums[r] = load<V>(c);
  }
  [[gnu::always_inline]] inline void finish(T* c, Index stride) const {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r, c = forget(c + stride)) store(c, sums[r]);
  }
  [[gnu::always_inline]] inline void take(const T* panel) { b = load<V>(panel); }
  template <bool sparing>
  [[gnu::always_inline]] inline void multiply_add(int r, const T* a) {
    if constexpr (!sparing) return Elements::template multiply_alone<N>(sums[r], load<T>(a), b);
    r % 4 == 0 ? numoe::multiply_add_from(sums[r], a, b) : numoe::multiply_add(sums[r], load<T>(a), b);
  }
};
template <class Elements, class T, int R>
struct Columns<Elements, T, 0, R> {
  inline void start(const T*, Index, Store) {}
  inline void finish(T*, Index) const {}
  inline void take(const T*) {}
  template <bool>
  inline void multiply_add(int, const T*) {}
};

// The first `cols` columns of one panel: two vectors, one and a half, ...  With each round, `step` bytes more are asked for
// from `ahead` on, at most as many as the round's numbers of all rows.
template <class Elements, class T, int N, int R, int cols>
[[gnu::always_inline]] inline void unpacked_panel(const TileArgs<T>& args, const T* b, T* c, const char* ahead,
                                                  Index step) {
  constexpr int whole = cols / N * N;
  constexpr Index most = R * k_at_once * sizeof(T);
  const char* a = reinterpret_cast<const char*>(args.a);
  const Index stride = args.a_stride * static_cast<Index>(sizeof(T));  // in bytes: factors of an address are at most 8
  Columns<Elements, T, whole ? N : 0, R> left;
  Columns<Elements, T, whole == 2 * N ? N : 0, R> right;
  Columns<Elements, T, cols - whole, R> rest;
  left.start(c, args.c_stride, args.store);
  right.start(c + N, args.c_stride, args.store);
  rest.start(c + whole, args.c_stride, args.store);
  constexpr bool sparing = spares_instructions<Elements, Lanes<T, N>> && cols > N;
  const auto ask = [&]() __attribute__((always_inline)) {  // sparing, for every second line: memory sends two
#pragma GCC unroll 4
    for (Index line = 0; line < most; line += sparing ? 2 * Carry::line : Carry::line)
      __builtin_prefetch(ahead + line, 0, 2);
    ahead += step;
  };
  for_k<in_place<Lanes<T, N>>>(args.depth, ask, [&]() __attribute__((always_inline)) {
    left.take(b);
    right.take(b + N);
    rest.take(b + whole);
    const char* row = a;
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      if (r > 0 && r % 2 == 0) row = forget(row + 2 * stride);  // few addresses, or they would not fit the registers
      const T* const number = reinterpret_cast<const T*>(row + r % 2 * stride);
      left.template multiply_add<sparing>(r, number);
      right.template multiply_add<sparing>(r, number);
      rest.template multiply_add<sparing>(r, number);
    }
    a = forget(a + sizeof(T));
    b += 2 * N;
  });
  left.finish(c, args.c_stride);
  right.finish(c + N, args.c_stride);
  rest.finish(c + whole, args.c_stride);
}
template <class Elements, class T, int N, int R>
void unpacked_tile_of_height(const TileArgs<T>& args, const Neighbours& neighbours, Index last) {
  constexpr int part = unpacked_part<T, N>;
  const T* b = args.b;
  T* c = args.c;
  const char* ahead = static_cast<const char*>(args.ahead.at);
  Index step = args.ahead.lines * args.ahead.step;
  const Index whole = neighbours.panels - (last < 2 * N ? 1 : 0);
  for (Index p = 0; p < whole; ++p, b += neighbours.b_step, c += neighbours.c_step, step = 0) {
    unpacked_panel<Elements, T, N, R, 2 * N>(args, b, c, ahead, step);
  }
  if (last == N) return unpacked_panel<Elements, T, N, R, N>(args, b, c, ahead, step);
  if constexpr (part < N) {
    if (last == part) return unpacked_panel<Elements, T, N, R, part>(args, b, c, ahead, step);
    if (last == N + part) return unpacked_panel<Elements, T, N, R, N + part>(args, b, c, ahead, step);
  }
}

template <class Elements, class T, int N, int R, int P>
void broad_tile_of_height(const TileArgs<T>& args, const Neighbours& neighbours) {
  using V = Lanes<T, N>;
  const T *a = args.a, *b = args.b;
  const Index step = neighbours.b_step;
  Accumulators<T, N, R> sums[P];
#pragma GCC unroll 4
  for (int p = 0; p < P; ++p) sums[p].start(args.c + p * neighbours.c_step, args.c_stride, args.store);
  for (Index k = args.depth; k > 0; --k, a += R, b += 2 * N) {
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p) {
      sums[p].template multiply_add<Elements>(a, load<V>(b + p * step), load<V>(b + p * step + N));
      in_order();
    }
  }
#pragma GCC unroll 4
  for (int p = 0; p < P; ++p) sums[p].finish(args.c + p * neighbours.c_step, args.c_stride, args.store);
}

// A line for every two k's while there are lines, plain k's after them, lines without k's at the end.
template <class Mover, class Elements, class T, int N, int R>
void carrying_tile_of_height(const TileArgs<T>& args, Carry& carry) {
  using V = Lanes<T, N>;
  const T *a = args.a, *b = args.b;
  const Index stride = args.b_stride;
  [[maybe_unused]] const Index near = args.near;
  constexpr bool sparing = spares_instructions<Elements, V>;
  Mover mover(carry);
  Accumulators<T, N, R> sums;
  sums.start(args.c, args.c_stride, args.store);
  const auto next_k = [&]() __attribute__((always_inline)) {
    if constexpr (Mover::b_is_far) {
      ask_near<2 * N * sizeof(T)>(b, near);
    } else if constexpr (sparing) {
      ask_soon<2 * N * sizeof(T)>(b, near);
      ask_soon<R * sizeof(T)>(a, soon);
    }
    sums.template multiply_add<Elements, sparing>(a, load<V>(b), load<V>(b + N));
    a += R;
    b += stride;
  };
  Index each = 2;
  if constexpr (sizeof(V) == 16) asm("" : "+r"(each));  // not unrolled: x86's old instructions need more registers
  const Index half = args.depth / 2, together = carry.lines < half ? carry.lines : half;
  for (Index line = together; line > 0; --line) {
    mover.move_line(carry);
    for (Index k = each; k > 0; --k) next_k();
  }
  for (Index k = args.depth - 2 * together; k > 0; --k) next_k();
  sums.finish(args.c, args.c_stride, args.store);
  for (Index line = together; line < carry.lines; ++line) mover.move_line(carry);
  mover.stop(carry);
}

// Lanes hold pairs (k even in the low half, k odd in the high half): a shift and a mask widen them.
template <int N, int R>
void tile_bf16_of_height(const TileArgs<float, bfloat16>& args) {
  using V = Lanes<float, N>;
  using I = Lanes<std::uint32_t, N>;
  const I high_half = I{} + 0xffff0000u;
  const float* a = args.a;
  const bfloat16* b = args.b;
  const Index step = args.ahead.lines * args.ahead.step * 2 / k_at_once;  // for each pair
  const char* ahead = static_cast<const char*>(args.ahead.at);
  Accumulators<float, N, R> sums;
  sums.start(args.c, args.c_stride, args.store);
  for (Index k = args.depth; k > 0; k -= 2, a += 2 * R, b += 4 * N, ahead += step) {
    __builtin_prefetch(ahead, 0, 2);
    sums.template multiply_add<Widened<N>>(a, reinterpret<V>(load<I>(b) << 16),
                                           reinterpret<V>(load<I>(b + 2 * N) << 16));
    if (k == 1) break;
    const bfloat16* again = forget(b);  // a second load is cheaper than two registers for the pairs
    sums.template multiply_add<Widened<N>>(a + R, reinterpret<V>(load<I>(again) & high_half),
                                           reinterpret<V>(load<I>(again + 2 * N) & high_half));
  }
  sums.finish(args.c, args.c_stride, args.store);
}

template <int N, int R, int P>
void broad_tile_bf16_of_height(const TileArgs<float, bfloat16>& args, const Neighbours& neighbours) {
  using V = Lanes<float, N>;
  using I = Lanes<std::uint32_t, N>;
  const I high_half = I{} + 0xffff0000u;
  const float* a = args.a;
  const bfloat16* b = args.b;
  const Index step = neighbours.b_step;
  Accumulators<float, N, R> sums[P];
#pragma GCC unroll 4
  for (int p = 0; p < P; ++p) sums[p].start(args.c + p * neighbours.c_step, args.c_stride, args.store);
  for (Index k = args.depth; k > 0; k -= 2, a += 2 * R, b += 4 * N) {
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p) {
      const bfloat16* panel = b + p * step;
      sums[p].template multiply_add<Widened<N>>(a, reinterpret<V>(load<I>(panel) << 16),
                                                reinterpret<V>(load<I>(panel + 2 * N) << 16));
      in_order();
    }
    if (k == 1) break;
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p) {
      const bfloat16* panel = b + p * step;
      sums[p].template multiply_add<Widened<N>>(a + R, reinterpret<V>(load<I>(panel) & high_half),
                                                reinterpret<V>(load<I>(panel + 2 * N) & high_half));
      in_order();
    }
  }
#pragma GCC unroll 4
  for (int p = 0; p < P; ++p) sums[p].finish(args.c + p * neighbours.c_step, args.c_stride, args.store);
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

// Tables of functions by height, and what picks from them.
template <class T, int N, int R>
struct Tile {
  static constexpr int unpacked_rows = R < most_unpacked_rows ? R : most_unpacked_rows;

  static void run(Index rows, const TileArgs<T>& args) { heights<Numbers<T, N>>(all)[rows - 1](args); }
  static void run_dot(Index rows, const TileArgs<T>& args) { heights<Pairs<N>>(all)[rows - 1](args); }
  static void run_bf16(Index rows, const TileArgs<T, bfloat16>& args) { bf16_heights(all)[rows - 1](args); }
  static void run_sweeping(Index rows, const TileArgs<T>& args, const Neighbours& neighbours) {
    sweeping_heights<Numbers<T, N>, T>(all)[rows - 1](args, neighbours);
  }
  static void run_sweeping_dot(Index rows, const TileArgs<T>& args, const Neighbours& neighbours) {
    sweeping_heights<Pairs<N>, T>(all)[rows - 1](args, neighbours);
  }
  static void run_sweeping_narrow(Index rows, const TileArgs<T, bfloat16>& args, const Neighbours& neighbours) {
    sweeping_heights<Numbers<T, N>, bfloat16>(all)[rows - 1](args, neighbours);
  }
  static void run_unpacked(Index rows, const TileArgs<T>& args, const Neighbours& neighbours, Index last) {
    unpacked_heights<Numbers<T, N>>(unpacked)[rows - 1](args, neighbours, last);
  }
  static void run_unpacked_dot(Index rows, const TileArgs<T>& args, const Neighbours& neighbours, Index last) {
    unpacked_heights<Pairs<N>>(unpacked)[rows - 1](args, neighbours, last);
  }
  static void run_zipping(Index rows, const TileArgs<float, bfloat16>& args, const Neighbours& neighbours) {
    zipping_heights(std::make_integer_sequence<int, most_zipping_rows>{})[rows - 1](args, neighbours);
  }
  static void run_broad(Index rows, const TileArgs<T>& args, const Neighbours& neighbours) {
    broad_heights<Numbers<T, N>>(neighbours.panels)[rows - 1](args, neighbours);
  }
  static void run_broad_dot(Index rows, const TileArgs<T>& args, const Neighbours& neighbours) {
    broad_heights<Pairs<N>>(neighbours.panels)[rows - 1](args, neighbours);
  }
  static void run_broad_bf16(Index rows, const TileArgs<T, bfloat16>& args, const Neighbours& neighbours) {
    broad_bf16_heights(neighbours.panels)[rows - 1](args, neighbours);
  }
  static void run_carrying(Index rows, const TileArgs<T>& args, Carry& carry) {
    using V = Lanes<T, N>;
    const CarryingFunction* functions = nullptr;
    switch (carry.route) {
      case Route::through_l2:
        functions = carrying_heights<Copying<V, Route::through_l2>, Numbers<T, N>>(all);
        break;
      case Route::through_l1:
        functions = carrying_heights<Copying<V, Route::through_l1>, Numbers<T, N>>(all);
        break;
      case Route::past_caches:
        functions = carrying_heights<Copying<V, Route::past_caches>, Numbers<T, N>>(all);
        break;
    }
    functions[rows - 1](args, carry);
  }
  static void run_carrying_dot(Index rows, const TileArgs<T>& args, Carry& carry) {
    const auto functions = carry.route == Route::through_l1
                               ? carrying_heights<Zipping<N, Route::through_l1>, Pairs<N>>(all)
                               : carrying_heights<Zipping<N, Route::through_l2>, Pairs<N>>(all);
    functions[rows - 1](args, carry);
  }

 private:
  static constexpr std::make_integer_sequence<int, R> all{};
  static constexpr std::make_integer_sequence<int, unpacked_rows> unpacked{};
  template <int P>
  static constexpr std::make_integer_sequence<int, R / P> beside{};  // heights of P panels side by side

  using Function = void (*)(const TileArgs<T>&);
  using Bf16Function = void (*)(const TileArgs<T, bfloat16>&);
  template <class B>
  using NeighboursFunction = void (*)(const TileArgs<T, B>&, const Neighbours&);
  using UnpackedFunction = void (*)(const TileArgs<T>&, const Neighbours&, Index last);
  using CarryingFunction = void (*)(const TileArgs<T>&, Carry&);

  template <class Elements, int... H>
  static const Function* heights(std::integer_sequence<int, H...>) {
    static constexpr Function table[] = {tile_of_height<Elements, T, N, H + 1>...};
    return table;
  }
  template <int... H>
  static const Bf16Function* bf16_heights(std::integer_sequence<int, H...>) {
    static constexpr Bf16Function table[] = {tile_bf16_of_height<N, H + 1>...};
    return table;
  }
  template <class Elements, class B, int... H>
  static const NeighboursFunction<B>* sweeping_heights(std::integer_sequence<int, H...>) {
    static constexpr NeighboursFunction<B> table[] = {sweeping_tile_of_height<Elements, T, B, N, H + 1>...};
    return table;
  }
  template <int... H>
  static const NeighboursFunction<bfloat16>* zipping_heights(std::integer_sequence<int, H...>) {
    static constexpr NeighboursFunction<bfloat16> table[] = {zipping_tile_of_height<N, H + 1>...};
    return table;
  }
  template <class Elements, int... H>
  static const UnpackedFunction* unpacked_heights(std::integer_sequence<int, H...>) {
    static constexpr UnpackedFunction table[] = {unpacked_tile_of_height<Elements, T, N, H + 1>...};
    return table;
  }
  template <class Elements, int P, int... H>
  static const NeighboursFunction<T>* broad_heights(std::integer_sequence<int, H...>) {
    static constexpr NeighboursFunction<T> table[] = {broad_tile_of_height<Elements, T, N, H + 1, P>...};
    return table;
  }
  template <class Elements>
  static const NeighboursFunction<T>* broad_heights(Index panels) {
    return panels == 2   ? broad_heights<Elements, 2>(beside<2>)
           : panels == 3 ? broad_heights<Elements, 3>(beside<3>)
                         : broad_heights<Elements, 4>(beside<4>);
  }
  template <int P, int... H>
  static const NeighboursFunction<bfloat16>* broad_bf16_heights(std::integer_sequence<int, H...>) {
    static constexpr NeighboursFunction<bfloat16> table[] = {broad_tile_bf16_of_height<N, H + 1, P>...};
    return table;
  }
  static const NeighboursFunction<bfloat16>* broad_bf16_heights(Index panels) {
    return panels == 2   ? broad_bf16_heights<2>(beside<2>)
           : panels == 3 ? broad_bf16_heights<3>(beside<3>)
                         : broad_bf16_heights<4>(beside<4>);
  }
  template <class Mover, class Elements, int... H>
  static const CarryingFunction* carrying_heights(std::integer_sequence<int, H...>) {
    static constexpr CarryingFunction table[] = {carrying_tile_of_height<Mover, Elements, T, N, H + 1>...};
    return table;
  }
};

}  // namespace
}  // namespace numoe
