// The common ground of the experts' forward and backward: geometry, operands, and loops over (expert, piece) tasks.
#pragma once

#include <algorithm>
#include <utility>
#include <vector>

#include "numoe/eigen.h"
#include "numoe/experts.h"
#include "numoe/panels.h"
#include "numoe/parallel.h"

namespace numoe {

// Experts [begin, end), walked through together so that their rows stay in a cache between one product and the next.
struct ExpertRange {
  Index begin, end;
};

template <class T>
std::vector<ExpertRange> ranges_of_experts(const DispatchView& dispatch, Index numbers_per_row) {
  // Bytes of rows, to stay in a cache; one expert alone may need more.  Several threads meet a few times in each range, which
  // costs more than a cache that is farther away.
  const Index threads = num_threads(), budget = (threads > 1 ? std::min<Index>(4 * threads, 32) : 1) << 20;
  std::vector<ExpertRange> ranges;
  const Index most_rows = std::max<Index>(1, budget / (numbers_per_row * static_cast<Index>(sizeof(T))));
  for (Index e = 0; e < dispatch.num_experts(); ++e) {
    if (dispatch.rows(e) == 0) continue;
    const bool fits = !ranges.empty() && dispatch.begin(e + 1) - dispatch.begin(ranges.back().begin) <= most_rows;
    if (fits) {
      ranges.back().end = e + 1;
    } else {
      ranges.push_back({e, e + 1});
    }
  }
  return ranges;
}

// Rows of zeros, in pieces that Ctrl-C need not wait for.
template <class T>
void clear(MatrixView<T> y) {
  parallel_ranges(y.rows, 256, [&](Index begin, Index end) {
    for (Index t = begin; t < end; ++t) std::fill_n(y.row(t), y.cols, T(0));
  });
}

// Asks the system for the pages of numbers that are about to be overwritten column by column.  Fresh pages may come at
// less than 1 GB/s, and the first task of such a product would wait for all of them, and Ctrl-C for that task.
template <class T>
void touch_pages(T* data, Index count) {
  constexpr Index page = 4096 / sizeof(T), piece = (Index{8} << 20) / sizeof(T);
  if (count <= piece) return;
  parallel_ranges(count, piece, [&](Index begin, Index end) {
    for (Index i = begin; i < end; i += page) data[i] = T(0);
  });
}

template <class T>
class Pipeline {
 public:
  Pipeline(MatrixView<const T> x, const DispatchView& dispatch, MatrixView<const T> weights, Index d_model, Index d_ff,
           const ExpertOptions& options, bool combined, bool pairs = false)
      : x_(x),
        dispatch_(dispatch),
        options_(options),
        combined_(combined),
        pairs_(pairs),
        D_(d_model),
        F_(d_ff),
        W_(kernel_.tile_cols),
        row_weight_(weights ? dispatch.num_rows() : 0) {
    for (Index r = 0; r < row_weight_.size(); ++r) {
      row_weight_[r] = weights.data[dispatch.row_assignment[static_cast<std::size_t>(r)]];
    }
  }

 protected:
  RowTiles tiles(Index e) const { return {dispatch_.rows(e), tile_rows<T>(pairs_)}; }
  Index packed_size(Index depth) const { return row_size<T>(depth, pairs_); }  // of a row
  const std::int32_t* tokens(Index e) const { return dispatch_.row_token.data() + dispatch_.begin(e); }
  const T* weights_of_rows(Index e) const {
    return row_weight_.size() ? row_weight_.data() + dispatch_.begin(e) : nullptr;
  }
  bool weight_on(WeightOn place) const { return row_weight_.size() && options_.weight_on == place; }

  // x of expert e's rows, gathered; scaled if the weight goes on the input.
  Operand<T> inputs(Index e) const {
    Operand<T> rows{x_.data, x_.stride, 1, tokens(e)};
    if (weight_on(WeightOn::input)) rows.row_scale = weights_of_rows(e);
    return rows;
  }

  // Where expert e's packed rows of `size` T's start in a buffer for the experts of `range`.
  Index start(const ExpertRange& range, Index e, Index size) const {
    return (dispatch_.begin(e) - dispatch_.begin(range.begin)) * size;
  }
  Index rows_of(const ExpertRange& range) const { return dispatch_.begin(range.end) - dispatch_.begin(range.begin); }

  Index tasks_per_thread(Index rows) const { return num_threads() > 1 && rows > 2 * kernel_.tile_rows ? 4 : 1; }

  Index most_rows(const ExpertRange& range) const {
    Index most = 0;
    for (Index e = range.begin; e < range.end; ++e) most = std::max(most, dispatch_.rows(e));
    return most;
  }

  // Columns of a product that one task computes.  With many rows several tasks per thread: whoever is held up leaves some
  // to the others.  With few, a thread's columns stay together, as memory likes it.
  Index columns_per_task(Index depth, Index cols, Index rows) const {
    return column_block(depth, cols, W_, num_threads() * tasks_per_thread(rows), rows);
  }
  // The same where all experts of the range have tasks at once, for matrices whose rows had better not be cut: each is cut
  // into as few pieces as keep the threads busy.
  Index columns_per_task(Index depth, Index cols, const ExpertRange& range) const {
    const Index threads = num_threads(), rows = most_rows(range), most = threads * tasks_per_thread(rows);
    Index experts = 0;
    for (Index e = range.begin; e < range.end; ++e) experts += dispatch_.rows(e) > 0 ? 1 : 0;
    Index pieces = 1;
    for (; pieces < most; ++pieces) {
      const Index tasks = experts * pieces, idle = (threads - tasks % threads) % threads;  // while the last ones run
      if (16 * idle <= tasks && tasks >= 2 * most) break;
    }
    return column_block(depth, cols, W_, pieces, rows);
  }

  // body(expert, piece) for every piece of every expert with rows; pieces(e) pieces each.
  template <class Pieces, class Body>
  void for_pieces(const ExpertRange& range, Pieces pieces, Body body) const {
    std::vector<std::pair<Index, Index>> tasks;
    for (Index e = range.begin; e < range.end; ++e) {
      for (Index i = 0; i < (dispatch_.rows(e) ? pieces(e) : 0); ++i) tasks.emplace_back(e, i);
    }
    parallel_for(static_cast<Index>(tasks.size()), [&](Index task) {
      body(tasks[static_cast<std::size_t>(task)].first, tasks[static_cast<std::size_t>(task)].second);
    });
  }

  // Packs `rows(e)` (one operand row per dispatched row, `depth` columns) as row tiles.
  template <class Rows>
  void pack_rows(const ExpertRange& range, Rows rows, Index depth, T* packed) const {
    constexpr Index tiles_per_task = 2;
    const Index size = packed_size(depth);
    const auto pack = pairs_ ? pack_rounded_tile<T> : pack_tile<T>;
    for_pieces(
        range, [&](Index e) { return (tiles(e).count() + tiles_per_task - 1) / tiles_per_task; },
        [&](Index e, Index piece) {
          const RowTiles t = tiles(e);
          const Index last = std::min(t.count(), (piece + 1) * tiles_per_task);
          for (Index i = piece * tiles_per_task; i < last; ++i) {
            pack(rows(e), t.begin(i), t.height(i), depth, packed + start(range, e, size) + t.begin(i) * size);
          }
        });
  }

  MatrixView<const T> x_;
  const DispatchView& dispatch_;
  ExpertOptions options_;
  bool combined_, pairs_;  // pairs: rows are multiplied as bfloat16 pairs
  const Kernels<T>& kernel_ = kernels<T>();
  Index D_, F_, W_;
  Buffer<T> row_weight_;  // (M,), empty if the weights are absent
};

}  // namespace numoe
