#include <optional>

#include "numoe/forward.h"
#include "numoe/matmul.h"
#include "numoe/transposed.h"

namespace numoe {
namespace {

// Backward.  For one expert, with a = act(gate), h = a * up, out = h · w_down + b_down, y += weight * out:
//   dh        = dy · w_downᵀ                 (unweighted)
//   dweight   = ⟨dh, h⟩ + ⟨dy, b_down⟩       = ⟨dy, out⟩: no stored outputs needed
//   h, dh     *= weight
//   dgate, dup = activation's adjoint of dh
//   dw_down   = hᵀ · dy      dw_gate = xᵀ · dgate      dw_up = xᵀ · dup
//   dx       += dgate · w_gateᵀ + dup · w_upᵀ
// With the weight on the input, x above is weight * x: dweight = ⟨dinput, x⟩ and dx += weight * dinput.
//
// pairs: matrices are bfloat16 and multiplied as pairs, so that the other factor is rounded too, and both are in dw.
template <class S, bool pairs = false>
class Backward : Pipeline<Compute<S>> {
 public:
  using T = Compute<S>;
  using Base = Pipeline<T>;
  using Term = TransposedTerm<T, S, pairs>;
  Backward(MatrixView<const T> dresult, MatrixView<const T> x, const DispatchView& dispatch,
           MatrixView<const T> weights, const ExpertWeights<S>& experts, const ExpertOptions& options, bool combined,
           ExpertCache<const T> cache, const ExpertGrads<T>& grads)
      : Base(x, dispatch, weights, experts.d_model(), experts.d_ff(), options, combined, pairs),
        w_(experts),
        dy_(dresult),
        cache_(cache),
        grads_(grads),
        panels_before_(static_cast<std::size_t>(dispatch.num_experts()) + 1) {
    if (!cache) {
      forward_.emplace(x, dispatch, weights, D_, F_, options, combined, RowMajorWeights<T, S, pairs>(experts),
                       experts.biases());
    }
    for (Index e = 0; e < dispatch.num_experts(); ++e) {
      const auto i = static_cast<std::size_t>(e);
      panels_before_[i + 1] = panels_before_[i] + num_panels(dispatch.rows(e), W_);
    }
  }

  void run() {
    if (grads_.weights) std::fill_n(grads_.weights.data, grads_.weights.rows * grads_.weights.cols, T(0));
    if (grads_.store == GradStore::overwrite) clear_idle_experts();
    const Destination<T> to{.sums = grads_.x,
                            .weights = this->weight_on(WeightOn::input) ? row_weight_.data() : nullptr};
    this->for_ranges(2 * D_ + (cache_ ? 4 : 6) * F_, 0, to, [&](const ExpertRange& range, const Destination<T>& here) {
      const Index numbers = rows_of(range) * F_, again = cache_ ? 0 : numbers;
      Workspace<T, Slot::hidden> hidden(numbers);
      Workspace<T, Slot::dgate> dgate(w_.glu() ? numbers : 0);
      Workspace<T, Slot::dup> dup(numbers);
      Workspace<T, Slot::gate_again> gate_again(w_.glu() ? again : 0);
      Workspace<T, Slot::up_again> up_again(again);
      touch_pages(dup.data(), numbers);
      touch_pages(gate_again.data(), w_.glu() ? again : 0);
      touch_pages(up_again.data(), again);
      const auto cache = cache_ ? cache_ : compute_again(range, gate_again.data(), up_again.data());
      down_backward(range, dup.data());
      activation_backward(range, cache, hidden.data(), dgate.data(), dup.data());
      weight_gradients(range, hidden.data(), dgate.data(), dup.data());
      up_backward(range, dgate.data(), dup.data(), here);
    });
  }

 private:
  using Base::combined_, Base::dispatch_, Base::D_, Base::F_, Base::W_, Base::kernel_, Base::options_;
  using Base::row_weight_, Base::rows_of, Base::start, Base::tiles, Base::tokens, Base::x_;

  // The rows before the activation, as the forward had them.
  ExpertCache<const T> compute_again(const ExpertRange& range, T* gate, T* up) const {
    const Index first = dispatch_.begin(range.begin) * F_;  // the cache is addressed by rows of the whole dispatch
    const auto view = [&](T* data) { return MatrixView<T>{data - first, dispatch_.num_rows(), F_, F_}; };
    const ExpertCache<T> cache{w_.glu() ? view(gate) : MatrixView<T>{}, view(up)};
    forward_->up(range, cache, nullptr);
    return {cache.gate, cache.up};
  }

  // Whether gradients are so many bytes that they would only push useful things out of the caches.
  static bool large(const Tensor3View<T>& dw) {
    constexpr Index most = Index{8} << 20;
    return dw.count * dw.rows * dw.cols * static_cast<Index>(sizeof(T)) > most;
  }

  void clear_idle_experts() {
    parallel_for(w_.num_experts(), [&](Index e) {
      if (dispatch_.rows(e) != 0) return;
      for (const Tensor3View<T>& dw : {grads_.gate, grads_.up, grads_.down}) {
        if (!dw) continue;
        const MatrixView<T> zeros = dw[e];
        if (large(dw)) {
          kernel_.stream_zeros(zeros.rows * zeros.cols, zeros.data);
        } else {
          std::fill_n(zeros.data, zeros.rows * zeros.cols, T(0));
        }
      }
      for (const MatrixView<T>& db : {grads_.gate_bias, grads_.up_bias, grads_.down_bias}) {
        if (db) std::fill_n(db.row(e), db.cols, T(0));
      }
    });
  }

  // Where the panels of expert e's tokens, of `depth` k's each, start in a buffer for the experts of `range`.
  Index panels_start(const ExpertRange& range, Index e, Index depth) const {
    const auto before = [&](Index i) { return panels_before_[static_cast<std::size_t>(i)]; };
    return (before(e) - before(range.begin)) * W_ * depth;
  }
  TokenPanels<T> token_panels(const T* buffer, const ExpertRange& range, Index e, Index numbers) const {
    const Index depth = depth_of(numbers, pairs);
    return {buffer + panels_start(range, e, depth), dispatch_.rows(e), depth};
  }
  // Packs `rows(e)` (one operand row per dispatched row, of so many numbers) as panels of tokens.
  template <class Rows>
  void pack_token_panels(const ExpertRange& range, Rows rows, Index numbers, T* packed) const {
    const Index rows_per_task = 4 * W_, depth = depth_of(numbers, pairs);
    this->for_pieces(
        range, [&](Index e) { return (dispatch_.rows(e) + rows_per_task - 1) / rows_per_task; },
        [&](Index e, Index piece) {
          const Index first = piece * rows_per_task, count = std::min(rows_per_task, dispatch_.rows(e) - first);
          T* const panels = packed + panels_start(range, e, depth) + first * depth;
          if constexpr (pairs) {
            for (Index r = 0; r < count; r += W_) {
              pack_rounded_panel(rows(e), first + r, std::min(W_, count - r), numbers, panels + r * depth);
            }
          } else {
            pack_panels(transposed(rows(e)), depth, first, count, W_, panels);
          }
        });
  }

  // dy of expert e's rows: gathered by token, or already one row each.
  Operand<T> output_gradients(Index e) const {
    if (combined_) return {dy_.data, dy_.stride, 1, tokens(e)};
    return {dy_.row(dispatch_.begin(e)), dy_.stride, 1};
  }

  // out = h · w_down  ⇒  dh = dout · w_downᵀ, stored row by row (M, F)
  void down_backward(const ExpertRange& range, T* dh) {
    Workspace<T, Slot::dout_panels> dout(panels_start(range, range.end, depth_of(D_, pairs)));
    pack_token_panels(range, [&](Index e) { return output_gradients(e); }, D_, dout.data());
    const Index block = this->columns_per_task(D_, F_, range);
    this->for_pieces(
        range, [&](Index) { return (F_ + block - 1) / block; },
        [&](Index e, Index piece) {
          const Index col = piece * block, cols = std::min(block, F_ - col);
          const Term down{token_panels(dout.data(), range, e, D_), w_.down[e].row_range(col, col + cols)};
          const MatrixView<T> result{dh + start(range, e, F_) + col, dispatch_.rows(e), cols, F_};
          for_transposed({down}, result, [&](Index row, Index panel_col, MatrixView<const T> sums) {
            copy_rows(sums, result.from(row, panel_col));
          });
        });
  }

  // h = act(gate) * up  ⇒  dgate, dup; and dweight where the weight is on the output.  dh comes in `dup`.
  void activation_backward(const ExpertRange& range, const ExpertCache<const T>& cache, T* hidden, T* dgate, T* dup) {
    constexpr Index rows_per_task = 16;
    const Index first = dispatch_.begin(range.begin);
    parallel_ranges(rows_of(range), rows_per_task, [&](Index begin, Index end) {
      Index e = range.begin;
      for (Index i = begin; i < end; ++i) {
        while (dispatch_.begin(e + 1) <= first + i) ++e;
        activation_backward_row(cache, e, first + i, hidden + i * F_, dgate + (w_.glu() ? i * F_ : 0), dup + i * F_);
      }
    });
  }

  void activation_backward_row(const ExpertCache<const T>& cache, Index e, Index row, T* h, T* dgate, T* dup) {
    const T* pre = w_.glu() ? cache.gate.row(row) : cache.up.row(row);
    const T* linear = w_.glu() ? cache.up.row(row) : nullptr;
    const bool weighted = this->weight_on(WeightOn::output);
    T dweight = kernel_.activate_backward(options_.activation, F_, weighted ? this->row_weight_[row] : T(1), pre,
                                          linear, dup, h, w_.glu() ? dgate : dup, dup);
    if (!weighted) return;
    const T* dy = dy_.row(combined_ ? dispatch_.row_token[static_cast<std::size_t>(row)] : row);
    if (w_.down_bias) dweight += kernel_.dot(D_, dy, w_.down_bias.row(e));
    grads_.weights.data[dispatch_.row_assignment[static_cast<std::size_t>(row)]] = dweight;
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
    const Store store = grads_.store == GradStore::accumulate ? Store::add
                        : large(dw)                           ? Store::stream
                                                              : Store::overwrite;
    const Index padded = num_panels(n, W_) * W_, cols_at_once = 8 * W_;
    // k's of an expert: its rows, or what pairs of them are padded to
    const auto depth_of_expert = [&](Index e) { return row_size<T>(dispatch_.rows(e), pairs); };
    std::vector<Index> before(static_cast<std::size_t>(range.end - range.begin) + 1);
    for (Index e = range.begin; e < range.end; ++e) {
      const auto i = static_cast<std::size_t>(e - range.begin);
      before[i + 1] = before[i] + depth_of_expert(e) * padded;
    }
    Workspace<T, Slot::right_panels> panels(before.back());
    const auto panels_of = [&](Index e) { return panels.data() + before[static_cast<std::size_t>(e - range.begin)]; };
    this->for_pieces(
        range, [&](Index) { return (n + cols_at_once - 1) / cols_at_once; },
        [&](Index e, Index piece) {
          const Index col = piece * cols_at_once, cols = std::min(cols_at_once, n - col), rows = dispatch_.rows(e);
          T* const target = panels_of(e) + col * depth_of_expert(e);
          if constexpr (pairs) {
            pack_zipped_panels(right(e), rows, col, cols, target);
          } else {
            pack_panels(right(e), rows, col, cols, W_, target);
          }
        });
    const RowTiles tiles_of_dw = tiles_of_gradient<T>(m, pairs);
    const Index work_per_tile = tiles_of_dw.most_rows() * n * this->most_rows(range);
    const Index soon = max_task_work / std::max<Index>(1, work_per_tile);
    const Index tiles_per_task = std::clamp<Index>(soon, 1, tiles_of_a_task(tiles_of_dw));
    const Index pieces = (tiles_of_dw.count() + tiles_per_task - 1) / tiles_per_task;
    this->for_pieces(
        range, [&](Index) { return pieces; },
        [&](Index e, Index piece) {
          const Index begin = piece * tiles_per_task, rows = dispatch_.rows(e);
          const TileRange some{begin, std::min(begin + tiles_per_task, tiles_of_dw.count())};
          if constexpr (pairs) {
            multiply_zipped_tiles(left(e), tiles_of_dw, some, rows, panels_of(e), store, dw[e]);
          } else {
            multiply_tiles(transposed(left(e)), tiles_of_dw, some, rows, panels_of(e), store, dw[e]);
          }
        });
  }

  // out += bias  ⇒  dbias = Σ over rows of dout
  template <class Rows>
  void column_sums(const ExpertRange& range, Rows rows, MatrixView<T> dbias) {
    this->for_pieces(
        range, [](Index) { return Index{1}; },
        [&](Index e, Index) {
          const Operand<T> a = rows(e);
          T* sums = scratch<T, Slot::sums>(dbias.cols);
          std::fill_n(sums, dbias.cols, T(0));
          for (Index r = 0; r < dispatch_.rows(e); ++r) {
            kernel_.axpy(dbias.cols, a.row_scale ? a.row_scale[r] : T(1), a.row(r), sums);
          }
          if (grads_.store == GradStore::accumulate) {
            kernel_.axpy(dbias.cols, T(1), sums, dbias.row(e));
          } else {
            std::copy_n(sums, dbias.cols, dbias.row(e));
          }
        });
  }

  // gate = x · w_gate, up = x · w_up  ⇒  dinput = dgate · w_gateᵀ + dup · w_upᵀ, added to its token
  void up_backward(const ExpertRange& range, const T* dgate, const T* dup, Destination<T> to) {
    const Index numbers = panels_start(range, range.end, depth_of(F_, pairs));
    Workspace<T, Slot::dgate_panels> packed_dgate(w_.glu() ? numbers : 0);
    Workspace<T, Slot::dup_panels> packed_dup(numbers);
    const auto rows = [&](const T* data) {
      return [=, this, &range](Index e) { return Operand<T>{data + start(range, e, F_), F_, 1}; };
    };
    pack_token_panels(range, rows(dup), F_, packed_dup.data());
    if (w_.glu()) pack_token_panels(range, rows(dgate), F_, packed_dgate.data());
    const bool weighted = this->weight_on(WeightOn::input);
    Workspace<T, Slot::dinput> dinput(weighted && !to.rows ? rows_of(range) * D_ : 0);
    if (weighted && !to.rows) {
      to.rows = {dinput.data() - dispatch_.begin(range.begin) * D_, dispatch_.num_rows(), D_, D_};
    }
    const Index block = this->columns_per_task(2 * F_, D_, range);
    parallel_for((D_ + block - 1) / block, [&](Index task) {
      const Index col = task * block, cols = std::min(block, D_ - col);
      for (Index e = range.begin; e < range.end; ++e) {
        if (dispatch_.rows(e) == 0) continue;
        const TokenPanels<T> up = token_panels(packed_dup.data(), range, e, F_);
        const TokenPanels<T> gate = w_.glu() ? token_panels(packed_dgate.data(), range, e, F_) : up;
        up_backward_columns(e, col, cols, gate, up, to);
      }
    });
    if (weighted) input_weight_gradients(range, to.rows);
  }

  void up_backward_columns(Index e, Index col, Index cols, const TokenPanels<T>& dgate, const TokenPanels<T>& dup,
                           const Destination<T>& to) {
    const Term up{dup, w_.up[e].row_range(col, col + cols)};
    const MatrixView<T> result = this->place(to, e, col);
    const auto use = [&](Index row, Index panel_col, MatrixView<T> sums) {
      this->deliver(to, e, row, col + panel_col, sums);
    };
    if (w_.glu()) {
      for_transposed({up, Term{dgate, w_.gate[e].row_range(col, col + cols)}}, result, use);
    } else {
      for_transposed({up}, result, use);
    }
  }

  // input = weight * x  ⇒  dweight = ⟨dinput, x⟩
  void input_weight_gradients(const ExpertRange& range, MatrixView<const T> dinput) {
    const Index first = dispatch_.begin(range.begin);
    parallel_ranges(rows_of(range), 64, [&](Index begin, Index end) {
      for (Index i = begin; i < end; ++i) {
        const auto row = static_cast<std::size_t>(first + i);
        grads_.weights.data[dispatch_.row_assignment[row]] =
            kernel_.dot(D_, dinput.row(first + i), x_.row(dispatch_.row_token[row]));
      }
    });
  }

  const ExpertWeights<S>& w_;
  std::optional<Forward<T, RowMajorWeights<T, S, pairs>>> forward_;  // for what was not kept
  MatrixView<const T> dy_;
  ExpertCache<const T> cache_;
  const ExpertGrads<T>& grads_;
  std::vector<Index> panels_before_;  // of tokens, of the experts before each
};

}  // namespace

template <class S>
void experts_backward(MatrixView<const Compute<S>> dresult, MatrixView<const Compute<S>> x,
                      const DispatchView& dispatch, MatrixView<const Compute<S>> weights,
                      const ExpertWeights<S>& experts, const ExpertOptions& options, bool combined,
                      ExpertCache<const Compute<S>> cache, const ExpertGrads<Compute<S>>& grads) {
  const auto run = [&]<bool pairs>() {
    Backward<S, pairs>(dresult, x, dispatch, weights, experts, options, combined, cache, grads).run();
  };
  if constexpr (std::is_same_v<S, bfloat16>) {
    if (kernels<Compute<S>>().pairs) return run.template operator()<true>();
  }
  run.template operator()<false>();
}

#define NUMOE_INSTANTIATE(S)                                                                                        \
  template void experts_backward(MatrixView<const Compute<S>>, MatrixView<const Compute<S>>, const DispatchView&,   \
                                 MatrixView<const Compute<S>>, const ExpertWeights<S>&, const ExpertOptions&, bool, \
                                 ExpertCache<const Compute<S>>, const ExpertGrads<Compute<S>>&);
NUMOE_INSTANTIATE(float)
NUMOE_INSTANTIATE(double)
NUMOE_INSTANTIATE(bfloat16)
#undef NUMOE_INSTANTIATE

}  // namespace numoe
