// Rows on their way through the caches: carried by the tiles of one product to where the next one, or nobody, reads them.
#pragma once

#include "numoe/packing.h"

namespace numoe {

// Rows of whole lines that go from one place to another, shared out among a known number of tiles.
class Carriage {
 public:
  Carriage() = default;
  // Pitches are bytes from one row to the next; carry says where from and where to.  A line is `to_line` bytes there.
  Carriage(Carry carry, Index rows, Index from_pitch, Index to_pitch, Index tiles, Index to_line = Carry::line)
      : carry_(carry), left_(rows * carry.lines_in_row), share_((left_ + tiles - 1) / tiles) {
    carry_.left_in_row = carry.lines_in_row;
    carry_.from_jump = from_pitch - carry.lines_in_row * Carry::line;
    carry_.to_jump = to_pitch - carry.lines_in_row * to_line;
  }

  // For the next tile to move; everything, if it is the last.
  Carry& next_share() { return next(share_); }
  Carry& rest() { return next(left_); }

 private:
  Carry& next(Index lines) {
    carry_.lines = std::min(lines, left_);
    left_ -= carry_.lines;
    return carry_;
  }

  Carry carry_;
  Index left_ = 0, share_ = 0;  // lines
};

// Numbers from one staged row to the next.  A matrix's rows often lie a power of two apart, where they share a few sets of
// each cache; staged rows are an odd number of lines apart.
template <class S>
Index staged_pitch(Index width) {
  constexpr Index line = Carry::line / sizeof(S);
  return ((width + line - 1) / line | 1) * line;
}

// Rows [row, row + rows) of b, less than `width` columns from `col` on, padded with zeros to as many, in this task's scratch.
template <class S>
const S* padded_rows(MatrixView<const S> b, Index row, Index rows, Index col, Index cols, Index width) {
  S* const padded = scratch<S, Slot::panel>(rows * width);
  for (Index r = 0; r < rows; ++r) {
    std::copy_n(b.row(row + r) + col, cols, padded + r * width);
    std::fill_n(padded + r * width + cols, width - cols, S{});
  }
  return padded;
}

// Part of a row-major matrix: `rows` rows of `cols` numbers, `stride` apart.  Staged, a row is followed by zeros up to
// `width` numbers.
template <class S>
struct Block {
  using Staged = S;
  const S* data = nullptr;
  Index stride = 0, rows = 0, cols = 0, width = 0;

  bool operator==(const Block&) const = default;
  Index pitch() const { return staged_pitch<S>(width); }

  // How `tiles` tiles move what is whole lines.
  static void carry(Carry& lines) { kernels<Compute<S>>().carry(lines); }
  Carriage carriage(S* staged, Index tiles) const {
    constexpr Index number = sizeof(S);
    const Index lines_in_row = cols * number / Carry::line;
    return Carriage({.route = habits().to_stage,
                     .from = reinterpret_cast<const char*>(data),
                     .to = reinterpret_cast<char*>(staged),
                     .lines_in_row = lines_in_row,
                     .lead = habits().lines_ahead / std::max<Index>(1, lines_in_row) * stride * number},
                    rows, stride * number, pitch() * number, tiles);
  }
  // What is less than a line at the end of each row.
  void copy_ends(S* staged) const {
    constexpr Index line = Carry::line / sizeof(S);
    const Index whole = cols / line * line;
    if (whole == width) return;
    for (Index r = 0; r < rows; ++r) {
      S* row = staged + r * pitch();
      std::copy(data + r * stride + whole, data + r * stride + cols, row + whole);
      std::fill(row + cols, row + width, S{});
    }
  }
};

// The same of bfloat16 numbers.  Staged, two rows are one row of pairs.
template <class T>
struct PairedBlock {
  using Staged = T;
  const bfloat16* data = nullptr;
  Index stride = 0, rows = 0, cols = 0, width = 0;

  bool operator==(const PairedBlock&) const = default;
  Index pitch() const { return staged_pitch<T>(width); }

  static void carry(Carry& lines) { kernels<T>().pairs.carry(lines); }
  Carriage carriage(T* staged, Index tiles) const {
    constexpr Index number = sizeof(bfloat16);
    const Index lines_in_row = cols * number / Carry::line;
    return Carriage({.route = habits().to_stage,
                     .from = reinterpret_cast<const char*>(data),
                     .to = reinterpret_cast<char*>(staged),
                     .lines_in_row = lines_in_row,
                     .lead = habits().lines_ahead / std::max<Index>(1, 2 * lines_in_row) * 2 * stride * number,
                     .odd = stride * number},
                    rows / 2, 2 * stride * number, pitch() * static_cast<Index>(sizeof(T)), tiles, 2 * Carry::line);
  }
  // What is less than a panel at the end of each row, and the last one of an odd number of rows.
  void copy_ends(T* staged) const {
    const PairKernels<T>& kernel = kernels<T>().pairs;
    const Index panel = kernels<T>().tile_cols, whole = cols / panel;
    if (rows % 2) kernel.zip(1, whole, data + (rows - 1) * stride, stride, staged + rows / 2 * pitch(), panel, 0);
    if (whole * panel == width) return;
    const MatrixView<const bfloat16> here{data, rows, cols, stride};
    for (Index r = 0; r < rows; r += 2) {
      const Index count = std::min<Index>(2, rows - r);
      const bfloat16* ends = padded_rows(here, r, count, whole * panel, cols - whole * panel, panel);
      kernel.zip(count, 1, ends, panel, staged + r / 2 * pitch() + whole * panel, panel, 0);
    }
  }
};

// Two buffers of one task: the tiles that multiply the block in one carry the next block into the other.
template <class Block>
class Stage {
 public:
  using Staged = typename Block::Staged;
  using Rows = Block;
  // For blocks of up to `size` numbers, counting rows by their pitch.
  explicit Stage(Index size) : size_(size), place_(scratch<Staged, Slot::stage>(2 * size_)) {}

  // The rows of `wanted`, their pitch apart, until the take after the next: staged before, or copied now.
  const Staged* take(const Block& wanted) {
    if (wanted != coming_) prepare(wanted, 1);
    Block::carry(carriage_.rest());
    coming_ = {};
    Staged* const taken = place_ + side_ * size_;
    side_ = 1 - side_;
    wanted.copy_ends(taken);
    return taken;
  }
  // From now on, `tiles` tiles carry shares of `next`, which may be nothing.
  void prepare(const Block& next, Index tiles) {
    coming_ = next;
    carriage_ = next.carriage(place_ + side_ * size_, tiles);
  }
  Carry& next_share() { return carriage_.next_share(); }

 private:
  Index size_;  // numbers of one buffer
  Staged* place_;
  Index side_ = 0;  // of the block to be taken next
  Block coming_;
  Carriage carriage_;
};

}  // namespace numoe
