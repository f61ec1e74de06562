// Views as Eigen arrays, for elementwise work on whole matrices.
//
// Elementwise expressions keep the promise of equal bits: each element is computed alone, whatever its place.  Eigen's
// sums and products do not - their order depends on sizes and alignment - so those run on the kernel table instead.
// Never included by files with instruction-set flags.
#pragma once

#include <Eigen/Core>
#include <span>
#include <type_traits>

#include "numoe/view.h"

namespace numoe {

template <class T>
auto as_array(MatrixView<T> view) {
  using Scalar = std::remove_const_t<T>;
  using Array = Eigen::Array<Scalar, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
  using Mapped = std::conditional_t<std::is_const_v<T>, const Array, Array>;
  return Eigen::Map<Mapped, Eigen::Unaligned, Eigen::OuterStride<>>(view.data, view.rows, view.cols,
                                                                    Eigen::OuterStride<>(view.stride));
}

// One row.
template <class T>
auto as_row(T* data, Index size) {
  using Scalar = std::remove_const_t<T>;
  using Array = Eigen::Array<Scalar, 1, Eigen::Dynamic, Eigen::RowMajor>;
  return Eigen::Map<std::conditional_t<std::is_const_v<T>, const Array, Array>>(data, size);
}

}  // namespace numoe
