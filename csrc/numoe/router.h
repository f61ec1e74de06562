// Logits → which K experts, with which weights; and back.
#pragma once

#include <cstdint>
#include <limits>
#include <span>

#include "numoe/view.h"

namespace numoe {

// s(z), applied to the router logits z of one token.
enum class Score {
  softmax,         // over all E logits
  softmax_chosen,  // over the K chosen logits
  sigmoid,         // σ(z)                    DeepSeek-V3
  sqrt_softplus,   // √ln(1 + eᶻ)             DeepSeek-V4
};
enum class Normalize { none, sum, l2 };
enum class GroupScore { top2_sum, max };

struct RouterOptions {
  Index top_k = 1;
  Score score = Score::softmax;
  Normalize normalize = Normalize::sum;
  double eps = 0;  // added to the divisor, or its floor
  bool eps_is_floor = false;
  double scale = 1;
  Index num_groups = 1;
  Index groups_kept = 1;
  GroupScore group_score = GroupScore::top2_sum;
};

// logits (T, E) += b_router (E), if there is one.
template <class T>
void add_router_bias(std::span<const T> b_router, MatrixView<T> logits);

// indices (T, K): chosen experts, best first, ties to the lowest index, NaN below everything; distinct and in range for
// every bit pattern.  weights (T, K).  A token with mask 0 gets indices -1 and weights 0.
// choice_bias (E) is added to the scores for choosing only; choice_bias and mask (T) may be empty.
// Throws std::domain_error if a token has no expert above -inf.
template <class T>
void route(MatrixView<const T> logits, std::span<const T> choice_bias, std::span<const bool> mask,
           const RouterOptions& options, MatrixView<std::int32_t> indices, MatrixView<T> weights);

// The same on the calling thread; errors call the first token `first_token`.
template <class T>
void route_serial(MatrixView<const T> logits, std::span<const T> choice_bias, std::span<const bool> mask,
                  const RouterOptions& options, Index first_token, MatrixView<std::int32_t> indices,
                  MatrixView<T> weights);

// dlogits (T, E) = (∂weights/∂logits)ᵀ · dweights.  The choice itself is a constant.
template <class T>
void route_backward(MatrixView<const T> logits, MatrixView<const std::int32_t> indices, MatrixView<const T> dweights,
                    const RouterOptions& options, MatrixView<T> dlogits);

}  // namespace numoe
