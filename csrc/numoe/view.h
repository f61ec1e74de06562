// Borrowed row-major views and one aligned owner: the library's whole vocabulary for memory.
// Letters (T tokens, D d_model, F d_ff, E experts, K choices, M dispatched rows) are those of the README's legend.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <span>
#include <stdexcept>
#include <type_traits>
#include <utility>

#include "numoe/memory.h"

namespace numoe {

using Index = std::ptrdiff_t;
static_assert(sizeof(Index) == 8, "numoe needs a 64-bit platform");

// The upper half of a float32.  Storage only: numoe computes in float32.
struct bfloat16 {
  std::uint16_t bits;
};
// Round to nearest, ties to even; NaN stays NaN (quiet), overflow becomes inf.
inline bfloat16 round_to_bfloat16(float value) {
  const auto bits = std::bit_cast<std::uint32_t>(value);
  if (value != value) return {static_cast<std::uint16_t>((bits >> 16) | 0x40u)};
  return {static_cast<std::uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}

// The type in which numbers of type S are multiplied and added.
template <class S>
using Compute = std::conditional_t<std::is_same_v<S, bfloat16>, float, S>;

// rows × cols numbers; row i starts at data + i * stride.
template <class T>
struct MatrixView {
  T* data = nullptr;
  Index rows = 0;
  Index cols = 0;
  Index stride = 0;

  T* row(Index i) const { return data + i * stride; }
  MatrixView row_range(Index begin, Index end) const { return {row(begin), end - begin, cols, stride}; }
  MatrixView from(Index i, Index j) const { return {row(i) + j, rows - i, cols - j, stride}; }  // rows i.., columns j..
  T& operator()(Index i, Index j) const { return data[i * stride + j]; }
  operator MatrixView<const T>() const { return {data, rows, cols, stride}; }
  explicit operator bool() const { return data != nullptr; }  // false: an optional matrix that is absent
};

// count contiguous matrices of one shape: the experts' weights (E, D, F).
template <class T>
struct Tensor3View {
  T* data = nullptr;
  Index count = 0;
  Index rows = 0;
  Index cols = 0;

  MatrixView<T> operator[](Index i) const { return {data + i * rows * cols, rows, cols, cols}; }
  operator Tensor3View<const T>() const { return {data, count, rows, cols}; }
  explicit operator bool() const { return data != nullptr; }
};

// a * b, or std::length_error where the product does not fit: sizes come from users.
inline Index checked_product(Index a, Index b) {
  if (a != 0 && b > std::numeric_limits<Index>::max() / a) throw std::length_error("array size overflows 64 bits");
  return a * b;
}

// Owner of `size` uninitialised numbers; throws std::bad_alloc.
template <class T>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(Index size)
      : data_(size == 0 ? nullptr : static_cast<T*>(allocate(bytes(checked_product(size, sizeof(T)))))), size_(size) {}
  Buffer(Buffer&& other) noexcept : data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)) {}
  Buffer& operator=(Buffer&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    return *this;
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() {
    if (data_) release(data_, bytes(size_ * static_cast<Index>(sizeof(T))));
  }

  T* data() { return data_; }
  const T* data() const { return data_; }
  Index size() const { return size_; }
  T& operator[](Index i) { return data_[i]; }
  const T& operator[](Index i) const { return data_[i]; }

 private:
  static std::size_t bytes(Index n) { return static_cast<std::size_t>(n); }

  T* data_ = nullptr;
  Index size_ = 0;
};

}  // namespace numoe
