// Where the panels of a product come from, and the loops of tiles over them.
//
//   PackedPanels   panels that are packed already: weights of a PackedExperts, or somebody's scratch
//   RowMajor       a row-major matrix whose owner may change it between calls: packed on the fly, block by block
//   Transposed     the transpose of such a matrix
//
// Every product is cut along k into blocks that stay in a cache while all row tiles pass over them; the tiles of one
// block ask for the next.  An element's sum runs over ascending k through all of them, so no cut changes a bit.
#pragma once

#include <type_traits>

#include "numoe/packing.h"

namespace numoe {

constexpr Index block_depth = 512;  // × W numbers: 64 KB of float32 panels with 32 columns, half a small L2 cache

// Rows of a left operand, packed: tile i is [depth][height(i)] from data + begin(i) * depth.  Pairs of bfloat16 are
// multiplied by dots with panels of pairs; depth counts them.
template <class T>
struct PackedRows {
  const T* data;
  RowTiles tiles;
  Index depth;
  bool pairs = false;

  const T* tile(Index i) const { return data + tiles.begin(i) * depth; }
};

// Rows k.. of a panel as a tile reads them: of the arithmetic's type, or bfloat16 pairs.
template <class T>
struct PanelBlock {
  const T* wide = nullptr;
  const bfloat16* narrow = nullptr;
};

// What the tiles of a block ask for: tile i < tiles from begin + i * per_tile on, `per_k` bytes further for each k.
struct NextBlock {
  const void* begin;
  Index per_tile = 0, per_k = 0, tiles = 0;

  const void* at(Index tile) const { return static_cast<const char*>(begin) + (tile < tiles ? tile * per_tile : 0); }
  Index step(Index tile) const { return tile < tiles ? per_k : 0; }
};

// ── panels that are there ───────────────────────────────────────────────────────────────────────────────────────────

// Panel j starts at data + j * step.  bfloat16 panels are [depth/2][W][2]; they are widened in registers for few tiles,
// once per block for more, because widening twice costs less than a pass through the cache.
template <class T, class S>
class PackedPanels {
 public:
  PackedPanels(const S* data, Index step, const S* end) : data_(data), step_(step), end_(end) {}

  PanelBlock<T> block(Index j, Index k, Index depth, Index tiles) const {
    const S* panel = data_ + j * step_ + k * W_;
    if constexpr (std::is_same_v<S, T>) {
      return {panel, nullptr};
    } else {
      if (tiles <= 2) return {nullptr, panel};
      T* wide = scratch<T, 0>(block_depth * W_);
      kernels<T>().widen_panel(depth, panel, wide);
      return {wide, nullptr};
    }
  }
  Index panels_at_once(Index) const { return 1; }
  // Whatever lies next in memory is next to be read.
  NextBlock after(Index j, Index k, Index depth, Index tiles) const {
    const S* next = data_ + j * step_ + (k + depth) * W_;
    const Index bytes = std::min(depth * W_, end_ - next) * static_cast<Index>(sizeof(S));
    if (bytes <= 0) return {data_};
    const Index steps = std::is_same_v<S, T> || tiles > 2 ? depth : (depth + 1) / 2;
    return {next, bytes / tiles, bytes / (tiles * steps), tiles};
  }

 private:
  const S* data_;
  Index step_;
  const S* end_;
  Index W_ = kernels<T>().tile_cols;
};

// ── panels packed on the fly ────────────────────────────────────────────────────────────────────────────────────────

// Columns [col, col + cols) of a row-major matrix.  S: its type; T: that of the arithmetic.
//
// Memory is fast only along rows.  So some rows are walked through several panels before the next ones come, the sums of
// these panels wait in c, and the tiles ask for the next rows in the order in which they lie in memory.  For few tiles
// packing would cost more than the product: they read the matrix where it is.
template <class T, class S>
class RowMajor {
 public:
  RowMajor(MatrixView<const S> matrix, Index col, Index cols) : b_(matrix), col_(col), cols_(cols) {}

  Index panels_at_once(Index tiles) const {
    constexpr Index some = 8;
    return few(tiles) ? num_panels(cols_, W_) : std::min(some, num_panels(cols_, W_));
  }

  // c (+)= rows · panels [j, j + count)
  void multiply(const PackedRows<T>& rows, TileRange range, Index j, Index count, Store store, T* c) const {
    const Index first = rows.tiles.begin(range.begin), size = (rows.tiles.begin(range.end) - first) * W_;
    const Index tiles = range.count(), depth_at_once = few(tiles) ? 16 : 128;
    TileArgs<T> args{.c_stride = W_, .near = few(tiles) ? next_panel : one_cache_away};
    for (Index k = 0; k < rows.depth; k += depth_at_once) {
      args.depth = std::min(depth_at_once, rows.depth - k);
      args.store = k == 0 ? store : Store::accumulate;
      const T* widened = nullptr;
      if constexpr (!std::is_same_v<S, T>) widened = widen_rows(j, count, k, args.depth);
      for (Index p = 0; p < count; ++p) {
        if (widened) {
          args.b = widened + p * W_;
          args.b_stride = count * W_;
        } else {
          set_rows(args, j + p, k, tiles);
        }
        for (Index i = range.begin; i < range.end; ++i) {
          const Index height = rows.tiles.height(i);
          args.a = rows.tile(i) + k * height;
          args.c = c + p * size + (rows.tiles.begin(i) - first) * W_;
          if (few(tiles)) {
            ask_along_the_row(args.ahead, j + p, k);
          } else {
            ask_for_next_rows(args.ahead, j, count, k, args.depth, p * tiles + i - range.begin, tiles);
          }
          kernels<T>().tile(height, args);
        }
      }
    }
  }

 private:
  static constexpr Index next_panel = 128, one_cache_away = 1024;  // bytes
  static bool few(Index tiles) { return tiles <= 2; }

  // Rows [k, k + depth) of panels [j, j + count) in the type of the arithmetic: [depth][count * W].
  const T* widen_rows(Index j, Index count, Index k, Index depth) const {
    const Index width = count * W_, valid = std::min(width, cols_ - j * W_);
    T* wide = scratch<T, 0>(depth * width);
    for (Index i = 0; i < depth; ++i) {
      kernels<T>().widen(valid, b_.row(k + i) + col_ + j * W_, wide + i * width);
      std::fill_n(wide + i * width + valid, width - valid, T(0));
    }
    return wide;
  }

  // b = rows [k, k + depth) of panel j: in place, or packed where that pays or they must be padded.
  void set_rows(TileArgs<T>& args, Index j, Index k, Index tiles) const {
    if constexpr (std::is_same_v<S, T>) {
      const Index valid = std::min(W_, cols_ - j * W_);
      const T* source = b_.row(k) + col_ + j * W_;
      args.b = source;
      args.b_stride = b_.stride;
      if (valid == W_ && few(tiles)) return;
      T* panel = scratch<T, 0>(args.depth * W_);
      pack_panels(Operand<T>{source, b_.stride, 1}, args.depth, 0, valid, W_, panel);
      args.b = panel;
      args.b_stride = W_;
    }
  }

  // For few tiles, which take a panel quickly: the same rows, some panels on.
  void ask_along_the_row(Ahead& ahead, Index j, Index k) const {
    constexpr Index distance = 2048;  // bytes
    ahead.at = reinterpret_cast<const char*>(b_.row(k) + col_ + j * W_) + distance;
    ahead.step = row_bytes();
  }
  // For many: call number `call` of `count` panels of `tiles` tiles each asks for its share of the next rows.
  void ask_for_next_rows(Ahead& ahead, Index j, Index count, Index k, Index depth, Index call, Index tiles) const {
    constexpr Index line = 64;
    const bool same_panels = k + depth < b_.rows;
    const Index panel = same_panels ? j : j + count, row = same_panels ? k + depth : 0;
    const Index cols = std::min(count * W_, cols_ - panel * W_), rows = std::min(depth, b_.rows - row);
    const Index share = (rows + count * tiles - 1) / (count * tiles), begin = call * share;
    ahead.at = b_.data;
    ahead.step = ahead.jump = 0;
    if (cols <= 0 || begin >= rows) return;
    ahead.at = b_.row(row + begin) + col_ + panel * W_;
    ahead.step = line;
    ahead.run = (cols * static_cast<Index>(sizeof(S)) + line - 1) / line;
    ahead.jump = row_bytes() - ahead.run * line;
  }
  Index row_bytes() const { return b_.stride * static_cast<Index>(sizeof(S)); }

  MatrixView<const S> b_;
  Index col_, cols_;
  Index W_ = kernels<T>().tile_cols;
};

// Columns [col, col + cols) of the transpose of a row-major matrix: rows of that matrix.
template <class T, class S>
class Transposed {
 public:
  Transposed(MatrixView<const S> matrix, Index col, Index cols) : b_(matrix), col_(col), cols_(cols) {}

  PanelBlock<T> block(Index j, Index k, Index depth, Index) const {
    const T* columns[max_tile_cols];
    T* panel = scratch<T, 0>(block_depth * W_);
    const Index valid = std::min(W_, cols_ - j * W_);
    for (Index i = 0; i < valid; ++i) {
      const S* source = b_.row(col_ + j * W_ + i) + k;
      if constexpr (std::is_same_v<S, T>) {
        columns[i] = source;
      } else {
        T* wide = scratch<T, 2>(block_depth * W_) + i * block_depth;
        kernels<T>().widen(depth, source, wide);
        columns[i] = wide;
      }
    }
    kernels<T>().transpose(depth, valid, columns, panel, W_);
    return {panel, nullptr};
  }
  Index panels_at_once(Index) const { return 1; }
  NextBlock after(Index, Index, Index, Index) const { return {b_.data}; }  // rows in turn: left to the hardware

 private:
  MatrixView<const S> b_;
  Index col_, cols_;
  Index W_ = kernels<T>().tile_cols;
};

// ── products ────────────────────────────────────────────────────────────────────────────────────────────────────────

// c (+)= rows · panel j, for the tiles of `range`; row 0 of c is the first row of the range.
//
// Arguments are changed field by field: a struct that is written in parts and copied as a whole would wait for every
// store before it, streamed ones included.
template <class T, class Source>
void multiply_panel(const PackedRows<T>& rows, TileRange range, const Source& source, Index j, Store store, T* c,
                    Index c_stride) {
  constexpr Index one_memory_away = 3072, one_cache_away = 1024;
  const Kernels<T>& kernel = kernels<T>();
  const Index first = rows.tiles.begin(range.begin), n = range.count();
  TileArgs<T> wide{.c_stride = c_stride};
  TileArgs<T, bfloat16> narrow{.c_stride = c_stride};
  wide.b_stride = kernel.tile_cols;
  wide.near = narrow.near = n == 1 ? one_memory_away : one_cache_away;
  for (Index k = 0; k < rows.depth; k += block_depth) {
    const Index depth = std::min(block_depth, rows.depth - k);
    const PanelBlock<T> b = source.block(j, k, depth, n);
    const NextBlock next = source.after(j, k, depth, n);
    const auto multiply = [&](auto& args, auto tile) {
      args.depth = depth;
      args.store = k == 0 ? store : Store::accumulate;
      for (Index i = range.begin; i < range.end; ++i) {
        const Index height = rows.tiles.height(i);
        args.a = rows.tile(i) + k * height;
        args.c = c + (rows.tiles.begin(i) - first) * c_stride;
        args.ahead.at = next.at(i - range.begin);
        args.ahead.step = next.step(i - range.begin);
        tile(height, args);
      }
    };
    if (b.narrow) {
      narrow.b = b.narrow;
      multiply(narrow, kernel.tile_bf16);
    } else {
      wide.b = b.wide;
      multiply(wide, rows.pairs ? kernel.tile_dot : kernel.tile);
    }
  }
  if (rows.depth == 0 && store != Store::accumulate) {
    for (Index r = 0; r < rows.tiles.begin(range.end) - first; ++r)
      std::fill_n(c + r * c_stride, kernel.tile_cols, T(0));
  }
}

// c (+)= rows · panels [j, j + count); c is [count][rows][W].
template <class T, class Source>
void multiply_panels(const PackedRows<T>& rows, TileRange range, const Source& source, Index j, Index count,
                     Store store, T* c) {
  const Index width = kernels<T>().tile_cols;
  const Index size = (rows.tiles.begin(range.end) - rows.tiles.begin(range.begin)) * width;
  for (Index p = 0; p < count; ++p) multiply_panel(rows, range, source, j + p, store, c + p * size, width);
}
template <class T, class S>
void multiply_panels(const PackedRows<T>& rows, TileRange range, const RowMajor<T, S>& source, Index j, Index count,
                     Store store, T* c) {
  source.multiply(rows, range, j, count, store, c);
}

}  // namespace numoe
