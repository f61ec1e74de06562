#include "numoe/matmul.h"

#include "numoe/panels.h"
#include "numoe/parallel.h"

namespace numoe {

namespace {

template <class T>
bool whole_lines(MatrixView<T> c) {
  constexpr auto line = std::uintptr_t{64};
  return reinterpret_cast<std::uintptr_t>(c.data) % line == 0 &&
         static_cast<std::size_t>(c.stride) * sizeof(T) % line == 0;
}

}  // namespace

template <class T>
void multiply_tiles(const Operand<T>& a, const RowTiles& tiles, TileRange range, Index depth, const T* b_panels,
                    Store store, MatrixView<T> c) {
  const Kernels<T>& kernel = kernels<T>();
  const Index width = kernel.tile_cols;
  const Index first = tiles.begin(range.begin), height = tiles.begin(range.end) - first;
  T* packed = scratch<T, 1>(height * (depth + width));
  T* sums = packed + height * depth;
  pack_tiles(a, tiles, range, depth, packed);
  const PackedRows<T> rows{packed - first * depth, tiles, depth};
  const PackedPanels<T, T> panels(b_panels, depth * width, b_panels);
  const bool streams = store == Store::stream && depth <= block_depth && whole_lines(c);
  for (Index j = 0; j * width < c.cols; ++j) {
    const Index valid = std::min(width, c.cols - j * width);
    T* target = c.row(first) + j * width;
    if (valid == width && store != Store::accumulate) {
      multiply_panel(rows, range, panels, j, streams ? Store::stream : Store::overwrite, target, c.stride);
      continue;
    }
    multiply_panel(rows, range, panels, j, Store::overwrite, sums, width);
    for (Index r = 0; r < height; ++r) {
      T* row = target + r * c.stride;
      if (store == Store::accumulate) {  // the whole sum is added: as if the caller had done it
        kernel.axpy(valid, T(1), sums + r * width, row);
      } else {
        std::copy_n(sums + r * width, valid, row);
      }
    }
  }
  if (streams) kernel.stream_end();
}

template <class T>
void multiply_packed(const Operand<T>& a, const T* b_panels, Index depth, MatrixView<T> c) {
  constexpr Index tiles_per_task = 4;
  const RowTiles tiles{c.rows, kernels<T>().tile_rows};
  if (c.rows == 0 || c.cols == 0) return;
  parallel_for((tiles.count() + tiles_per_task - 1) / tiles_per_task, [&](Index task) {
    const Index begin = task * tiles_per_task, end = std::min(begin + tiles_per_task, tiles.count());
    multiply_tiles(a, tiles, {begin, end}, depth, b_panels, Store::overwrite, c);
  });
}

template <class T>
void matmul(const Operand<T>& a, const Operand<T>& b, Index depth, MatrixView<T> c) {
  constexpr Index tiles_per_task = 16;  // enough rows to pay for packing b again, few enough to share out
  const Index width = kernels<T>().tile_cols;
  const RowTiles tiles{c.rows, kernels<T>().tile_rows};
  if (c.rows == 0 || c.cols == 0) return;
  const Index row_tasks = (tiles.count() + tiles_per_task - 1) / tiles_per_task;
  const Index tasks = std::max<Index>(1, 2 * num_threads() / row_tasks);
  const Index block = column_block(depth, c.cols, width, tasks, tiles_per_task * kernels<T>().tile_rows);
  const Index col_tasks = (c.cols + block - 1) / block;
  parallel_for(row_tasks * col_tasks, [&](Index task) {
    const Index tile_begin = task / col_tasks * tiles_per_task, col = task % col_tasks * block;
    const Index cols = std::min(block, c.cols - col);
    T* panels = scratch<T, 2>(num_panels(cols, width) * width * depth);
    pack_panels(b, depth, col, cols, width, panels);
    const TileRange range{tile_begin, std::min(tile_begin + tiles_per_task, tiles.count())};
    multiply_tiles(a, tiles, range, depth, panels, Store::overwrite, {c.data + col, c.rows, cols, c.stride});
  });
}

template void matmul(const Operand<float>&, const Operand<float>&, Index, MatrixView<float>);
template void matmul(const Operand<double>&, const Operand<double>&, Index, MatrixView<double>);
template void multiply_packed(const Operand<float>&, const float*, Index, MatrixView<float>);
template void multiply_packed(const Operand<double>&, const double*, Index, MatrixView<double>);
template void multiply_tiles(const Operand<float>&, const RowTiles&, TileRange, Index, const float*, Store,
                             MatrixView<float>);
template void multiply_tiles(const Operand<double>&, const RowTiles&, TileRange, Index, const double*, Store,
                             MatrixView<double>);

}  // namespace numoe
