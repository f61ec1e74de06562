// The experts' parameters of a Python dict as views.
#pragma once

#include "bindings/arrays.h"
#include "bindings/options.h"
#include "numoe/experts.h"

namespace numoe::bindings {

// params[name], or None.
inline py::object param(const py::dict& params, const char* name) {
  PyObject* found = PyDict_GetItemString(params.ptr(), name);  // borrowed
  return found ? py::reinterpret_borrow<py::object>(found) : py::none();
}

// Calls f.template operator()<S>() with the type of the experts' matrices, for arithmetic in the dtype of x.
template <class F>
auto with_weights(const py::array& x, const py::dict& params, F&& f) {
  return with_dtype(x, [&]<class T>() {
    if constexpr (std::is_same_v<T, float>) {
      if (py::isinstance<py::array_t<Stored<bfloat16>>>(param(params, "w_up")))
        return f.template operator()<bfloat16>();
    }
    return f.template operator()<T>();
  });
}

template <class S>
ExpertWeights<S> expert_weights(Dims& dims, const py::dict& params) {
  using T = Compute<S>;
  ExpertWeights<S> w;
  w.up = dims.optional_tensor<S>(param(params, "w_up"), "params['w_up']", "E D F");
  w.down = dims.optional_tensor<S>(param(params, "w_down"), "params['w_down']", "E F D");
  if (!w.up || !w.down) throw py::value_error("params must contain 'w_up' and 'w_down'");
  w.gate = dims.optional_tensor<S>(param(params, "w_gate"), "params['w_gate']", "E D F");
  w.gate_bias = dims.optional_matrix<T>(param(params, "b_gate"), "params['b_gate']", "E F");
  w.up_bias = dims.optional_matrix<T>(param(params, "b_up"), "params['b_up']", "E F");
  w.down_bias = dims.optional_matrix<T>(param(params, "b_down"), "params['b_down']", "E D");
  if (dims["E"] < 1 || dims["D"] < 1 || dims["F"] < 1) throw py::value_error("E, D and F must be >= 1");
  const bool biased = static_cast<bool>(w.up_bias);
  if (static_cast<bool>(w.down_bias) != biased || static_cast<bool>(w.gate_bias) != (biased && w.glu())) {
    throw py::value_error("params must contain all of the experts' biases or none of them");
  }
  return w;
}

}  // namespace numoe::bindings
