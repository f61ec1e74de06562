// Expert weights in the order in which the register tile reads them: immutable, no other copy needed.
//
// Per expert and panel of W columns: the gate's panel followed by the up panel (one contiguous stream per range of
// columns), and separately the down panels.  float32 panels are [depth][W]; bfloat16 panels are [depth/2][W][2].
#pragma once

#include "numoe/experts.h"
#include "numoe/packing.h"

namespace numoe {

// S: float, double or bfloat16, the type in which the weights are stored.
template <class S>
class PackedExperts {
 public:
  // Rounds to S while packing; throws std::bad_alloc.  Source: S or Compute<S>.
  template <class Source>
  explicit PackedExperts(const ExpertWeights<Source>& weights);

  bool glu() const { return glu_; }
  Index num_experts() const { return E_; }
  Index d_model() const { return D_; }
  Index d_ff() const { return F_; }
  Index bytes() const { return (up_.size() + down_.size()) * static_cast<Index>(sizeof(S)); }
  // Whether they are more than caches keep from one call to the next.
  bool from_memory() const { return bytes() > Index{16} << 20; }

  // The panel of columns [col, col + W) of w_gate[e] (w_up[e] for plain MLPs); the up panel of a GLU follows it.
  const S* up(Index e, Index col) const { return up_.data() + e * up_size_ + col / W_ * up_step_; }
  const S* down(Index e, Index col) const { return down_.data() + e * down_size_ + col / W_ * down_step_; }
  Index gate_to_up() const { return up_step_ / 2; }  // numbers from a GLU's gate panel to its up panel
  Index up_step() const { return up_step_; }         // numbers from one panel (pair) to the next
  Index down_step() const { return down_step_; }

 private:
  bool glu_;
  Index E_, D_, F_, W_;
  Index up_step_, up_size_, down_step_, down_size_;  // numbers per panel (pair) and per expert
  Buffer<S> up_, down_;
};

// y (T, D) = the weighted sum of the experts' outputs, as experts_forward of unpacked weights computes it, bit for bit
// where the weights are the same numbers.
template <class S>
void experts_forward(MatrixView<const Compute<S>> x, const DispatchView& dispatch, MatrixView<const Compute<S>> weights,
                     const PackedExperts<S>& experts, const ExpertBiases<Compute<S>>& biases,
                     const ExpertOptions& options, MatrixView<Compute<S>> y);

}  // namespace numoe
