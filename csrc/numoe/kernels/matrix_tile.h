// Tiles of bfloat16 pairs on a matrix unit.
#pragma once

#include "numoe/kernels/kernels.h"
#include "numoe/kernels/matrix_unit.h"
#include "numoe/kernels/tile.h"

namespace numoe {
namespace {

// 16 pairs at a time, the last ones from a copy of the panel that zeros follow.
template <class Unit>
struct MatrixTile {
  static constexpr int side = matrix_side, rows = 2 * side;

  static Index panels_beside(Index count) { return count <= side ? 3 : 1; }

  static void run(Index height, const TileArgs<float>& args) {
    if (height > side) return multiply<two_rows_of_tiles>(height, args, {});
    multiply<1>(height, args, {});
  }
  static void run_broad(Index height, const TileArgs<float>& args, const Neighbours& neighbours) {
    if (neighbours.panels == 2) return multiply<2>(height, args, neighbours);
    multiply<3>(height, args, neighbours);
  }

 private:
  static constexpr int two_rows_of_tiles = 0;
  static constexpr Index line = 64, pairs_of_b = 2 * line;  // bytes: of a row of a tile, of the same pair in a panel

  // For 16 pairs at a time: rows of a, 64 bytes apart, and 16 pairs of the first panel.
  template <int panels>
  static inline void step(Unit& unit, const char* a, const char* b, Index b_step) {
    if constexpr (panels == two_rows_of_tiles) {
      unit.template load<4>(a, line);
      unit.template load<6>(b, pairs_of_b);
      unit.template multiply_add<0, 4, 6>();
      unit.template load<7>(b + line, pairs_of_b);
      unit.template multiply_add<1, 4, 7>();
      unit.template load<5>(a + side * line, line);
      unit.template multiply_add<2, 5, 6>();
      unit.template multiply_add<3, 5, 7>();
    } else {
      unit.template load<6>(a, line);
      panel<0, panels>(unit, b, b_step);
    }
  }
  template <int p, int panels>
  static inline void panel(Unit& unit, const char* b, Index b_step) {
    unit.template load<7>(b, pairs_of_b);
    unit.template multiply_add<2 * p, 6, 7>();
    unit.template load<7>(b + line, pairs_of_b);
    unit.template multiply_add<2 * p + 1, 6, 7>();
    if constexpr (p + 1 < panels) panel<p + 1, panels>(unit, b + b_step, b_step);
  }

  // f.template operator()<t>(place) for each register of sums.
  template <int panels, class F>
  static inline void for_sums(float* c, Index c_stride, Index c_step, F f) {
    f.template operator()<0>(c);
    f.template operator()<1>(c + side);
    if constexpr (panels == two_rows_of_tiles) {
      f.template operator()<2>(c + side * c_stride);
      f.template operator()<3>(c + side * c_stride + side);
    }
    if constexpr (panels > 1) {
      f.template operator()<2>(c + c_step);
      f.template operator()<3>(c + c_step + side);
    }
    if constexpr (panels > 2) {
      f.template operator()<4>(c + 2 * c_step);
      f.template operator()<5>(c + 2 * c_step + side);
    }
  }

  template <int panels>
  static void multiply(Index height, const TileArgs<float>& args, const Neighbours& neighbours) {
    constexpr Index number = sizeof(float);
    Unit unit(static_cast<int>(height));
    const Index stride = args.c_stride * number, b_step = neighbours.b_step * number;
    for_sums<panels>(args.c, args.c_stride, neighbours.c_step, [&]<int t>(float* c) {
      args.store == Store::accumulate ? unit.template load<t>(c, stride) : unit.template clear<t>();
    });
    const char *a = reinterpret_cast<const char*>(args.a), *b = reinterpret_cast<const char*>(args.b);
    Asking asking(args.ahead);
    Index left = args.depth;
    for (; left >= side; left -= side, a += height * line, b += side * pairs_of_b) {
      if constexpr (panels <= 1) asking(side / k_at_once);
      step<panels>(unit, a, b, b_step);
    }
    if (left > 0) last_step<panels>(unit, a, b, b_step, left);
    for_sums<panels>(args.c, args.c_stride, neighbours.c_step, [&]<int t>(float* c) {
      unit.template store<t>(c, stride);
    });
    unit.give_back();
  }

  // `count` pairs; a has zeros behind them.
  template <int panels>
  static void last_step(Unit& unit, const char* a, const char* b, Index b_step, Index count) {
    constexpr int most = panels > 1 ? panels : 1;
    alignas(64) char padded[most * side * pairs_of_b];
    const Index bytes = count * pairs_of_b;
    for (Index p = 0; p < most; ++p) {
      char* const target = padded + p * side * pairs_of_b;
      __builtin_memcpy(target, b + p * b_step, static_cast<std::size_t>(bytes));
      __builtin_memset(target + bytes, 0, static_cast<std::size_t>(side * pairs_of_b - bytes));
    }
    step<panels>(unit, a, padded, side * pairs_of_b);
  }
};

}  // namespace
}  // namespace numoe
