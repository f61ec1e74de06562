#include "numoe/router.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <numeric>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "numoe/eigen.h"
#include "numoe/kernels/kernels.h"
#include "numoe/parallel.h"

namespace numoe {
namespace {

// A task takes about 20 us: a token costs a little by itself and a little per expert.
Index tokens_per_task(Index num_experts) { return std::max<Index>(1, 32768 / (64 + num_experts)); }

template <class T>
constexpr T infinity = std::numeric_limits<T>::infinity();

// ── scores ──────────────────────────────────────────────────────────────────────────────────────────────────────────

template <class T>
T sigmoid(T z) {
  return z >= 0 ? 1 / (1 + std::exp(-z)) : std::exp(z) / (1 + std::exp(z));
}
template <class T>
T softplus(T z) {
  return std::max(z, T(0)) + std::log1p(std::exp(-std::abs(z)));
}
// d ln(√softplus(z)) / dz = σ(z) / (2 softplus(z)), which tends to ½ where both underflow.
template <class T>
T log_sqrt_softplus_slope(T z) {
  return z < -30 ? T(0.5) : sigmoid(z) / (2 * softplus(z));
}

// ── choice ──────────────────────────────────────────────────────────────────────────────────────────────────────────

// Floats as integers of the same order, with -0 = +0 and NaN below everything: a total order for any bit pattern.
template <class T>
auto order_key(T value) {
  using Int = std::conditional_t<sizeof(T) == 4, std::int32_t, std::int64_t>;
  if (std::isnan(value)) return std::numeric_limits<Int>::min();
  const Int bits = std::bit_cast<Int>(value);
  return bits >= 0 ? bits : std::numeric_limits<Int>::min() - bits;  // -0.0 → 0
}

// The positions of the `count` largest of n values, sorted by (value descending, position ascending).
template <class T>
void largest(Index n, Index count, const T* values, std::int32_t* best) {
  if (count <= max_top_k) return kernels<T>().routing.top_k(n, count, values, best);
  std::vector<std::int32_t> order(static_cast<std::size_t>(n));
  std::iota(order.begin(), order.end(), 0);
  std::partial_sort(order.begin(), order.begin() + count, order.end(), [values](std::int32_t a, std::int32_t b) {
    const auto key_a = order_key(values[a]), key_b = order_key(values[b]);
    return key_a > key_b || (key_a == key_b && a < b);
  });
  std::copy_n(order.begin(), count, best);
}

// Routes one token after another; its buffers are reused.
template <class T>
class TokenRouter {
 public:
  TokenRouter(Index num_experts, std::span<const T> choice_bias, const RouterOptions& options)
      : E_(num_experts), K_(options.top_k), bias_(choice_bias), options_(options) {}

  void choose(const T* z, std::int32_t* indices) {
    const T* score = scores_for_choice(z);
    // Scores grow with the logits, so without a bias the logits choose: they do not underflow into ties.
    const T* key = bias_.empty() ? z : score;
    if (grouped()) {
      choose_within_groups(score, key, indices);
    } else {
      largest(E_, K_, key, indices);
    }
  }

  // weights = scale * norm(s(z) at indices)
  void weigh(const T* z, const std::int32_t* indices, T* weights) {
    if (in_log_space()) {
      log_scores(z, indices, weights);
      kernel_.softmax(K_, weights, weights);
    } else {
      raw_scores(z, indices, weights);
      const T divisor = normalizer(weights).divisor;
      for (Index k = 0; k < K_; ++k) weights[k] = divisor == 0 ? T(0) : weights[k] / divisor;
    }
    const T scale = static_cast<T>(options_.scale);
    for (Index k = 0; k < K_; ++k) weights[k] *= scale;
  }

  void weigh_backward(const T* z, const std::int32_t* indices, const T* dweights, T* dz) {
    std::fill_n(dz, E_, T(0));
    value_.resize(size(K_));
    dvalue_.resize(size(K_));
    if (in_log_space()) {
      log_space_backward(z, indices, dweights, dz);
    } else {
      raw_backward(z, indices, dweights, dz);
    }
  }

 private:
  static std::size_t size(Index n) { return static_cast<std::size_t>(n); }
  static T* sized(std::vector<T>& buffer, Index n) {
    buffer.resize(size(n));
    return buffer.data();
  }

  bool grouped() const { return options_.groups_kept < options_.num_groups; }

  // Weights divided by their plain sum are a softmax of the chosen log-scores: no 0/0, no underflow.
  bool in_log_space() const {
    if (options_.score == Score::softmax_chosen) return options_.normalize != Normalize::l2 && options_.eps == 0;
    return options_.normalize == Normalize::sum && options_.eps == 0;
  }

  // ln s(z) at the chosen experts
  void log_scores(const T* z, const std::int32_t* indices, T* log_score) const {
    for (Index k = 0; k < K_; ++k) log_score[k] = z[indices[k]];
    if (options_.score == Score::sigmoid) {
      kernel_.curve(Curve::log_sigmoid, K_, log_score, log_score);
    } else if (options_.score == Score::sqrt_softplus) {
      kernel_.curve(Curve::sqrt_softplus, K_, log_score, log_score);
      for (Index k = 0; k < K_; ++k) {
        const T z_k = z[indices[k]];
        log_score[k] = z_k < -30 ? z_k / 2 : std::log(log_score[k]);
      }
    }
  }
  T log_score_slope(T z) const {
    switch (options_.score) {
      case Score::sigmoid:
        return sigmoid(-z);
      case Score::sqrt_softplus:
        return log_sqrt_softplus_slope(z);
      default:
        return T(1);
    }
  }

  // softmax(z) over all experts, computed once per token.
  const T* probabilities(const T* z) {
    if (probability_of_ != z) kernel_.softmax(E_, z, sized(probability_, E_));
    probability_of_ = z;
    return probability_.data();
  }

  // s(z_e) + bias_e, or null where the choice needs the logits alone.
  const T* scores_for_choice(const T* z) {
    if (bias_.empty() && !grouped()) return nullptr;
    const T* score = z;  // softmax_chosen
    if (options_.score == Score::softmax) {
      score = probabilities(z);
    } else if (options_.score != Score::softmax_chosen) {
      const Curve curve = options_.score == Score::sigmoid ? Curve::sigmoid : Curve::sqrt_softplus;
      kernel_.curve(curve, E_, z, sized(score_, E_));
      score = score_.data();
    }
    if (bias_.empty()) return score;
    T* biased = sized(score_, E_);
    for (Index e = 0; e < E_; ++e) biased[e] = score[e] + bias_[size(e)];
    return biased;
  }

  // Only experts of the best groups may be chosen.
  void choose_within_groups(const T* score, const T* key, std::int32_t* indices) {
    const Index per_group = E_ / options_.num_groups, kept = options_.groups_kept;
    T* value = sized(value_, std::max(options_.num_groups, kept * per_group));
    for (Index g = 0; g < options_.num_groups; ++g) value[g] = group_score(score + g * per_group, per_group);
    group_.resize(size(kept));
    largest(options_.num_groups, kept, value, group_.data());
    std::sort(group_.begin(), group_.end());  // ascending experts: ties go to the lowest index
    for (Index i = 0; i < kept; ++i) std::copy_n(key + group_[size(i)] * per_group, per_group, value + i * per_group);
    largest(kept * per_group, K_, value, indices);
    for (Index k = 0; k < K_; ++k) {
      const Index group = group_[size(indices[k] / per_group)];
      indices[k] = static_cast<std::int32_t>(group * per_group + indices[k] % per_group);
    }
  }

  // NaN if a score is.
  T group_score(const T* score, Index n) const {
    T best[2];
    kernel_.two_largest(n, score, best);
    return options_.group_score == GroupScore::max ? best[0] : best[0] + best[1];
  }

  // u_k = s(z) at the chosen experts
  void raw_scores(const T* z, const std::int32_t* indices, T* u) {
    const T* from = options_.score == Score::softmax ? probabilities(z) : z;
    for (Index k = 0; k < K_; ++k) u[k] = from[indices[k]];
    if (options_.score == Score::softmax_chosen) kernel_.softmax(K_, u, u);
    if (options_.score == Score::sigmoid) kernel_.curve(Curve::sigmoid, K_, u, u);
    if (options_.score == Score::sqrt_softplus) kernel_.curve(Curve::sqrt_softplus, K_, u, u);
  }

  // The divisor and the norm it was made of.
  struct Norm {
    T norm, divisor;
    bool floored;  // divisor = eps, a constant
  };
  Norm normalizer(const T* u) const {
    if (options_.normalize == Normalize::none) return {T(1), T(1), true};
    T norm = 0;
    for (Index k = 0; k < K_; ++k) norm += options_.normalize == Normalize::sum ? u[k] : u[k] * u[k];
    if (options_.normalize == Normalize::l2) norm = std::sqrt(norm);
    const T eps = static_cast<T>(options_.eps);
    if (options_.eps_is_floor) return {norm, std::max(norm, eps), norm < eps};
    return {norm, norm + eps, false};
  }

  // v = softmax(log s);  w = scale v  ⇒  dlog s_k = v_k (g_k - Σ_j g_j v_j) with g = scale dw
  void log_space_backward(const T* z, const std::int32_t* indices, const T* dweights, T* dz) {
    log_scores(z, indices, value_.data());
    kernel_.softmax(K_, value_.data(), value_.data());
    const T scale = static_cast<T>(options_.scale);
    T mean = 0;
    for (Index k = 0; k < K_; ++k) mean += scale * dweights[k] * value_[size(k)];
    for (Index k = 0; k < K_; ++k) {
      const T z_k = z[indices[k]];
      dz[indices[k]] = value_[size(k)] * (scale * dweights[k] - mean) * log_score_slope(z_k);
    }
  }

  void raw_backward(const T* z, const std::int32_t* indices, const T* dweights, T* dz) {
    raw_scores(z, indices, value_.data());
    const Norm norm = normalizer(value_.data());
    const T scale = static_cast<T>(options_.scale);
    // w = scale u / divisor  ⇒  du_k = scale / divisor * (dw_k - ∂divisor/∂u_k Σ_j dw_j u_j / divisor)
    T mean = 0;
    for (Index k = 0; k < K_; ++k) mean += dweights[k] * value_[size(k)];
    for (Index k = 0; k < K_; ++k) {
      const T divisor_slope = norm.floored                           ? T(0)
                              : options_.normalize == Normalize::sum ? T(1)
                              : norm.norm == 0                       ? T(0)
                                                                     : value_[size(k)] / norm.norm;
      const T inner = norm.divisor == 0 ? T(0) : dweights[k] - divisor_slope * mean / norm.divisor;
      dvalue_[size(k)] = norm.divisor == 0 ? T(0) : scale / norm.divisor * inner;
    }
    scores_backward(z, indices, dz);
  }

  // u = s(z)  ⇒  dz
  void scores_backward(const T* z, const std::int32_t* indices, T* dz) {
    T mean = 0;  // Σ_k du_k u_k
    for (Index k = 0; k < K_; ++k) mean += dvalue_[size(k)] * value_[size(k)];
    switch (options_.score) {
      case Score::softmax: {  // p = softmax over all E: dz = p ∘ (dp - Σ dp p), dp = 0 for the unchosen
        const T* p = probabilities(z);
        for (Index e = 0; e < E_; ++e) dz[e] = -p[e] * mean;
        for (Index k = 0; k < K_; ++k) dz[indices[k]] += value_[size(k)] * dvalue_[size(k)];
        break;
      }
      case Score::softmax_chosen:
        for (Index k = 0; k < K_; ++k) dz[indices[k]] = value_[size(k)] * (dvalue_[size(k)] - mean);
        break;
      case Score::sigmoid:
      case Score::sqrt_softplus:  // du/dz = u · d ln u / dz
        for (Index k = 0; k < K_; ++k) {
          dz[indices[k]] = dvalue_[size(k)] * value_[size(k)] * log_score_slope(z[indices[k]]);
        }
        break;
    }
  }

  Index E_, K_;
  std::span<const T> bias_;
  const RouterOptions& options_;
  const RoutingKernels<T>& kernel_ = kernels<T>().routing;
  std::vector<T> score_, probability_;  // (E,)
  const T* probability_of_ = nullptr;   // the token's logits
  std::vector<T> value_, dvalue_;       // (K,), or one per group, or one per expert of the groups kept
  std::vector<std::int32_t> group_;     // (groups_kept,)
};

template <class T>
void check_some_expert(const T* z, Index num_experts, Index token) {
  for (Index e = 0; e < num_experts; ++e) {
    if (z[e] != -infinity<T>) return;
  }
  throw std::domain_error("no expert is available for token " + std::to_string(token) +
                          ": all its logits are -inf; mask the token or leave it at least one finite logit");
}

}  // namespace

template <class T>
void add_router_bias(std::span<const T> b_router, MatrixView<T> logits) {
  if (!b_router.empty()) as_array(logits).rowwise() += as_row(b_router.data(), logits.cols);
}

template <class T>
void route_serial(MatrixView<const T> logits, std::span<const T> choice_bias, std::span<const bool> mask,
                  const RouterOptions& options, Index first_token, MatrixView<std::int32_t> indices,
                  MatrixView<T> weights) {
  TokenRouter<T> router(logits.cols, choice_bias, options);
  for (Index t = 0; t < logits.rows; ++t) {
    if (!mask.empty() && !mask[static_cast<std::size_t>(t)]) {
      std::fill_n(indices.row(t), options.top_k, -1);
      std::fill_n(weights.row(t), options.top_k, T(0));
      continue;
    }
    check_some_expert(logits.row(t), logits.cols, first_token + t);
    router.choose(logits.row(t), indices.row(t));
    router.weigh(logits.row(t), indices.row(t), weights.row(t));
  }
}

template <class T>
void route(MatrixView<const T> logits, std::span<const T> choice_bias, std::span<const bool> mask,
           const RouterOptions& options, MatrixView<std::int32_t> indices, MatrixView<T> weights) {
  parallel_ranges(logits.rows, tokens_per_task(logits.cols), [&](Index begin, Index end) {
    const auto of_task = mask.empty() ? mask : mask.subspan(static_cast<std::size_t>(begin));
    route_serial(logits.row_range(begin, end), choice_bias, of_task, options, begin, indices.row_range(begin, end),
                 weights.row_range(begin, end));
  });
}

template <class T>
void route_backward(MatrixView<const T> logits, MatrixView<const std::int32_t> indices, MatrixView<const T> dweights,
                    const RouterOptions& options, MatrixView<T> dlogits) {
  parallel_ranges(logits.rows, tokens_per_task(logits.cols), [&](Index begin, Index end) {
    TokenRouter<T> router(logits.cols, {}, options);
    for (Index t = begin; t < end; ++t) {
      if (indices(t, 0) < 0) {  // a masked token
        std::fill_n(dlogits.row(t), logits.cols, T(0));
      } else {
        router.weigh_backward(logits.row(t), indices.row(t), dweights.row(t), dlogits.row(t));
      }
    }
  });
}

#define NUMOE_INSTANTIATE(T)                                                                                       \
  template void route(MatrixView<const T>, std::span<const T>, std::span<const bool>, const RouterOptions&,        \
                      MatrixView<std::int32_t>, MatrixView<T>);                                                    \
  template void route_serial(MatrixView<const T>, std::span<const T>, std::span<const bool>, const RouterOptions&, \
                             Index, MatrixView<std::int32_t>, MatrixView<T>);                                      \
  template void route_backward(MatrixView<const T>, MatrixView<const std::int32_t>, MatrixView<const T>,           \
                               const RouterOptions&, MatrixView<T>);
template void add_router_bias(std::span<const float>, MatrixView<float>);
template void add_router_bias(std::span<const double>, MatrixView<double>);
NUMOE_INSTANTIATE(float)
NUMOE_INSTANTIATE(double)
#undef NUMOE_INSTANTIATE

}  // namespace numoe
