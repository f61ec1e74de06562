// Auxiliary losses: each function returns the value and fills its gradient.
//
// One arithmetic for float32 and float64 data: every number is widened to double, every sum is a double, and
// only the stored gradient is rounded back, so the error of a value does not grow with the number of tokens.
// Tokens are summed in blocks of fixed size, block by block: the bits do not depend on the number of threads.
//
// Common to all: mask (T), true = real token; empty = all are.  A masked token contributes nothing,
// whatever its numbers are, and its gradient is 0.  n counts the unmasked tokens; n = 0 gives 0.  indices (T,
// K) hold -1 where a choice was not routed; such a choice is not counted.
#pragma once

#include <cstdint>
#include <span>

#include "numoe/router.h"
#include "numoe/view.h"

namespace numoe {

// c_e: choices of expert e; c1_e: first choices; P_e = mean of p_te; all over the unmasked tokens.
enum class BalanceConvention {
  switch_first,       // E Σ_e (c1_e / n) P_e
  gshard_paper,       // 1/E Σ_e (c1_e / n) P_e
  megatron,           // E/K Σ_e (c_e / n) P_e
  hugging_face,       // E Σ_e (c_e / n) P_e
  deepseek_sequence,  // mean over sequences of the megatron form of one sequence
};

// Value, and dlogits (T, E) with the counts held constant.  sequence_lengths sum to T and are read by
// deepseek_sequence only; empty = one sequence.
template <class T>
double load_balance_loss(MatrixView<const T> logits, MatrixView<const std::int32_t> indices,
                         BalanceConvention convention, Score score, std::span<const bool> mask,
                         std::span<const std::int64_t> sequence_lengths, MatrixView<T> dlogits);

// CV²(I), I_e = sum of the weights that reach expert e; dweights (T, K), 0 where indices is -1.
template <class T>
double importance_loss(MatrixView<const T> weights, MatrixView<const std::int32_t> indices, Index num_experts,
                       std::span<const bool> mask, MatrixView<T> dweights);

// CV²(l), l_e = Σ_t P(expert e is among the top_k when its noise is drawn again); all matrices (T, E).
template <class T>
double load_loss(MatrixView<const T> logits, MatrixView<const T> noisy_logits, MatrixView<const T> noise_std,
                 Index top_k, std::span<const bool> mask, MatrixView<T> dlogits, MatrixView<T> dnoisy_logits,
                 MatrixView<T> dnoise_std);

// mean_t logsumexp(logits_t)²; dlogits (T, E).
template <class T>
double z_loss(MatrixView<const T> logits, std::span<const bool> mask, MatrixView<T> dlogits);

}  // namespace numoe
