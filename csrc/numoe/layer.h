// A whole layer for inference in one call: router, dispatch, experts, combine; with packed weights the shared expert too.
#pragma once

#include <optional>
#include <vector>

#include "numoe/packed.h"
#include "numoe/router.h"

namespace numoe {

// One set of packed experts with its biases.
template <class S>
struct PackedBranch {
  using T = Compute<S>;
  PackedExperts<S> experts;
  ExpertOptions options;
  std::vector<T> gate_bias, up_bias, down_bias;  // empty without biases

  template <class Source>
  PackedBranch(const ExpertWeights<Source>& weights, const ExpertOptions& expert_options);
  ExpertBiases<T> biases() const;
  Index bytes() const;
  // y (T, D) = Σ weight * expert(x)
  void forward(MatrixView<const T> x, const DispatchView& dispatch, MatrixView<const T> weights, MatrixView<T> y) const;
};

// What a forward needs besides the experts' own scratch.
template <class T>
struct Pass;

template <class S>
class PackedLayer {
 public:
  using T = Compute<S>;

  PackedLayer(MatrixView<const T> w_router, std::span<const T> b_router, std::span<const T> choice_bias,
              const RouterOptions& router, PackedBranch<S> routed, std::optional<PackedBranch<S>> shared,
              std::span<const T> shared_score);

  Index d_model() const { return routed_.experts.d_model(); }
  Index num_experts() const { return routed_.experts.num_experts(); }
  Index top_k() const { return router_.top_k; }
  Index bytes() const;
  const PackedBranch<S>& routed() const { return routed_; }

  // y (T, D) of x (T, D): nothing dropped, nothing masked.  The numbers of the unpacked layer, bit for bit for S = T.
  void forward(MatrixView<const T> x, MatrixView<T> y) const;
  // The same for a router's decision from outside: indices (T, K) in -1..E-1, -1 for nobody, and weights (T, K).
  void forward_routed(MatrixView<const T> x, MatrixView<const std::int32_t> indices, MatrixView<const T> weights,
                      MatrixView<T> y) const;

 private:
  void route_tokens(MatrixView<const T> x, MatrixView<std::int32_t> indices, MatrixView<T> weights) const;
  void add_shared(Pass<T>& pass, MatrixView<const T> x, MatrixView<T> y) const;

  Buffer<T> router_panels_;
  std::vector<T> b_router_, choice_bias_, shared_score_;
  RouterOptions router_;
  PackedBranch<S> routed_;
  std::optional<PackedBranch<S>> shared_;
};

// The router's parameters where they are.
template <class T>
struct RouterWeights {
  MatrixView<const T> w;              // (D, E)
  std::span<const T> b, choice_bias;  // (E), or empty
};

// y (T, D) of x (T, D) by weights that stay where they are, nothing dropped: the numbers of matmul, route, a dispatch
// and experts_forward one after the other.  mask (T) may be empty.
template <class S>
void layer_forward(MatrixView<const Compute<S>> x, std::span<const bool> mask, const RouterWeights<Compute<S>>& weights,
                   const RouterOptions& router, const ExpertWeights<S>& experts, const ExpertOptions& options,
                   MatrixView<Compute<S>> y);

}  // namespace numoe
