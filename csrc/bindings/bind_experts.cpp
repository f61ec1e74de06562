#include "bindings/dispatch_arrays.h"
#include "bindings/expert_weights.h"
#include "numoe/experts.h"
#include "numoe/parallel.h"

namespace numoe::bindings {
namespace {

ExpertOptions make_options(const std::string& activation, const std::string& weight_on) {
  return {parse<Activation>(activation, "activation",
                            {{"silu", Activation::silu},
                             {"gelu", Activation::gelu},
                             {"gelu_tanh", Activation::gelu_tanh},
                             {"relu", Activation::relu},
                             {"relu2", Activation::relu2},
                             {"quick_gelu", Activation::quick_gelu}}),
          parse<WeightOn>(weight_on, "weight_on", {{"output", WeightOn::output}, {"input", WeightOn::input}})};
}

// A zeroed array shaped like params[name].  np.zeros (unlike zeros_like) gets untouched zero pages from the system, so
// gradients of idle experts cost nothing.
template <class T>
py::array_t<T> zeros_like(const py::dict& params, const char* name) {
  const py::object value = params[name];
  return py::module_::import("numpy").attr("zeros")(value.attr("shape"), value.attr("dtype"));
}

py::tuple bind_experts_forward(const py::array& x_, const py::array& offset_, const py::array& row_token_,
                               const py::array& row_assignment_, Index top_k, const py::object& weights_,
                               const py::dict& params, const ExpertOptions& options, bool combined, bool keep_cache) {
  return with_dtype(x_, [&]<class T>() -> py::tuple {
    Dims dims;
    auto x = dims.matrix<T>(x_, "x", "T D");
    dims.bind("K", top_k);
    const auto experts = expert_weights<T>(dims, params);
    const auto dispatch = dispatch_view(dims, offset_, row_token_, row_assignment_);
    auto weights = dims.optional_matrix<T>(weights_, "weights", "T K");
    auto result = dims.empty<T>(combined ? "T D" : "M D");
    ExpertCache<T> cache;
    py::object cache_gate = py::none(), cache_up = py::none();
    if (keep_cache) {
      auto up = dims.empty<T>("M F");
      cache.up = up.matrix();
      cache_up = up.array;
      if (experts.glu()) {
        auto gate = dims.empty<T>("M F");
        cache.gate = gate.matrix();
        cache_gate = gate.array;
      }
    }
    auto view = result.matrix();
    {
      ReleasedGil nogil;
      experts_forward(x, dispatch, weights, experts, options, combined, cache, view);
    }
    return py::make_tuple(result.array, cache_gate, cache_up);
  });
}

template <class T>
struct GradArrays {
  py::dict params;
  ExpertGrads<T> grads;

  GradArrays(const py::dict& values, const ExpertWeights<T>& w) {
    grads.up = tensor(values, "w_up");
    grads.down = tensor(values, "w_down");
    if (w.glu()) grads.gate = tensor(values, "w_gate");
    if (w.up_bias) {
      grads.up_bias = matrix(values, "b_up");
      grads.down_bias = matrix(values, "b_down");
      if (w.glu()) grads.gate_bias = matrix(values, "b_gate");
    }
  }

 private:
  Tensor3View<T> tensor(const py::dict& values, const char* name) {
    auto array = zeros_like<T>(values, name);
    params[name] = array;
    return {array.mutable_data(), array.shape(0), array.shape(1), array.shape(2)};
  }
  MatrixView<T> matrix(const py::dict& values, const char* name) {
    auto array = zeros_like<T>(values, name);
    params[name] = array;
    return {array.mutable_data(), array.shape(0), array.shape(1), array.shape(1)};
  }
};

py::tuple bind_experts_backward(const py::array& dresult_, const py::array& x_, const py::array& offset_,
                                const py::array& row_token_, const py::array& row_assignment_, Index top_k,
                                const py::object& weights_, const py::dict& params, const ExpertOptions& options,
                                bool combined, const py::object& cache_gate_, const py::object& cache_up_) {
  return with_dtype(x_, [&]<class T>() -> py::tuple {
    Dims dims;
    auto x = dims.matrix<T>(x_, "x", "T D");
    dims.bind("K", top_k);
    const auto experts = expert_weights<T>(dims, params);
    const auto dispatch = dispatch_view(dims, offset_, row_token_, row_assignment_);
    auto weights = dims.optional_matrix<T>(weights_, "weights", "T K");
    auto dresult = dims.matrix<T>(dresult_, combined ? "dy" : "drows", combined ? "T D" : "M D");
    ExpertCache<const T> cache{dims.optional_matrix<T>(cache_gate_, "cache.gate", "M F"),
                               dims.optional_matrix<T>(cache_up_, "cache.up", "M F")};
    const bool cached = static_cast<bool>(cache) && static_cast<bool>(cache.gate) == experts.glu();
    if (!cached && dims["M"] > 0) {
      throw py::value_error("the forward kept no cache for these experts; call forward, not layer(x), before backward");
    }
    GradArrays<T> arrays(params, experts);
    auto dx = dims.empty<T>("T D");
    arrays.grads.x = dx.matrix();
    py::object dweights = py::none();
    if (weights) {
      auto array = dims.empty<T>("T K");
      arrays.grads.weights = array.matrix();
      dweights = array.array;
    }
    {
      ReleasedGil nogil;
      experts_backward(dresult, x, dispatch, weights, experts, options, combined, cache, arrays.grads);
    }
    return py::make_tuple(dx.array, dweights, arrays.params);
  });
}

}  // namespace

void bind_experts(py::module_& m) {
  py::class_<ExpertOptions>(m, "ExpertOptions")
      .def(py::init(&make_options), py::kw_only(), py::arg("activation"), py::arg("weight_on"));
  m.def("experts_forward", &bind_experts_forward, py::arg("x"), py::arg("offsets"), py::arg("row_token"),
        py::arg("row_assignment"), py::arg("top_k"), py::arg("weights"), py::arg("params"), py::arg("options"),
        py::arg("combined"), py::arg("keep_cache"));
  m.def("experts_backward", &bind_experts_backward, py::arg("dresult"), py::arg("x"), py::arg("offsets"),
        py::arg("row_token"), py::arg("row_assignment"), py::arg("top_k"), py::arg("weights"), py::arg("params"),
        py::arg("options"), py::arg("combined"), py::arg("cache_gate"), py::arg("cache_up"));
}

}  // namespace numoe::bindings
