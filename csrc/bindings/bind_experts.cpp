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

py::tuple bind_experts_forward(const py::array& x_, const py::array& offset_, const py::array& row_token_,
                               const py::array& row_assignment_, Index top_k, const py::object& weights_,
                               const py::dict& params, const ExpertOptions& options, bool combined, bool keep_cache) {
  return with_weights(x_, params, [&]<class S>() -> py::tuple {
    using T = Compute<S>;
    Dims dims;
    auto x = dims.matrix<T>(x_, "x", "T D");
    dims.bind("K", top_k);
    const auto experts = expert_weights<S>(dims, params);
    const CheckedDispatch checked(dims, offset_, row_token_, row_assignment_);
    const DispatchView& dispatch = checked.view();
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
      experts_forward<S>(x, dispatch, weights, experts, options, combined, cache, view);
    }
    return py::make_tuple(result.array, cache_gate, cache_up);
  });
}

// The arrays of the parameters' gradients: the caller's, or new ones.
template <class T>
class GradArrays {
 public:
  py::dict params;
  ExpertGrads<T> grads;

  GradArrays(Dims& dims, bool glu, bool biased, const py::object& into, bool accumulate, const DispatchView& dispatch)
      : dims_(dims), into_(into) {
    if (accumulate && into.is_none()) throw py::value_error("accumulate adds to earlier gradients; pass them as into");
    // np.zeros gets untouched zero pages from the system, so gradients of idle experts cost nothing; np.empty gets huge
    // pages, which are worth more where most experts have rows.
    Index busy = 0;
    for (Index e = 0; e < dispatch.num_experts(); ++e) busy += dispatch.rows(e) != 0;
    const bool mostly_busy = 2 * busy >= dispatch.num_experts();
    make_ = mostly_busy ? "empty" : "zeros";
    grads.store = accumulate                       ? GradStore::accumulate
                  : mostly_busy || !into.is_none() ? GradStore::overwrite
                                                   : GradStore::fresh;
    if (glu) grads.gate = tensor({"w_gate", "into['w_gate']"}, "E D F");
    grads.up = tensor({"w_up", "into['w_up']"}, "E D F");
    grads.down = tensor({"w_down", "into['w_down']"}, "E F D");
    if (!biased) return;
    if (glu) grads.gate_bias = matrix({"b_gate", "into['b_gate']"}, "E F");
    grads.up_bias = matrix({"b_up", "into['b_up']"}, "E F");
    grads.down_bias = matrix({"b_down", "into['b_down']"}, "E D");
  }

 private:
  struct Name {
    const char *key, *argument;
  };

  py::array array(const Name& name, const char* letters) {
    const py::array found = into_.is_none() ? line_aligned(make_, dims_.shape(letters), py::dtype::of<T>())
                                            : Dims::as_array(into_[name.key], name.argument);
    params[name.key] = found;
    return found;
  }
  Tensor3View<T> tensor(const Name& name, const char* letters) {
    py::array found = array(name, letters);
    return dims_.output_tensor<T>(found, name.argument, letters);
  }
  MatrixView<T> matrix(const Name& name, const char* letters) {
    py::array found = array(name, letters);
    return dims_.output_matrix<T>(found, name.argument, letters);
  }

  Dims& dims_;
  const py::object& into_;
  const char* make_;
};

py::tuple bind_experts_backward(const py::array& dresult_, const py::array& x_, const py::array& offset_,
                                const py::array& row_token_, const py::array& row_assignment_, Index top_k,
                                const py::object& weights_, const py::dict& params, const ExpertOptions& options,
                                bool combined, const py::object& cache_gate_, const py::object& cache_up_,
                                const py::object& into, bool accumulate) {
  return with_weights(x_, params, [&]<class S>() -> py::tuple {
    using T = Compute<S>;
    Dims dims;
    auto x = dims.matrix<T>(x_, "x", "T D");
    dims.bind("K", top_k);
    const auto experts = expert_weights<S>(dims, params);
    const CheckedDispatch checked(dims, offset_, row_token_, row_assignment_);
    const DispatchView& dispatch = checked.view();
    auto weights = dims.optional_matrix<T>(weights_, "weights", "T K");
    auto dresult = dims.matrix<T>(dresult_, combined ? "dy" : "drows", combined ? "T D" : "M D");
    ExpertCache<const T> cache{dims.optional_matrix<T>(cache_gate_, "cache.gate", "M F"),
                               dims.optional_matrix<T>(cache_up_, "cache.up", "M F")};
    if (cache && static_cast<bool>(cache.gate) != experts.glu()) {
      throw py::value_error("the cache does not fit these experts; pass the one of their own forward");
    }
    GradArrays<T> arrays(dims, experts.glu(), static_cast<bool>(experts.up_bias), into, accumulate, dispatch);
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
      experts_backward<S>(dresult, x, dispatch, weights, experts, options, combined, cache, arrays.grads);
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
        py::arg("options"), py::arg("combined"), py::arg("cache_gate"), py::arg("cache_up"), py::arg("into"),
        py::arg("accumulate"));
}

}  // namespace numoe::bindings
