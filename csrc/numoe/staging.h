// Rows on their way through the caches: carried by the tiles of one product to where the next one, or nobody, reads them.
#pragma once

#include "numoe/packing.h"

namespace numoe {

// Rows of whole lines that go from one place to another, shared out among a known number of tiles.
class Carriage {
 public:
  Carriage() = default;
  // Pitches are bytes from one row to the next; carry says where from and where to.
  Carriage(Carry carry, Index rows, Index from_pitch, Index to_pitch, Index tiles)
      : carry_(carry), left_(rows * carry.lines_in_row), share_((left_ + tiles - 1) / tiles) {
    carry_.left_in_row = carry.lines_in_row;
    carry_.from_jump = from_pitch - carry.lines_in_row * Carry::line;
    carry_.to_jump = to_pitch - carry.lines_in_row * Carry::line;
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

// Part of a row-major matrix: `rows` rows of `cols` numbers, `stride` apart.  Staged, a row is followed by zeros up to
// `width` numbers.
template <class S>
struct Block {
  const S* data = nullptr;
  Index stride = 0, rows = 0, cols = 0, width = 0;

  bool operator==(const Block&) const = default;
};

// Two buffers of one task: the tiles that multiply the block in one carry the next block into the other.
//
// A matrix's rows often lie a power of two apart, where they share a few sets of each cache; staged rows are an odd
// number of lines apart.
template <class S>
class Stage {
 public:
  using T = Compute<S>;
  using Rows = Block<S>;
  // For blocks of up to `size` numbers, counting rows by their pitch.
  explicit Stage(Index size) : size_(size), place_(scratch<S, 3>(2 * size_)) {}

  // Numbers from one staged row to the next.
  static Index pitch(Index width) {
    constexpr Index line = Carry::line / sizeof(S);
    return ((width + line - 1) / line | 1) * line;
  }

  // The rows of `wanted`, pitch(width) apart, until the take after the next: staged before, or copied now.
  const S* take(const Block<S>& wanted) {
    if (wanted != coming_) prepare(wanted, 1);
    kernels<T>().carry(carriage_.rest());
    coming_ = {};
    S* const taken = place_ + side_ * size_;
    side_ = 1 - side_;
    copy_ends(wanted, taken);
    return taken;
  }
  // From now on, `tiles` tiles carry shares of `next`, which may be nothing.
  void prepare(const Block<S>& next, Index tiles) {
    constexpr Index lines_ahead = 64;
    const Index row_bytes = next.stride * static_cast<Index>(sizeof(S));
    const Index lines_in_row = next.cols * static_cast<Index>(sizeof(S)) / Carry::line;
    coming_ = next;
    carriage_ = Carriage({.from = reinterpret_cast<const char*>(next.data),
                          .to = reinterpret_cast<char*>(place_ + side_ * size_),
                          .lines_in_row = lines_in_row,
                          .lead = lines_ahead / std::max<Index>(1, lines_in_row) * row_bytes},
                         next.rows, row_bytes, pitch(next.width) * static_cast<Index>(sizeof(S)), tiles);
  }
  Carry& next_share() { return carriage_.next_share(); }

 private:
  // What is less than a line at the end of each row.
  static void copy_ends(const Block<S>& block, S* staged) {
    constexpr Index line = Carry::line / sizeof(S);
    const Index whole = block.cols / line * line;
    if (whole == block.width) return;
    for (Index r = 0; r < block.rows; ++r) {
      S* row = staged + r * pitch(block.width);
      std::copy(block.data + r * block.stride + whole, block.data + r * block.stride + block.cols, row + whole);
      std::fill(row + block.cols, row + block.width, S{});
    }
  }

  Index size_;  // numbers of one buffer
  S* place_;
  Index side_ = 0;  // of the block to be taken next
  Block<S> coming_;
  Carriage carriage_;
};

}  // namespace numoe
