#include "numoe/matmul.h"

#include "numoe/panels.h"
#include "numoe/parallel.h"

namespace numoe {
namespace {

template <class T>
bool whole_lines(MatrixView<T> c) {
  constexpr Index number = sizeof(T);
  return reinterpret_cast<std::uintptr_t>(c.data) % Carry::line == 0 && c.stride * number % Carry::line == 0 &&
         c.cols * number % Carry::line == 0;
}

// Whether large results had better go past the caches.  Few lines of sums leave by ordinary stores as fast as memory takes
// them (streaming the 6 lines of an AVX2 tile took 1.4 times as long, Zen 3); so do those of many that would go at once on
// some CPUs (28 lines of AVX-512: 1.3-1.6 times as long for 4 to 48 rows, Cascade Lake).  Otherwise they hold up what comes
// after them.
template <class T>
bool pays_to_stream(bool carried) {
  return !kernels<T>().few_lines_of_sums() && (carried || habits().bursts_past_caches);
}

// Whether a tile of `depth` k's can carry the sums of another: a line with every two k's.
template <class T>
bool tiles_can_carry(Index depth) {
  const bool whole = kernels<T>().tile_cols * static_cast<Index>(sizeof(T)) % Carry::line == 0;
  return whole && depth >= 2 * kernels<T>().lines_of_sums();
}

// The tiles of `range` times all whole panels → c.  Each tile passes over as many panels as stay in a cache, so that rows
// of c are written in long runs.
template <class T, class Tile>
void sweep_tiles(Tile tile, const PackedRows<T>& rows, TileRange range, const T* panels, Store store, MatrixView<T> c) {
  constexpr Index cache = Index{128} << 10;  // bytes
  const Kernels<T>& kernel = kernels<T>();
  const Index width = kernel.tile_cols, count = c.cols / width, size = rows.depth * width;
  const Index at_once = std::max<Index>(1, cache / (std::max<Index>(1, size) * static_cast<Index>(sizeof(T))));
  TileArgs<T> args{.depth = rows.depth, .b_stride = width, .c_stride = c.stride, .store = store};
  for (Index j = 0; j < count; j += at_once) {
    const Neighbours neighbours{.panels = std::min(at_once, count - j), .b_step = size, .c_step = width};
    args.b = panels + j * size;
    for (Index i = range.begin; i < range.end; ++i) {
      args.a = rows.tile(i);
      args.c = c.row(rows.tiles.begin(i)) + j * width;
      tile(rows.tiles.height(i), args, neighbours);
    }
  }
  if (store == Store::stream) kernel.stream_end();
}

// The same for all panels, the last of which may be wider than c.  sums: [rows of the range][W]
template <class T, class Tile>
void sweep_all_tiles(Tile tile, const PackedRows<T>& rows, TileRange range, const T* panels, T* sums, Store store,
                     MatrixView<T> c) {
  sweep_tiles(tile, rows, range, panels, store, c);
  const Index width = kernels<T>().tile_cols, whole = c.cols / width, rest = c.cols % width;
  if (rest == 0) return;
  const Index first = rows.tiles.begin(range.begin), end = rows.tiles.begin(range.end);
  const MatrixView<T> last{sums - first * width, end, width, width};
  const bool goes_on = store == Store::accumulate;
  for (Index r = first; goes_on && r < end; ++r) {
    std::copy_n(c.row(r) + whole * width, rest, last.row(r));
    std::fill_n(last.row(r) + rest, width - rest, T(0));
  }
  sweep_tiles(tile, rows, range, panels + whole * rows.depth * width, goes_on ? store : Store::overwrite, last);
  for (Index r = first; r < end; ++r, sums += width) {
    T* const row = c.row(r) + whole * width;
    if (store == Store::add) {
      kernels<T>().axpy(rest, T(1), sums, row);
    } else {
      std::copy_n(sums, rest, row);
    }
  }
}

bool rows_as_they_are(const auto& a) {
  return a.col_stride == 1 && !a.row_index && !a.col_index && !a.row_scale && !a.col_scale;
}

// Rows [first, first + c.rows) of a where they are, times one panel, of which no more is computed than c has columns: the
// router of few experts.
template <class T>
void multiply_few_columns(const Operand<T>& a, Index first, Index depth, const T* panel, MatrixView<T> c) {
  const Kernels<T>& kernel = kernels<T>();
  const RowTiles tiles{c.rows, kernel.unpacked_rows};
  const Index width = kernel.tile_cols, last = num_panels(c.cols, kernel.unpacked_part) * kernel.unpacked_part;
  T* const sums = scratch<T, Slot::sums>(kernel.unpacked_rows * width);
  TileArgs<T> args{.depth = depth, .a_stride = a.row_stride, .b = panel, .c = sums, .c_stride = width};
  for (Index i = 0; i < tiles.count(); ++i) {
    args.a = a.row(first + tiles.begin(i));
    kernel.unpacked_tile(tiles.height(i), args, {}, last);
    for (Index r = 0; r < tiles.height(i); ++r) copy_run(sums + r * width, c.cols, c.row(tiles.begin(i) + r));
  }
}

// c = rows · panels past the caches: the tiles of a panel carry the sums of the panel before to c.
template <class T>
void stream_tiles(const PackedRows<T>& rows, TileRange range, const T* panels, T* sums, MatrixView<T> c) {
  const Kernels<T>& kernel = kernels<T>();
  constexpr Index number = sizeof(T);
  const Index width = kernel.tile_cols, height = c.rows, size = height * width;
  const Index tiles = range.count() * ((rows.depth + block_depth - 1) / block_depth);
  TileArgs<T> args{.b_stride = width, .c_stride = width};
  Carriage carriage;
  for (Index col = 0; col < c.cols; col += width, panels += rows.depth * width) {
    T* const here = sums + col / width % 2 * size;
    for (Index k = 0; k < rows.depth; k += block_depth) {
      args.depth = std::min(block_depth, rows.depth - k);
      args.store = k == 0 ? Store::overwrite : Store::accumulate;
      args.b = panels + k * width;
      for (Index i = range.begin; i < range.end; ++i) {
        args.a = rows.tile(i) + k * rows.tiles.height(i);
        args.c = here + (rows.tiles.begin(i) - rows.tiles.begin(range.begin)) * width;
        kernel.carrying_tile(rows.tiles.height(i), args, carriage.next_share());
      }
    }
    carriage = Carriage({.route = Route::past_caches,
                         .from = reinterpret_cast<const char*>(here),
                         .to = reinterpret_cast<char*>(c.data + col),
                         .lines_in_row = std::min(width, c.cols - col) * number / Carry::line},
                        height, width * number, c.stride * number, tiles);
  }
  kernel.carry(carriage.rest());
  kernel.stream_end();
}

}  // namespace

template <class T>
void multiply_tiles(const Operand<T>& a, const RowTiles& tiles, TileRange range, Index depth, const T* b_panels,
                    Store store, MatrixView<T> c) {
  const Index width = kernels<T>().tile_cols;
  const Index first = tiles.begin(range.begin), height = tiles.begin(range.end) - first;
  if (c.cols <= width && store == Store::overwrite && rows_as_they_are(a)) {
    return multiply_few_columns(a, first, depth, b_panels, c.row_range(first, first + height));
  }
  T* sums = scratch<T, Slot::sums>(height * (2 * width + depth));
  T* packed = sums + 2 * height * width;
  pack_tiles(a, tiles, range, depth, packed);
  const PackedRows<T> rows{packed - first * depth, tiles, depth, depth};
  const bool carried = tiles_can_carry<T>(depth);
  if (store == Store::stream && !(pays_to_stream<T>(carried) && whole_lines(c))) store = Store::overwrite;
  if (store == Store::stream && carried) {
    return stream_tiles(rows, range, b_panels, sums, c.row_range(first, first + height));
  }
  sweep_all_tiles(kernels<T>().sweeping_tile, rows, range, b_panels, sums, store, c);
}

template <class T>
void multiply_zipped_tiles(const Operand<T>& a, const RowTiles& tiles, TileRange range, Index rows, const T* b_panels,
                           Store store, MatrixView<T> c) {
  const Index width = kernels<T>().tile_cols, size = row_size<T>(rows, true);
  const Index first = tiles.begin(range.begin), height = tiles.begin(range.end) - first;
  T* sums = scratch<T, Slot::sums>(height * (width + size));
  T* packed = sums + height * width;
  pack_zipped_tiles(a, rows, tiles, range, packed);
  if (store == Store::stream && !(pays_to_stream<T>(false) && whole_lines(c))) store = Store::overwrite;
  const PackedRows<T> pairs{packed - first * size, tiles, size, size};
  sweep_all_tiles(kernels<T>().pairs.sweeping_tile, pairs, range, b_panels, sums, store, c);
}

template <class T>
void matmul(const Operand<T>& a, const Operand<T>& b, Index depth, MatrixView<T> c) {
  constexpr Index tiles_per_task = 16;  // enough rows to pay for packing b again, few enough to share out
  constexpr Index deepest = 8192;       // k's at once: threads keep what they pack
  const Index width = kernels<T>().tile_cols;
  const RowTiles tiles{c.rows, kernels<T>().tile_rows};
  if (c.rows == 0 || c.cols == 0) return;
  const Index row_tasks = (tiles.count() + tiles_per_task - 1) / tiles_per_task;
  const Index tasks = std::max<Index>(1, 2 * num_threads() / row_tasks);
  const Index block = column_block(depth, c.cols, width, tasks, tiles_per_task * kernels<T>().tile_rows);
  const Index depth_of_block = std::min(depth, deepest);
  const Index col_tasks = (c.cols + block - 1) / block;
  parallel_for(row_tasks * col_tasks, [&](Index task) {
    const Index tile_begin = task / col_tasks * tiles_per_task, col = task % col_tasks * block;
    const Index cols = std::min(block, c.cols - col);
    T* panels = scratch<T, Slot::passing>(num_panels(cols, width) * width * depth_of_block);
    const TileRange range{tile_begin, std::min(tile_begin + tiles_per_task, tiles.count())};
    Index k = 0;
    do {  // once at least: an empty sum is 0
      const Index here = std::min(depth_of_block, depth - k);
      const Store store = k == 0 ? Store::overwrite : Store::accumulate;
      pack_panels(rows_from(b, k), here, col, cols, width, panels);
      multiply_tiles(a.cols_from(k), tiles, range, here, panels, store, {c.data + col, c.rows, cols, c.stride});
      k += depth_of_block;
    } while (k < depth);
  });
}

template void matmul(const Operand<float>&, const Operand<float>&, Index, MatrixView<float>);
template void matmul(const Operand<double>&, const Operand<double>&, Index, MatrixView<double>);
template void multiply_tiles(const Operand<float>&, const RowTiles&, TileRange, Index, const float*, Store,
                             MatrixView<float>);
template void multiply_tiles(const Operand<double>&, const RowTiles&, TileRange, Index, const double*, Store,
                             MatrixView<double>);
template void multiply_zipped_tiles(const Operand<float>&, const RowTiles&, TileRange, Index, const float*, Store,
                                    MatrixView<float>);

}  // namespace numoe
