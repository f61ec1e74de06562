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

#include <map>
#include <span>
#include <string>
#include <string_view>
#include <type_traits>
#include <vector>

#include "bindings/gil.h"
#include "numoe/view.h"

namespace numoe::bindings {

namespace py = pybind11;

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

// A freshly allocated array and the view through which the core fills it.
template <class T>
struct Output {
  py::array_t<T> array;
  T* data() { return array.mutable_data(); }
  MatrixView<T> matrix() { return {data(), array.shape(0), array.shape(1), array.shape(1)}; }
  Tensor3View<T> tensor() { return {data(), array.shape(0), array.shape(1), array.shape(2)}; }
  std::span<T> span() { return {data(), static_cast<std::size_t>(array.size())}; }
};

// Shape letters → sizes, bound by the first array that uses a letter and checked against every later one.
class Dims {
 public:
  void bind(const std::string& letter, Index size) { sizes_[letter] = {size, "the call"}; }
  Index operator[](const std::string& letter) const { return sizes_.at(letter).first; }

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
    return {py::array_t<T>(shape(letters))};
  }

  std::vector<py::ssize_t> shape(std::string_view letters) const {
    std::vector<py::ssize_t> sizes;
    for (const auto& letter : split(letters)) sizes.push_back(sizes_.at(letter).first);
    return sizes;
  }

 private:
  static std::vector<std::string> split(std::string_view letters) {
    std::vector<std::string> parts(1);
    for (char c : letters) {
      if (c == ' ') {
        parts.emplace_back();
      } else {
        parts.back() += c;
      }
    }
    return parts;
  }

  static std::string tuple_text(const std::vector<std::string>& letters) {
    std::string text = "(" + letters[0] + (letters.size() == 1 ? "," : "");
    for (std::size_t i = 1; i < letters.size(); ++i) text += ", " + letters[i];
    return text + ")";
  }

  static std::string shape_text(const py::array& array) { return std::string(py::str(array.attr("shape"))); }

  template <class T>
  void check(const py::array& array, const char* name, const char* letters, bool written) {
    if (!py::isinstance<py::array_t<T>>(array)) {
      throw py::type_error(std::string(name) + " must have dtype " + std::string(py::str(py::dtype::of<T>())) +
                           "; got " + std::string(py::str(array.dtype())));
    }
    const auto parts = split(letters);
    if (static_cast<std::size_t>(array.ndim()) != parts.size()) {
      throw py::value_error(std::string(name) + " must have shape " + tuple_text(parts) + "; got " + shape_text(array));
    }
    for (std::size_t i = 0; i < parts.size(); ++i) check_axis(array, name, letters, parts[i], i);
    check_memory(array, name, written);
  }

  void check_axis(const py::array& array, const char* name, const char* letters, const std::string& letter,
                  std::size_t axis) {
    const Index size = array.shape(static_cast<py::ssize_t>(axis));
    const auto [entry, inserted] = sizes_.try_emplace(letter, size, name);
    if (inserted || entry->second.first == size) return;
    throw py::value_error(std::string(name) + " must have shape " + tuple_text(split(letters)) + " with " + letter +
                          " = " + std::to_string(entry->second.first) + " from " + entry->second.second + "; got " +
                          shape_text(array));
  }

  static void check_memory(const py::array& array, const char* name, bool written) {
    constexpr int aligned = 0x0100;  // NPY_ARRAY_ALIGNED
    if (!(array.flags() & py::array::c_style) || !(array.flags() & aligned)) {
      throw py::value_error(std::string(name) + " must be C-contiguous and aligned; pass np.ascontiguousarray(" + name +
                            ")");
    }
    if (written && !array.writeable()) throw py::value_error(std::string(name) + " is read-only");
  }

  std::map<std::string, std::pair<Index, std::string>> sizes_;
};

}  // namespace numoe::bindings
