#include "bindings/arrays.h"
#include "numoe/bfloat16.h"

namespace numoe::bindings {

namespace {

// An array of another type, of the same shape, that `convert` fills from the data of a.
template <class To, class From, class Convert>
py::array_t<Stored<To>> converted(const py::array& a, Convert convert) {
  if (!Dims::is_readable<Stored<From>>(a)) {
    throw py::type_error("the array must be C-contiguous, aligned and of dtype " +
                         std::string(py::str(py::dtype::of<Stored<From>>())));
  }
  Output<Stored<To>> result{uninitialised<Stored<To>>({a.shape(), a.shape() + a.ndim()})};
  const auto* const from = static_cast<const From*>(a.data());
  auto* const to = reinterpret_cast<To*>(result.data());
  {
    ReleasedGil nogil;
    convert(a.size(), from, to);
  }
  return result.array;
}

}  // namespace

void bind_bfloat16(py::module_& m) {
  m.def("widened", [](const py::array& bits) { return converted<float, bfloat16>(bits, widen); }, py::arg("bits"));
  m.def("rounded", [](const py::array& a) { return converted<bfloat16, float>(a, narrow); }, py::arg("a"));
}

}  // namespace numoe::bindings
