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

  static Index panels_beside(Index count) { return count <= side ? 3 : 1; }
  static Index passes(Index count) { return (count + most - 1) / most; }
  // What many tiles pass over, and the rows of one, stay in an L1; with two of them memory sets the pace.
  static Index block_depth(Index count) { return passes(count) > 2 ? 128 : 512; }

  static void run(Index count, const TileArgs<float>& args) { run_sweeping(count, args, {}); }
  static void run_sweeping(Index count, const TileArgs<float>& args, const Neighbours& neighbours) {
    sweep(count, args, {line, count * line}, neighbours);
  }
  static void run_unpacked(Index count, const TileArgs<float>& args, const Neighbours& neighbours, Index) {
    sweep(count, args, {args.a_stride * number, line}, neighbours);
  }
  static void run_broad(Index count, const TileArgs<float>& args, const Neighbours& neighbours) {
    Unit unit;
    Asking nothing({});
    const Product product(args, {line, count * line}, neighbours, 0, 0);
    unit.shape(count);
    neighbours.panels == 2 ? multiply<2>(unit, product, count, nothing) : multiply<3>(unit, product, count, nothing);
    unit.give_back();
  }

 private:
  static constexpr int two_rows_of_tiles = 0;  // instead of a number of panels
  static constexpr Index number = sizeof(float);
  static constexpr Index line = 64, pairs_of_b = 2 * line;  // bytes: of a row of a tile, of the same pair in a panel
  static constexpr Index all_columns = 2 * side;

  struct StepsOfA {
    Index row, pairs;  // bytes from one row to the next, from 16 pairs of a row to the next ones
  };
  struct Product {
    const char *a, *b;
    float* c;
    StepsOfA a_step;
    Index b_step, depth, c_stride, c_step;  // b_step in bytes
    Store store;

    // Of the rows of a from `row` on and panel p.
    Product(const TileArgs<float>& args, StepsOfA steps, const Neighbours& neighbours, Index row, Index p)
        : a(reinterpret_cast<const char*>(args.a) + row * steps.row),
          b(reinterpret_cast<const char*>(args.b + p * neighbours.b_step)),
          c(args.c + row * args.c_stride + p * neighbours.c_step),
          a_step(steps),
          b_step(neighbours.b_step * number),
          depth(args.depth),
          c_stride(args.c_stride),
          c_step(neighbours.c_step),
          store(args.store) {}
  };

  static inline void sweep(Index count, const TileArgs<float>& args, StepsOfA steps, const Neighbours& neighbours) {
    Unit unit;
    Asking asking(args.ahead), nothing({});
    Index shaped = 0;
    for (Index row = 0; row < count; row += most) {
      const Index height = count - row < most ? count - row : most;
      if (height != shaped) unit.shape(shaped = height);
      for (Index p = 0; p < neighbours.panels; ++p) {
        const Product product(args, steps, neighbours, row, p);
        Asking& ask = p == 0 ? asking : nothing;
        height > side ? multiply<two_rows_of_tiles>(unit, product, height, ask) : multiply<1>(unit, product, height, ask);
      }
    }
    unit.give_back();
  }

  template <int panels>
  [[gnu::noinline]] static void multiply(Unit& unit, const Product& product, Index height, Asking& ahead) {
    start<panels>(unit, product);
    const char *a = product.a, *b = product.b;
    const StepsOfA a_step = product.a_step;
    const Index b_step = product.b_step;
    Asking asking = ahead;
    Index left = product.depth;
    for (; left >= side; left -= side, a += a_step.pairs, b += side * pairs_of_b) {
      if constexpr (panels <= 1) asking(side / k_at_once);
      step<panels>(unit, a, a_step.row, b, b_step);
    }
    ahead = asking;
    if (left > 0) last_step<panels>(unit, a, a_step.row, height, b, b_step, left);
    finish<panels>(unit, product, height);
  }

  // For 16 pairs: rows of a, and 16 pairs of the first panel.
  template <int panels>
  static inline void step(Unit& unit, const char* a, Index a_stride, const char* b, Index b_step) {
    if constexpr (panels == two_rows_of_tiles) {
      unit.template load<4>(a, a_stride);
      unit.template load<6>(b, pairs_of_b);
      unit.template multiply_add<0, 4, 6>();
      unit.template load<7>(b + line, pairs_of_b);
      unit.template multiply_add<1, 4, 7>();
      unit.template load<5>(a + side * a_stride, a_stride);
      unit.template multiply_add<2, 5, 6>();
      unit.template multiply_add<3, 5, 7>();
    } else {
      unit.template load<6>(a, a_stride);
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
  // Fewer than 16 pairs.
  template <int panels>
  [[gnu::noinline]] static void last_step(Unit& unit, const char* a, Index a_stride, Index height, const char* b,
                                          Index b_step, Index count) {
    constexpr int copies = panels > 1 ? panels : 1;
    alignas(64) char of_a[most * line], of_b[copies * side * pairs_of_b];
    __builtin_memset(of_a, 0, sizeof of_a);
    __builtin_memset(of_b, 0, sizeof of_b);
    for (Index r = 0; r < height; ++r) {
      __builtin_memcpy(of_a + r * line, a + r * a_stride, static_cast<std::size_t>(count * number));
    }
    for (Index p = 0; p < copies; ++p) {
      __builtin_memcpy(of_b + p * side * pairs_of_b, b + p * b_step, static_cast<std::size_t>(count * pairs_of_b));
    }
    step<panels>(unit, of_a, line, of_b, side * pairs_of_b);
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
  static inline void start(Unit& unit, const Product& product) {
    const Index stride = product.c_stride * number;
    const bool from_c = product.store == Store::accumulate;
    for_sums<panels>(product.c, product.c_stride, product.c_step, [&]<int t>(float* sums) {
      from_c ? unit.template load<t>(sums, stride) : unit.template clear<t>();
    });
  }
  template <int panels>
  static inline void finish(Unit& unit, const Product& product, Index height) {
    const auto put = [&](float* c, Index c_stride) {
      for_sums<panels>(c, c_stride, product.c_step, [&]<int t>(float* sums) {
        unit.template store<t>(sums, c_stride * number);
      });
    };
    if constexpr (panels <= 1) {
      if (product.store == Store::add || product.store == Store::stream) {
        alignas(64) float sums[most * all_columns];
        put(sums, all_columns);
        return move_sums(sums, height, product);
      }
    }
    put(product.c, product.c_stride);
  }
  static inline void move_sums(const float* sums, Index height, const Product& product) {
    using V = Lanes<float, side>;
    float* c = product.c;
    for (Index r = 0; r < height; ++r, sums += all_columns, c += product.c_stride) {
      for (Index j = 0; j < all_columns; j += side) {
        const V v = numoe::load<V>(sums + j);
        product.store == Store::add ? numoe::store(c + j, numoe::load<V>(c + j) + v) : stream(c + j, v);
      }
    }
  }
};

}  // namespace
}  // namespace numoe
