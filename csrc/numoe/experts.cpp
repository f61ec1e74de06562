#include "numoe/experts.h"

#include <algorithm>
#include <vector>

#include "numoe/eigen.h"
#include "numoe/matmul.h"
#include "numoe/packed.h"
#include "numoe/packing.h"
#include "numoe/parallel.h"

namespace numoe {
namespace {

// Experts [begin, end), walked through together so that scratch memory stays bounded however many tokens come.
struct ExpertRange {
  Index begin, end;
};

template <class T>
std::vector<ExpertRange> ranges_of_experts(const DispatchView& dispatch, Index numbers_per_row) {
  constexpr Index budget = Index{64} << 20;  // bytes of scratch; one expert alone may need more
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

// The common ground of forward and backward: geometry, operands, and loops over (expert, piece) tasks.
template <class T>
class Pipeline {
 public:
  Pipeline(MatrixView<const T> x, const DispatchView& dispatch, MatrixView<const T> weights, Index d_model, Index d_ff,
           const ExpertOptions& options, bool combined)
      : x_(x),
        dispatch_(dispatch),
        options_(options),
        combined_(combined),
        D_(d_model),
        F_(d_ff),
        W_(kernel_.tile_cols),
        row_weight_(weights ? dispatch.num_rows() : 0) {
    for (Index r = 0; r < row_weight_.size(); ++r) {
      row_weight_[r] = weights.data[dispatch.row_assignment[static_cast<std::size_t>(r)]];
    }
  }

 protected:
  RowTiles tiles(Index e) const { return {dispatch_.rows(e), kernel_.tile_rows}; }
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

  // Where expert e's packed rows of `depth` numbers start in a buffer for the experts of `range`.
  Index start(const ExpertRange& range, Index e, Index depth) const {
    return (dispatch_.begin(e) - dispatch_.begin(range.begin)) * depth;
  }
  Index rows_of(const ExpertRange& range) const { return dispatch_.begin(range.end) - dispatch_.begin(range.begin); }

  Index most_rows(const ExpertRange& range) const {
    Index most = 0;
    for (Index e = range.begin; e < range.end; ++e) most = std::max(most, dispatch_.rows(e));
    return most;
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
    constexpr Index tiles_per_task = 8;
    for_pieces(
        range, [&](Index e) { return (tiles(e).count() + tiles_per_task - 1) / tiles_per_task; },
        [&](Index e, Index piece) {
          const RowTiles t = tiles(e);
          const Index last = std::min(t.count(), (piece + 1) * tiles_per_task);
          for (Index i = piece * tiles_per_task; i < last; ++i) {
            pack_tile(rows(e), t.begin(i), t.height(i), depth, packed + start(range, e, depth) + t.begin(i) * depth);
          }
        });
  }

  MatrixView<const T> x_;
  const DispatchView& dispatch_;
  ExpertOptions options_;
  bool combined_;
  const Kernels<T>& kernel_ = kernels<T>();
  Index D_, F_, W_;
  Buffer<T> row_weight_;  // (M,), empty if the weights are absent
};

template <class T>
void add_bias(const T* bias, Index cols, Index rows, T* tile, Index stride) {
  as_array(MatrixView<T>{tile, rows, cols, stride}).rowwise() += as_row(bias, cols);
}

// One panel of weights, wide (the type of the arithmetic) or narrow (bfloat16).
template <class T>
struct Panel {
  const T* wide = nullptr;
  const bfloat16* narrow = nullptr;
};
template <class T>
struct UpPanels {
  Panel<T> first;   // w_gate, or w_up of plain MLP experts
  Panel<T> second;  // w_up
};

// Panels packed on the fly from row-major weights that their owner may change between calls.  A task packs the columns
// it is about to multiply by, once, whatever the number of rows.
template <class T>
class PanelsOnTheFly {
 public:
  explicit PanelsOnTheFly(const ExpertWeights<T>& weights) : w_(weights) {}

  bool glu() const { return w_.glu(); }
  Index up_block(Index tasks, Index rows) const {
    return packed_column_block<T>(2 * w_.d_model(), w_.d_ff(), W_, tasks, rows);
  }
  Index down_block(Index tasks, Index rows) const {
    return packed_column_block<T>(w_.d_ff(), w_.d_model(), W_, tasks, rows);
  }

  void begin_up(Index e, Index col, Index cols) {
    const Index size = num_panels(cols, W_) * W_ * w_.d_model();
    up_ = scratch<T, 0>(2 * size);
    pack_panels(operand(glu() ? w_.gate[e] : w_.up[e]), w_.d_model(), col, cols, W_, up_);
    if (glu()) pack_panels(operand(w_.up[e]), w_.d_model(), col, cols, W_, up_ + size);
    second_ = up_ + size;
  }
  // Columns [begin + j, begin + j + W) of the block begun last, to be multiplied by `rows` rows.
  UpPanels<T> up(Index, Index, Index j, Index) const {
    return {{up_ + j * w_.d_model()}, {second_ + j * w_.d_model()}};
  }

  void begin_down(Index e, Index col, Index cols) {
    down_ = scratch<T, 0>(num_panels(cols, W_) * W_ * w_.d_ff());
    pack_panels(operand(w_.down[e]), w_.d_ff(), col, cols, W_, down_);
  }
  Panel<T> down(Index, Index, Index j, Index) const { return {down_ + j * w_.d_ff()}; }

 private:
  const ExpertWeights<T>& w_;
  Index W_ = kernels<T>().tile_cols;
  T* up_ = nullptr;
  T* second_ = nullptr;
  T* down_ = nullptr;
};

// Panels that are there already.  bfloat16 ones are widened in registers for few rows, once per panel for many.
template <class T, class S>
class PanelsInPlace {
 public:
  explicit PanelsInPlace(const PackedExperts<S>& weights) : w_(weights) {}

  bool glu() const { return w_.glu(); }
  Index up_block(Index tasks, Index rows) const { return column_block(2 * w_.d_model(), w_.d_ff(), W_, tasks, rows); }
  Index down_block(Index tasks, Index rows) const { return column_block(w_.d_ff(), w_.d_model(), W_, tasks, rows); }

  void begin_up(Index, Index, Index) {}
  UpPanels<T> up(Index e, Index col, Index j, Index rows) const {
    const S* first = w_.up(e, col + j);
    if (!glu()) return {widened(first, w_.d_model(), rows, 0), {}};
    return {widened(first, w_.d_model(), rows, 0), widened(first + w_.gate_to_up(), w_.d_model(), rows, 1)};
  }
  void begin_down(Index, Index, Index) {}
  Panel<T> down(Index e, Index col, Index j, Index rows) const {
    return widened(w_.down(e, col + j), w_.d_ff(), rows, 0);
  }

 private:
  Panel<T> widened(const S* panel, Index depth, Index rows, Index which) const {
    if constexpr (std::is_same_v<S, T>) {
      return {panel};
    } else {
      if (rows <= 2 * kernels<T>().tile_rows) return {nullptr, panel};  // widening twice costs less than a pass
      T* wide = scratch<T, 0>(2 * depth * W_) + which * depth * W_;
      kernels<T>().widen_panel(depth, panel, wide);
      return {wide};
    }
  }

  const PackedExperts<S>& w_;
  Index W_ = kernels<T>().tile_cols;
};

template <class T, class Panels>
class Forward : Pipeline<T> {
 public:
  using Base = Pipeline<T>;
  Forward(MatrixView<const T> x, const DispatchView& dispatch, MatrixView<const T> weights, Index d_model, Index d_ff,
          const ExpertOptions& options, bool combined, Panels panels, ExpertBiases<T> bias)
      : Base(x, dispatch, weights, d_model, d_ff, options, combined), panels_(panels), bias_(bias) {}

  void run(ExpertCache<T> cache, MatrixView<T> result) {
    if (combined_) clear(result);
    for (const ExpertRange& range : ranges_of_experts<T>(dispatch_, D_ + F_)) {
      Workspace<T, 3> inputs(rows_of(range) * D_);
      Workspace<T, 4> hidden(rows_of(range) * F_);
      this->pack_rows(range, [&](Index e) { return this->inputs(e); }, D_, inputs.data());
      up(range, inputs.data(), cache, hidden.data());
      down(range, hidden.data(), result);
    }
  }

 private:
  using Base::combined_, Base::dispatch_, Base::D_, Base::F_, Base::W_, Base::kernel_, Base::options_;
  using Base::rows_of, Base::start, Base::tiles, Base::tokens;

  static void clear(MatrixView<T> y) {
    parallel_ranges(y.rows, 256, [&](Index begin, Index end) {
      for (Index t = begin; t < end; ++t) std::fill_n(y.row(t), y.cols, T(0));
    });
  }

  // hidden = act(inputs · w_gate + b_gate) * (inputs · w_up + b_up), stored as row tiles for the next product
  void up(const ExpertRange& range, const T* inputs, ExpertCache<T> cache, T* hidden) const {
    const Index block = panels_.up_block(num_threads(), this->most_rows(range));
    this->for_pieces(
        range, [&](Index) { return (F_ + block - 1) / block; },
        [&](Index e, Index piece) {
          const Index col = piece * block, cols = std::min(block, F_ - col);
          Panels panels = panels_;  // a task's own: it remembers what was begun
          panels.begin_up(e, col, cols);
          for (Index j = 0; j < cols; j += W_) {
            const UpPanels<T> weights = panels.up(e, col, j, dispatch_.rows(e));
            for (Index i = 0; i < tiles(e).count(); ++i) {
              up_tile(e, i, col + j, std::min(W_, cols - j), weights, inputs + start(range, e, D_), cache,
                      hidden + start(range, e, F_));
            }
          }
        });
  }

  void up_tile(Index e, Index i, Index col, Index cols, const UpPanels<T>& weights, const T* inputs,
               ExpertCache<T> cache, T* hidden) const {
    const bool glu = panels_.glu();
    const RowTiles t = tiles(e);
    const Index row = t.begin(i), height = t.height(i);
    T* pre = scratch<T, 1>(3 * kernel_.tile_rows * W_);
    T* linear = pre + kernel_.tile_rows * W_;
    T* h = linear + kernel_.tile_rows * W_;
    product(D_, height, inputs + row * D_, weights.first, pre);
    finish(e, col, cols, row, height, glu ? bias_.gate : bias_.up, glu ? cache.gate : cache.up, pre);
    if (glu) {
      product(D_, height, inputs + row * D_, weights.second, linear);
      finish(e, col, cols, row, height, bias_.up, cache.up, linear);
    }
    kernel_.activate(options_.activation, height * W_, pre, glu ? linear : nullptr, h);
    T* packed = hidden + row * F_ + col * height;  // [k][height], k = column of hidden
    for (Index j = 0; j < cols; ++j) {
      for (Index r = 0; r < height; ++r) packed[j * height + r] = h[r * W_ + j];
    }
  }

  void product(Index depth, Index height, const T* rows, const Panel<T>& panel, T* tile) const {
    if (panel.wide) {
      kernel_.tile(depth, height, rows, panel.wide, tile, W_, false);
    } else {
      kernel_.tile_bf16(depth, height, rows, panel.narrow, tile, W_);
    }
  }

  // Adds the bias to a tile of rows before the activation, and keeps it for the backward if there is a cache.
  void finish(Index e, Index col, Index cols, Index row, Index height, MatrixView<const T> bias, MatrixView<T> cache,
              T* tile) const {
    if (bias) add_bias(bias.row(e) + col, cols, height, tile, W_);
    if (!cache) return;
    for (Index r = 0; r < height; ++r) {
      std::copy_n(tile + r * W_, cols, cache.row(dispatch_.begin(e) + row + r) + col);
    }
  }

  // result (+)= weight * (hidden · w_down + b_down); a task owns its columns and takes the experts in order
  void down(const ExpertRange& range, const T* hidden, MatrixView<T> result) const {
    const Index block = panels_.down_block(2 * num_threads(), rows_of(range));
    parallel_for((D_ + block - 1) / block, [&](Index task) {
      const Index col = task * block, cols = std::min(block, D_ - col);
      Panels panels = panels_;
      for (Index e = range.begin; e < range.end; ++e) {
        if (dispatch_.rows(e) == 0) continue;
        panels.begin_down(e, col, cols);
        for (Index j = 0; j < cols; j += W_) {
          const Panel<T> weights = panels.down(e, col, j, dispatch_.rows(e));
          for (Index i = 0; i < tiles(e).count(); ++i) {
            down_tile(e, i, col + j, std::min(W_, cols - j), weights, hidden + start(range, e, F_), result);
          }
        }
      }
    });
  }

  void down_tile(Index e, Index i, Index col, Index cols, const Panel<T>& weights, const T* hidden,
                 MatrixView<T> result) const {
    const RowTiles t = tiles(e);
    const Index row = t.begin(i), height = t.height(i);
    T* tile = scratch<T, 1>(kernel_.tile_rows * W_);
    product(F_, height, hidden + row * F_, weights, tile);
    if (bias_.down) add_bias(bias_.down.row(e) + col, cols, height, tile, W_);
    for (Index r = 0; r < height; ++r) {
      if (combined_) {
        const T weight = this->weight_on(WeightOn::output) ? this->weights_of_rows(e)[row + r] : T(1);
        kernel_.axpy(cols, weight, tile + r * W_, result.row(tokens(e)[row + r]) + col);
      } else {
        std::copy_n(tile + r * W_, cols, result.row(dispatch_.begin(e) + row + r) + col);
      }
    }
  }

  Panels panels_;
  ExpertBiases<T> bias_;
};

// Backward.  For one expert, with a = act(gate), h = a * up, out = h · w_down + b_down, y += weight * out:
//   dh        = dy · w_downᵀ                 (unweighted)
//   dweight   = ⟨dh, h⟩ + ⟨dy, b_down⟩       = ⟨dy, out⟩: no stored outputs needed
//   h, dh     *= weight
//   dgate, dup = activation's adjoint of dh
//   dw_down   = hᵀ · dy      dw_gate = xᵀ · dgate      dw_up = xᵀ · dup
//   dx       += dgate · w_gateᵀ + dup · w_upᵀ
// With the weight on the input, x above is weight * x: dweight = ⟨dinput, x⟩ and dx += weight * dinput.
template <class T>
class Backward : Pipeline<T> {
 public:
  using Base = Pipeline<T>;
  Backward(MatrixView<const T> dresult, MatrixView<const T> x, const DispatchView& dispatch,
           MatrixView<const T> weights, const ExpertWeights<T>& experts, const ExpertOptions& options, bool combined,
           ExpertCache<const T> cache, const ExpertGrads<T>& grads)
      : Base(x, dispatch, weights, experts.d_model(), experts.d_ff(), options, combined),
        w_(experts),
        dy_(dresult),
        cache_(cache),
        grads_(grads) {}

  void run() {
    std::fill_n(grads_.x.data, grads_.x.rows * grads_.x.cols, T(0));
    if (grads_.weights) std::fill_n(grads_.weights.data, grads_.weights.rows * grads_.weights.cols, T(0));
    for (const ExpertRange& range : ranges_of_experts<T>(dispatch_, 2 * D_ + 4 * F_)) {
      const Index numbers = rows_of(range) * F_;
      Workspace<T, 4> hidden(numbers);
      Workspace<T, 5> dgate(w_.glu() ? numbers : 0);
      Workspace<T, 6> dup(numbers);
      down_backward(range, dup.data());
      activation_backward(range, hidden.data(), dgate.data(), dup.data());
      weight_gradients(range, hidden.data(), dgate.data(), dup.data());
      up_backward(range, dgate.data(), dup.data());
    }
  }

 private:
  using Base::combined_, Base::dispatch_, Base::D_, Base::F_, Base::W_, Base::kernel_, Base::options_;
  using Base::rows_of, Base::start, Base::tiles, Base::tokens, Base::x_;

  // dy of expert e's rows: gathered by token, or already one row each.
  Operand<T> output_gradients(Index e) const {
    if (combined_) return {dy_.data, dy_.stride, 1, tokens(e)};
    return {dy_.row(dispatch_.begin(e)), dy_.stride, 1};
  }

  // out = h · w_down  ⇒  dh = dout · w_downᵀ, stored row by row (M, F)
  void down_backward(const ExpertRange& range, T* dh) {
    Workspace<T, 3> dout(rows_of(range) * D_);
    this->pack_rows(range, [&](Index e) { return output_gradients(e); }, D_, dout.data());
    const Index block = packed_column_block<T>(D_, F_, W_, num_threads(), this->most_rows(range));
    this->for_pieces(
        range, [&](Index) { return (F_ + block - 1) / block; },
        [&](Index e, Index piece) {
          const Index col = piece * block, cols = std::min(block, F_ - col);
          T* panels = scratch<T, 0>(num_panels(cols, W_) * W_ * D_);
          T* tile = scratch<T, 1>(kernel_.tile_rows * W_);
          pack_panels(transposed(operand(w_.down[e])), D_, col, cols, W_, panels);
          const RowTiles t = tiles(e);
          for (Index j = 0; j < cols; j += W_) {
            for (Index i = 0; i < t.count(); ++i) {
              const Index row = t.begin(i);
              kernel_.tile(D_, t.height(i), dout.data() + start(range, e, D_) + row * D_, panels + j * D_, tile, W_,
                           false);
              for (Index r = 0; r < t.height(i); ++r) {
                T* target = dh + start(range, e, F_) + (row + r) * F_ + col + j;
                std::copy_n(tile + r * W_, std::min(W_, cols - j), target);
              }
            }
          }
        });
  }

  // h = act(gate) * up  ⇒  dgate, dup; and dweight where the weight is on the output.  dh comes in `dup`.
  void activation_backward(const ExpertRange& range, T* hidden, T* dgate, T* dup) {
    constexpr Index rows_per_task = 16;
    const Index first = dispatch_.begin(range.begin);
    parallel_ranges(rows_of(range), rows_per_task, [&](Index begin, Index end) {
      Index e = range.begin;
      for (Index i = begin; i < end; ++i) {
        while (dispatch_.begin(e + 1) <= first + i) ++e;
        activation_backward_row(e, first + i, hidden + i * F_, dgate + (w_.glu() ? i * F_ : 0), dup + i * F_);
      }
    });
  }

  void activation_backward_row(Index e, Index row, T* h, T* dgate, T* dup) {
    const T* pre = w_.glu() ? cache_.gate.row(row) : cache_.up.row(row);
    const T* linear = w_.glu() ? cache_.up.row(row) : nullptr;
    const bool weighted = this->weight_on(WeightOn::output);
    if (weighted) {
      T* const dh = dup;
      kernel_.activate(options_.activation, F_, pre, linear, h);
      const Index assignment = dispatch_.row_assignment[static_cast<std::size_t>(row)];
      T dweight = kernel_.dot(F_, dh, h);
      const T* dy = dy_.row(combined_ ? dispatch_.row_token[static_cast<std::size_t>(row)] : row);
      if (w_.down_bias) dweight += kernel_.dot(D_, dy, w_.down_bias.row(e));
      grads_.weights.data[assignment] = dweight;
    }
    const T weight = weighted ? this->row_weight_[row] : T(1);
    if (weighted) as_row(dup, F_) *= weight;
    kernel_.activate_backward(options_.activation, F_, pre, linear, dup, h, w_.glu() ? dgate : dup, dup);
    if (weighted) as_row(h, F_) *= weight;
  }

  // out = h · w_down, gate = x · w_gate, up = x · w_up  ⇒  dw_down = hᵀ dout, dw_gate = xᵀ dgate, dw_up = xᵀ dup
  void weight_gradients(const ExpertRange& range, const T* hidden, const T* dgate, const T* dup) {
    const auto rows = [&](const T* data) {
      return [=, this, &range](Index e) { return Operand<T>{data + start(range, e, F_), F_, 1}; };
    };
    const auto inputs = [&](Index e) { return this->inputs(e); };
    const auto outputs = [&](Index e) { return output_gradients(e); };
    outer_products(range, rows(hidden), F_, outputs, D_, grads_.down);
    if (w_.glu()) outer_products(range, inputs, D_, rows(dgate), F_, grads_.gate);
    outer_products(range, inputs, D_, rows(dup), F_, grads_.up);
    if (!w_.up_bias) return;
    const bool weighted = this->weight_on(WeightOn::output);
    column_sums(
        range,
        [&](Index e) {
          Operand<T> dout = output_gradients(e);
          if (weighted) dout.row_scale = this->weights_of_rows(e);
          return dout;
        },
        grads_.down_bias);
    if (w_.glu()) column_sums(range, rows(dgate), grads_.gate_bias);
    column_sums(range, rows(dup), grads_.up_bias);
  }

  // dw[e] = left(e)ᵀ · right(e), a sum over the expert's rows in order
  template <class Left, class Right>
  void outer_products(const ExpertRange& range, Left left, Index m, Right right, Index n, Tensor3View<T> dw) {
    const Index padded = num_panels(n, W_) * W_;
    Workspace<T, 7> panels(rows_of(range) * padded);
    this->for_pieces(
        range, [](Index) { return Index{1}; },
        [&](Index e, Index) {
          pack_panels(right(e), dispatch_.rows(e), 0, n, W_, panels.data() + start(range, e, padded));
        });
    const RowTiles tiles_of_dw{m, kernel_.tile_rows};
    const Index work_per_tile = kernel_.tile_rows * n * this->most_rows(range);
    const Index tiles_per_task = std::clamp<Index>(max_task_work / std::max<Index>(1, work_per_tile), 1, 8);
    const Index pieces = (tiles_of_dw.count() + tiles_per_task - 1) / tiles_per_task;
    this->for_pieces(
        range, [&](Index) { return pieces; },
        [&](Index e, Index piece) {
          const Index begin = piece * tiles_per_task, end = std::min(begin + tiles_per_task, tiles_of_dw.count());
          multiply_tiles(transposed(left(e)), tiles_of_dw, begin, end, dispatch_.rows(e),
                         panels.data() + start(range, e, padded), dw[e]);
        });
  }

  // out += bias  ⇒  dbias = Σ over rows of dout
  template <class Rows>
  void column_sums(const ExpertRange& range, Rows rows, MatrixView<T> sums) {
    this->for_pieces(
        range, [](Index) { return Index{1}; },
        [&](Index e, Index) {
          const Operand<T> a = rows(e);
          for (Index r = 0; r < dispatch_.rows(e); ++r) {
            kernel_.axpy(sums.cols, a.row_scale ? a.row_scale[r] : T(1), a.row(r), sums.row(e));
          }
        });
  }

  // gate = x · w_gate, up = x · w_up  ⇒  dinput = dgate · w_gateᵀ + dup · w_upᵀ, added to its token
  void up_backward(const ExpertRange& range, const T* dgate, const T* dup) {
    const Index numbers = rows_of(range) * F_;
    Workspace<T, 8> packed_dgate(w_.glu() ? numbers : 0);
    Workspace<T, 9> packed_dup(numbers);
    const auto rows = [&](const T* data) {
      return [=, this, &range](Index e) { return Operand<T>{data + start(range, e, F_), F_, 1}; };
    };
    this->pack_rows(range, rows(dup), F_, packed_dup.data());
    if (w_.glu()) this->pack_rows(range, rows(dgate), F_, packed_dgate.data());
    const bool weighted = this->weight_on(WeightOn::input);
    Workspace<T, 10> dinput(weighted ? rows_of(range) * D_ : 0);  // (rows, D), for ⟨dinput, x⟩
    const Index block = packed_column_block<T>(2 * F_, D_, W_, 2 * num_threads(), rows_of(range));
    parallel_for((D_ + block - 1) / block, [&](Index task) {
      const Index col = task * block, cols = std::min(block, D_ - col);
      for (Index e = range.begin; e < range.end; ++e) {
        if (dispatch_.rows(e) == 0) continue;
        const Index at = start(range, e, F_);
        up_backward_block(e, col, cols, {w_.glu() ? packed_dgate.data() + at : nullptr, packed_dup.data() + at},
                          weighted ? dinput.data() + start(range, e, D_) : nullptr);
      }
    });
    if (weighted) input_weight_gradients(range, dinput.data());
  }

  struct UpRows {
    const T* first;   // packed dgate, or null
    const T* second;  // packed dup
  };
  void up_backward_block(Index e, Index col, Index cols, UpRows rows, T* dinput) {
    const Index size = num_panels(cols, W_) * W_ * F_;
    T* panels = scratch<T, 0>(2 * size);
    T* tile = scratch<T, 1>(kernel_.tile_rows * W_);
    pack_panels(transposed(operand(w_.up[e])), F_, col, cols, W_, panels);
    if (rows.first) pack_panels(transposed(operand(w_.gate[e])), F_, col, cols, W_, panels + size);
    const RowTiles t = tiles(e);
    for (Index j = 0; j < cols; j += W_) {
      const Index valid = std::min(W_, cols - j);
      for (Index i = 0; i < t.count(); ++i) {
        const Index row = t.begin(i), height = t.height(i);
        kernel_.tile(F_, height, rows.second + row * F_, panels + j * F_, tile, W_, false);
        if (rows.first) kernel_.tile(F_, height, rows.first + row * F_, panels + size + j * F_, tile, W_, true);
        for (Index r = 0; r < height; ++r) {
          const T weight = dinput ? this->weights_of_rows(e)[row + r] : T(1);
          kernel_.axpy(valid, weight, tile + r * W_, grads_.x.row(tokens(e)[row + r]) + col + j);
          if (dinput) std::copy_n(tile + r * W_, valid, dinput + (row + r) * D_ + col + j);
        }
      }
    }
  }

  // input = weight * x  ⇒  dweight = ⟨dinput, x⟩
  void input_weight_gradients(const ExpertRange& range, const T* dinput) {
    const Index first = dispatch_.begin(range.begin);
    parallel_ranges(rows_of(range), 64, [&](Index begin, Index end) {
      for (Index i = begin; i < end; ++i) {
        const auto row = static_cast<std::size_t>(first + i);
        grads_.weights.data[dispatch_.row_assignment[row]] =
            kernel_.dot(D_, dinput + i * D_, x_.row(dispatch_.row_token[row]));
      }
    });
  }

  const ExpertWeights<T>& w_;
  MatrixView<const T> dy_;
  ExpertCache<const T> cache_;
  const ExpertGrads<T>& grads_;
};

}  // namespace

template <class T>
void experts_forward(MatrixView<const T> x, const DispatchView& dispatch, MatrixView<const T> weights,
                     const ExpertWeights<T>& experts, const ExpertOptions& options, bool combined, ExpertCache<T> cache,
                     MatrixView<T> result) {
  Forward<T, PanelsOnTheFly<T>>(x, dispatch, weights, experts.d_model(), experts.d_ff(), options, combined,
                                PanelsOnTheFly<T>(experts), {experts.gate_bias, experts.up_bias, experts.down_bias})
      .run(cache, result);
}

template <class S>
void experts_forward(MatrixView<const Compute<S>> x, const DispatchView& dispatch, MatrixView<const Compute<S>> weights,
                     const PackedExperts<S>& experts, const ExpertBiases<Compute<S>>& biases,
                     const ExpertOptions& options, MatrixView<Compute<S>> y) {
  using T = Compute<S>;
  Forward<T, PanelsInPlace<T, S>>(x, dispatch, weights, experts.d_model(), experts.d_ff(), options, true,
                                  PanelsInPlace<T, S>(experts), biases)
      .run({}, y);
}

template <class T>
void experts_backward(MatrixView<const T> dresult, MatrixView<const T> x, const DispatchView& dispatch,
                      MatrixView<const T> weights, const ExpertWeights<T>& experts, const ExpertOptions& options,
                      bool combined, ExpertCache<const T> cache, const ExpertGrads<T>& grads) {
  Backward<T>(dresult, x, dispatch, weights, experts, options, combined, cache, grads).run();
}

#define NUMOE_INSTANTIATE(T)                                                                                         \
  template void experts_forward(MatrixView<const T>, const DispatchView&, MatrixView<const T>,                       \
                                const ExpertWeights<T>&, const ExpertOptions&, bool, ExpertCache<T>, MatrixView<T>); \
  template void experts_backward(MatrixView<const T>, MatrixView<const T>, const DispatchView&, MatrixView<const T>, \
                                 const ExpertWeights<T>&, const ExpertOptions&, bool, ExpertCache<const T>,          \
                                 const ExpertGrads<T>&);
NUMOE_INSTANTIATE(float)
NUMOE_INSTANTIATE(double)
#undef NUMOE_INSTANTIATE
#define NUMOE_INSTANTIATE_PACKED(S)                                                                              \
  template void experts_forward(MatrixView<const Compute<S>>, const DispatchView&, MatrixView<const Compute<S>>, \
                                const PackedExperts<S>&, const ExpertBiases<Compute<S>>&, const ExpertOptions&,  \
                                MatrixView<Compute<S>>);
NUMOE_INSTANTIATE_PACKED(float)
NUMOE_INSTANTIATE_PACKED(double)
NUMOE_INSTANTIATE_PACKED(bfloat16)
#undef NUMOE_INSTANTIATE_PACKED

}  // namespace numoe
