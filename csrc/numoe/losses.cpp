#include "numoe/losses.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numbers>
#include <numeric>
#include <vector>

#include "numoe/parallel.h"

namespace numoe {
namespace {

constexpr Index kBlock = 256;            // tokens per partial sum: fixed, so no result depends on the thread count
constexpr double kScoreEps = 1e-20;      // Megatron-LM, DeepSeek-V3: p = s / (sum s + eps)
constexpr double kVariationEps = 1e-10;  // tensor2tensor, V-MoE: CV² = var / (mean² + eps)
constexpr double kInfinity = std::numeric_limits<double>::infinity();

bool is_real(std::span<const bool> mask, Index t) { return mask.empty() || mask[static_cast<std::size_t>(t)]; }

Index count_real(std::span<const bool> mask, Index begin, Index end) {
  Index count = 0;
  for (Index t = begin; t < end; ++t) count += is_real(mask, t) ? 1 : 0;
  return count;
}

template <class T>
void clear(MatrixView<T> gradient) {
  for (Index t = 0; t < gradient.rows; ++t) std::fill_n(gradient.row(t), gradient.cols, T(0));
}

Index num_blocks(Index begin, Index end) { return (end - begin + kBlock - 1) / kBlock; }

// body(block, first, last) for every block of the tokens begin..end, on several threads.
template <class Body>
void for_blocks(Index begin, Index end, const Body& body) {
  parallel_for(num_blocks(begin, end), [&](Index block) {
    const Index first = begin + block * kBlock;
    body(block, first, std::min(end, first + kBlock));
  });
}

// Total of body(first, last) over the blocks, added in block order.
template <class Body>
double sum_blocks(Index begin, Index end, const Body& body) {
  std::vector<double> partial(static_cast<std::size_t>(num_blocks(begin, end)));
  for_blocks(begin, end, [&](Index block, Index first, Index last) {
    partial[static_cast<std::size_t>(block)] = body(first, last);
  });
  return std::accumulate(partial.begin(), partial.end(), 0.0);
}

// ── one token's probabilities ──

// p (E) = softmax(z); returns logsumexp(z).  Entries equal to the largest count as exp(0): one +inf takes
// all. A row of -inf has p = 0 and logsumexp -inf; NaN spreads over its row.
template <class T>
double softmax(const T* z, Index E, double* p) {
  double largest = -kInfinity;
  for (Index e = 0; e < E; ++e) largest = std::max(largest, static_cast<double>(z[e]));
  double sum = 0;
  for (Index e = 0; e < E; ++e) {
    const double logit = z[e];
    p[e] = logit == largest ? 1.0 : std::exp(logit - largest);
    sum += p[e];
  }
  const double inverse = (largest == -kInfinity ? 0.0 : 1.0) / sum;
  for (Index e = 0; e < E; ++e) p[e] *= inverse;
  return largest + std::log(sum);
}

struct ScoreAt {
  double value;  // s(z)
  double slope;  // d ln s / dz
};

ScoreAt sigmoid_at(double z) {
  const double e = std::exp(-std::abs(z));
  const double small = e / (1 + e), large = 1 / (1 + e);
  return z < 0 ? ScoreAt{small, large} : ScoreAt{large, small};
}

ScoreAt sqrt_softplus_at(double z) {
  const double finite = std::min(z, 1e300);  // several +inf share, as in the softmax
  const double e = std::exp(-std::abs(finite));
  const double softplus = std::max(finite, 0.0) + std::log1p(e);
  const double sigmoid = (finite < 0 ? e : 1.0) / (1 + e);
  // sigmoid / softplus → 1 for z → -inf: equal to double precision below -40, where both may underflow.
  return {std::sqrt(softplus), finite < -40 ? 0.5 : sigmoid / (2 * softplus)};
}

// p (E) = s / (Σ s + eps), slope (E) = d ln s / dz.
template <class T, class ScoreOf>
void normalized_scores(const T* z, Index E, const ScoreOf& score_at, double* p, double* slope) {
  double sum = kScoreEps;
  for (Index e = 0; e < E; ++e) {
    const ScoreAt score = score_at(static_cast<double>(z[e]));
    p[e] = score.value;
    slope[e] = score.slope;
    sum += score.value;
  }
  for (Index e = 0; e < E; ++e) p[e] /= sum;
}

// p and slope (E) of one token under `score`; the softmax behaves as if its slope were 1.
template <class T>
void probabilities(const T* z, Index E, Score score, double* p, double* slope) {
  switch (score) {
    case Score::sigmoid:
      return normalized_scores(z, E, sigmoid_at, p, slope);
    case Score::sqrt_softplus:
      return normalized_scores(z, E, sqrt_softplus_at, p, slope);
    case Score::softmax:
    case Score::softmax_chosen:
      softmax(z, E, p);
      std::fill_n(slope, E, 1.0);
  }
}

// ── load balance ──

// counts (E) of the unmasked tokens begin..end: how often each expert is chosen, among the first `columns`
// choices.
void count_choices(MatrixView<const std::int32_t> indices, std::span<const bool> mask, Index begin, Index end,
                   Index columns, std::vector<double>& counts) {
  std::fill(counts.begin(), counts.end(), 0.0);
  for (Index t = begin; t < end; ++t) {
    if (!is_real(mask, t)) continue;
    for (Index k = 0; k < columns; ++k) {
      const auto e = static_cast<std::size_t>(indices(t, k));  // -1 becomes the largest number there is
      if (e < counts.size()) counts[e] += 1;
    }
  }
}

// Every convention is linear in p:  value = Σ_te c_e p_te with constant c.  This is c_e / count_e.
double coefficient_per_count(BalanceConvention convention, Index num_experts, Index num_choices, Index num_real,
                             Index num_sequences) {
  const auto E = static_cast<double>(num_experts), K = static_cast<double>(num_choices);
  const auto n = static_cast<double>(num_real);
  switch (convention) {
    case BalanceConvention::gshard_paper:
      return 1 / (E * n * n);
    case BalanceConvention::megatron:
      return E / (K * n * n);
    case BalanceConvention::deepseek_sequence:
      return E / (K * n * n * static_cast<double>(num_sequences));
    case BalanceConvention::switch_first:
    case BalanceConvention::hugging_face:
      break;
  }
  return E / (n * n);
}

// Σ_te c_e p_te over the unmasked tokens begin..end, and its gradient
//   dz_te = p_te (c_e - Σ_j c_j p_tj) d ln s/dz.
template <class T>
double balance_tokens(MatrixView<const T> logits, std::span<const bool> mask, Score score, std::span<const double> c,
                      Index begin, Index end, MatrixView<T> dlogits) {
  const Index E = logits.cols;
  Buffer<double> p(E), slope(E);
  double value = 0;
  for (Index t = begin; t < end; ++t) {
    if (!is_real(mask, t)) {
      std::fill_n(dlogits.row(t), E, T(0));
      continue;
    }
    probabilities(logits.row(t), E, score, p.data(), slope.data());
    const double mean = std::inner_product(c.begin(), c.end(), p.data(), 0.0);
    value += mean;
    for (Index e = 0; e < E; ++e) {
      dlogits(t, e) = static_cast<T>(p[e] * (c[static_cast<std::size_t>(e)] - mean) * slope[e]);
    }
  }
  return value;
}

// ── squared coefficient of variation ──

// CV²(v) = var(v) / (mean(v)² + eps) with the population variance; v is replaced by dCV²/dv:
//   2 / (E (mean² + eps)) ((v_e - mean) - CV² mean).
double squared_variation(std::vector<double>& v) {
  const auto E = static_cast<double>(v.size());
  const double mean = std::accumulate(v.begin(), v.end(), 0.0) / E;
  double variance = 0;
  for (const double x : v) variance += (x - mean) * (x - mean) / E;
  const double divisor = mean * mean + kVariationEps;
  const double value = variance / divisor;
  for (double& x : v) x = 2 / (E * divisor) * ((x - mean) - value * mean);
  return value;
}

// ── Shazeer's load ──

// Of one token: the experts whose noisy logits are its thresholds.
struct Threshold {
  std::int32_t last_inside;    // the k-th largest: what an expert outside the top k must beat
  std::int32_t first_outside;  // the (k+1)-th: what an expert inside must keep beating
};

// "a is chosen before b": larger logit, then lower index; NaN last.
template <class T>
struct ChosenBefore {
  const T* z;
  bool operator()(std::int32_t a, std::int32_t b) const {
    if (z[a] > z[b]) return true;
    if (z[a] < z[b]) return false;
    const bool a_nan = std::isnan(z[a]), b_nan = std::isnan(z[b]);
    return a_nan == b_nan ? a < b : b_nan;
  }
};

// order (E) is scratch.  Heaps, of which std::partial_sort makes use, stay in their range even if another thread changes the
// numbers meanwhile.
template <class T>
Threshold find_threshold(const T* noisy, Index top_k, std::vector<std::int32_t>& order) {
  std::iota(order.begin(), order.end(), 0);
  std::partial_sort(order.begin(), order.begin() + top_k + 1, order.end(), ChosenBefore<T>{noisy});
  return {order[static_cast<std::size_t>(top_k - 1)], order[static_cast<std::size_t>(top_k)]};
}

// One token of the load loss.
template <class T>
struct NoisyToken {
  const T* z;
  const T* noisy;
  const T* sigma;
  Threshold threshold;

  bool inside(std::int32_t e) const { return ChosenBefore<T>{noisy}(e, threshold.first_outside); }

  // u = (z_e - threshold of e) / σ_e
  double margin(std::int32_t e) const {
    const double logit = z[e];
    const double bound = noisy[inside(e) ? threshold.first_outside : threshold.last_inside];
    if (logit == -kInfinity) return -kInfinity;  // excluded from outside: never chosen
    if (logit == bound) return 0;                // also where +inf meets +inf
    return (logit - bound) / static_cast<double>(sigma[e]);
  }
};

double normal_cdf(double u) { return 0.5 * std::erfc(-u / std::numbers::sqrt2); }

double normal_pdf(double u) { return std::exp(-0.5 * u * u) * (0.5 * std::numbers::sqrt2 * std::numbers::inv_sqrtpi); }

// Of one token: dz_e = a_e φ(u)/σ_e, dσ_e = -u dz_e, and -dz_e flows to the noisy logit that is e's
// threshold. slope (E): a = dvalue/dload.
template <class T>
void load_backward(const NoisyToken<T>& token, std::span<const double> slope, T* dz, T* dnoisy, T* dsigma) {
  double to_inside = 0, to_outside = 0;
  for (std::int32_t e = 0; e < static_cast<std::int32_t>(slope.size()); ++e) {
    const double u = token.margin(e);
    const double density = normal_pdf(u);
    if (density == 0) continue;  // far away, or u = ±inf: no influence
    const double flow = slope[static_cast<std::size_t>(e)] * density / static_cast<double>(token.sigma[e]);
    dz[e] = static_cast<T>(flow);
    dsigma[e] = static_cast<T>(-u * flow);
    (token.inside(e) ? to_outside : to_inside) -= flow;
  }
  dnoisy[token.threshold.last_inside] = static_cast<T>(to_inside);
  dnoisy[token.threshold.first_outside] = static_cast<T>(to_outside);
}

}  // namespace

template <class T>
double load_balance_loss(MatrixView<const T> logits, MatrixView<const std::int32_t> indices,
                         BalanceConvention convention, Score score, std::span<const bool> mask,
                         std::span<const std::int64_t> sequence_lengths, MatrixView<T> dlogits) {
  const Index E = logits.cols;
  const bool first_only =
      convention == BalanceConvention::switch_first || convention == BalanceConvention::gshard_paper;
  const Index columns = first_only ? std::min<Index>(indices.cols, 1) : indices.cols;
  if (convention == BalanceConvention::hugging_face) score = Score::softmax;
  const std::int64_t all[] = {logits.rows};
  const bool one_sequence = convention != BalanceConvention::deepseek_sequence || sequence_lengths.empty();
  const std::span<const std::int64_t> lengths = one_sequence ? all : sequence_lengths;

  Index num_sequences = 0, begin = 0;  // sequences with at least one real token
  for (const Index length : lengths) {
    num_sequences += count_real(mask, begin, begin + length) > 0 ? 1 : 0;
    begin += length;
  }

  std::vector<double> c(static_cast<std::size_t>(E));
  double value = 0;
  begin = 0;
  for (const Index length : lengths) {
    const Index end = begin + length, n = count_real(mask, begin, end);
    count_choices(indices, mask, begin, end, columns, c);
    const double per_count = n == 0 ? 0 : coefficient_per_count(convention, E, columns, n, num_sequences);
    for (double& x : c) x *= per_count;
    value += sum_blocks(begin, end, [&](Index first, Index last) {
      return balance_tokens<T>(logits, mask, score, c, first, last, dlogits);
    });
    begin = end;
  }
  return value;
}

template <class T>
double importance_loss(MatrixView<const T> weights, MatrixView<const std::int32_t> indices, Index num_experts,
                       std::span<const bool> mask, MatrixView<T> dweights) {
  clear(dweights);
  std::vector<double> importance(static_cast<std::size_t>(num_experts), 0.0);
  const auto for_each = [&](const auto& visit) {  // visit(weight, its gradient, its expert)
    for (Index t = 0; t < weights.rows; ++t) {
      if (!is_real(mask, t)) continue;
      for (Index k = 0; k < weights.cols; ++k) {
        const auto e = static_cast<std::size_t>(indices(t, k));
        if (e < importance.size()) visit(weights(t, k), dweights(t, k), importance[e]);
      }
    }
  };
  for_each([](T weight, T&, double& sum) { sum += static_cast<double>(weight); });
  const double value = squared_variation(importance);
  for_each([](T, T& gradient, double slope) { gradient = static_cast<T>(slope); });
  return value;
}

template <class T>
double load_loss(MatrixView<const T> logits, MatrixView<const T> noisy_logits, MatrixView<const T> noise_std,
                 Index top_k, std::span<const bool> mask, MatrixView<T> dlogits, MatrixView<T> dnoisy_logits,
                 MatrixView<T> dnoise_std) {
  clear(dlogits);
  clear(dnoisy_logits);
  clear(dnoise_std);
  const Index E = logits.cols;
  if (top_k >= E) return 0;  // every expert always wins: equal loads, and no gradient

  const auto experts = static_cast<std::size_t>(E);
  std::vector<Threshold> thresholds(static_cast<std::size_t>(logits.rows));
  const auto token = [&](Index t) {
    return NoisyToken<T>{logits.row(t), noisy_logits.row(t), noise_std.row(t), thresholds[static_cast<std::size_t>(t)]};
  };
  const auto blocks = static_cast<std::size_t>(num_blocks(0, logits.rows));
  std::vector<double> partial(blocks * experts, 0.0);  // loads (blocks, E)
  for_blocks(0, logits.rows, [&](Index block, Index first, Index last) {
    std::vector<std::int32_t> order(experts);
    double* load = partial.data() + block * E;
    for (Index t = first; t < last; ++t) {
      if (!is_real(mask, t)) continue;
      thresholds[static_cast<std::size_t>(t)] = find_threshold(noisy_logits.row(t), top_k, order);
      for (std::int32_t e = 0; e < E; ++e) load[e] += normal_cdf(token(t).margin(e));
    }
  });
  std::vector<double> load(experts, 0.0);
  for (std::size_t i = 0; i < partial.size(); ++i) load[i % experts] += partial[i];

  const double value = squared_variation(load);  // load now holds dvalue/dload
  for_blocks(0, logits.rows, [&](Index, Index first, Index last) {
    for (Index t = first; t < last; ++t) {
      if (!is_real(mask, t)) continue;
      load_backward<T>(token(t), load, dlogits.row(t), dnoisy_logits.row(t), dnoise_std.row(t));
    }
  });
  return value;
}

template <class T>
double z_loss(MatrixView<const T> logits, std::span<const bool> mask, MatrixView<T> dlogits) {
  const Index n = count_real(mask, 0, logits.rows), E = logits.cols;
  const double share = n == 0 ? 0 : 1 / static_cast<double>(n);
  const double sum = sum_blocks(0, logits.rows, [&](Index first, Index last) {
    Buffer<double> p(E);
    double squares = 0;
    for (Index t = first; t < last; ++t) {
      if (!is_real(mask, t)) {
        std::fill_n(dlogits.row(t), E, T(0));
        continue;
      }
      const double lse = softmax(logits.row(t), E, p.data());
      squares += lse * lse;
      for (Index e = 0; e < E; ++e) {  // dz_te = 2/n lse_t p_te; 0, not NaN, where p = 0 and lse is infinite
        dlogits(t, e) = static_cast<T>(p[e] == 0 ? 0.0 : 2 * share * lse * p[e]);
      }
    }
    return squares;
  });
  return share * sum;
}

#define NUMOE_INSTANTIATE(T)                                                                                          \
  template double load_balance_loss<T>(MatrixView<const T>, MatrixView<const std::int32_t>, BalanceConvention, Score, \
                                       std::span<const bool>, std::span<const std::int64_t>, MatrixView<T>);          \
  template double importance_loss<T>(MatrixView<const T>, MatrixView<const std::int32_t>, Index,                      \
                                     std::span<const bool>, MatrixView<T>);                                           \
  template double load_loss<T>(MatrixView<const T>, MatrixView<const T>, MatrixView<const T>, Index,                  \
                               std::span<const bool>, MatrixView<T>, MatrixView<T>, MatrixView<T>);                   \
  template double z_loss<T>(MatrixView<const T>, std::span<const bool>, MatrixView<T>);
NUMOE_INSTANTIATE(float)
NUMOE_INSTANTIATE(double)
#undef NUMOE_INSTANTIATE

}  // namespace numoe
