// The experts: a fused pipeline over expert-sorted rows, and its backward.
//
//   forward   gather + pack x → gate/up products, activation on the tile → down product, combine on the tile
//   backward  the same steps in reverse; see experts_backward
//
// Where the target multiplies bfloat16 pairs, bfloat16 matrices are so multiplied for every number of rows, and the other
// factor - rows of x, weighted where the weight goes on the input, hidden rows, rows of gradients - is rounded to bfloat16.
//
// No (M, 2F) buffer exists in inference, and rows of D are kept only until those of some experts are added up.  Threads
// take whole experts where that shares out the work, and columns of all of them where it does not (schedule.h), so skewed
// routing costs nothing; each token's rows are added in the order of experts, so the bits depend neither on threads nor on
// other tokens.
#pragma once

#include "numoe/dispatch.h"
#include "numoe/kernels/kernels.h"
#include "numoe/view.h"

namespace numoe {

template <class T>
struct ExpertBiases {
  MatrixView<const T> gate, up, down;  // (E, F), (E, F), (E, D); absent, or all present
};

// S: float, double or bfloat16, the type of the matrices.  w_gate is absent for plain MLP experts; biases are absent or
// all present.
template <class S>
struct ExpertWeights {
  using T = Compute<S>;
  Tensor3View<const S> gate;      // (E, D, F)
  Tensor3View<const S> up;        // (E, D, F)
  Tensor3View<const S> down;      // (E, F, D)
  MatrixView<const T> gate_bias;  // (E, F)
  MatrixView<const T> up_bias;    // (E, F)
  MatrixView<const T> down_bias;  // (E, D)

  ExpertBiases<T> biases() const { return {gate_bias, up_bias, down_bias}; }
  bool glu() const { return static_cast<bool>(gate); }
  Index num_experts() const { return up.count; }
  Index d_model() const { return up.rows; }
  Index d_ff() const { return up.cols; }
};

enum class WeightOn { output, input };

struct ExpertOptions {
  Activation activation = Activation::silu;
  WeightOn weight_on = WeightOn::output;
};

// What the backward needs from the forward: the rows before the activation.
template <class T>
struct ExpertCache {
  MatrixView<T> gate;  // (M, F), absent for plain MLP experts
  MatrixView<T> up;    // (M, F)
  explicit operator bool() const { return static_cast<bool>(up); }
};

// weights (T, K); absent counts as 1.  With `combined` the result is y (T, D), the weighted sum of each token's rows;
// without it the unweighted rows (M, D) (weight_on = input still applies its weight).  cache may be absent.
template <class S>
void experts_forward(MatrixView<const Compute<S>> x, const DispatchView& dispatch, MatrixView<const Compute<S>> weights,
                     const ExpertWeights<S>& experts, const ExpertOptions& options, bool combined,
                     ExpertCache<Compute<S>> cache, MatrixView<Compute<S>> result);

enum class GradStore {
  fresh,       // the parameters' gradients come in as zeros
  overwrite,   // they come in as anything
  accumulate,  // the new ones are added to what is there
};

// Gradients; x and weights are always written.  Exactly nothing is added for experts without rows.
template <class T>
struct ExpertGrads {
  MatrixView<T> x;        // (T, D)
  MatrixView<T> weights;  // (T, K), absent if weights are
  Tensor3View<T> gate, up, down;
  MatrixView<T> gate_bias, up_bias, down_bias;
  GradStore store = GradStore::fresh;
};

// dresult: (T, D) or (M, D), as `combined` says.  Without a cache the rows before the activation are computed again.
template <class S>
void experts_backward(MatrixView<const Compute<S>> dresult, MatrixView<const Compute<S>> x,
                      const DispatchView& dispatch, MatrixView<const Compute<S>> weights,
                      const ExpertWeights<S>& experts, const ExpertOptions& options, bool combined,
                      ExpertCache<const Compute<S>> cache, const ExpertGrads<Compute<S>>& grads);

}  // namespace numoe
