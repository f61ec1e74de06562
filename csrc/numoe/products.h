// The bare products of an MoE layer, on one thread: what its kernels reach with nothing around them, for `python -m numoe
// bench --products`.  Routing, gathering, activation and combination come on top in a layer.
#pragma once

#include "numoe/packing.h"

namespace numoe {

enum class Product {
  packed,      // rows (n, depth) · packed panels: the forward of a packed layer
  row_major,   // rows (n, depth) · matrix: that of a layer
  transposed,  // rows (n, cols) · matrixᵀ: gradients of inputs
  outer,       // rowsᵀ (depth, n) · rows (n, cols) → matrix: gradients of weights
};

// Products of the same rows with one (depth, cols) matrix after the other, `count` of them in turns: more than caches keep
// if they are to come from memory.
class ProductProbe {
 public:
  // pairs: of bfloat16 numbers, on targets that multiply them; the outer product is float32.  Throws std::bad_alloc.
  ProductProbe(Product, bool pairs, Index rows, Index depth, Index cols, Index count);

  // Multiply-adds, two operations each, per second over about `seconds`, of whole products.
  double rate(double seconds);

 private:
  void multiply(float* matrix);
  void multiply_packed(const float* matrix) const;
  void multiply_row_major(const float* matrix) const;
  void multiply_transposed(const float* matrix) const;
  void multiply_outer(float* matrix) const;

  RowTiles tiles() const;        // of the rows
  Index size_of_matrix() const;  // floats
  MatrixView<const bfloat16> narrow(const float* matrix) const;

  Product product_;
  bool pairs_;
  Index rows_, depth_, cols_, count_;
  Buffer<float> matrices_, left_, right_;  // left, right: the rows, packed as the product wants them
  Index next_ = 0;
};

}  // namespace numoe
