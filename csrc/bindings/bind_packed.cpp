#include <algorithm>
#include <span>

#include "bindings/dispatch_arrays.h"
#include "bindings/expert_weights.h"
#include "bindings/options.h"
#include "numoe/layer.h"

namespace numoe::bindings {

namespace {

// S: how the experts are stored; Source: what they are packed from.
template <class S, class Source>
PackedLayer<S> make_layer_from(const py::dict& params, const py::object& choice_bias_, const RouterOptions& router,
                               const ExpertOptions& options, const py::object& shared_params,
                               const ExpertOptions& shared_options) {
  using T = Compute<S>;
  Dims dims;
  const auto w_router = dims.optional_matrix<T>(param(params, "w_router"), "params['w_router']", "D E");
  const auto b_router = dims.optional_vector<T>(param(params, "b_router"), "params['b_router']", "E");
  const auto choice_bias = dims.optional_vector<T>(choice_bias_, "choice_bias", "E");
  const auto routed = expert_weights<Source>(dims, params);
  if (!w_router) throw py::value_error("params must contain 'w_router'");
  check_options(router, dims["E"]);
  ExpertWeights<Source> shared{};
  std::span<const T> score;
  if (!shared_params.is_none()) {
    Dims shared_dims;
    shared_dims.bind("D", dims["D"]);
    const auto dict = shared_params.cast<py::dict>();
    shared = expert_weights<Source>(shared_dims, dict);
    score = shared_dims.optional_vector<T>(param(dict, "score"), "w_shared_score", "D");
  }
  ReleasedGil nogil;
  std::optional<PackedBranch<S>> packed_shared;
  if (shared.up) packed_shared.emplace(shared, shared_options);
  return PackedLayer<S>(w_router, b_router, choice_bias, router, PackedBranch<S>(routed, options),
                        std::move(packed_shared), score);
}

template <class S>
PackedLayer<S> make_layer(const py::dict& params, const py::object& choice_bias, const RouterOptions& router,
                          const ExpertOptions& options, const py::object& shared_params,
                          const ExpertOptions& shared_options) {
  if (py::isinstance<py::array_t<Stored<bfloat16>>>(param(params, "w_up"))) {
    if constexpr (std::is_same_v<S, bfloat16>) {
      return make_layer_from<S, S>(params, choice_bias, router, options, shared_params, shared_options);
    }
  }
  return make_layer_from<S, Compute<S>>(params, choice_bias, router, options, shared_params, shared_options);
}

template <class S>
py::array run_forward(const PackedLayer<S>& layer, const py::array& x, Index tokens) {
  using T = Compute<S>;
  const Index D = layer.d_model();
  check_assignments(tokens, layer.top_k());
  Output<T> y{uninitialised<T>(std::vector<py::ssize_t>(x.shape(), x.shape() + x.ndim()))};
  const MatrixView<const T> from{static_cast<const T*>(x.data()), tokens, D, D};
  const MatrixView<T> to{y.data(), tokens, D, D};
  {
    ReleasedGil nogil;
    layer.forward(from, to);
  }
  return y.array;
}

template <class S>
py::array forward(const PackedLayer<S>& layer, const py::array& x) {
  Dims dims;
  dims.bind("D", layer.d_model());
  dims.matrix<Compute<S>>(x, "x", "T D");
  return run_forward(layer, x, dims["T"]);
}

// The same for x (..., D) that needs neither conversion nor complaint; None for any other object.
template <class S>
py::object forward_ready(const PackedLayer<S>& layer, const py::object& x_) {
  using T = Compute<S>;
  if (!is_plain_array(x_)) return py::none();
  const auto x = py::reinterpret_borrow<py::array>(x_);
  const py::ssize_t axes = x.ndim();
  if (axes == 0 || x.shape(axes - 1) != layer.d_model() || !Dims::is_readable<T>(x)) return py::none();
  return run_forward(layer, x, x.size() / layer.d_model());
}

// The core checks the range of the indices, as it counts them.
void check_distinct(MatrixView<const std::int32_t> indices) {
  for (Index t = 0; t < indices.rows; ++t) {
    const std::span choices(indices.row(t), static_cast<std::size_t>(indices.cols));
    for (std::size_t k = 1; k < choices.size(); ++k) {
      const auto earlier = choices.first(k);
      if (choices[k] >= 0 && std::find(earlier.begin(), earlier.end(), choices[k]) != earlier.end()) {
        throw py::value_error("indices[" + std::to_string(t) + "] chooses expert " + std::to_string(choices[k]) +
                              " twice; the choices of one token must be distinct.");
      }
    }
  }
}

// The layer without its router.
template <class S>
py::array forward_routed(const PackedLayer<S>& layer, const py::array& x_, const py::array& indices_,
                         const py::array& weights_) {
  using T = Compute<S>;
  Dims dims;
  dims.bind("D", layer.d_model());
  auto x = dims.matrix<T>(x_, "x", "T D");
  const Copied copied_indices(dims.matrix<std::int32_t>(indices_, "indices", "T K"));
  const auto& indices = copied_indices.view();
  auto weights = dims.matrix<T>(weights_, "weights", "T K");
  check_assignments(dims["T"], dims["K"]);
  check_distinct(indices);
  auto y = dims.empty<T>("T D");
  auto view = y.matrix();
  {
    ReleasedGil nogil;
    layer.forward_routed(x, indices, weights, view);
  }
  return y.array;
}

// The routed experts alone, for a dispatch made outside.
template <class S>
py::array experts(const PackedLayer<S>& layer, const py::array& x_, const py::array& offset_,
                  const py::array& row_token_, const py::array& row_assignment_, Index top_k,
                  const py::object& weights_) {
  using T = Compute<S>;
  Dims dims;
  dims.bind("D", layer.d_model());
  dims.bind("E", layer.num_experts());
  dims.bind("K", top_k);
  auto x = dims.matrix<T>(x_, "x", "T D");
  const CheckedDispatch checked(dims, offset_, row_token_, row_assignment_);
  const DispatchView& dispatch = checked.view();
  auto weights = dims.optional_matrix<T>(weights_, "weights", "T K");
  auto y = dims.empty<T>("T D");
  auto view = y.matrix();
  {
    ReleasedGil nogil;
    layer.routed().forward(x, dispatch, weights, view);
  }
  return y.array;
}

template <class S>
void bind_packed_layer(py::module_& m, const char* name) {
  using Layer = PackedLayer<S>;
  py::class_<Layer>(m, name)
      .def(py::init(&make_layer<S>), py::arg("params"), py::arg("choice_bias"), py::arg("router"), py::arg("options"),
           py::arg("shared_params"), py::arg("shared_options"))
      .def("forward", &forward<S>, py::arg("x"))
      .def("forward_routed", &forward_routed<S>, py::arg("x"), py::arg("indices"), py::arg("weights"))
      .def("forward_ready", &forward_ready<S>, py::arg("x"))
      .def("experts", &experts<S>, py::arg("x"), py::arg("offsets"), py::arg("row_token"), py::arg("row_assignment"),
           py::arg("top_k"), py::arg("weights"))
      .def_property_readonly("nbytes", &Layer::bytes);
}

}  // namespace

void bind_packed(py::module_& m) {
  bind_packed_layer<float>(m, "PackedLayerFloat32");
  bind_packed_layer<double>(m, "PackedLayerFloat64");
  bind_packed_layer<bfloat16>(m, "PackedLayerBfloat16");
}

}  // namespace numoe::bindings
