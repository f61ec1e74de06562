// The layout of an MoE step: which (token, choice) assignments are kept, and in which row each of them goes.
//
// Integers only, so one Dispatch serves every dtype, the forward and the backward.  Rows are sorted by expert, inside an
// expert by token.  Everything is O(N + E) except the orders that sort by weight.
#pragma once

#include <cstdint>
#include <span>

#include "numoe/view.h"

namespace numoe {

struct DispatchView {
  std::span<const std::int64_t> offset;          // (E+1,) rows of expert e are [offset[e], offset[e+1])
  std::span<const std::int32_t> row_token;       // (M,)   row → token
  std::span<const std::int32_t> row_assignment;  // (M,)   row → token * K + choice

  Index num_experts() const { return static_cast<Index>(offset.size()) - 1; }
  Index num_rows() const { return static_cast<Index>(row_token.size()); }
  Index begin(Index expert) const { return offset[static_cast<std::size_t>(expert)]; }
  Index rows(Index expert) const { return begin(expert + 1) - begin(expert); }
};

// Who gets in first when an expert has more assignments than capacity.
enum class Priority {
  position,     // token by token, its choices in order
  choice,       // all first choices, then all second choices, ...
  probability,  // the largest weights of each expert
  batch,        // tokens by their largest weight, then choice by choice
};

// Tokens [begin, end) share `capacity` places per expert.
struct CapacityGroup {
  Index begin, end, capacity;
};

// kept[t, k] if indices[t, k] >= 0 and the expert has room for it; groups are disjoint and cover all tokens.
template <class T>
void keep_within_capacity(MatrixView<const std::int32_t> indices, MatrixView<const T> weights, Index num_experts,
                          std::span<const CapacityGroup> groups, Priority priority, MatrixView<bool> kept);

// How many assignments each expert gets: indices >= 0, where kept (if given).  Throws std::out_of_range for an index
// outside -1..E-1.
void count_assignments(MatrixView<const std::int32_t> indices, MatrixView<const bool> kept,
                       std::span<std::int64_t> counts);

// The counting sort.  assignment_row is (T, K): the row of each assignment, or -1.
void sort_by_expert(MatrixView<const std::int32_t> indices, MatrixView<const bool> kept,
                    std::span<const std::int64_t> offset, std::span<std::int32_t> row_token,
                    std::span<std::int32_t> row_assignment, MatrixView<std::int32_t> assignment_row);

// Survivors' weights divided by their sum and multiplied by scale; 0 for the dropped.
//   v = w * kept;  out = scale * v / Σ_k v
template <class T>
void renormalize_kept(MatrixView<const T> weights, MatrixView<const std::int32_t> assignment_row, T scale,
                      MatrixView<T> out);
template <class T>
void renormalize_kept_backward(MatrixView<const T> weights, MatrixView<const std::int32_t> assignment_row, T scale,
                               MatrixView<const T> dout, MatrixView<T> dweights);

// y[t] += Σ over t's rows, ascending, of weight * row, where rows are those of the dispatch from `first` on; weights are
// all of its rows', or absent for weight 1.  A new y counts as 0.
template <class T>
void add_to_tokens(MatrixView<const T> rows, const DispatchView& dispatch, Index first, const T* weights, bool y_is_new,
                   MatrixView<T> y);
// y[t] = Σ over t's rows, ascending, of weight * rows[row]; `weights` (T, K), or absent for weight 1.
template <class T>
void combine(MatrixView<const T> rows, const DispatchView& dispatch, MatrixView<const T> weights, MatrixView<T> y);
// drows[row] = weight * dy[t];  dweights[t, k] = ⟨dy[t], rows[row]⟩, 0 where dropped.
template <class T>
void combine_backward(MatrixView<const T> dy, MatrixView<const T> rows, const DispatchView& dispatch,
                      MatrixView<const T> weights, MatrixView<T> drows, MatrixView<T> dweights);

}  // namespace numoe
