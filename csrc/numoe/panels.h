// Where the panels of a product come from, and the loops of tiles over them.
//
//   PackedPanels   panels that are packed already: weights of a PackedExperts
//   RowMajor       a row-major matrix whose owner may change it between calls
//   RowMajorPairs  the same of bfloat16 numbers, multiplied as pairs
//
// Every product is cut along k into blocks that stay in a cache while all row tiles pass over them; the tiles of one
// block ask for the next, or carry it to where it is read from.  An element's sum runs over ascending k through all of
// them, so no cut changes a bit.
#pragma once

#include <type_traits>

#include "numoe/staging.h"

namespace numoe {

constexpr Index block_depth = 512;  // × W numbers: 64 KB of float32 panels with 32 columns, half a small L2 cache

constexpr Index one_memory_away = 8192;  // bytes that a tile reads while a line comes from a busy memory
constexpr Index one_cache_away = 1024;   // and from the L2

// Rows of a left operand, packed: tile i is as the kernels want it, from data + begin(i) * size, and so are its k's from
// each block's first on.  With pairs of bfloat16, `depth` counts them.
template <class T>
struct PackedRows {
  const T* data;
  RowTiles tiles;
  Index depth;
  Index size;  // of a row, at least depth

  const T* tile(Index i, Index k = 0) const { return data + tiles.begin(i) * size + k * tiles.height(i); }
};

// Sums of some rows and panels: those of row r in panel p are W numbers from at(p, r) on.
template <class T>
struct Sums {
  T* data;
  Index step, stride;  // from one panel to the next, from one row to the next

  // [panel][rows][W]
  static Sums side_by_side(T* data, Index rows) {
    const Index width = kernels<T>().tile_cols;
    return {data, rows * width, width};
  }
  // Columns of a matrix.
  static Sums in(MatrixView<T> matrix) { return {matrix.data, kernels<T>().tile_cols, matrix.stride}; }

  T* at(Index panel, Index row) const { return data + panel * step + row * stride; }
};

// Rows k.. of a panel as a tile reads them: of the arithmetic's type, or bfloat16 pairs.
template <class T>
struct PanelBlock {
  const T* wide = nullptr;
  const bfloat16* narrow = nullptr;
};

// Panels [begin, begin + count) of a source; none if there is no source.
template <class Source>
struct Panels {
  const Source* source = nullptr;
  Index begin = 0, count = 0;
};
template <class Source>
Panels<Source> some_panels(const Source& source, Index begin, Index at_once) {
  const Index end = std::min(begin + at_once, source.count());
  return begin < end ? Panels<Source>{&source, begin, end - begin} : Panels<Source>{};
}
// Those after panel `j`'s; after the last ones the first ones, if they come `again`.
template <class Source>
Panels<Source> panels_after(const Source& source, Index j, Index at_once, bool again) {
  const bool last = j + at_once >= source.count();
  return some_panels(source, last && again ? 0 : j + at_once, at_once);
}

// ── panels that are there ───────────────────────────────────────────────────────────────────────────────────────────

// Panel j < count starts at data + j * step; before `end`, what follows a panel is read next.  `from_memory`: no cache keeps
// the panels.  `pairs`: they and the rows consist of bfloat16 pairs.  Otherwise bfloat16 panels, [depth/2][W][2], are widened
// in registers for some tiles (1.1-1.2 times as fast there, Zen 3); for more once per block, which costs as much as three
// rows and spares their loops the instructions.
template <class T, class S>
class PackedPanels {
 public:
  struct Stage {};
  PackedPanels(const S* data, Index step, Index count, const S* end, bool from_memory, bool pairs)
      : data_(data), step_(step), count_(count), end_(end), from_memory_(from_memory), pairs_(pairs) {}

  Index count() const { return count_; }
  bool pairs() const { return pairs_; }

  PanelBlock<T> block(Index j, Index k, Index depth, Index tiles) const {
    const S* panel = data_ + j * step_ + k * W_;
    if constexpr (std::is_same_v<S, T>) {
      return {panel, nullptr};
    } else {
      if (tiles <= tiles_that_widen) return {nullptr, panel};
      T* wide = scratch<T, Slot::panel>(numoe::block_depth * W_);
      kernels<T>().widen_panel(depth, panel, wide);
      return {wide, nullptr};
    }
  }
  // Few rows read several panels at once, because memory is faster that way: side by side, if a tile has registers to spare
  // for their sums, or in turns.
  Index panels_at_once(Index, Index rows) const {
    const Index beside = panels_beside(rows);
    return std::min(count_, beside == 1 && takes_turns(rows) ? max_side_by_side : beside);
  }
  Stage stage() const { return {}; }

  // c = rows · panels [j, j + count) for few tiles.
  void multiply_together(const PackedRows<T>& rows, TileRange range, Index j, Index count, Sums<T> c) const {
    const bool beside = range.count() == 1 && count <= panels_beside(rows.tiles.height(range.begin));
    beside ? multiply_side_by_side(rows, range.begin, j, count, c) : multiply_in_turns(rows, range, j, count, c);
  }
  // k's of a panel that tiles of so many rows multiply before the next ones come.  Where a tile passes over them many times,
  // they and its rows stay in an L1; with two passes memory sets the pace.
  Index block_depth(Index rows) const {
    constexpr Index of_many_passes = 128;
    return passes(rows) > 2 ? of_many_passes : numoe::block_depth;
  }
  // Whether the first of so few tiles may wait for memory: a request into the L1 would take the place of those that are on
  // their way.
  bool first_waits(Index tiles) const { return std::is_same_v<S, T> && tiles <= 6; }
  // What the first of `tiles` tiles asks for while it multiplies rows [k, k + depth) of panel j: its share of the next block,
  // which lies behind this one; if nothing passes over this one again, what it reads itself.  The share of the next tile
  // is as large and lies behind this one.
  struct Shares {
    Ahead first;
    Index bytes;
  };
  Shares ahead(Index j, Index k, Index depth, Index tiles, Index height) const {
    constexpr Index number = sizeof(S);
    const S* here = data_ + j * step_ + k * W_;
    const bool again = tiles * passes(height) > 1;
    const S* next = again ? here + depth * W_ : here + one_memory_away / number;
    const Index bytes = std::min(depth * W_, end_ - next) * number / tiles;
    if (bytes <= 0) return {};
    const Index request = again ? habits().request : Carry::line;  // line by line, the CPU's prefetchers go along
    return {Ahead::spread(next, bytes, passes(height) * depth, request), bytes};
  }

 private:
  static constexpr Index tiles_that_widen = 6;  // a panel, each for itself

  Index passes(Index rows) const { return pairs_ ? kernels<T>().pairs.passes(rows) : 1; }  // of a tile over its panel
  // Several panels, if a tile has registers for their sums.  Half a tile's rows gain more from a tile that asks ahead, but
  // not from turns.
  Index panels_beside(Index rows) const {
    const Index most_rows = tile_rows<T>(pairs_);
    if (pairs_ && !kernels<T>().pairs.broad_tile) return 1;
    if (2 * rows > most_rows || (2 * rows == most_rows && !takes_turns(rows))) return 1;
    return std::min(most_rows / rows, habits().streams);
  }
  // Whether it pays to put the sums aside every few k's: while memory sets the pace (measured on Zen 3).  No tile does so
  // with narrow numbers or with pairs.
  bool takes_turns(Index rows) const {
    constexpr Index few_rows = 9;
    return from_memory_ && std::is_same_v<S, T> && !pairs_ && rows <= few_rows && kernels<T>().few_lines_of_sums();
  }

  void multiply_side_by_side(const PackedRows<T>& rows, Index tile, Index j, Index count, Sums<T> c) const {
    const Index height = rows.tiles.height(tile);
    const auto multiply = [&](auto kernel, auto* b) {
      using B = std::remove_const_t<std::remove_pointer_t<decltype(b)>>;
      const TileArgs<T, B> args{.depth = rows.depth, .a = rows.tile(tile), .b = b, .c = c.data, .c_stride = c.stride};
      kernel(height, args, {.panels = count, .b_step = step_, .c_step = c.step});
    };
    const S* panel = data_ + j * step_;
    if constexpr (std::is_same_v<S, T>) {
      multiply(pairs_ ? kernels<T>().pairs.broad_tile : kernels<T>().broad_tile, panel);
    } else {
      multiply(kernels<T>().broad_tile_bf16, panel);
    }
  }

  // Some k's of each panel, then the next ones, which the tiles ask for meanwhile.
  void multiply_in_turns(const PackedRows<T>& rows, TileRange range, Index j, Index count, Sums<T> c) const {
    constexpr Index turn = 16;
    const Index first = rows.tiles.begin(range.begin);
    if constexpr (std::is_same_v<S, T>) {
      const Neighbours neighbours{.panels = count, .b_step = step_, .c_step = c.step};
      TileArgs<T> args{.b_stride = W_, .c_stride = c.stride, .near = turn * W_ * static_cast<Index>(sizeof(T))};
      for (Index k = 0; k < rows.depth; k += turn) {
        args.depth = std::min(turn, rows.depth - k);
        args.store = k == 0 ? Store::overwrite : Store::accumulate;
        args.b = data_ + j * step_ + k * W_;
        for (Index i = range.begin; i < range.end; ++i) {
          const Index height = rows.tiles.height(i);
          args.a = rows.tile(i, k);
          args.c = c.at(0, rows.tiles.begin(i) - first);
          kernels<T>().sweeping_tile(height, args, neighbours);
        }
      }
    }
  }

  const S* data_;
  Index step_, count_;
  const S* end_;
  bool from_memory_, pairs_;
  Index W_ = kernels<T>().tile_cols;
};

// ── panels on the fly ───────────────────────────────────────────────────────────────────────────────────────────────

// Columns [col, col + cols) of a row-major matrix.  S: its type; T: that of the arithmetic.
//
// Memory is fast only along rows.  So some rows are walked through several panels before the next ones come, and the sums
// of these panels wait in c.  Few tiles read the matrix where it is, more of them from a stage: broad blocks while memory
// sets the pace, deep ones, which read and write the sums less often, for many rows.  High tiles do so much with a line
// that it hardly matters where it comes from: more of them count as few.
template <class T, class S>
class RowMajor {
 public:
  using Stage = numoe::Stage<Block<S>>;

  RowMajor(MatrixView<const S> matrix, Index col, Index cols) : b_(matrix), col_(col), cols_(cols) {}

  Index count() const { return num_panels(cols_, W_); }
  bool in_place(Index tiles, Index) const {
    return tiles <= (kernels<T>().tile_rows > low ? habits().tiles_on_matrices : 2);
  }
  Index panels_at_once(Index tiles, Index rows) const {
    if (in_place(tiles, rows)) {
      const Index bytes = row_by_row(rows) ? near_cache : cache;
      return std::clamp<Index>(bytes / (rows * W_ * static_cast<Index>(sizeof(T))), 1, count());
    }
    return std::min(count(), width_of_block(rows) / (W_ * static_cast<Index>(sizeof(T))));
  }
  Index depth_of_block(Index rows) const { return block_bytes / width_of_block(rows); }
  Stage stage() const {
    Index size = 0;
    for (const Index width : {deep, wide, broad}) {
      size = std::max(size, block_bytes / width * staged_pitch<S>(width / static_cast<Index>(sizeof(T))));
    }
    return Stage(size);
  }

  // Rows [k, k + depth) of panels [j, j + count).
  Block<S> block(Index j, Index count, Index k, Index depth) const {
    const Index cols = std::min(count * W_, cols_ - j * W_);
    return {b_.row(k) + col_ + j * W_, b_.stride, std::min(depth, b_.rows - k), cols, count * W_};
  }
  static auto carrying_tile() { return kernels<T>().carrying_tile; }
  // Panel p of `count` staged ones as a tile's b.
  void set_panel(TileArgs<T>& args, const S* staged, Index count, Index p) const {
    const Index pitch = staged_pitch<S>(count * W_);
    if constexpr (std::is_same_v<S, T>) {
      args.b = staged + p * W_;
      args.b_stride = pitch;
      args.near = 8 * pitch * static_cast<Index>(sizeof(T));
    } else {
      T* widened = scratch<T, Slot::panel>(args.depth * W_);
      kernels<T>().widen(args.depth, W_, staged + p * W_, pitch, widened, W_);
      args.b = widened;
      args.b_stride = W_;
      args.near = one_cache_away;
    }
  }

  // c = rows · panels [j, j + count) for tiles which sweep over some rows of the matrix from end to end and ask for
  // the rows after these.
  void multiply_in_place(const PackedRows<T>& rows, TileRange range, Index j, Index count, Sums<T> c) const {
    const Index first = rows.tiles.begin(range.begin), height = rows.tiles.begin(range.end) - first;
    const Sweep part = row_by_row(height) ? few_rows(height) : many_rows(rows.tiles.height(range.begin), count);
    const Index whole = std::min(count, cols_ / W_ - j);
    TileArgs<T, S> args{.c_stride = c.stride, .near = part.ahead * b_.stride * static_cast<Index>(sizeof(S))};
    for (Index k = 0; k < rows.depth; k += part.depth) {
      args.depth = std::min(part.depth, rows.depth - k);
      args.store = k == 0 ? Store::overwrite : Store::accumulate;
      const auto sweep = [&](const S* b, Index stride, Index panel, Index panels) {
        args.b = b;
        args.b_stride = stride;
        for (Index i = range.begin; i < range.end; ++i) {
          const Index tile = rows.tiles.height(i);
          args.a = rows.tile(i, k);
          args.c = c.at(panel, rows.tiles.begin(i) - first);
          const Neighbours neighbours{.panels = panels, .b_step = W_, .c_step = c.step};
          if constexpr (std::is_same_v<S, T>) {
            kernels<T>().sweeping_tile(tile, args, neighbours);
          } else {
            kernels<T>().sweeping_tile_narrow(tile, args, neighbours);
          }
        }
      };
      if (whole > 0) sweep(b_.row(k) + col_ + j * W_, b_.stride, 0, whole);
      if (whole < count) sweep(last_panel(k, args.depth), W_, whole, 1);
    }
  }

 private:
  static constexpr Index low = 6;  // rows of a tile
  // Bytes for the sums of matrices in place, and as many for the part over which one sweep passes.
  static constexpr Index cache = Index{256} << 10, near_cache = Index{32} << 10;
  // Bytes of a staged block, and of its rows as panels'.
  static constexpr Index block_bytes = Index{128} << 10, deep = 256, wide = 1024, broad = 4096;
  // From 113 rows on deep ones are 1.02 times as fast as wide ones (Zen 4, AVX-512 and AVX2).
  static Index width_of_block(Index rows) { return rows > 112 ? deep : rows > 28 ? wide : broad; }

  // Rows of the matrix over which tiles sweep, and how many rows further they ask.
  struct Sweep {
    Index depth, ahead;
  };
  // Low tiles wait for memory: few enough not to collide in a cache whose sets repeat every 4 KB, and streams enough to keep
  // the memory busy.  High tiles compute meanwhile: many, because sums come and go with each sweep, as long as two sweeps fit
  // a cache.
  static Sweep many_rows(Index height, Index panels) {
    constexpr Index fewest = 8, number = sizeof(S);
    if (height <= low) return {fewest, fewest};
    const Index most = std::clamp(cache / (panels * kernels<T>().tile_cols * number), fewest, habits().rows_of_a_sweep);
    return {most, most};
  }
  // Where memory is fastest row by row, and the sums of so few rows come and go meanwhile.
  static bool row_by_row(Index rows) { return habits().row_by_row && rows <= 7; }
  static Sweep few_rows(Index rows) { return {(rows + 3) / 4, 4}; }

  // Rows [k, k + depth) of the panel that is less than W columns.
  const S* last_panel(Index k, Index depth) const {
    const Index valid = cols_ % W_;
    return padded_rows(b_, k, depth, col_ + cols_ - valid, valid, W_);
  }

  MatrixView<const S> b_;
  Index col_, cols_;
  Index W_ = kernels<T>().tile_cols;
};

// Columns [col, col + cols) of a row-major bfloat16 matrix, multiplied as pairs.  Few rows pair the numbers themselves as they
// pass over the matrix; more of them read a stage of pairs, which their tiles fill meanwhile, or pairs that were zipped before
// where tiles do not carry.
template <class T>
class RowMajorPairs {
 public:
  using Stage = numoe::Stage<PairedBlock<T>>;

  RowMajorPairs(MatrixView<const bfloat16> matrix, Index col, Index cols) : b_(matrix), col_(col), cols_(cols) {}

  Index count() const { return num_panels(cols_, W_); }
  bool in_place(Index, Index rows) const { return rows <= kernels<T>().pairs.zipping_rows && b_.rows % 2 == 0; }
  static bool staged() { return kernels<T>().pairs.carry != nullptr; }
  Index panels_at_once(Index tiles, Index rows) const {
    if (in_place(tiles, rows) && habits().row_by_row) return std::min(count(), panels_in(near_cache, rows));
    if (in_place(tiles, rows) || !staged()) return std::min(count(), std::clamp<Index>(panels_in(cache, rows), 4, 32));
    return std::min(count(), width_of_block(rows) / (W_ * static_cast<Index>(sizeof(T))));
  }
  // Through the L1, one tile alone is best off with small blocks (35 -> 53 % of the limit at 10 rows, Zen 5).
  Index depth_of_block(Index rows) const {
    const bool one_tile = rows <= kernels<T>().pairs.tile_rows && habits().to_stage == Route::through_l1;
    return (one_tile ? block_bytes / 2 : block_bytes) / width_of_block(rows);
  }
  Stage stage() const {
    if (!staged()) return Stage(0);
    constexpr Index pair = sizeof(T);
    Index size = 0;
    for (const Index width : {one_panel(), deep, broad}) {
      size = std::max(size, block_bytes / width * staged_pitch<T>(width / pair));
    }
    return Stage(size);
  }

  // Pairs [k, k + depth) of panels [j, j + count).
  PairedBlock<T> block(Index j, Index count, Index k, Index depth) const {
    const Index cols = std::min(count * W_, cols_ - j * W_);
    return {b_.row(2 * k) + col_ + j * W_, b_.stride, std::min(2 * depth, b_.rows - 2 * k), cols, count * W_};
  }
  static auto carrying_tile() { return kernels<T>().pairs.carrying_tile; }
  // Panel p of `count` staged ones as a tile's b.
  void set_panel(TileArgs<T>& args, const T* staged, Index count, Index p) const {
    args.b = staged + p * W_;
    args.b_stride = staged_pitch<T>(count * W_);
  }

  // c = rows · panels [j, j + count) for one tile that sweeps over some rows of the matrix from end to end and asks for the
  // rows after these.
  void multiply_in_place(const PackedRows<T>& rows, TileRange range, Index j, Index count, Sums<T> c) const {
    const Index height = rows.tiles.height(range.begin);
    const Index pairs_at_once = habits().row_by_row ? (height + 2) / 3 : 4;
    const Index whole = std::min(count, cols_ / W_ - j), rows_ahead = std::max<Index>(4, 2 * pairs_at_once);
    TileArgs<T, bfloat16> args{.c_stride = c.stride};
    args.near = rows_ahead * b_.stride * static_cast<Index>(sizeof(bfloat16));
    for (Index k = 0; k < rows.depth; k += pairs_at_once) {
      args.depth = std::min(pairs_at_once, rows.depth - k);
      args.store = k == 0 ? Store::overwrite : Store::accumulate;
      args.a = rows.tile(range.begin, k);
      const auto sweep = [&](const bfloat16* b, Index stride, Index panel, Index panels) {
        args.b = b;
        args.b_stride = stride;
        args.c = c.at(panel, 0);
        kernels<T>().pairs.zipping_tile(height, args, {.panels = panels, .b_step = W_, .c_step = c.step});
      };
      if (whole > 0) sweep(b_.row(2 * k) + col_ + j * W_, b_.stride, 0, whole);
      if (whole < count) sweep(last_panel(k, args.depth), W_, whole, 1);
    }
  }

  // c = rows · panels [j, j + count) for tiles that read pairs which were zipped before.
  void multiply_zipped(const PackedRows<T>& rows, TileRange range, Index j, Index count, Sums<T> c) const {
    constexpr Index depth = 128;  // pairs
    const PairKernels<T>& kernel = kernels<T>().pairs;
    const Index first = rows.tiles.begin(range.begin);
    T* const panels = scratch<T, Slot::passing>(count * pitch(depth));
    TileArgs<T> args{.c_stride = c.stride};
    for (Index k = 0; k < rows.depth; k += depth) {
      args.depth = std::min(depth, rows.depth - k);
      args.store = k == 0 ? Store::overwrite : Store::accumulate;
      pair_rows(j, count, k, args.depth, panels);
      for (Index p = 0; p < count; ++p) {
        args.b = panels + p * pitch(args.depth);
        for (Index i = range.begin; i < range.end; ++i) {
          args.a = rows.tile(i, k);
          args.c = c.at(p, rows.tiles.begin(i) - first);
          kernel.tile(rows.tiles.height(i), args);
        }
      }
    }
  }

 private:
  // Bytes for the sums of matrices in place, also beside their rows in an L1; of a staged block, and of its rows.
  static constexpr Index cache = Index{512} << 10, near_cache = Index{32} << 10;
  static constexpr Index block_bytes = Index{128} << 10, deep = 1024, broad = 4096;
  Index one_panel() const { return W_ * static_cast<Index>(sizeof(T)); }
  // Through the L2, many rows are best off with a panel at a time (1.1 times as fast at 32 rows, 1.02 at 128, Zen 4); two
  // threads with fewer of them wait for memory, which is faster along its rows.
  Index width_of_block(Index rows) const {
    if (rows > 22 && habits().to_stage == Route::through_l2) return one_panel();
    return rows > 28 ? deep : broad;
  }
  // Panels whose sums are at most so many bytes.
  Index panels_in(Index bytes, Index rows) const {
    return std::max<Index>(1, bytes / (rows * W_ * static_cast<Index>(sizeof(T))));
  }

  // Pairs [k, k + depth) of the panel that is less than W columns.
  const bfloat16* last_panel(Index k, Index depth) const {
    const Index valid = cols_ % W_;
    return padded_rows(b_, 2 * k, 2 * depth, col_ + cols_ - valid, valid, W_);
  }

  // From one panel to the next: an odd number of lines, or they would share a few sets of each cache.
  Index pitch(Index depth) const { return depth * W_ + Carry::line / static_cast<Index>(sizeof(T)); }
  // Pairs [k, k + depth) of panels [j, j + count) → [depth][W], `pitch` apart.  Some rows at a time: as many streams as keep
  // the memory busy.
  void pair_rows(Index j, Index count, Index k, Index depth, T* panels) const {
    constexpr Index rows_at_once = 16;
    const PairKernels<T>& kernel = kernels<T>().pairs;
    const Index whole = std::min(count, cols_ / W_ - j), step = pitch(depth), end = std::min(2 * (k + depth), b_.rows);
    const Index near = rows_at_once * b_.stride * static_cast<Index>(sizeof(bfloat16));
    for (Index row = 2 * k; row < end; row += rows_at_once, panels += rows_at_once / 2 * W_) {
      const Index rows = std::min(rows_at_once, end - row);
      const bfloat16* b = b_.row(row) + col_ + j * W_;
      kernel.zip(rows, whole, b, b_.stride, panels, step, near);
      if (whole == count) continue;
      bfloat16 ends[rows_at_once * max_tile_cols] = {};  // of the last columns, which do not fill a panel
      for (Index r = 0; r < rows; ++r) {
        std::copy_n(b + r * b_.stride + whole * W_, cols_ - (j + whole) * W_, ends + r * W_);
      }
      kernel.zip(rows, 1, ends, W_, panels + whole * step, step, 0);
    }
  }

  MatrixView<const bfloat16> b_;
  Index col_, cols_;
  Index W_ = kernels<T>().tile_cols;
};

// ── products ────────────────────────────────────────────────────────────────────────────────────────────────────────

// c, of one panel, = rows · panel j, for the tiles of `range`; row 0 of c is the first row of the range.
//
// Arguments are changed field by field: a struct that is written in parts and copied as a whole would wait for every
// store before it, streamed ones included.
template <class T, class S>
void multiply_panel(const PackedRows<T>& rows, TileRange range, const PackedPanels<T, S>& source, Index j, Sums<T> c) {
  const Kernels<T>& kernel = kernels<T>();
  const Index first = rows.tiles.begin(range.begin), n = range.count();
  TileArgs<T> wide{.c_stride = c.stride};
  TileArgs<T, bfloat16> narrow{.c_stride = c.stride};
  const Index most_depth = source.block_depth(rows.tiles.height(range.begin));
  for (Index k = 0; k < rows.depth; k += most_depth) {
    const Index depth = std::min(most_depth, rows.depth - k);
    const PanelBlock<T> b = source.block(j, k, depth, n);
    const auto shares = source.ahead(j, k, depth, n, rows.tiles.height(range.begin));
    const auto multiply = [&](auto& args, auto tile) {
      args.depth = depth;
      args.store = k == 0 ? Store::overwrite : Store::accumulate;
      args.ahead = shares.first;
      const char* share = static_cast<const char*>(shares.first.at);
      for (Index i = range.begin; i < range.end; ++i, share += shares.bytes) {
        args.near = i == range.begin && source.first_waits(n) ? 0 : one_cache_away;
        args.a = rows.tile(i, k);
        args.c = c.at(0, rows.tiles.begin(i) - first);
        args.ahead.at = share;
        tile(rows.tiles.height(i), args);
      }
    };
    if (b.narrow) {
      narrow.b = b.narrow;
      multiply(narrow, kernel.tile_bf16);
    } else {
      wide.b = b.wide;
      multiply(wide, source.pairs() ? kernel.pairs.tile : kernel.tile);
    }
  }
}

// The blocks in which staged panels are multiplied: `depth` numbers along k of some panels.
template <class Source>
struct BlockOfPanels {
  Panels<Source> panels;
  Index depth;
  Index k = 0;

  typename Source::Stage::Rows rows() const {
    if (!panels.source) return {};
    return panels.source->block(panels.begin, panels.count, k, depth);
  }
  // The block after this one, if k goes on to `end`; else the first one of `next`.
  BlockOfPanels after(Index end, Panels<Source> next) const {
    if (k + depth < end) return {panels, depth, k + depth};
    return {next, depth};
  }
};

// c = rows · staged panels; the tiles carry the block after theirs: of these panels, then of `next`.
template <class T, class Source>
void multiply_staged(typename Source::Stage& stage, const PackedRows<T>& rows, TileRange range, Panels<Source> panels,
                     Panels<Source> next, Sums<T> c) {
  const Index first = rows.tiles.begin(range.begin), height = rows.tiles.begin(range.end) - first;
  TileArgs<T> args{.c_stride = c.stride};
  BlockOfPanels<Source> now{panels, panels.source->depth_of_block(height)};
  do {
    const BlockOfPanels<Source> coming = now.after(rows.depth, next);
    const auto* staged = stage.take(now.rows());
    stage.prepare(coming.rows(), panels.count * range.count());
    args.depth = std::min(now.depth, rows.depth - now.k);
    args.store = now.k == 0 ? Store::overwrite : Store::accumulate;
    for (Index p = 0; p < panels.count; ++p) {
      panels.source->set_panel(args, staged, panels.count, p);
      for (Index i = range.begin; i < range.end; ++i) {
        args.a = rows.tile(i, now.k);
        args.c = c.at(p, rows.tiles.begin(i) - first);
        panels.source->carrying_tile()(rows.tiles.height(i), args, stage.next_share());
      }
    }
    now = coming;
  } while (now.k != 0);
}

// c = rows · panels.  `next`: what the same rows are multiplied by afterwards, if anything.
template <class T, class Source>
void multiply_panels(typename Source::Stage& stage, const PackedRows<T>& rows, TileRange range, Panels<Source> panels,
                     Panels<Source> next, Sums<T> c) {
  if constexpr (requires { &Source::in_place; }) {
    const Source& source = *panels.source;
    if (source.in_place(range.count(), rows.tiles.begin(range.end) - rows.tiles.begin(range.begin))) {
      return source.multiply_in_place(rows, range, panels.begin, panels.count, c);
    }
    if constexpr (requires { &Source::multiply_zipped; }) {
      if (!source.staged()) return source.multiply_zipped(rows, range, panels.begin, panels.count, c);
    }
    multiply_staged(stage, rows, range, panels, next, c);
  } else if (panels.count > 1) {
    panels.source->multiply_together(rows, range, panels.begin, panels.count, c);
  } else {
    multiply_panel(rows, range, *panels.source, panels.begin, c);
  }
}

// body(tiles) for as many tiles at a time as their sums fit a cache beside the panel.
template <class Body>
void for_passes(const RowTiles& row_tiles, Body body) {
  constexpr Index rows_of_sums = 256;
  const Index count = row_tiles.count(), at_once = std::max<Index>(1, rows_of_sums / row_tiles.most_rows());
  const Index passes = (count + at_once - 1) / at_once;
  for (Index i = 0; i < passes; ++i) body(TileRange{i * count / passes, (i + 1) * count / passes});
}

// use(row, col, sums) for every panel of rows · source, `cols` columns: `sums` are those of rows [row, ..) and columns
// [col, ..), where they belong in the `result`, if there is one and it has room for whole panels.
template <class T, class Source, class Use>
void for_panels(const PackedRows<T>& rows, const Source& source, Index cols, MatrixView<T> result, Use use) {
  const Index width = kernels<T>().tile_cols;
  auto stage = source.stage();
  for_passes(rows.tiles, [&](TileRange pass) {
    const Index row = rows.tiles.begin(pass.begin), height = rows.tiles.begin(pass.end) - row;
    const Index at_once = source.panels_at_once(pass.count(), height);
    const bool again = pass.end < rows.tiles.count();
    T* const elsewhere = scratch<T, Slot::sums>(at_once * height * width);
    for (Index j = 0; j * width < cols; j += at_once) {
      const Panels<Source> now = some_panels(source, j, at_once);
      const bool fits = result && (j + now.count) * width <= cols;
      const auto sums = fits ? Sums<T>::in(result.from(row, j * width)) : Sums<T>::side_by_side(elsewhere, height);
      multiply_panels(stage, rows, pass, now, panels_after(source, j, at_once, again), sums);
      for (Index p = 0; p < now.count; ++p) {
        const Index col = (j + p) * width;
        use(row, col, MatrixView<T>{sums.at(p, 0), height, std::min(width, cols - col), sums.stride});
      }
    }
  });
}

}  // namespace numoe
