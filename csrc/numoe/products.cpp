#include "numoe/products.h"

#include <chrono>

#include "numoe/matmul.h"
#include "numoe/panels.h"
#include "numoe/transposed.h"

namespace numoe {
namespace {

Index width() { return kernels<float>().tile_cols; }
Index padded(Index n) { return num_panels(n, width()) * width(); }
constexpr auto nobody_uses = [](Index, Index, MatrixView<float>) {};

// Ordinary numbers: the sums neither overflow nor become subnormal.
Buffer<float> numbers(Index count) {
  Buffer<float> values(count);
  for (Index i = 0; i < count; ++i) values[i] = static_cast<float>(i % 7 - 3) / 8;
  return values;
}

}  // namespace

ProductProbe::ProductProbe(Product product, bool pairs, Index rows, Index depth, Index cols, Index count)
    : product_(product),
      pairs_(pairs),
      rows_(rows),
      depth_(depth),
      cols_(cols),
      count_(count),
      matrices_(numbers(count * size_of_matrix())),
      left_(numbers(product == Product::transposed ? padded(rows) * depth_of(cols, pairs)
                    : product == Product::outer    ? rows * depth
                                                   : rows * row_size<float>(depth, pairs))),
      right_(numbers(product == Product::outer ? row_size<float>(rows, pairs) * padded(cols) : 0)) {}

RowTiles ProductProbe::tiles() const { return {rows_, tile_rows<float>(pairs_)}; }

Index ProductProbe::size_of_matrix() const {
  if (product_ == Product::packed) return depth_of(depth_, pairs_) * padded(cols_);
  return pairs_ && product_ != Product::outer ? (depth_ * cols_ + 1) / 2 : depth_ * cols_;
}

MatrixView<const bfloat16> ProductProbe::narrow(const float* matrix) const {
  return {reinterpret_cast<const bfloat16*>(matrix), depth_, cols_, cols_};
}

double ProductProbe::rate(double seconds) {
  using Clock = std::chrono::steady_clock;
  const auto start = Clock::now();
  const auto spent = [&] { return std::chrono::duration<double>(Clock::now() - start).count(); };
  double operations = 0;
  do {
    multiply(matrices_.data() + next_ * size_of_matrix());
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
  const Index depth = depth_of(depth_, pairs_);
  const PackedRows<float> rows{left_.data(), tiles(), depth, row_size<float>(depth_, pairs_)};
  const float* const end = matrices_.data() + matrices_.size();
  const PackedPanels<float, float> panels{matrix, depth * width(), num_panels(cols_, width()), end, true, pairs_};
  for_panels(rows, panels, cols_, {}, nobody_uses);
}

void ProductProbe::multiply_row_major(const float* matrix) const {
  const PackedRows<float> rows{left_.data(), tiles(), depth_of(depth_, pairs_), row_size<float>(depth_, pairs_)};
  if (pairs_) return for_panels(rows, RowMajorPairs<float>(narrow(matrix), 0, cols_), cols_, {}, nobody_uses);
  for_panels(rows, RowMajor<float, float>({matrix, depth_, cols_, cols_}, 0, cols_), cols_, {}, nobody_uses);
}

void ProductProbe::multiply_transposed(const float* matrix) const {
  const TokenPanels<float> rows{left_.data(), rows_, depth_of(cols_, pairs_)};
  if (pairs_) return for_transposed({TransposedTerm<float, bfloat16, true>{rows, narrow(matrix)}}, {}, nobody_uses);
  for_transposed({TransposedTerm<float, float, false>{rows, {matrix, depth_, cols_, cols_}}}, {}, nobody_uses);
}

void ProductProbe::multiply_outer(float* matrix) const {
  const Operand<float> left{left_.data(), depth_, 1};
  const MatrixView<float> result{matrix, depth_, cols_, cols_};
  const RowTiles rows = tiles_of_gradient<float>(depth_, pairs_);
  const Index at_once = tiles_of_a_task(rows);
  for (Index i = 0; i < rows.count(); i += at_once) {
    const TileRange some{i, std::min(i + at_once, rows.count())};
    if (pairs_) {
      multiply_zipped_tiles(left, rows, some, rows_, right_.data(), Store::stream, result);
    } else {
      multiply_tiles(transposed(left), rows, some, rows_, right_.data(), Store::stream, result);
    }
  }
}

}  // namespace numoe
