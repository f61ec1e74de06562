// The forward of the experts, over weights that are packed or not.
//
//   PackedWeights     panels in place
//   RowMajorWeights   NumPy's matrices, which their owner may change between calls
// Both name a matrix of an expert, columns [col, col + cols), as a source of panels, and say what rows it is multiplied
// by: numbers, or pairs of bfloat16.
#pragma once

#include "numoe/packed.h"
#include "numoe/pipeline.h"

namespace numoe {

// in_pairs: bfloat16 matrices are multiplied as pairs.
template <class T, class S, bool in_pairs = false>
class RowMajorWeights {
 public:
  static constexpr bool pairs = in_pairs, in_rows = true;  // in_rows: memory is fast only along them
  using Source = std::conditional_t<pairs, RowMajorPairs<T>, RowMajor<T, S>>;

  explicit RowMajorWeights(const ExpertWeights<S>& weights) : w_(weights) {}

  bool glu() const { return w_.glu(); }
  auto gate(Index e, Index col, Index cols) const { return Source(w_.gate[e], col, cols); }
  auto up(Index e, Index col, Index cols) const { return Source(w_.up[e], col, cols); }
  auto down(Index e, Index col, Index cols) const { return Source(w_.down[e], col, cols); }

 private:
  const ExpertWeights<S>& w_;
};

// in_pairs: bfloat16 panels are read as panels of pairs, which the type T only carries.
template <class T, class S, bool in_pairs = false>
class PackedWeights {
 public:
  static constexpr bool pairs = in_pairs, in_rows = false;

  explicit PackedWeights(const PackedExperts<S>& weights) : w_(weights) {}

  bool glu() const { return w_.glu(); }
  auto gate(Index e, Index col, Index cols) const { return panels(w_.up(e, col), 0, w_.up_step(), cols); }
  auto up(Index e, Index col, Index cols) const {
    return panels(w_.up(e, col), glu() ? w_.gate_to_up() : 0, w_.up_step(), cols);
  }
  auto down(Index e, Index col, Index cols) const { return panels(w_.down(e, col), 0, w_.down_step(), cols); }

 private:
  using Element = std::conditional_t<pairs, T, S>;  // of a panel: a pair, or a number

  // Panels `step` numbers apart, which start `offset` numbers behind `first`.
  PackedPanels<T, Element> panels(const S* first, Index offset, Index step, Index cols) const {
    constexpr Index size = sizeof(Element) / sizeof(S);
    const Element* begin = reinterpret_cast<const Element*>(first);
    const Index count = num_panels(cols, kernels<T>().tile_cols);
    return {begin + offset / size, step / size, count, begin + count * step / size, w_.from_memory(), pairs};
  }

  const PackedExperts<S>& w_;
};

// rows of a tile, or of a panel of sums, plus a bias
template <class T>
void add_bias(const T* bias, Index cols, Index rows, T* sums, Index stride) {
  as_array(MatrixView<T>{sums, rows, cols, stride}).rowwise() += as_row(bias, cols);
}

template <class T, class Weights>
class Forward : Pipeline<T> {
 public:
  using Base = Pipeline<T>;
  Forward(MatrixView<const T> x, const DispatchView& dispatch, MatrixView<const T> weights, Index d_model, Index d_ff,
          const ExpertOptions& options, bool combined, const Weights& matrices, ExpertBiases<T> bias)
      : Base(x, dispatch, weights, d_model, d_ff, options, combined, Weights::pairs),
        matrices_(matrices),
        bias_(bias),
        rounded_(round_inputs_once() ? x.rows * packed_size(D_) : 0) {
    if (round_inputs_once()) round_inputs();
  }

  void run(ExpertCache<T> cache, MatrixView<T> result) const {
    for (const MatrixView<T>& pre : {cache.gate, cache.up}) touch_pages(pre.data, pre.rows * pre.cols);
    Destination<T> to{.weights = this->weight_on(WeightOn::output) ? row_weight_.data() : nullptr};
    (combined_ ? to.sums : to.rows) = result;
    // Panels for few rows come from memory, on which threads draw best together (1.0-1.09 times as fast, Zen 5).
    const Index numbers = packed_size(D_) + packed_size(F_), rows_apart = Weights::in_rows ? 0 : 12;
    this->for_ranges(numbers, rows_apart, to, [&](const ExpertRange& range, const Destination<T>& here) {
      const Index size = rows_of(range) * packed_size(F_);
      Workspace<T, Slot::hidden> hidden(size);
      touch_pages(hidden.data(), size);
      up(range, cache, hidden.data());
      down(range, hidden.data(), here);
    });
  }

  // cache.gate = x · w_gate + b_gate, cache.up = x · w_up + b_up, and
  // hidden = act(gate) * up, stored as row tiles for the next product; either may be absent
  void up(const ExpertRange& range, ExpertCache<T> cache, T* hidden) const {
    Workspace<T, Slot::inputs> inputs(rows_of(range) * packed_size(D_));
    pack_inputs(range, inputs.data());
    const Index block =
        Weights::in_rows ? this->long_columns_per_task(2 * D_, F_, range) : this->columns_per_task(2 * D_, F_, range);
    this->for_pieces(
        range, [&](Index) { return (F_ + block - 1) / block; },
        [&](Index e, Index piece) {
          const Index col = piece * block, cols = std::min(block, F_ - col);
          up_columns(e, col, cols, packed_rows(inputs.data(), range, e, D_), cache,
                     hidden ? hidden + start(range, e, packed_size(F_)) : nullptr);
        });
  }

 private:
  using Base::combined_, Base::dispatch_, Base::D_, Base::F_, Base::W_, Base::kernel_, Base::options_;
  using Base::packed_size, Base::row_weight_, Base::rows_of, Base::start, Base::tiles, Base::tokens, Base::x_;

  // Whether rows of x become pairs before they are packed, because several experts take each of them.
  bool round_inputs_once() const {
    constexpr Index most_bytes = Index{64} << 20;
    return Weights::pairs && !this->weight_on(WeightOn::input) && dispatch_.num_rows() > x_.rows &&
           x_.rows * packed_size(D_) * static_cast<Index>(sizeof(T)) <= most_bytes;
  }
  void round_inputs() {
    const Operand<T> x = operand(x_);
    const Index size = packed_size(D_);
    parallel_ranges(x_.rows, 64, [&](Index begin, Index end) {
      for (Index t = begin; t < end; ++t) round_row(x, t, D_, size, rounded_.data() + t * size);
    });
  }
  void pack_inputs(const ExpertRange& range, T* packed) const {
    const Index size = packed_size(D_);
    this->pack_rows(range, size, packed, [&](Index e, Index row, Index height, T* target) {
      if (round_inputs_once()) {
        pack_tile_of_pairs<T>({rounded_.data(), size, 1, tokens(e)}, row, height, size, target);
      } else if (Weights::pairs) {
        pack_rounded_tile(this->inputs(e), row, height, D_, target);
      } else {
        pack_tile(this->inputs(e), row, height, D_, target);
      }
    });
  }

  // Expert e's rows of `depth` numbers, in a buffer for the experts of `range`.
  PackedRows<T> packed_rows(const T* buffer, const ExpertRange& range, Index e, Index depth) const {
    const Index size = packed_size(depth);
    return {buffer + start(range, e, size), tiles(e), depth_of(depth, Weights::pairs), size};
  }

  // The first matrix of a GLU is w_gate; plain MLP experts have w_up alone.
  void up_columns(Index e, Index col, Index cols, const PackedRows<T>& x, ExpertCache<T> cache, T* hidden) const {
    const bool glu = matrices_.glu();
    const auto up = matrices_.up(e, col, cols);
    const auto gate = glu ? matrices_.gate(e, col, cols) : up;
    auto stage = up.stage();
    for_passes(x.tiles, [&](TileRange pass) {
      const Index first = x.tiles.begin(pass.begin), height = x.tiles.begin(pass.end) - first, size = height * W_;
      const Index at_once = up.panels_at_once(pass.count(), height);
      T* pre = scratch<T, Slot::sums>((glu ? 2 : 1) * at_once * size);
      T* linear = glu ? pre + at_once * size : nullptr;
      for (Index j = 0; j < up.count(); j += at_once) {
        const auto now = some_panels(gate, j, at_once), beside = some_panels(up, j, at_once);
        const auto later = panels_after(gate, j, at_once, pass.end < x.tiles.count());
        const Index count = now.count;
        multiply_panels(stage, x, pass, now, glu ? beside : later, Sums<T>::side_by_side(pre, height));
        if (glu) multiply_panels(stage, x, pass, beside, later, Sums<T>::side_by_side(linear, height));
        const Columns here{e, col + j * W_, std::min(count * W_, cols - j * W_), first, height};
        finish(here, pre, glu ? bias_.gate : bias_.up, glu ? cache.gate : cache.up);
        if (glu) finish(here, linear, bias_.up, cache.up);
        if (!hidden) continue;
        T* const h = pre;
        kernel_.activate(options_.activation, count * size, pre, linear, h);
        for (Index p = 0; p < count; ++p) {
          const Index panel_col = (j + p) * W_;
          store_hidden(x.tiles, pass, col + panel_col, std::min(W_, cols - panel_col), h + p * size, hidden);
        }
      }
    });
  }

  // Columns [col, col + cols) of rows [row, row + rows) of expert e.
  struct Columns {
    Index e, col, cols, row, rows;
  };
  // Adds the bias to sums before the activation, [panel][rows][W], and keeps them for the backward if there is a cache: row by
  // row, as memory likes it.
  void finish(const Columns& here, T* sums, MatrixView<const T> bias, MatrixView<T> cache) const {
    const Index size = here.rows * W_;
    const auto for_panels_of = [&](auto use) {
      for (Index j = 0; j < here.cols; j += W_) use(sums + j / W_ * size, j, std::min(W_, here.cols - j));
    };
    if (bias) {
      for_panels_of([&](T* panel, Index j, Index valid) {
        add_bias(bias.row(here.e) + here.col + j, valid, here.rows, panel, W_);
      });
    }
    for (Index r = 0; cache && r < here.rows; ++r) {
      T* const row = cache.row(dispatch_.begin(here.e) + here.row + r) + here.col;
      for_panels_of([&](T* panel, Index j, Index valid) { copy_run(panel + r * W_, valid, row + j); });
    }
  }

  // h (rows of the pass, W) → columns [col, col + cols) of the expert's row tiles; pairs are rounded in place
  void store_hidden(const RowTiles& row_tiles, TileRange pass, Index col, Index cols, T* h, T* hidden) const {
    const Index size = packed_size(cols), stride = Weights::pairs && cols == W_ ? size : W_;
    if (Weights::pairs) round_hidden(row_tiles.begin(pass.end) - row_tiles.begin(pass.begin), cols, h);
    const T* rows[max_tile_rows];
    for (Index i = pass.begin; i < pass.end; ++i) {
      const Index height = row_tiles.height(i);
      for (Index r = 0; r < height; ++r, h += stride) rows[r] = h;
      T* const target = hidden + row_tiles.begin(i) * packed_size(F_) + packed_size(col) * height;
      if constexpr (Weights::pairs) {
        pack_pairs(rows, height, size, target);
      } else {
        kernel_.transpose(size, height, rows, target, height);
      }
    }
  }
  // `cols` of W numbers in each row → pairs: whole rows one after the other, others where they are.
  void round_hidden(Index rows, Index cols, T* h) const {
    if (cols == W_) return kernel_.pairs.round(rows * W_, T(1), h, h);
    const Index pairs = (cols + 1) / 2, padding = packed_size(cols) - pairs;
    for (Index r = 0; r < rows; ++r, h += W_) {
      kernel_.pairs.round(cols, T(1), h, h);
      std::fill_n(h + pairs, padding, T(0));
    }
  }

  // hidden · w_down + b_down; a task owns its columns and takes the experts in order
  void down(const ExpertRange& range, const T* hidden, const Destination<T>& to) const {
    const Index block = this->columns_per_task(F_, D_, range);
    parallel_for((D_ + block - 1) / block, [&](Index task) {
      const Index col = task * block, cols = std::min(block, D_ - col);
      for (Index e = range.begin; e < range.end; ++e) {
        if (dispatch_.rows(e) == 0) continue;
        down_columns(e, col, cols, packed_rows(hidden, range, e, F_), to);
      }
    });
  }

  void down_columns(Index e, Index col, Index cols, const PackedRows<T>& hidden, const Destination<T>& to) const {
    const auto down = matrices_.down(e, col, cols);
    for_panels(hidden, down, cols, this->place(to, e, col), [&](Index row, Index panel_col, MatrixView<T> sums) {
      if (bias_.down) add_bias(bias_.down.row(e) + col + panel_col, sums.cols, sums.rows, sums.data, sums.stride);
      this->deliver(to, e, row, col + panel_col, sums);
    });
  }

  Weights matrices_;
  ExpertBiases<T> bias_;
  Workspace<T, Slot::rounded> rounded_;  // x as pairs (T, packed_size(D)), or nothing
};

}  // namespace numoe
