// The boundary: every NumPy array that enters the core is checked here, once, and becomes a view.
//
//   Dims dims;
//   auto x = dims.matrix<T>(x_, "x", "T D");            // binds T and D
//   auto w = dims.matrix<T>(w_, "w_router", "D E");     // D must be the same
//   auto y = dims.empty<T>("T E");                      // a new array of the bound shape
//
// Arrays must be C-contiguous, aligned and of exactly the expected dtype; the Python face converts, this refuses.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <memory>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>
#include <type_traits>
#include <vector>

#include "bindings/gil.h"
#include "numoe/view.h"

namespace numoe::bindings {

namespace py = pybind11;

// What numpy.zeros or numpy.empty makes, but from the start of a cache line on: vectors that cross lines cost twice, and
// only whole lines can be stored past the caches.
inline py::array line_aligned(const char* make, const std::vector<py::ssize_t>& shape, const py::dtype& dtype) {
  constexpr Index line = 64;
  if (dtype.attr("hasobject").cast<bool>()) throw py::type_error("dtype must not hold objects");
  Index bytes = dtype.itemsize();
  for (const py::ssize_t size : shape) {
    if (size < 0) throw py::value_error("shape must not be negative");
    bytes = checked_product(bytes, size);
  }
  if (bytes > std::numeric_limits<Index>::max() - line) throw std::length_error("array size overflows 64 bits");
  const py::array memory = py::module_::import("numpy").attr(make)(bytes + line, "u1");
  const auto address = reinterpret_cast<std::uintptr_t>(memory.data());
  return py::array(dtype, shape, reinterpret_cast<const void*>((address + line - 1) / line * line), memory);
}

// An uninitialised array.  A large one has memory of ours, on huge pages: a training step of 1,024 tokens had 1,500 page
// faults and takes 5 % less time with 13.  (To keep such memory for the next step saves no more: what the system has just
// cleared is in a cache.)
template <class T>
py::array_t<T> uninitialised(const std::vector<py::ssize_t>& shape) {
  constexpr Index large = Index{1} << 20;  // bytes
  Index count = 1;
  for (const py::ssize_t size : shape) count = checked_product(count, size);
  if (count < large / static_cast<Index>(sizeof(T))) return py::array_t<T>(shape);
  auto memory = std::make_unique<Buffer<T>>(count);
  const T* const data = memory->data();
  const py::capsule owner(memory.get(), [](void* buffer) { delete static_cast<Buffer<T>*>(buffer); });
  memory.release();
  return py::array_t<T>(shape, data, owner);
}

// Calls f.template operator()<T>() with the C++ type of the array's dtype (float32 or float64).
template <class F>
auto with_dtype(const py::array& array, F&& f) {
  if (py::isinstance<py::array_t<float>>(array)) return f.template operator()<float>();
  if (py::isinstance<py::array_t<double>>(array)) return f.template operator()<double>();
  throw py::type_error("dtype " + std::string(py::str(array.dtype())) + " is not float32 or float64");
}

// How numbers of type T arrive: NumPy knows no bfloat16, so the Python face passes the bits as uint16.
template <class T>
using Stored = std::conditional_t<std::is_same_v<T, bfloat16>, std::uint16_t, T>;

// An ndarray, not of a subclass that may mean something else.
inline bool is_plain_array(const py::object& object) {
  return Py_TYPE(object.ptr()) == py::detail::npy_api::get().PyArray_Type_;
}

// A freshly allocated array and the view through which the core fills it.
template <class T>
struct Output {
  py::array_t<T> array;
  T* data() { return array.mutable_data(); }
  MatrixView<T> matrix() { return {data(), array.shape(0), array.shape(1), array.shape(1)}; }
  std::span<T> span() { return {data(), static_cast<std::size_t>(array.size())}; }
};

// A copy of an argument on which the core relies for where it reads and writes: without the GIL, other threads may write to
// the array itself.
template <class T>
class Copied {
 public:
  explicit Copied(MatrixView<const T> a) : numbers_(a.rows * a.cols), view_{numbers_.data(), a.rows, a.cols, a.cols} {
    std::copy_n(a.data, numbers_.size(), numbers_.data());
  }
  Copied(const Copied&) = delete;
  Copied& operator=(const Copied&) = delete;

  const MatrixView<const T>& view() const { return view_; }

 private:
  Buffer<T> numbers_;
  MatrixView<const T> view_;
};

// Shape letters → sizes, bound by the first array that uses a letter and checked against every later one; and where the arrays
// are, because one that is written may share memory with none before it.  Letters and names are string literals; an array that
// fits costs no allocation.
class Dims {
 public:
  void bind(const char* letter, Index size) {
    Entry* known = find(letter);
    (known ? *known : add(letter)) = {letter, size, "the call"};
  }
  Index operator[](std::string_view letter) const {
    for (int i = 0; i < count_; ++i) {
      if (entries_[i].letter == letter) return entries_[i].size;
    }
    throw std::out_of_range("axis " + std::string(letter) + " is not bound");
  }

  template <class T>
  MatrixView<const T> matrix(const py::array& array, const char* name, const char* letters) {
    check<T>(array, name, letters, false);
    return {static_cast<const T*>(array.data()), array.shape(0), array.shape(1), array.shape(1)};
  }
  template <class T>
  Tensor3View<const T> tensor(const py::array& array, const char* name, const char* letters) {
    check<Stored<T>>(array, name, letters, false);
    return {static_cast<const T*>(array.data()), array.shape(0), array.shape(1), array.shape(2)};
  }
  template <class T>
  std::span<const T> vector(const py::array& array, const char* name, const char* letters) {
    check<T>(array, name, letters, false);
    return {static_cast<const T*>(array.data()), static_cast<std::size_t>(array.size())};
  }
  // An array the core writes into.
  template <class T>
  MatrixView<T> output_matrix(py::array& array, const char* name, const char* letters) {
    check<T>(array, name, letters, true);
    return {static_cast<T*>(array.mutable_data()), array.shape(0), array.shape(1), array.shape(1)};
  }
  template <class T>
  Tensor3View<T> output_tensor(py::array& array, const char* name, const char* letters) {
    check<T>(array, name, letters, true);
    return {static_cast<T*>(array.mutable_data()), array.shape(0), array.shape(1), array.shape(2)};
  }

  // An array of T that the core can read in place.
  template <class T>
  static bool is_readable(const py::array& array) {
    return py::isinstance<py::array_t<T>>(array) && in_order(array);
  }

  // An argument typed as "anything" that must be an array.
  static py::array as_array(const py::object& object, const char* name) {
    if (!py::isinstance<py::array>(object)) {
      throw py::type_error(std::string(name) + " must be a NumPy array; got " +
                           std::string(py::str(py::type::of(object).attr("__name__"))));
    }
    return py::reinterpret_borrow<py::array>(object);
  }

  // Optional arrays: None becomes an empty view.
  template <class T>
  MatrixView<const T> optional_matrix(const py::object& object, const char* name, const char* letters) {
    return object.is_none() ? MatrixView<const T>{} : matrix<T>(as_array(object, name), name, letters);
  }
  template <class T>
  Tensor3View<const T> optional_tensor(const py::object& object, const char* name, const char* letters) {
    return object.is_none() ? Tensor3View<const T>{} : tensor<T>(as_array(object, name), name, letters);
  }
  template <class T>
  std::span<const T> optional_vector(const py::object& object, const char* name, const char* letters) {
    return object.is_none() ? std::span<const T>{} : vector<T>(as_array(object, name), name, letters);
  }

  template <class T>
  Output<T> empty(const char* letters) const {
    return {uninitialised<T>(shape(letters))};
  }

  std::vector<py::ssize_t> shape(const char* letters) const {
    std::vector<py::ssize_t> sizes;
    sizes.reserve(4);
    for_letters(letters, [&](std::string_view letter) { sizes.push_back((*this)[letter]); });
    return sizes;
  }

 private:
  static constexpr int max_letters = 16, max_arrays = 32;
  struct Entry {
    std::string_view letter;
    Index size = 0;
    const char* from = nullptr;  // the array that bound it
  };
  struct Memory {
    const char *begin = nullptr, *end = nullptr;
    const char* array = nullptr;  // its name
  };

  template <class F>
  static void for_letters(std::string_view letters, F f) {
    for (;;) {
      const std::size_t space = letters.find(' ');
      f(letters.substr(0, space));
      if (space == std::string_view::npos) return;
      letters.remove_prefix(space + 1);
    }
  }

  Entry* find(std::string_view letter) {
    for (int i = 0; i < count_; ++i) {
      if (entries_[i].letter == letter) return &entries_[i];
    }
    return nullptr;
  }
  Entry& add(std::string_view letter) {
    if (count_ == max_letters) throw std::length_error("too many axes");
    return entries_[count_++] = {letter};
  }

  static std::string tuple_text(const char* letters) {
    std::string text = "(";
    int axes = 0;
    for_letters(letters, [&](std::string_view letter) {
      text += axes++ == 0 ? "" : ", ";
      text += letter;
    });
    return text + (axes == 1 ? ",)" : ")");
  }

  static std::string shape_text(const py::array& array) { return std::string(py::str(array.attr("shape"))); }

  template <class T>
  void check(const py::array& array, const char* name, const char* letters, bool written) {
    if (!py::isinstance<py::array_t<T>>(array)) {
      throw py::type_error(std::string(name) + " must have dtype " + std::string(py::str(py::dtype::of<T>())) +
                           "; got " + std::string(py::str(array.dtype())));
    }
    const py::ssize_t axes = 1 + std::count(letters, letters + std::strlen(letters), ' ');
    if (array.ndim() != axes) {
      throw py::value_error(std::string(name) + " must have shape " + tuple_text(letters) + "; got " +
                            shape_text(array));
    }
    py::ssize_t axis = 0;
    for_letters(letters, [&](std::string_view letter) { check_axis(array, name, letters, letter, axis++); });
    check_memory(array, name, written);
    check_overlap(
        {static_cast<const char*>(array.data()), static_cast<const char*>(array.data()) + array.nbytes(), name},
        written);
  }

  void check_overlap(const Memory& here, bool written) {
    for (int i = 0; written && i < num_arrays_; ++i) {
      if (here.begin < arrays_[i].end && arrays_[i].begin < here.end) {
        throw py::value_error(std::string(here.array) + " shares memory with " + arrays_[i].array +
                              " and would overwrite it; pass an array of its own");
      }
    }
    if (num_arrays_ == max_arrays) throw std::length_error("too many arrays");
    arrays_[num_arrays_++] = here;
  }

  void check_axis(const py::array& array, const char* name, const char* letters, std::string_view letter,
                  py::ssize_t axis) {
    const Index size = array.shape(axis);
    const Entry* known = find(letter);
    if (!known) {
      add(letter) = {letter, size, name};
    } else if (known->size != size) {
      throw py::value_error(std::string(name) + " must have shape " + tuple_text(letters) + " with " +
                            std::string(letter) + " = " + std::to_string(known->size) + " from " + known->from +
                            "; got " + shape_text(array));
    }
  }

  // C-contiguous and aligned.
  static bool in_order(const py::array& array) {
    constexpr int wanted = py::array::c_style | 0x0100;  // NPY_ARRAY_ALIGNED
    return (array.flags() & wanted) == wanted;
  }

  static void check_memory(const py::array& array, const char* name, bool written) {
    if (!in_order(array)) {
      throw py::value_error(std::string(name) + " must be C-contiguous and aligned; pass np.ascontiguousarray(" + name +
                            ")");
    }
    if (written && !array.writeable()) throw py::value_error(std::string(name) + " is read-only");
  }

  Entry entries_[max_letters];
  int count_ = 0;
  Memory arrays_[max_arrays];
  int num_arrays_ = 0;
};

}  // namespace numoe::bindings
