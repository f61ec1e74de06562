// The experts: a fused pipeline over expert-sorted rows, and its backward.
//
//   forward   gather + pack x → gate/up products, activation on the tile → down product, combine on the tile
//   backward  the same steps in reverse; see experts_backward
//
// No (M, 2F) and no (M, D) buffer exists in inference.  Threads own columns of the result and walk through the experts
// in order, so skewed routing costs nothing and the bits depend neither on threads nor on other tokens.
#pragma once

#include "numoe/dispatch.h"
#include "numoe/kernels/kernels.h"
#include "numoe/view.h"

namespace numoe {

// w_gate is absent for plain MLP experts; biases are absent or all present.
template <class T>
struct ExpertWeights {
  Tensor3View<const T> gate;      // (E, D, F)
  Tensor3View<const T> up;        // (E, D, F)
  Tensor3View<const T> down;      // (E, F, D)
  MatrixView<const T> gate_bias;  // (E, F)
  MatrixView<const T> up_bias;    // (E, F)
  MatrixView<const T> down_bias;  // (E, D)

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
template <class T>
void experts_forward(MatrixView<const T> x, const DispatchView& dispatch, MatrixView<const T> weights,
                     const ExpertWeights<T>& experts, const ExpertOptions& options, bool combined, ExpertCache<T> cache,
                     MatrixView<T> result);

// Gradients, all written; those of experts without rows must come in zeroed and stay so.
template <class T>
struct ExpertGrads {
  MatrixView<T> x;        // (T, D)
  MatrixView<T> weights;  // (T, K), absent if weights are
  Tensor3View<T> gate, up, down;
  MatrixView<T> gate_bias, up_bias, down_bias;
};

// dresult: (T, D) or (M, D), as `combined` says.
template <class T>
void experts_backward(MatrixView<const T> dresult, MatrixView<const T> x, const DispatchView& dispatch,
                      MatrixView<const T> weights, const ExpertWeights<T>& experts, const ExpertOptions& options,
                      bool combined, ExpertCache<const T> cache, const ExpertGrads<T>& grads);

}  // namespace numoe
