// Dense products on the register tile, for the router and for weight gradients.
#pragma once

#include "numoe/packing.h"
#include "numoe/view.h"

namespace numoe {

// c (m, n) = a (m, k) · b (k, n).  Each element is one sum over ascending k, whatever m, n, c's neighbours and the
// number of threads are.
template <class T>
void matmul(const Operand<T>& a, const Operand<T>& b, Index depth, MatrixView<T> c);

// The same with all panels of b packed already.
template <class T>
void multiply_packed(const Operand<T>& a, const T* b_panels, Index depth, MatrixView<T> c);

// The serial part of a product whose b is packed: rows [tile_begin, tile_end) of `tiles` times all panels → c.
template <class T>
void multiply_tiles(const Operand<T>& a, const RowTiles& tiles, Index tile_begin, Index tile_end, Index depth,
                    const T* b_panels, MatrixView<T> c);

extern template void matmul(const Operand<float>&, const Operand<float>&, Index, MatrixView<float>);
extern template void matmul(const Operand<double>&, const Operand<double>&, Index, MatrixView<double>);
extern template void multiply_packed(const Operand<float>&, const float*, Index, MatrixView<float>);
extern template void multiply_packed(const Operand<double>&, const double*, Index, MatrixView<double>);
extern template void multiply_tiles(const Operand<float>&, const RowTiles&, Index, Index, Index, const float*,
                                    MatrixView<float>);
extern template void multiply_tiles(const Operand<double>&, const RowTiles&, Index, Index, Index, const double*,
                                    MatrixView<double>);

}  // namespace numoe
