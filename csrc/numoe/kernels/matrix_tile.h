// Tiles of bfloat16 pairs on a matrix unit.
#pragma once

#include "numoe/kernels/kernels.h"
#include "numoe/kernels/matrix_unit.h"
#include "numoe/kernels/tile.h"

namespace numoe {
namespace {

// Rows are cut into tiles of 32; what does not fill one has a shape of its own.  Pairs come 16 at a time, the last ones from
// copies that zeros follow.
template <class Unit>
struct MatrixTile {
  static constexpr int side = matrix_side, most = 2 * side;
  static constexpr int rows = 256;  // whose sums of a panel stay in a cache

  static void run(Index count, const TileArgs<float>& args) { run_sweeping(count, args, {}); }
  static void run_sweeping(Index count, const TileArgs<float>& args, const Neighbours& neighbours) {
    sweep(count, args, {line, count * line}, neighbours);
  }
  static void run_unpacked(Index count, const TileArgs<float>& args, const Neighbours& neighbours, Index) {
    sweep(count, args, {args.a_stride * number, line}, neighbours);
  }

 private:
  static constexpr Index number = sizeof(float);
  static constexpr Index line = 64, pairs_of_b = 2 * line;  // bytes: of a row of a tile, of the same pair in a panel
  static constexpr Index all_columns = 2 * side;

  struct StepsOfA {
    Index row, pairs;  // bytes from one row to the next, from 16 pairs of a row to the next ones
  };
  struct Product {
    const char *a, *b;
    StepsOfA a_step;
    Index depth;
    float* c;
    Index c_stride;
    Store store;
  };

  static inline void sweep(Index count, const TileArgs<float>& args, StepsOfA steps, const Neighbours& neighbours) {
    Unit unit;
    Asking asking(args.ahead), nothing({});
    Index shaped = 0;
    for (Index row = 0; row < count; row += most) {
      const Index height = count - row < most ? count - row : most;
      if (height != shaped) unit.shape(shaped = height);
      for (Index p = 0; p < neighbours.panels; ++p) {
        const Product product{reinterpret_cast<const char*>(args.a) + row * steps.row,
                              reinterpret_cast<const char*>(args.b + p * neighbours.b_step),
                              steps,
                              args.depth,
                              args.c + row * args.c_stride + p * neighbours.c_step,
                              args.c_stride,
                              args.store};
        Asking& ask = p == 0 ? asking : nothing;
        height > side ? multiply<true>(unit, product, height, ask) : multiply<false>(unit, product, height, ask);
      }
    }
    unit.give_back();
  }

  // others: whether there are more than 16 rows.
  template <bool others>
  [[gnu::noinline]] static void multiply(Unit& unit, const Product& product, Index height, Asking& ahead) {
    start<others>(unit, product);
    const char *a = product.a, *b = product.b;
    const StepsOfA a_step = product.a_step;
    Asking asking = ahead;
    Index left = product.depth;
    for (; left >= side; left -= side, a += a_step.pairs, b += side * pairs_of_b) {
      asking(side / k_at_once);
      step<others>(unit, a, a_step.row, b);
    }
    ahead = asking;
    if (left > 0) last_step<others>(unit, a, a_step.row, height, b, left);
    finish<others>(unit, product, height);
  }

  template <bool others>
  static inline void step(Unit& unit, const char* a, Index a_stride, const char* b) {
    unit.template load<4>(a, a_stride);
    unit.template load<6>(b, pairs_of_b);
    unit.template multiply_add<0, 4, 6>();
    unit.template load<7>(b + line, pairs_of_b);
    unit.template multiply_add<1, 4, 7>();
    if constexpr (others) {
      unit.template load<5>(a + side * a_stride, a_stride);
      unit.template multiply_add<2, 5, 6>();
      unit.template multiply_add<3, 5, 7>();
    }
  }
  // Fewer than 16 pairs.
  template <bool others>
  [[gnu::noinline]] static void last_step(Unit& unit, const char* a, Index a_stride, Index height, const char* b,
                                          Index count) {
    alignas(64) char of_a[most * line] = {}, of_b[side * pairs_of_b] = {};
    for (Index r = 0; r < height; ++r) {
      __builtin_memcpy(of_a + r * line, a + r * a_stride, static_cast<std::size_t>(count * number));
    }
    __builtin_memcpy(of_b, b, static_cast<std::size_t>(count * pairs_of_b));
    step<others>(unit, of_a, line, of_b);
  }

  template <bool others>
  static inline void start(Unit& unit, const Product& product) {
    if (product.store != Store::accumulate) {
      unit.template clear<0>();
      unit.template clear<1>();
      if constexpr (others) unit.template clear<2>();
      if constexpr (others) unit.template clear<3>();
      return;
    }
    const float *first = product.c, *rest = first + side * product.c_stride;
    const Index stride = product.c_stride * number;
    unit.template load<0>(first, stride);
    unit.template load<1>(first + side, stride);
    if constexpr (others) unit.template load<2>(rest, stride);
    if constexpr (others) unit.template load<3>(rest + side, stride);
  }
  template <bool others>
  static inline void finish(Unit& unit, const Product& product, Index height) {
    if (product.store != Store::add && product.store != Store::stream) {
      return put<others>(unit, product.c, product.c_stride);
    }
    alignas(64) float sums[most * all_columns];
    put<others>(unit, sums, all_columns);
    using V = Lanes<float, side>;
    float* c = product.c;
    for (Index r = 0; r < height; ++r, c += product.c_stride) {
      for (Index j = 0; j < all_columns; j += side) {
        const V v = numoe::load<V>(sums + r * all_columns + j);
        product.store == Store::add ? numoe::store(c + j, numoe::load<V>(c + j) + v) : stream(c + j, v);
      }
    }
  }
  template <bool others>
  static inline void put(Unit& unit, float* c, Index c_stride) {
    const Index stride = c_stride * number;
    float* const rest = c + side * c_stride;
    unit.template store<0>(c, stride);
    unit.template store<1>(c + side, stride);
    if constexpr (others) unit.template store<2>(rest, stride);
    if constexpr (others) unit.template store<3>(rest + side, stride);
  }
};

}  // namespace
}  // namespace numoe
