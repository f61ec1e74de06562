// Dense products on the register tile, for the router and for weight gradients.
#pragma once

#include "numoe/packing.h"
#include "numoe/view.h"

namespace numoe {

// c (m, n) = a (m, k) · b (k, n).  Each element is one sum over ascending k, whatever m, n, c's neighbours and the
// number of threads are.
template <class T>
void matmul(const Operand<T>& a, const Operand<T>& b, Index depth, MatrixView<T> c);

// The serial part of a product whose b is packed: the row tiles of `range` times all panels → c, which is overwritten, gone on
// with (accumulate), added to, or streamed: overwritten in the way that is best for results larger than the caches.
template <class T>
void multiply_tiles(const Operand<T>& a, const RowTiles& tiles, TileRange range, Index depth, const T* b_panels,
                    Store store, MatrixView<T> c);

// The tiles of a weight's gradient (rows, n), and how many of them make a task.
template <class T>
RowTiles tiles_of_gradient(Index rows, bool pairs) {
  constexpr Index most = 128;
  return {rows, std::min(most, tile_rows<T>(pairs))};
}
inline Index tiles_of_a_task(const RowTiles& tiles) {
  constexpr Index high = 64;
  return tiles.most_rows() < high ? 8 : 1;
}

// multiply_tiles for the transpose of a, whose `rows` rows are k's: both factors as bfloat16 pairs of k's.
template <class T>
void multiply_zipped_tiles(const Operand<T>& a, const RowTiles& tiles, TileRange range, Index rows, const T* b_panels,
                           Store store, MatrixView<T> c);

extern template void matmul(const Operand<float>&, const Operand<float>&, Index, MatrixView<float>);
extern template void matmul(const Operand<double>&, const Operand<double>&, Index, MatrixView<double>);
extern template void multiply_tiles(const Operand<float>&, const RowTiles&, TileRange, Index, const float*, Store,
                                    MatrixView<float>);
extern template void multiply_tiles(const Operand<double>&, const RowTiles&, TileRange, Index, const double*, Store,
                                    MatrixView<double>);
extern template void multiply_zipped_tiles(const Operand<float>&, const RowTiles&, TileRange, Index, const float*,
                                           Store, MatrixView<float>);

}  // namespace numoe
