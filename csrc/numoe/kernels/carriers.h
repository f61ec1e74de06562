// Who moves the lines of a Carry, one at a time: as they are, or two rows of bfloat16 numbers as one row of pairs.
#pragma once

#include "numoe/kernels/kernels.h"
#include "numoe/kernels/lanes.h"

namespace numoe {
namespace {

// Where in a Carry somebody is.
class Carrier {
 public:
  explicit Carrier(const Carry& carry)
      : from(carry.from), to(carry.to), lead(carry.lead), left_in_row(carry.left_in_row) {}

  inline void stop(Carry& carry) const {
    carry.from = from;
    carry.to = to;
    carry.left_in_row = left_in_row;
  }

 protected:
  const char* from;
  char* to;
  Index lead, left_in_row;

  template <Route route>
  [[gnu::always_inline]] inline void ask(Index offset) const {
    __builtin_prefetch(from + offset, 0, route == Route::through_l1 ? 3 : 2);
  }
  [[gnu::always_inline]] inline void go_on(const Carry& carry, Index written) {
    from = forget(from + Carry::line);  // apart: compilers would move both into one vector register
    to = forget(to + written);
    if (--left_in_row > 0) return;
    const Carry& jump = *forget(&carry);  // read when needed: there are no registers to spare
    from = forget(from + jump.from_jump);
    to = forget(to + jump.to_jump);
    left_in_row = jump.lines_in_row;
  }
};

// Moves lines as they are, V at a time.
template <class V, Route route>
struct Copying : Carrier {
  // Lines on other routes go to a stage, and so did those that the tile reads.
  static constexpr bool b_is_far = route == Route::past_caches;
  using Carrier::Carrier;

  [[gnu::always_inline]] inline void move_line(const Carry& carry) {
    ask<route>(lead);
#pragma GCC unroll 4
    for (std::size_t i = 0; i < Carry::line; i += sizeof(V)) {
      if constexpr (route == Route::past_caches) {
        stream(to + i, load<V>(from + i));
      } else {
        store(to + i, load<V>(from + i));
      }
      in_order();
    }
    go_on(carry, Carry::line);
  }
};

// Moves 2N bfloat16 numbers each of two rows as 2N pairs: not by a permutation, whose indices would take registers.
template <int N, Route route>
struct Zipping : Carrier {
  static_assert(2 * N * sizeof(bfloat16) == Carry::line);
  static constexpr bool b_is_far = false;
  Index odd;

  explicit Zipping(const Carry& carry) : Carrier(carry), odd(carry.odd) {}

  [[gnu::always_inline]] inline void move_line(const Carry& carry) {
    ask<route>(lead);
    ask<route>(lead + odd);
#pragma GCC unroll 2
    for (Index i = 0; i < 2; ++i) {
      const char* even = from + i * Carry::line / 2;
      store(to + i * Carry::line, words(even) | words(even + odd) << 16);
      in_order();
    }
    go_on(carry, 2 * Carry::line);
  }

 private:
  static inline Lanes<std::uint32_t, N> words(const char* numbers) {
    return __builtin_convertvector(load<Lanes<std::uint16_t, N>>(numbers), Lanes<std::uint32_t, N>);
  }
};

template <class Mover>
void carry_lines(Carry& carry) {
  Mover mover(carry);
  for (Index i = 0; i < carry.lines; ++i) mover.move_line(carry);
  mover.stop(carry);
}
template <class T, int N>
void carry(Carry& what) {
  using V = Lanes<T, N>;
  switch (what.route) {
    case Route::through_l2:
      return carry_lines<Copying<V, Route::through_l2>>(what);
    case Route::through_l1:
      return carry_lines<Copying<V, Route::through_l1>>(what);
    case Route::past_caches:
      return carry_lines<Copying<V, Route::past_caches>>(what);
  }
}
template <int N>
void carry_zipped(Carry& what) {
  if (what.route == Route::through_l1) return carry_lines<Zipping<N, Route::through_l1>>(what);
  carry_lines<Zipping<N, Route::through_l2>>(what);
}

}  // namespace
}  // namespace numoe
