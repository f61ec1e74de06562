#include "numoe/dispatch.h"

#include <algorithm>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

#include "numoe/eigen.h"
#include "numoe/kernels/kernels.h"
#include "numoe/parallel.h"

namespace numoe {
namespace {

constexpr Index numbers_per_task = 1 << 16;  // added or multiplied: some 20 us

// std::stable_sort in pieces, which several threads sort and Ctrl-C need not wait for.
template <class Before>
void sort_stably(std::vector<Index>& values, Before before) {
  constexpr Index piece = 1 << 16;
  const auto size = static_cast<Index>(values.size());
  const auto at = [&](Index i) { return values.begin() + std::min(i, size); };
  parallel_for((size + piece - 1) / piece,
               [&](Index i) { std::stable_sort(at(i * piece), at((i + 1) * piece), before); });
  for (Index sorted = piece; sorted < size; sorted *= 2) {
    parallel_for((size + 2 * sorted - 1) / (2 * sorted), [&](Index i) {
      const Index begin = 2 * i * sorted;
      std::inplace_merge(at(begin), at(begin + sorted), at(begin + 2 * sorted), before);
    });
  }
}

// One capacity group under construction: free places per expert, and the rule "first come, first served".
template <class T>
class Admission {
 public:
  Admission(MatrixView<const std::int32_t> indices, MatrixView<const T> weights, Index num_experts,
            MatrixView<bool> kept)
      : indices_(indices), weights_(weights), kept_(kept), free_(static_cast<std::size_t>(num_experts)) {}

  void run(const CapacityGroup& group, Priority priority) {
    std::fill(free_.begin(), free_.end(), group.capacity);
    switch (priority) {
      case Priority::position:
        return by_position(group);
      case Priority::choice:
        return by_choice(tokens_of(group));
      case Priority::probability:
        return by_probability(group);
      case Priority::batch:
        return by_choice(tokens_by_best_weight(group));
    }
  }

 private:
  void offer(Index t, Index k) {
    const std::int32_t expert = indices_(t, k);
    const bool admitted = expert >= 0 && free_[static_cast<std::size_t>(expert)] > 0;
    if (admitted) --free_[static_cast<std::size_t>(expert)];
    kept_(t, k) = admitted;
  }

  void by_position(const CapacityGroup& group) {
    for (Index t = group.begin; t < group.end; ++t) {
      for (Index k = 0; k < indices_.cols; ++k) offer(t, k);
    }
  }

  void by_choice(const std::vector<Index>& tokens) {
    for (Index k = 0; k < indices_.cols; ++k) {
      for (Index t : tokens) offer(t, k);
    }
  }

  // Largest weight first, so that each expert's places go to its largest weights; ties to the earlier token.
  void by_probability(const CapacityGroup& group) {
    const Index K = indices_.cols;
    std::vector<Index> order(static_cast<std::size_t>((group.end - group.begin) * K));
    std::iota(order.begin(), order.end(), group.begin * K);
    sort_stably(order, [&](Index a, Index b) { return above(weights_(a / K, a % K), weights_(b / K, b % K)); });
    for (Index assignment : order) offer(assignment / K, assignment % K);
  }

  static std::vector<Index> tokens_of(const CapacityGroup& group) {
    std::vector<Index> tokens(static_cast<std::size_t>(group.end - group.begin));
    std::iota(tokens.begin(), tokens.end(), group.begin);
    return tokens;
  }

  std::vector<Index> tokens_by_best_weight(const CapacityGroup& group) const {
    std::vector<Index> tokens = tokens_of(group);
    sort_stably(tokens, [&](Index a, Index b) { return above(best(a), best(b)); });
    return tokens;
  }

  T best(Index t) const {
    T largest = weights_(t, 0);
    for (Index k = 1; k < weights_.cols; ++k) largest = above(weights_(t, k), largest) ? weights_(t, k) : largest;
    return largest;
  }

  // a > b with NaN below everything: a strict weak order for every bit pattern, as std::stable_sort needs.
  static bool above(T a, T b) { return a > b || (a == a && b != b); }

  MatrixView<const std::int32_t> indices_;
  MatrixView<const T> weights_;
  MatrixView<bool> kept_;
  std::vector<Index> free_;  // (E,)
};

// The rows of each token, ascending.
class RowsOfTokens {
 public:
  RowsOfTokens(std::span<const std::int32_t> row_token, Index num_tokens)
      : end_(static_cast<std::size_t>(num_tokens) + 1), rows_(row_token.size()) {
    for (const std::int32_t token : row_token) ++end_[static_cast<std::size_t>(token) + 1];
    std::partial_sum(end_.begin(), end_.end(), end_.begin());
    // Each row goes to where its token's next one belongs, so that the start of a token becomes its end.
    std::int32_t row = 0;
    for (const std::int32_t token : row_token) {
      rows_[static_cast<std::size_t>(end_[static_cast<std::size_t>(token)]++)] = row++;
    }
  }
  std::span<const std::int32_t> operator[](Index token) const {
    const auto t = static_cast<std::size_t>(token);
    const std::int32_t begin = t == 0 ? 0 : end_[t - 1];
    return std::span(rows_).subspan(static_cast<std::size_t>(begin), static_cast<std::size_t>(end_[t] - begin));
  }

 private:
  std::vector<std::int32_t> end_;  // (T+1,) rows of the tokens up to each; they fit 32 bits, as T * K does
  std::vector<std::int32_t> rows_;
};

[[noreturn]] void throw_out_of_range(Index t, Index k, Index expert, Index num_experts) {
  throw std::out_of_range("indices[" + std::to_string(t) + ", " + std::to_string(k) + "] = " + std::to_string(expert) +
                          " is out of range for num_experts = " + std::to_string(num_experts) +
                          " (-1 means not routed).");
}

bool is_kept(MatrixView<const bool> kept, Index t, Index k) { return !kept || kept(t, k); }

}  // namespace

template <class T>
void keep_within_capacity(MatrixView<const std::int32_t> indices, MatrixView<const T> weights, Index num_experts,
                          std::span<const CapacityGroup> groups, Priority priority, MatrixView<bool> kept) {
  Admission<T> admission(indices, weights, num_experts, kept);
  for (const CapacityGroup& group : groups) admission.run(group, priority);
}

void count_assignments(MatrixView<const std::int32_t> indices, MatrixView<const bool> kept,
                       std::span<std::int64_t> counts) {
  const auto num_experts = static_cast<Index>(counts.size());
  std::fill(counts.begin(), counts.end(), 0);
  for (Index t = 0; t < indices.rows; ++t) {
    const std::int32_t* experts = indices.row(t);
    for (Index k = 0; k < indices.cols; ++k) {
      const Index expert = experts[k];
      if (expert < -1 || expert >= num_experts) throw_out_of_range(t, k, expert, num_experts);
      if (expert >= 0 && is_kept(kept, t, k)) ++counts[static_cast<std::size_t>(expert)];
    }
  }
}

void sort_by_expert(MatrixView<const std::int32_t> indices, MatrixView<const bool> kept,
                    std::span<const std::int64_t> offset, std::span<std::int32_t> row_token,
                    std::span<std::int32_t> row_assignment, MatrixView<std::int32_t> assignment_row) {
  std::vector<std::int32_t> next(offset.size() - 1);  // rows fit 32 bits, as T * K does
  std::transform(offset.begin(), offset.end() - 1, next.begin(),
                 [](auto row) { return static_cast<std::int32_t>(row); });
  for (Index t = 0; t < indices.rows; ++t) {
    const std::int32_t* experts = indices.row(t);
    std::int32_t* rows = assignment_row.row(t);
    for (Index k = 0; k < indices.cols; ++k) {
      if (experts[k] < 0 || !is_kept(kept, t, k)) {
        rows[k] = -1;
        continue;
      }
      const std::int32_t row = next[static_cast<std::size_t>(experts[k])]++;
      row_token[static_cast<std::size_t>(row)] = static_cast<std::int32_t>(t);
      row_assignment[static_cast<std::size_t>(row)] = static_cast<std::int32_t>(t * indices.cols + k);
      rows[k] = row;
    }
  }
}

template <class T>
void renormalize_kept(MatrixView<const T> weights, MatrixView<const std::int32_t> assignment_row, T scale,
                      MatrixView<T> out) {
  for (Index t = 0; t < weights.rows; ++t) {
    T sum = 0;
    for (Index k = 0; k < weights.cols; ++k) sum += assignment_row(t, k) >= 0 ? weights(t, k) : T(0);
    for (Index k = 0; k < weights.cols; ++k) {
      out(t, k) = assignment_row(t, k) >= 0 && sum != 0 ? scale * weights(t, k) / sum : T(0);
    }
  }
}

template <class T>
void renormalize_kept_backward(MatrixView<const T> weights, MatrixView<const std::int32_t> assignment_row, T scale,
                               MatrixView<const T> dout, MatrixView<T> dweights) {
  for (Index t = 0; t < weights.rows; ++t) {
    T sum = 0, mean = 0;  // mean = Σ_j dout_j v_j / Σ v
    for (Index k = 0; k < weights.cols; ++k) {
      if (assignment_row(t, k) < 0) continue;
      sum += weights(t, k);
      mean += dout(t, k) * weights(t, k);
    }
    if (sum != 0) mean /= sum;
    // out_k = scale * v_k / Σ v  ⇒  dv_k = scale / Σ v * (dout_k - mean)
    for (Index k = 0; k < weights.cols; ++k) {
      const bool live = assignment_row(t, k) >= 0 && sum != 0;
      dweights(t, k) = live ? scale / sum * (dout(t, k) - mean) : T(0);
    }
  }
}

template <class T>
void add_to_tokens(MatrixView<const T> rows, const DispatchView& dispatch, Index first, const T* weights, bool y_is_new,
                   MatrixView<T> y) {
  const auto tokens = dispatch.row_token.subspan(static_cast<std::size_t>(first), static_cast<std::size_t>(rows.rows));
  const RowsOfTokens rows_of(tokens, y.rows);
  const Index numbers = y.cols * (rows.rows / std::max<Index>(1, y.rows) + 1);  // of a token and its rows
  const Index tokens_per_task = std::max<Index>(1, numbers_per_task / std::max<Index>(1, numbers));
  parallel_ranges(y.rows, tokens_per_task, [&](Index begin, Index end) {
    for (Index t = begin; t < end; ++t) {  // whose sum stays in a cache while its rows come
      if (y_is_new) std::fill_n(y.row(t), y.cols, T(0));
      for (const std::int32_t r : rows_of[t]) {
        kernels<T>().axpy(y.cols, weights ? weights[first + r] : T(1), rows.row(r), y.row(t));
      }
    }
  });
}

template <class T>
void combine(MatrixView<const T> rows, const DispatchView& dispatch, MatrixView<const T> weights, MatrixView<T> y) {
  Buffer<T> weights_of_rows(weights ? dispatch.num_rows() : 0);
  for (Index r = 0; r < weights_of_rows.size(); ++r) {
    weights_of_rows[r] = weights.data[dispatch.row_assignment[static_cast<std::size_t>(r)]];
  }
  add_to_tokens(rows, dispatch, 0, weights_of_rows.data(), true, y);
}

template <class T>
void combine_backward(MatrixView<const T> dy, MatrixView<const T> rows, const DispatchView& dispatch,
                      MatrixView<const T> weights, MatrixView<T> drows, MatrixView<T> dweights) {
  std::fill_n(dweights.data, dweights.rows * dweights.cols, T(0));
  const Index rows_per_task = std::max<Index>(16, numbers_per_task / std::max<Index>(1, dy.cols));
  parallel_ranges(dispatch.num_rows(), rows_per_task, [&](Index begin, Index end) {
    for (Index r = begin; r < end; ++r) {
      const auto row = static_cast<std::size_t>(r);
      const Index assignment = dispatch.row_assignment[row];
      const T weight = weights ? weights.data[assignment] : T(1);
      const T* source = dy.row(dispatch.row_token[row]);
      as_row(drows.row(r), dy.cols) = weight * as_row(source, dy.cols);
      dweights.data[assignment] = kernels<T>().dot(dy.cols, source, rows.row(r));
    }
  });
}

#define NUMOE_INSTANTIATE(T)                                                                                           \
  template void keep_within_capacity(MatrixView<const std::int32_t>, MatrixView<const T>, Index,                       \
                                     std::span<const CapacityGroup>, Priority, MatrixView<bool>);                      \
  template void renormalize_kept(MatrixView<const T>, MatrixView<const std::int32_t>, T, MatrixView<T>);               \
  template void renormalize_kept_backward(MatrixView<const T>, MatrixView<const std::int32_t>, T, MatrixView<const T>, \
                                          MatrixView<T>);                                                              \
  template void add_to_tokens(MatrixView<const T>, const DispatchView&, Index, const T*, bool, MatrixView<T>);         \
  template void combine(MatrixView<const T>, const DispatchView&, MatrixView<const T>, MatrixView<T>);                 \
  template void combine_backward(MatrixView<const T>, MatrixView<const T>, const DispatchView&, MatrixView<const T>,   \
                                 MatrixView<T>, MatrixView<T>);
NUMOE_INSTANTIATE(float)
NUMOE_INSTANTIATE(double)
#undef NUMOE_INSTANTIATE

}  // namespace numoe
