#include "numoe/matmul.h"

#include "numoe/parallel.h"

namespace numoe {

template <class T>
void multiply_tiles(const Operand<T>& a, const RowTiles& tiles, Index tile_begin, Index tile_end, Index depth,
                    const T* b_panels, MatrixView<T> c) {
  const Kernels<T>& kernel = kernels<T>();
  const Index width = kernel.tile_cols;
  const Index first = tiles.begin(tile_begin);
  T* packed = scratch<T, 0>((tiles.begin(tile_end) - first) * depth);
  T* edge = scratch<T, 1>(kernel.tile_rows * width);
  for (Index i = tile_begin; i < tile_end; ++i) {
    pack_tile(a, tiles.begin(i), tiles.height(i), depth, packed + (tiles.begin(i) - first) * depth);
  }
  for (Index j = 0; j < c.cols; j += width) {
    const Index valid = std::min(width, c.cols - j);
    for (Index i = tile_begin; i < tile_end; ++i) {
      const Index row = tiles.begin(i), height = tiles.height(i);
      const T* tile = packed + (row - first) * depth;
      const bool whole = valid == width;
      kernel.tile(depth, height, tile, b_panels + j * depth, whole ? c.row(row) + j : edge, whole ? c.stride : width,
                  false);
      for (Index r = 0; !whole && r < height; ++r) std::copy_n(edge + r * width, valid, c.row(row + r) + j);
    }
  }
}

template <class T>
void multiply_packed(const Operand<T>& a, const T* b_panels, Index depth, MatrixView<T> c) {
  constexpr Index tiles_per_task = 4;
  const RowTiles tiles{c.rows, kernels<T>().tile_rows};
  if (c.rows == 0 || c.cols == 0) return;
  parallel_for((tiles.count() + tiles_per_task - 1) / tiles_per_task, [&](Index task) {
    const Index begin = task * tiles_per_task, end = std::min(begin + tiles_per_task, tiles.count());
    multiply_tiles(a, tiles, begin, end, depth, b_panels, c);
  });
}

template <class T>
void matmul(const Operand<T>& a, const Operand<T>& b, Index depth, MatrixView<T> c) {
  constexpr Index tiles_per_task = 16;  // enough rows to pay for packing b again, few enough to share out
  const Index width = kernels<T>().tile_cols;
  const RowTiles tiles{c.rows, kernels<T>().tile_rows};
  if (c.rows == 0 || c.cols == 0) return;
  const Index row_tasks = (tiles.count() + tiles_per_task - 1) / tiles_per_task;
  const Index block = packed_column_block<T>(depth, c.cols, width, std::max<Index>(1, 2 * num_threads() / row_tasks),
                                             tiles_per_task * kernels<T>().tile_rows);
  const Index col_tasks = (c.cols + block - 1) / block;
  parallel_for(row_tasks * col_tasks, [&](Index task) {
    const Index tile_begin = task / col_tasks * tiles_per_task, col = task % col_tasks * block;
    const Index cols = std::min(block, c.cols - col);
    T* panels = scratch<T, 2>(num_panels(cols, width) * width * depth);
    pack_panels(b, depth, col, cols, width, panels);
    multiply_tiles(a, tiles, tile_begin, std::min(tile_begin + tiles_per_task, tiles.count()), depth, panels,
                   MatrixView<T>{c.data + col, c.rows, cols, c.stride});
  });
}

template void matmul(const Operand<float>&, const Operand<float>&, Index, MatrixView<float>);
template void matmul(const Operand<double>&, const Operand<double>&, Index, MatrixView<double>);
template void multiply_packed(const Operand<float>&, const float*, Index, MatrixView<float>);
template void multiply_packed(const Operand<double>&, const double*, Index, MatrixView<double>);
template void multiply_tiles(const Operand<float>&, const RowTiles&, Index, Index, Index, const float*,
                             MatrixView<float>);
template void multiply_tiles(const Operand<double>&, const RowTiles&, Index, Index, Index, const double*,
                             MatrixView<double>);

}  // namespace numoe
