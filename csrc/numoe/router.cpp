#include "numoe/router.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "numoe/eigen.h"
#include "numoe/parallel.h"

namespace numoe {
namespace {

constexpr Index tokens_per_task = 64;

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

// exp(z - max), where a logit that *is* the maximum counts as 1: infinite maxima share the weight.
template <class T>
T exp_below(T z, T max) {
  return z == max ? T(1) : std::exp(z - max);
}

template <class T>
T max_of(const T* z, Index n) {
  T max = -infinity<T>;
  for (Index i = 0; i < n; ++i) max = z[i] > max ? z[i] : max;
  return max;
}

// p = softmax(z).  NaN anywhere makes the row NaN; a row of -inf gives zeros.
template <class T>
void softmax(const T* z, Index n, T* p) {
  const T max = max_of(z, n);
  T sum = 0;
  for (Index i = 0; i < n; ++i) sum += p[i] = exp_below(z[i], max);
  const bool empty = max == -infinity<T> && !std::isnan(sum);
  for (Index i = 0; i < n; ++i) p[i] = empty ? T(0) : p[i] / sum;
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

// The `count` largest of n keys, sorted by (key descending, position ascending).  O(n) while few new maxima turn up.
template <class Key, class KeyAt>
class Largest {
 public:
  void run(Index n, Index count, KeyAt key_at, std::vector<Index>& best) {
    best.clear();
    keys_.clear();
    for (Index i = 0; i < n; ++i) {
      const Key key = key_at(i);
      const bool full = static_cast<Index>(best.size()) == count;
      if (full && key <= keys_.back()) continue;
      if (full) best.pop_back(), keys_.pop_back();
      const auto place = std::upper_bound(keys_.begin(), keys_.end(), key, std::greater<>{}) - keys_.begin();
      best.insert(best.begin() + place, i);
      keys_.insert(keys_.begin() + place, key);
    }
  }

 private:
  std::vector<Key> keys_;
};
template <class KeyAt>
void largest(Index n, Index count, KeyAt key_at, std::vector<Index>& best) {
  Largest<decltype(key_at(Index{})), KeyAt>().run(n, count, key_at, best);
}

// Routes one token after another; its buffers are reused.
template <class T>
class TokenRouter {
 public:
  TokenRouter(Index num_experts, std::span<const T> choice_bias, const RouterOptions& options)
      : E_(num_experts), K_(options.top_k), bias_(choice_bias), options_(options), score_(size(num_experts)) {}

  void choose(const T* z, std::int32_t* indices) {
    scores_for_choice(z);
    // Scores grow with the logits, so without a bias the logits choose: they do not underflow into ties.
    const T* key = bias_.empty() ? z : score_.data();
    if (options_.groups_kept == options_.num_groups) {
      largest(E_, K_, [key](Index e) { return order_key(key[e]); }, chosen_);
    } else {
      choose_within_groups(key);
    }
    for (Index k = 0; k < K_; ++k) indices[k] = static_cast<std::int32_t>(chosen_[size(k)]);
  }

  // weights = scale * norm(s(z) at indices)
  void weigh(const T* z, const std::int32_t* indices, T* weights) {
    if (in_log_space()) {
      for (Index k = 0; k < K_; ++k) weights[k] = log_score(z[indices[k]]);
      softmax(weights, K_, weights);
    } else {
      raw_scores(z, indices, weights);
      const T divisor = normalizer(weights).divisor;
      for (Index k = 0; k < K_; ++k) weights[k] = divisor == 0 ? T(0) : weights[k] / divisor;
    }
    for (Index k = 0; k < K_; ++k) weights[k] *= static_cast<T>(options_.scale);
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

  // Weights divided by their plain sum are a softmax of the chosen log-scores: no 0/0, no underflow.
  bool in_log_space() const {
    if (options_.score == Score::softmax_chosen) return options_.normalize != Normalize::l2 && options_.eps == 0;
    return options_.normalize == Normalize::sum && options_.eps == 0;
  }

  T log_score(T z) const {
    switch (options_.score) {
      case Score::sigmoid:
        return -softplus(-z);
      case Score::sqrt_softplus:
        return z < -30 ? z / 2 : T(0.5) * std::log(softplus(z));
      default:
        return z;
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

  // score_[e] = s(z_e) + bias_e, only as far as the choice needs it.
  void scores_for_choice(const T* z) {
    const bool grouped = options_.groups_kept < options_.num_groups;
    if (bias_.empty() && !grouped) return;
    switch (options_.score) {
      case Score::softmax:
        softmax(z, E_, score_.data());
        break;
      case Score::softmax_chosen:
        std::copy_n(z, E_, score_.begin());
        break;
      case Score::sigmoid:
        std::transform(z, z + E_, score_.begin(), sigmoid<T>);
        break;
      case Score::sqrt_softplus:
        std::transform(z, z + E_, score_.begin(), [](T v) { return std::sqrt(softplus(v)); });
        break;
    }
    for (Index e = 0; e < static_cast<Index>(bias_.size()); ++e) score_[size(e)] += bias_[size(e)];
  }

  // Only experts of the best groups may be chosen.
  void choose_within_groups(const T* key) {
    const Index per_group = E_ / options_.num_groups;
    largest(
        options_.num_groups, options_.groups_kept,
        [&](Index g) { return order_key(group_score(score_.data() + g * per_group, per_group)); }, groups_);
    std::sort(groups_.begin(), groups_.end());  // ascending experts: ties go to the lowest index
    const auto expert = [&](Index i) { return groups_[size(i / per_group)] * per_group + i % per_group; };
    largest(options_.groups_kept * per_group, K_, [&](Index i) { return order_key(key[expert(i)]); }, chosen_);
    for (Index& i : chosen_) i = expert(i);
  }

  T group_score(const T* score, Index n) const {
    T first = -infinity<T>, second = -infinity<T>;
    for (Index i = 0; i < n; ++i) {
      if (std::isnan(score[i])) return score[i];
      if (score[i] > first) {
        second = std::exchange(first, score[i]);
      } else if (score[i] > second) {
        second = score[i];
      }
    }
    return options_.group_score == GroupScore::max ? first : first + second;
  }

  // u_k = s(z) at the chosen experts
  void raw_scores(const T* z, const std::int32_t* indices, T* u) {
    for (Index k = 0; k < K_; ++k) u[k] = z[indices[k]];
    switch (options_.score) {
      case Score::softmax:
        softmax(z, E_, score_.data());
        for (Index k = 0; k < K_; ++k) u[k] = score_[size(indices[k])];
        break;
      case Score::softmax_chosen:
        softmax(u, K_, u);
        break;
      case Score::sigmoid:
        std::transform(u, u + K_, u, sigmoid<T>);
        break;
      case Score::sqrt_softplus:
        std::transform(u, u + K_, u, [](T v) { return std::sqrt(softplus(v)); });
        break;
    }
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
    for (Index k = 0; k < K_; ++k) value_[size(k)] = log_score(z[indices[k]]);
    softmax(value_.data(), K_, value_.data());
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
      case Score::softmax:  // p = softmax over all E: dz = p ∘ (dp - Σ dp p), dp = 0 for the unchosen
        softmax(z, E_, score_.data());
        for (Index e = 0; e < E_; ++e) dz[e] = -score_[size(e)] * mean;
        for (Index k = 0; k < K_; ++k) dz[indices[k]] += value_[size(k)] * dvalue_[size(k)];
        break;
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
  std::vector<T> score_;           // (E,)
  std::vector<T> value_, dvalue_;  // (K,)
  std::vector<Index> chosen_, groups_;
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
void route(MatrixView<const T> logits, std::span<const T> choice_bias, std::span<const bool> mask,
           const RouterOptions& options, MatrixView<std::int32_t> indices, MatrixView<T> weights) {
  parallel_ranges(logits.rows, tokens_per_task, [&](Index begin, Index end) {
    TokenRouter<T> router(logits.cols, choice_bias, options);
    for (Index t = begin; t < end; ++t) {
      if (!mask.empty() && !mask[static_cast<std::size_t>(t)]) {
        std::fill_n(indices.row(t), options.top_k, -1);
        std::fill_n(weights.row(t), options.top_k, T(0));
        continue;
      }
      check_some_expert(logits.row(t), logits.cols, t);
      router.choose(logits.row(t), indices.row(t));
      router.weigh(logits.row(t), indices.row(t), weights.row(t));
    }
  });
}

template <class T>
void route_backward(MatrixView<const T> logits, MatrixView<const std::int32_t> indices, MatrixView<const T> dweights,
                    const RouterOptions& options, MatrixView<T> dlogits) {
  parallel_ranges(logits.rows, tokens_per_task, [&](Index begin, Index end) {
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

#define NUMOE_INSTANTIATE(T)                                                                                \
  template void route(MatrixView<const T>, std::span<const T>, std::span<const bool>, const RouterOptions&, \
                      MatrixView<std::int32_t>, MatrixView<T>);                                             \
  template void route_backward(MatrixView<const T>, MatrixView<const std::int32_t>, MatrixView<const T>,    \
                               const RouterOptions&, MatrixView<T>);
template void add_router_bias(std::span<const float>, MatrixView<float>);
template void add_router_bias(std::span<const double>, MatrixView<double>);
NUMOE_INSTANTIATE(float)
NUMOE_INSTANTIATE(double)
#undef NUMOE_INSTANTIATE

}  // namespace numoe
