// Products with the transpose of a row-major matrix, rows · matrixᵀ, without transposing it.
//
// The matrix's rows are read where they are, as the rows of a tile, and the tokens' rows are its columns: what comes out is
// the transpose of the result.  Each element is one sum over ascending k of the same products, so that its bits are those
// of a tile the other way round.
#pragma once

#include <initializer_list>

#include "numoe/packing.h"

namespace numoe {

// Rows of tokens as panels, packed [panel][depth][W], the last one padded with zeros.  With pairs, depth counts them.
template <class T>
struct TokenPanels {
  const T* data;
  Index rows, depth;

  Index count() const { return num_panels(rows, width()); }
  const T* panel(Index p) const { return data + p * depth * width(); }
  static Index width() { return kernels<T>().tile_cols; }
};

// One product in a sum of products: rows (n, depth) · matrixᵀ, with matrix (columns of the result, depth).
// in_pairs: a bfloat16 matrix is multiplied as pairs.
template <class T, class S, bool in_pairs>
struct TransposedTerm {
  static constexpr bool pairs = in_pairs;
  TokenPanels<T> rows;
  MatrixView<const S> matrix;

  // Rows [begin, begin + count) of the matrix, in the type of the arithmetic, or as pairs.
  MatrixView<const T> matrix_rows(Index begin, Index count) const {
    const MatrixView<const S> here = matrix.row_range(begin, begin + count);
    if constexpr (pairs) {
      return pairs_of(here);
    } else if constexpr (std::is_same_v<S, T>) {
      return here;
    } else {
      T* wide = scratch<T, Slot::passing>(count * matrix.cols);
      kernels<T>().widen(count, matrix.cols, here.data, here.stride, wide, matrix.cols);
      return {wide, count, matrix.cols, matrix.cols};
    }
  }

 private:
  // Where they are, unless half a pair would belong to another row.
  static MatrixView<const T> pairs_of(MatrixView<const bfloat16> here) {
    const Index size = (here.cols + 1) / 2;
    if (here.cols % 2 == 0 && here.stride % 2 == 0) {
      return {reinterpret_cast<const T*>(here.data), here.rows, size, here.stride / 2};
    }
    T* const pairs = scratch<T, Slot::passing>(here.rows * size);
    for (Index r = 0; r < here.rows; ++r) {
      bfloat16* const row = reinterpret_cast<bfloat16*>(pairs + r * size);
      row[2 * size - 1] = {0};
      std::copy_n(here.row(r), here.cols, row);
    }
    return {pairs, here.rows, size, size};
  }
};

// Whose unpacked_tile multiplies numbers, or pairs.
template <class T, bool pairs>
const auto& unpacked_kernels() {
  if constexpr (pairs) {
    return kernels<T>().pairs;
  } else {
    return kernels<T>();
  }
}

// sums [panel][cols][W] (+)= the transpose of term.rows · term.matrixᵀ, columns [col, col + cols), for `count` panels of
// tokens from `first` on, the last of them up to column `last`.
template <class Term, class T>
void multiply_transposed(const Term& term, Index first, Index count, Index last, Index col, Index cols, Store store,
                         T* sums) {
  const auto& kernel = unpacked_kernels<T, Term::pairs>();
  const Index width = TokenPanels<T>::width();
  const RowTiles tiles{cols, kernel.unpacked_rows};
  const Neighbours neighbours{.panels = count, .b_step = term.rows.depth * width, .c_step = cols * width};
  TileArgs<T> args{.depth = term.rows.depth, .b = term.rows.panel(first), .c_stride = width, .store = store};
  for (Index i = 0; i < tiles.count(); ++i) {
    const Index height = tiles.height(i), begin = col + tiles.begin(i);
    const MatrixView<const T> rows = term.matrix_rows(begin, height);
    args.a = rows.data;
    args.a_stride = rows.stride;
    args.c = sums + tiles.begin(i) * width;
    const Index bytes =
        height * term.matrix.cols * static_cast<Index>(sizeof(*term.matrix.data));  // of this tile's rows
    Index steps = args.depth;
    if constexpr (Term::pairs) steps *= kernel.passes(height);
    args.ahead = Ahead::spread(term.matrix.row(begin + height), bytes, steps, Carry::line);
    kernel.unpacked_tile(height, args, neighbours, last);
  }
}

// Whole panels of tokens, two at least, that stay in a cache while all tiles of the matrix pass over them.
template <class T>
Index rows_in_cache(Index depth) {
  constexpr Index cache = Index{512} << 10;  // bytes
  const Index width = kernels<T>().tile_cols;
  return std::max<Index>(2, cache / (depth * width * static_cast<Index>(sizeof(T)))) * width;
}

// use(row, col, sums) for all of Σ rows · matrixᵀ: `sums` are those of rows [row, ..) and at most W columns [col, ..), where
// they belong in the `result`, if there is one and they are W columns.  All terms have the same rows of tokens and columns.
template <class T, class S, bool pairs, class Use>
void for_transposed(std::initializer_list<TransposedTerm<T, S, pairs>> terms, MatrixView<T> result, Use use) {
  constexpr Index cols_at_once = 96, most_rows = 256;  // whose sums fit a cache
  const Index width = kernels<T>().tile_cols, least = habits().half_vectors ? 1 : width / 2;
  const Index part = std::max(unpacked_kernels<T, pairs>().unpacked_part, least);
  const Index cols = terms.begin()->matrix.rows, rows = terms.begin()->rows.rows;
  const Index rows_at_once = std::min(most_rows, rows_in_cache<T>(terms.begin()->rows.depth));
  T* sums = scratch<T, Slot::sums>(rows_at_once * (cols_at_once + width));
  T* const elsewhere = sums + rows_at_once * cols_at_once;
  for (Index row = 0; row < rows; row += rows_at_once) {
    const Index rows_here = std::min(rows_at_once, rows - row), panels = num_panels(rows_here, width);
    const Index last = num_panels((rows_here - 1) % width + 1, part) * part;
    for (Index col = 0; col < cols; col += cols_at_once) {
      const Index cols_here = std::min(cols_at_once, cols - col);
      Store store = Store::overwrite;
      for (const auto& term : terms) {
        multiply_transposed(term, row / width, panels, last, col, cols_here, store, sums);
        store = Store::accumulate;
      }
      for (Index j = 0; j < cols_here; j += width) {
        const Index valid = std::min(width, cols_here - j);
        MatrixView<T> here{elsewhere, rows_here, valid, width};
        if (result && valid == width) here = {result.row(row) + col + j, rows_here, width, result.stride};
        for (Index p = 0; p < panels; ++p) {
          const T* columns[max_tile_cols];
          for (Index i = 0; i < valid; ++i) columns[i] = sums + (p * cols_here + j + i) * width;
          const Index rows_of_panel = std::min(width, rows_here - p * width);
          kernels<T>().transpose(rows_of_panel, valid, columns, here.row(p * width), here.stride);
        }
        use(row, col + j, here);
      }
    }
  }
}

}  // namespace numoe
