#include "numoe/products.h"

#include <chrono>

#include "numoe/matmul.h"
#include "numoe/panels.h"
#include "numoe/transposed.h"

namespace numoe {
namespace {

Index width() { return kernels<float>().tile_cols; }
Index padded(Index n) { return num_panels(n, width()) * width(); }
RowTiles tiles_of(Index rows) { return {rows, kernels<float>().tile_rows}; }

constexpr auto nobody_uses = [](Index, Index, MatrixView<float>) {};

// Ordinary numbers: the sums neither overflow nor become subnormal.
Buffer<float> numbers(Index count) {
  Buffer<float> values(count);
  for (Index i = 0; i < count; ++i) values[i] = static_cast<float>(i % 7 - 3) / 8;
  return values;
}

}  // namespace

ProductProbe::ProductProbe(Product product, Index rows, Index depth, Index cols, Index count)
    : product_(product),
      rows_(rows),
      depth_(depth),
      cols_(cols),
      count_(count),
      size_(depth * (product == Product::packed ? padded(cols) : cols)),
      matrices_(numbers(count * size_)),
      left_(numbers(product == Product::transposed ? padded(rows) * cols : rows * depth)),
      right_(numbers(product == Product::outer ? rows * padded(cols) : 0)) {}

double ProductProbe::rate(double seconds) {
  using Clock = std::chrono::steady_clock;
  const auto start = Clock::now();
  const auto spent = [&] { return std::chrono::duration<double>(Clock::now() - start).count(); };
  double operations = 0;
  do {
    multiply(matrices_.data() + next_ * size_);
    next_ = (next_ + 1) % count_;
    operations += 2.0 * static_cast<double>(rows_ * depth_ * cols_);
  } while (spent() < seconds);
  return operations / spent();
}

void ProductProbe::multiply(float* matrix) {
  switch (product_) {
    case Product::packed:
      return multiply_packed(matrix);
    case Product::row_major:
      return multiply_row_major(matrix);
    case Product::transposed:
      return multiply_transposed(matrix);
    case Product::outer:
      return multiply_outer(matrix);
  }
}

void ProductProbe::multiply_packed(const float* matrix) const {
  const PackedRows<float> rows{left_.data(), tiles_of(rows_), depth_, depth_};
  const float* const end = matrices_.data() + matrices_.size();
  const PackedPanels<float, float> panels{matrix, depth_ * width(), num_panels(cols_, width()), end, true, false};
  for_panels(rows, panels, cols_, nobody_uses);
}

void ProductProbe::multiply_row_major(const float* matrix) const {
  const PackedRows<float> rows{left_.data(), tiles_of(rows_), depth_, depth_};
  for_panels(rows, RowMajor<float, float>({matrix, depth_, cols_, cols_}, 0, cols_), cols_, nobody_uses);
}

void ProductProbe::multiply_transposed(const float* matrix) const {
  const TransposedTerm<float, float, false> term{{left_.data(), rows_, cols_}, {matrix, depth_, cols_, cols_}};
  for_transposed({term}, nobody_uses);
}

void ProductProbe::multiply_outer(float* matrix) const {
  constexpr Index tiles_at_once = 8;  // as a task of the backward has them
  const Operand<float> left{left_.data(), depth_, 1};
  const RowTiles tiles = tiles_of(depth_);
  for (Index i = 0; i < tiles.count(); i += tiles_at_once) {
    multiply_tiles(transposed(left), tiles, {i, std::min(i + tiles_at_once, tiles.count())}, rows_, right_.data(),
                   Store::stream, {matrix, depth_, cols_, cols_});
  }
}

}  // namespace numoe
