#include "bindings/arrays.h"
#include "bindings/options.h"
#include "numoe/matmul.h"
#include "numoe/parallel.h"
#include "numoe/router.h"

namespace numoe::bindings {
namespace {

RouterOptions make_options(Index top_k, const std::string& score, const std::string& normalize, double eps,
                           const std::string& eps_mode, double scale, Index num_groups, Index groups_kept,
                           const std::string& group_score) {
  return {.top_k = top_k,
          .score = parse<Score>(score, "score",
                                {{"softmax", Score::softmax},
                                 {"softmax_chosen", Score::softmax_chosen},
                                 {"sigmoid", Score::sigmoid},
                                 {"sqrt_softplus", Score::sqrt_softplus}}),
          .normalize = parse<Normalize>(normalize, "normalize",
                                        {{"none", Normalize::none}, {"sum", Normalize::sum}, {"l2", Normalize::l2}}),
          .eps = eps,
          .eps_is_floor = parse<bool>(eps_mode, "eps_mode", {{"add", false}, {"max", true}}),
          .scale = scale,
          .num_groups = num_groups,
          .groups_kept = groups_kept,
          .group_score = parse<GroupScore>(group_score, "group_score",
                                           {{"top2_sum", GroupScore::top2_sum}, {"max", GroupScore::max}})};
}

}  // namespace

void check_options(const RouterOptions& o, Index num_experts) {
  const bool groups =
      o.num_groups >= 1 && num_experts % o.num_groups == 0 && o.groups_kept >= 1 && o.groups_kept <= o.num_groups;
  if (!groups || o.top_k < 1 || o.top_k > o.groups_kept * (num_experts / o.num_groups)) {
    throw py::value_error("router options do not fit logits with " + std::to_string(num_experts) + " experts");
  }
}

namespace {

py::array router_logits(const py::array& x_, const py::array& w_, const py::object& b_) {
  return with_dtype(x_, [&]<class T>() -> py::array {
    Dims dims;
    auto x = dims.matrix<T>(x_, "x", "T D");
    auto w = dims.matrix<T>(w_, "w_router", "D E");
    auto b = dims.optional_vector<T>(b_, "b_router", "E");
    auto logits = dims.empty<T>("T E");
    auto z = logits.matrix();
    {
      ReleasedGil nogil;
      matmul(operand(x), operand(w), x.cols, z);
      add_router_bias(b, z);
    }
    return logits.array;
  });
}

// z = x · w  ⇒  dx = dz · wᵀ, dw = xᵀ · dz
py::tuple router_logits_backward(const py::array& dlogits_, const py::array& x_, const py::array& w_) {
  return with_dtype(x_, [&]<class T>() -> py::tuple {
    Dims dims;
    auto x = dims.matrix<T>(x_, "x", "T D");
    auto w = dims.matrix<T>(w_, "w_router", "D E");
    auto dz = dims.matrix<T>(dlogits_, "dlogits", "T E");
    auto dx = dims.empty<T>("T D");
    auto dw = dims.empty<T>("D E");
    auto dx_view = dx.matrix();
    auto dw_view = dw.matrix();
    {
      ReleasedGil nogil;
      matmul(operand(dz), transposed(operand(w)), dz.cols, dx_view);
      matmul(transposed(operand(x)), operand(dz), x.rows, dw_view);
    }
    return py::make_tuple(dx.array, dw.array);
  });
}

py::tuple bind_route(const py::array& logits_, const RouterOptions& options, const py::object& choice_bias_,
                     const py::object& mask_) {
  return with_dtype(logits_, [&]<class T>() -> py::tuple {
    Dims dims;
    auto logits = dims.matrix<T>(logits_, "logits", "T E");
    auto choice_bias = dims.optional_vector<T>(choice_bias_, "choice_bias", "E");
    auto mask = dims.optional_vector<bool>(mask_, "mask", "T");
    check_options(options, dims["E"]);
    dims.bind("K", options.top_k);
    auto indices = dims.empty<std::int32_t>("T K");
    auto weights = dims.empty<T>("T K");
    auto indices_view = indices.matrix();
    auto weights_view = weights.matrix();
    {
      ReleasedGil nogil;
      route(logits, choice_bias, mask, options, indices_view, weights_view);
    }
    return py::make_tuple(indices.array, weights.array);
  });
}

py::array bind_route_backward(const py::array& logits_, const py::array& indices_, const py::array& dweights_,
                              const RouterOptions& options) {
  return with_dtype(logits_, [&]<class T>() -> py::array {
    Dims dims;
    auto logits = dims.matrix<T>(logits_, "logits", "T E");
    check_options(options, dims["E"]);
    dims.bind("K", options.top_k);
    const Copied copied_indices(dims.matrix<std::int32_t>(indices_, "indices", "T K"));
    const auto& indices = copied_indices.view();
    auto dweights = dims.matrix<T>(dweights_, "dweights", "T K");
    for (Index t = 0; t < indices.rows; ++t) {
      for (Index k = 0; k < indices.cols; ++k) {
        if (indices(t, k) < -1 || indices(t, k) >= logits.cols || (indices(t, k) < 0) != (indices(t, 0) < 0)) {
          throw py::index_error("indices[" + std::to_string(t) + ", " + std::to_string(k) +
                                "] = " + std::to_string(indices(t, k)) + " was not chosen by numoe.route");
        }
      }
    }
    auto dlogits = dims.empty<T>("T E");
    auto view = dlogits.matrix();
    {
      ReleasedGil nogil;
      route_backward(logits, indices, dweights, options, view);
    }
    return dlogits.array;
  });
}

}  // namespace

void bind_router(py::module_& m) {
  py::class_<RouterOptions>(m, "RouterOptions")
      .def(py::init(&make_options), py::kw_only(), py::arg("top_k"), py::arg("score"), py::arg("normalize"),
           py::arg("eps"), py::arg("eps_mode"), py::arg("scale"), py::arg("num_groups"), py::arg("groups_kept"),
           py::arg("group_score"));
  m.def("router_logits", &router_logits, py::arg("x"), py::arg("w_router"), py::arg("b_router"));
  m.def("router_logits_backward", &router_logits_backward, py::arg("dlogits"), py::arg("x"), py::arg("w_router"));
  m.def("route", &bind_route, py::arg("logits"), py::arg("options"), py::arg("choice_bias"), py::arg("mask"));
  m.def("route_backward", &bind_route_backward, py::arg("logits"), py::arg("indices"), py::arg("dweights"),
        py::arg("options"));
}

}  // namespace numoe::bindings
