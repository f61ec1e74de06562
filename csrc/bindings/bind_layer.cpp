#include "bindings/dispatch_arrays.h"
#include "bindings/expert_weights.h"
#include "bindings/options.h"
#include "numoe/layer.h"

namespace numoe::bindings {

namespace {

py::array bind_layer_forward(const py::array& x_, const py::object& mask_, const py::array& w_router_,
                             const py::object& b_router_, const py::object& choice_bias_, const RouterOptions& router,
                             const py::dict& params, const ExpertOptions& options) {
  return with_weights(x_, params, [&]<class S>() -> py::array {
    using T = Compute<S>;
    Dims dims;
    auto x = dims.matrix<T>(x_, "x", "T D");
    auto mask = dims.optional_vector<bool>(mask_, "mask", "T");
    const RouterWeights<T> weights{dims.matrix<T>(w_router_, "w_router", "D E"),
                                   dims.optional_vector<T>(b_router_, "b_router", "E"),
                                   dims.optional_vector<T>(choice_bias_, "choice_bias", "E")};
    const auto experts = expert_weights<S>(dims, params);
    check_options(router, dims["E"]);
    check_assignments(dims["T"], router.top_k);
    auto y = dims.empty<T>("T D");
    auto view = y.matrix();
    {
      ReleasedGil nogil;
      layer_forward<S>(x, mask, weights, router, experts, options, view);
    }
    return y.array;
  });
}

}  // namespace

void bind_layer(py::module_& m) {
  m.def("layer_forward", &bind_layer_forward, py::arg("x"), py::arg("mask"), py::arg("w_router"), py::arg("b_router"),
        py::arg("choice_bias"), py::arg("router"), py::arg("params"), py::arg("options"));
}

}  // namespace numoe::bindings
