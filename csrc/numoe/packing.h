// Operands in the order in which the register tile reads them.
//
// A product c (m, n) = a (m, k) · b (k, n) is computed as  row tiles of a  ×  panels of b:
//   row tile  [k][height]  height <= R rows, all k; m rows are cut into ceil(m / R) tiles of nearly equal height
//   panel     [k][W]       W columns, all k; the last panel of a matrix is padded with zeros
// Gathering, transposing and scaling happen while packing, so one register tile serves every product of the layer.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "numoe/kernels/kernels.h"
#include "numoe/view.h"

namespace numoe {

// Element (i, j) is data[row(i) * row_stride + col(j) * col_stride] * row_scale[i] * col_scale[j], where row(i) is
// row_index[i] if given, and absent scales are 1.
template <class T>
struct Operand {
  const T* data = nullptr;
  Index row_stride = 0;
  Index col_stride = 1;
  const std::int32_t* row_index = nullptr;
  const std::int32_t* col_index = nullptr;
  const T* row_scale = nullptr;
  const T* col_scale = nullptr;

  const T* row(Index i) const { return data + (row_index ? row_index[i] : i) * row_stride; }
  const T* col(Index j) const { return data + (col_index ? col_index[j] : j) * col_stride; }

  Operand cols_from(Index j) const {
    Operand rest = *this;
    if (col_index) {
      rest.col_index += j;
    } else {
      rest.data += j * col_stride;
    }
    if (col_scale) rest.col_scale += j;
    return rest;
  }
};

template <class T>
Operand<T> operand(MatrixView<const T> a) {
  return {a.data, a.stride, 1};
}
template <class T>
Operand<T> transposed(const Operand<T>& a) {
  return {a.data, a.col_stride, a.row_stride, a.col_index, a.row_index, a.col_scale, a.row_scale};
}
template <class T>
Operand<T> rows_from(const Operand<T>& a, Index i) {
  return transposed(transposed(a).cols_from(i));
}

constexpr Index max_tile_rows = 256, max_tile_cols = 64;  // of any target

// How `rows` rows are cut into tiles of at most `most_rows`: all heights equal or differing by one.
class RowTiles {
 public:
  RowTiles(Index rows, Index most_rows)
      : most_rows_(most_rows),
        count_((rows + most_rows - 1) / most_rows),
        height_(rows / std::max<Index>(1, count_)),
        higher_(rows - count_ * height_) {}

  Index most_rows() const { return most_rows_; }
  Index count() const { return count_; }
  Index begin(Index tile) const { return tile * height_ + std::min(tile, higher_); }
  Index height(Index tile) const { return height_ + (tile < higher_ ? 1 : 0); }

 private:
  Index most_rows_, count_, height_, higher_;  // the first `higher_` tiles have one row more
};

struct TileRange {
  Index begin, end;
  Index count() const { return end - begin; }
};

// A short run of numbers, in 16-byte moves that may overlap.
template <class T>
void copy_run(const T* source, Index n, T* target) {
  constexpr Index piece = 16 / sizeof(T);
  if (n < piece) {
    for (Index i = 0; i < n; ++i) target[i] = source[i];
    return;
  }
  for (Index i = 0; i + piece < n; i += piece) std::memcpy(target + i, source + i, 16);
  std::memcpy(target + n - piece, source + n - piece, 16);
}

// Rows to other rows of as many numbers, unless they are the same.
template <class T>
void copy_rows(MatrixView<const T> from, MatrixView<T> to) {
  if (from.data == to.data) return;
  for (Index r = 0; r < from.rows; ++r) copy_run(from.row(r), from.cols, to.row(r));
}

// Row tile [row, row + height) of a, all `depth` columns → [depth][height].
template <class T>
void pack_tile(const Operand<T>& a, Index row, Index height, Index depth, T* packed) {
  if (a.col_stride == 1 && !a.col_index && !a.row_scale && !a.col_scale) {
    const T* rows[max_tile_rows];
    for (Index r = 0; r < height; ++r) rows[r] = a.row(row + r);
    return kernels<T>().transpose(depth, height, rows, packed, height);
  }
  for (Index r = 0; r < height; ++r) {
    const T* source = a.row(row + r);
    const T factor = a.row_scale ? a.row_scale[row + r] : T(1);
    for (Index k = 0; k < depth; ++k) {
      packed[k * height + r] = factor * (a.col_scale ? a.col_scale[k] : T(1)) * source[k * a.col_stride];
    }
  }
}

// The tiles of `range`, one after the other.
template <class T>
void pack_tiles(const Operand<T>& a, const RowTiles& tiles, TileRange range, Index depth, T* packed) {
  const Index first = tiles.begin(range.begin);
  const bool columns_together = a.row_stride == 1 && !a.row_index && !a.row_scale;  // a transposed matrix
  if (!columns_together) {
    for (Index i = range.begin; i < range.end; ++i) {
      pack_tile(a, tiles.begin(i), tiles.height(i), depth, packed + (tiles.begin(i) - first) * depth);
    }
    return;
  }
  for (Index k = 0; k < depth; ++k) {
    const T* source = a.col(k);
    for (Index i = range.begin; i < range.end; ++i) {
      const Index begin = tiles.begin(i), height = tiles.height(i);
      T* const target = packed + (begin - first) * depth + k * height;
      copy_run(source + begin, height, target);
      for (Index r = 0; a.col_scale && r < height; ++r) target[r] *= a.col_scale[k];
    }
  }
}

// Panels of bfloat16 weights pair the k's: [depth/2][width][2], an odd depth padded with 0; 32 bits per lane, like
// float32, so that one tile shape serves both.
inline Index panel_size(Index depth, Index width, bool bf16) { return (bf16 ? (depth + 1) / 2 * 2 : depth) * width; }

inline Index num_panels(Index cols, Index width) { return (cols + width - 1) / width; }

// Columns [col, col + cols) of b, all `depth` rows → panels [depth][width].  No product of the layer scales its b.
template <class T>
void pack_panels(const Operand<T>& b, Index depth, Index col, Index cols, Index width, T* packed) {
  const T* columns[max_tile_cols];
  for (Index j = 0; j < cols; j += width, packed += width * depth) {
    const Index valid = std::min(width, cols - j);
    if (b.col_stride == 1 && !b.col_index && !b.row_index && valid == width) {
      kernels<T>().copy_panel(depth, b.data + col + j, b.row_stride, packed);
    } else if (b.col_stride == 1 && !b.col_index) {
      for (Index k = 0; k < depth; ++k) {
        std::copy_n(b.row(k) + col + j, valid, packed + k * width);
        std::fill_n(packed + k * width + valid, width - valid, T(0));
      }
    } else if (b.row_stride == 1 && !b.row_index) {
      for (Index i = 0; i < valid; ++i) columns[i] = b.col(col + j + i);
      kernels<T>().transpose(depth, valid, columns, packed, width);
    } else {
      for (Index i = 0; i < width; ++i) {
        for (Index k = 0; k < depth; ++k) {
          packed[k * width + i] = i < valid ? *(b.col(col + j + i) + (b.row(k) - b.data)) : T(0);
        }
      }
    }
  }
}

// float32 or bfloat16 numbers → one bfloat16 panel.
inline bfloat16 to_bfloat16(float v) { return round_to_bfloat16(v); }
inline bfloat16 to_bfloat16(bfloat16 v) { return v; }
template <class S>
void pack_bf16_panel(MatrixView<const S> b, Index col, Index width, bfloat16* packed) {
  const Index valid = std::min(width, b.cols - col);
  for (Index k = 0; k < (b.rows + 1) / 2 * 2; ++k) {
    bfloat16* target = packed + k / 2 * 2 * width + k % 2;
    for (Index j = 0; j < width; ++j) {
      target[2 * j] = k < b.rows && j < valid ? to_bfloat16(b(k, col + j)) : bfloat16{0};
    }
  }
}

// How many columns of a (depth, cols) operand one task multiplies `rows` rows by: few enough that `tasks` tasks have work
// and that a task ends soon (Ctrl-C waits for it), but whole panels.  This never changes a result, only who computes it.
constexpr Index max_task_work = 320'000'000;  // multiply-adds: some 20 ms on 16-byte vectors
inline Index column_block(Index depth, Index cols, Index width, Index tasks, Index rows) {
  const Index soon = max_task_work / std::max<Index>(1, depth * rows);
  const Index shared = (cols + tasks - 1) / tasks;
  return std::max(width, std::min(soon, shared + width - 1) / width * width);
}

// What a thread keeps memory for, until it ends, so that calls do not fault in fresh pages each time.
enum class Slot {
  // of a task: scratch
  panel,    // and rounded rows, and rows that are padded to a panel's width
  sums,     // and what else a product needs beside its panel
  passing,  // what is on its way to a product: zipped, widened, packed
  stage,    // see Stage
  // of a call: Workspace
  rounded,
  inputs,
  hidden,
  gate_again,
  up_again,
  dgate,
  dup,
  dout_panels,
  dgate_panels,
  dup_panels,
  right_panels,
  dinput,
  rows_of_experts,
};
template <class T, Slot slot>
Buffer<T>& kept_buffer() {
  thread_local Buffer<T> buffer;
  return buffer;
}

// A task's scratch: at least `size` uninitialised numbers, until the task ends or asks for the same slot again.
template <class T, Slot slot>
T* scratch(Index size) {
  Buffer<T>& buffer = kept_buffer<T, slot>();
  if (buffer.size() < size) {
    buffer = Buffer<T>();
    buffer = Buffer<T>(size);
  }
  return buffer.data();
}

// A call's scratch.  The call owns the kept buffer while it runs - a signal handler may call the library in its middle, on the
// same thread - and gives it back unless it is unusually large.
template <class T, Slot slot>
class Workspace {
 public:
  explicit Workspace(Index size) : buffer_(std::move(kept_buffer<T, slot>())) {
    if (buffer_.size() >= size) return;
    buffer_ = Buffer<T>();
    buffer_ = Buffer<T>(size);
  }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  ~Workspace() {
    constexpr Index kept_bytes = Index{64} << 20;
    if (buffer_.size() * static_cast<Index>(sizeof(T)) <= kept_bytes) kept_buffer<T, slot>() = std::move(buffer_);
  }
  T* data() { return buffer_.data(); }
  const T* data() const { return buffer_.data(); }

 private:
  Buffer<T> buffer_;
};

// ── pairs ───────────────────────────────────────────────────────────────────────────────────────────────────────────

// Rows of a tile of numbers, or of pairs.
template <class T>
Index tile_rows(bool pairs) {
  return pairs ? kernels<T>().pairs.tile_rows : kernels<T>().tile_rows;
}
// How many k's a product over so many numbers has.
inline Index depth_of(Index numbers, bool pairs) { return pairs ? (numbers + 1) / 2 : numbers; }
// How many T's a packed row of so many numbers is: one for each k, and padding where tiles of pairs want it.
template <class T>
Index row_size(Index numbers, bool pairs) {
  const Index depth = depth_of(numbers, pairs), together = pairs ? kernels<T>().pairs.together : 1;
  return (depth + together - 1) / together * together;
}

// Rows of `size` pairs → a tile's a, all of them or columns of it.
template <class T>
void pack_pairs(const T* const* rows, Index height, Index size, T* packed) {
  const Index together = kernels<T>().pairs.together;
  if (together == 1) return kernels<T>().transpose(size, height, rows, packed, height);
  for (Index k = 0; k < size; k += together) {
    for (Index r = 0; r < height; ++r, packed += together) std::copy_n(rows[r] + k, together, packed);
  }
}

// A row of a, `depth` numbers that lie together, rounded → `size` pairs, padded with zeros.
template <class T>
void round_row(const Operand<T>& a, Index row, Index depth, Index size, T* pairs) {
  kernels<T>().pairs.round(depth, a.row_scale ? a.row_scale[row] : T(1), a.row(row), pairs);
  const Index used = depth_of(depth, true);
  std::fill_n(pairs + used, size - used, T(0));
}
// Rows [row, row + count) of it, in this task's scratch.
template <class T>
void round_rows(const Operand<T>& a, Index row, Index count, Index depth, Index size, const T** rows) {
  T* rounded = scratch<T, Slot::panel>(count * size);
  for (Index r = 0; r < count; ++r, rounded += size) {
    round_row(a, row + r, depth, size, rounded);
    rows[r] = rounded;
  }
}

// Row tile [row, row + height) of a, whose rows are `size` pairs already → a tile's a.
template <class T>
void pack_tile_of_pairs(const Operand<T>& a, Index row, Index height, Index size, T* packed) {
  const T* rows[max_tile_rows];
  for (Index r = 0; r < height; ++r) rows[r] = a.row(row + r);
  pack_pairs(rows, height, size, packed);
}

// Row tile [row, row + height) of a, rounded to bfloat16 → a tile's a.
template <class T>
void pack_rounded_tile(const Operand<T>& a, Index row, Index height, Index depth, T* packed) {
  const T* rows[max_tile_rows];
  const Index size = row_size<T>(depth, true);
  round_rows(a, row, height, depth, size, rows);
  pack_pairs(rows, height, size, packed);
}

// Rows [row, row + count) of a, count <= W, rounded → a panel [pairs][W] whose columns they are, padded with zeros.
template <class T>
void pack_rounded_panel(const Operand<T>& a, Index row, Index count, Index depth, T* packed) {
  const T* rows[max_tile_cols];
  const Index size = depth_of(depth, true);
  round_rows(a, row, count, depth, size, rows);
  kernels<T>().transpose(size, count, rows, packed, kernels<T>().tile_cols);
}

// Columns [col, col + cols) of rows r and r + 1 of a's `rows`, rounded → `cols` pairs; a row after the last counts as 0.
template <class T>
void zip_two_rows(const Operand<T>& a, Index rows, Index r, Index col, Index cols, T* pairs) {
  const auto factor = [&](Index row) { return a.row_scale && row < rows ? a.row_scale[row] : T(1); };
  const T* odd = r + 1 < rows ? a.row(r + 1) + col : nullptr;
  kernels<T>().pairs.zip_rounded(cols, factor(r), a.row(r) + col, factor(r + 1), odd, pairs);
}

// Columns [col, col + cols) of `rows` rows of a, zipped → panels [size][W] of row_size(rows) pairs, padded with zeros.  Row by
// row, as memory likes it.
template <class T>
void pack_zipped_panels(const Operand<T>& a, Index rows, Index col, Index cols, T* packed) {
  const Index width = kernels<T>().tile_cols, pairs = depth_of(rows, true), size = row_size<T>(rows, true);
  for (Index r = 0; r < size; ++r) {
    for (Index j = 0; j < cols; j += width) {
      T* const target = packed + (j * size + r * width);
      const Index valid = r < pairs ? std::min(width, cols - j) : 0;
      if (valid > 0) zip_two_rows(a, rows, 2 * r, col + j, valid, target);
      std::fill_n(target + valid, width - valid, T(0));
    }
  }
}

// The same columns, those of the tiles of `range`, as rows of these tiles.
template <class T>
void pack_zipped_tiles(const Operand<T>& a, Index rows, const RowTiles& tiles, TileRange range, T* packed) {
  const Index together = kernels<T>().pairs.together, pairs = depth_of(rows, true), size = row_size<T>(rows, true);
  const Index first = tiles.begin(range.begin), cols = tiles.begin(range.end) - first;
  T* const zipped = scratch<T, Slot::passing>(size * cols);
  for (Index r = 0; r < pairs; ++r) zip_two_rows(a, rows, 2 * r, first, cols, zipped + r * cols);
  std::fill_n(zipped + pairs * cols, (size - pairs) * cols, T(0));
  if (together == 1) return pack_tiles(Operand<T>{zipped - first, 1, cols}, tiles, range, size, packed);
  for (Index i = range.begin; i < range.end; ++i) {
    const Index height = tiles.height(i);
    for (Index k = 0; k < size; k += together, packed += together * height) {
      const T* lines[max_tile_cols];
      for (Index g = 0; g < together; ++g) lines[g] = zipped + (k + g) * cols + tiles.begin(i) - first;
      kernels<T>().transpose(height, together, lines, packed, together);
    }
  }
}

}  // namespace numoe
