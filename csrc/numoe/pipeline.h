// The common ground of the experts' forward and backward: geometry, operands, and loops over experts and their pieces.
#pragma once

#include <algorithm>
#include <utility>
#include <vector>

#include "numoe/eigen.h"
#include "numoe/experts.h"
#include "numoe/panels.h"
#include "numoe/schedule.h"

namespace numoe {

// Where rows of D numbers go, one for each dispatched row: to rows of their own, added to what their tokens have already,
// or both.
template <class T>
struct Destination {
  MatrixView<T> rows;          // (M, D)
  MatrixView<T> sums;          // (T, D)
  const T* weights = nullptr;  // (M,) of rows in sums, or 1
};

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

  Index most_rows(const ExpertRange& range) const {
    Index most = 0;
    for (Index e = range.begin; e < range.end; ++e) most = std::max(most, dispatch_.rows(e));
    return most;
  }

  // With many rows several tasks per thread: whoever is held up leaves some to the others.  With few, a thread's columns stay
  // together, as memory likes it.
  Index tasks_of(const ExpertRange& range) const {
    return range.threads > 1 && most_rows(range) > 2 * kernel_.tile_rows ? 4 * range.threads : range.threads;
  }
  // Columns of a product that one task computes.
  Index columns_per_task(Index depth, Index cols, const ExpertRange& range) const {
    return column_block(depth, cols, W_, tasks_of(range), most_rows(range));
  }
  // The same where all experts of the range have tasks at once, for matrices whose rows had better not be cut: each is cut
  // into as few pieces as keep the threads busy.
  Index long_columns_per_task(Index depth, Index cols, const ExpertRange& range) const {
    const Index threads = range.threads, most = tasks_of(range);
    Index experts = 0;
    for (Index e = range.begin; e < range.end; ++e) experts += dispatch_.rows(e) > 0 ? 1 : 0;
    Index pieces = 1;
    for (; pieces < most; ++pieces) {
      const Index tasks = experts * pieces, idle = (threads - tasks % threads) % threads;  // while the last ones run
      if (16 * idle <= tasks && tasks >= 2 * most) break;
    }
    return column_block(depth, cols, W_, pieces, most_rows(range));
  }

  // work(range, destination) for ranges that are all experts with rows, whose products need so many numbers for each row;
  // what it brings to the destination comes to where `to` says, whose sums start from 0.  Threads work apart on experts with
  // `rows_apart` on average.
  template <class Work>
  void for_ranges(Index numbers_per_row, Index rows_apart, const Destination<T>& to, Work work) const {
    constexpr Index number = sizeof(T), megabyte = Index{1} << 20;
    const Index threads = num_threads();
    // Of rows that wait to be added up: enough for experts to share out (8 instead of 32 MB took 1-3 % longer, Zen 5).
    const Index waiting = std::min<Index>(16 * threads, 256) * megabyte;
    // Of rows that stay in a cache.  Several threads meet a few times in each range, which costs more than a cache that is
    // farther away.
    const Index cache = (threads > 1 ? std::min<Index>(4 * threads, 32) : 1) * megabyte;
    bool sums_are_new = true;
    for (const ExpertRange& range : cut(all_experts(dispatch_), dispatch_, D_ * number, waiting)) {
      const std::vector<Index> experts = heaviest_first(range, dispatch_);
      const bool many_rows = rows_of(range) >= rows_apart * static_cast<Index>(experts.size());
      if (threads > 1 && many_rows && share_out_evenly(experts, dispatch_, threads)) {
        work_apart(range, experts, to, sums_are_new, work);
      } else {
        if (sums_are_new) clear(to.sums);
        for (const ExpertRange& part : cut(range, dispatch_, numbers_per_row * number, cache)) work(part, to);
      }
      sums_are_new = false;
    }
    if (sums_are_new) clear(to.sums);
  }

  // Columns from `col` on of expert e's rows at the destination, if it has rows of their own.
  MatrixView<T> place(const Destination<T>& to, Index e, Index col) const {
    return to.rows ? to.rows.from(dispatch_.begin(e), col) : MatrixView<T>{};
  }
  // Brings a block of expert e, whose first number is that of `row` and `col`, to where it belongs, unless it is there.
  void deliver(const Destination<T>& to, Index e, Index row, Index col, MatrixView<const T> block) const {
    const Index first = dispatch_.begin(e) + row;
    if (to.sums) {
      kernel_.add_rows(block.rows, block.cols, to.weights ? to.weights + first : nullptr, block.data, block.stride,
                       tokens(e) + row, to.sums.data + col, to.sums.stride);
    }
    if (to.rows) copy_rows(block, to.rows.from(first, col));
  }

  // body(expert, piece) for every piece of every expert with rows; pieces(e) pieces each.
  template <class Pieces, class Body>
  void for_pieces(const ExpertRange& range, Pieces pieces, Body body) const {
    if (range.end - range.begin == 1) {
      parallel_for(pieces(range.begin), [&](Index piece) { body(range.begin, piece); });
      return;
    }
    std::vector<std::pair<Index, Index>> tasks;
    for (Index e = range.begin; e < range.end; ++e) {
      for (Index i = 0; i < (dispatch_.rows(e) ? pieces(e) : 0); ++i) tasks.emplace_back(e, i);
    }
    parallel_for(static_cast<Index>(tasks.size()), [&](Index task) {
      body(tasks[static_cast<std::size_t>(task)].first, tasks[static_cast<std::size_t>(task)].second);
    });
  }

  // pack(expert, row, height, target) for all row tiles of the range, whose rows are `size` numbers each once they are packed.
  template <class Pack>
  void pack_rows(const ExpertRange& range, Index size, T* packed, Pack pack) const {
    constexpr Index tiles_per_task = 2;
    for_pieces(
        range, [&](Index e) { return (tiles(e).count() + tiles_per_task - 1) / tiles_per_task; },
        [&](Index e, Index piece) {
          const RowTiles t = tiles(e);
          const Index last = std::min(t.count(), (piece + 1) * tiles_per_task);
          for (Index i = piece * tiles_per_task; i < last; ++i) {
            pack(e, t.begin(i), t.height(i), packed + start(range, e, size) + t.begin(i) * size);
          }
        });
  }

 private:
  // Sums get their rows afterwards, in order.
  template <class Work>
  void work_apart(const ExpertRange& range, const std::vector<Index>& experts, const Destination<T>& to,
                  bool sums_are_new, Work work) const {
    Destination<T> rows_of_experts = to;
    rows_of_experts.sums = {};
    const Index pitch = staged_pitch<T>(D_), size = rows_of(range) * pitch;
    Workspace<T, Slot::rows_of_experts> rows(to.rows ? 0 : size);
    if (!to.rows) {
      touch_pages(rows.data(), size);
      rows_of_experts.rows = {rows.data() - dispatch_.begin(range.begin) * pitch, dispatch_.num_rows(), D_, pitch};
    }
    parallel_for(static_cast<Index>(experts.size()), [&](Index i) {
      const Index e = experts[static_cast<std::size_t>(i)];
      work(ExpertRange{e, e + 1, 1}, rows_of_experts);
    });
    if (!to.sums) return;
    const Index first = dispatch_.begin(range.begin);
    const MatrixView<const T> rows_of_range = rows_of_experts.rows.row_range(first, first + rows_of(range));
    add_to_tokens(rows_of_range, dispatch_, first, to.weights, sums_are_new, to.sums);
  }

 protected:
  MatrixView<const T> x_;
  const DispatchView& dispatch_;
  ExpertOptions options_;
  bool combined_, pairs_;  // pairs: rows are multiplied as bfloat16 pairs
  const Kernels<T>& kernel_ = kernels<T>();
  Index D_, F_, W_;
  Buffer<T> row_weight_;  // (M,), empty if the weights are absent
};

}  // namespace numoe
