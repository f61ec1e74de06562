#include <limits>
#include <vector>

#include "bindings/dispatch_arrays.h"
#include "bindings/options.h"

namespace numoe::bindings {
namespace {

constexpr std::initializer_list<std::pair<const char*, Priority>> priorities = {{"position", Priority::position},
                                                                                {"choice", Priority::choice},
                                                                                {"probability", Priority::probability},
                                                                                {"batch", Priority::batch}};

std::vector<CapacityGroup> capacity_groups(MatrixView<const std::int64_t> groups, Index num_tokens) {
  std::vector<CapacityGroup> result;
  Index end = 0;
  bool consecutive = true;
  for (Index g = 0; g < groups.rows; ++g) {
    result.push_back({groups(g, 0), groups(g, 1), groups(g, 2)});
    consecutive = consecutive && groups(g, 0) == end && groups(g, 1) >= end && groups(g, 2) >= 0;
    end = groups(g, 1);
  }
  if (!consecutive || end != num_tokens) throw py::value_error("capacity groups must cover all tokens in order");
  return result;
}

// indices (T, K); groups (G, 3) of begin, end, capacity, or None for no limit; weights (T, K) decide who is dropped.
py::tuple bind_dispatch_tokens(const py::array& indices_, const py::object& weights_, Index num_experts,
                               const py::object& groups_, const std::string& priority_) {
  Dims dims;
  const Copied copied_indices(dims.matrix<std::int32_t>(indices_, "indices", "T K"));
  const auto& indices = copied_indices.view();
  constexpr Index most_experts = std::numeric_limits<std::int32_t>::max();  // indices are 32-bit
  if (num_experts < 1 || num_experts > most_experts) {
    throw py::value_error("num_experts must be in 1.." + std::to_string(most_experts) + "; got " +
                          std::to_string(num_experts));
  }
  check_assignments(dims["T"], dims["K"]);
  dims.bind("E+1", num_experts + 1);
  auto offsets = dims.empty<std::int64_t>("E+1");
  auto offset = offsets.span();
  offset[0] = 0;
  count_assignments(indices, {}, offset.subspan(1));  // also checks every index
  Buffer<bool> kept_buffer(groups_.is_none() ? 0 : dims["T"] * dims["K"]);
  MatrixView<bool> kept{kept_buffer.data(), dims["T"], dims["K"], dims["K"]};
  if (kept) {
    const auto priority = parse<Priority>(priority_, "drop_priority", priorities);
    dims.bind("3", 3);
    const auto groups = capacity_groups(dims.optional_matrix<std::int64_t>(groups_, "groups", "G 3"), dims["T"]);
    const auto array = Dims::as_array(weights_, "weights");
    with_dtype(array, [&]<class T>() {
      const Copied weights(dims.matrix<T>(array, "weights", "T K"));
      ReleasedGil nogil;
      keep_within_capacity(indices, weights.view(), num_experts, groups, priority, kept);
    });
    count_assignments(indices, kept, offset.subspan(1));
  }
  for (std::size_t e = 1; e < offset.size(); ++e) offset[e] += offset[e - 1];
  dims.bind("M", offset.back());
  auto row_token = dims.empty<std::int32_t>("M");
  auto row_assignment = dims.empty<std::int32_t>("M");
  auto assignment_row = dims.empty<std::int32_t>("T K");
  const auto tokens = row_token.span(), assignments = row_assignment.span();
  const auto rows = assignment_row.matrix();
  {
    ReleasedGil nogil;
    sort_by_expert(indices, kept, offset, tokens, assignments, rows);
  }
  return py::make_tuple(offsets.array, row_token.array, row_assignment.array, assignment_row.array);
}

py::array bind_renormalize(const py::array& weights_, const py::array& assignment_row_, double scale) {
  return with_dtype(weights_, [&]<class T>() -> py::array {
    Dims dims;
    auto weights = dims.matrix<T>(weights_, "weights", "T K");
    auto rows = dims.matrix<std::int32_t>(assignment_row_, "assignment_row", "T K");
    auto out = dims.empty<T>("T K");
    renormalize_kept(weights, rows, static_cast<T>(scale), out.matrix());
    return out.array;
  });
}

py::array bind_renormalize_backward(const py::array& weights_, const py::array& assignment_row_, double scale,
                                    const py::array& dout_) {
  return with_dtype(weights_, [&]<class T>() -> py::array {
    Dims dims;
    auto weights = dims.matrix<T>(weights_, "weights", "T K");
    auto rows = dims.matrix<std::int32_t>(assignment_row_, "assignment_row", "T K");
    auto dout = dims.matrix<T>(dout_, "dweights", "T K");
    auto dweights = dims.empty<T>("T K");
    renormalize_kept_backward(weights, rows, static_cast<T>(scale), dout, dweights.matrix());
    return dweights.array;
  });
}

py::array bind_combine(const py::array& rows_, const py::array& offset_, const py::array& row_token_,
                       const py::array& row_assignment_, Index num_tokens, Index top_k, const py::object& weights_) {
  return with_dtype(rows_, [&]<class T>() -> py::array {
    Dims dims;
    dims.bind("T", num_tokens);
    dims.bind("K", top_k);
    dims.bind("E", offset_.size() - 1);
    const CheckedDispatch checked(dims, offset_, row_token_, row_assignment_);
    const DispatchView& dispatch = checked.view();
    auto rows = dims.matrix<T>(rows_, "rows", "M D");
    auto weights = dims.optional_matrix<T>(weights_, "weights", "T K");
    auto y = dims.empty<T>("T D");
    auto view = y.matrix();
    {
      ReleasedGil nogil;
      combine(rows, dispatch, weights, view);
    }
    return y.array;
  });
}

py::tuple bind_combine_backward(const py::array& dy_, const py::array& rows_, const py::array& offset_,
                                const py::array& row_token_, const py::array& row_assignment_, Index top_k,
                                const py::object& weights_) {
  return with_dtype(rows_, [&]<class T>() -> py::tuple {
    Dims dims;
    auto dy = dims.matrix<T>(dy_, "dy", "T D");
    dims.bind("K", top_k);
    dims.bind("E", offset_.size() - 1);
    const CheckedDispatch checked(dims, offset_, row_token_, row_assignment_);
    const DispatchView& dispatch = checked.view();
    auto rows = dims.matrix<T>(rows_, "rows", "M D");
    auto weights = dims.optional_matrix<T>(weights_, "weights", "T K");
    auto drows = dims.empty<T>("M D");
    auto dweights = dims.empty<T>("T K");
    auto drows_view = drows.matrix();
    auto dweights_view = dweights.matrix();
    {
      ReleasedGil nogil;
      combine_backward(dy, rows, dispatch, weights, drows_view, dweights_view);
    }
    return py::make_tuple(drows.array, dweights.array);
  });
}

}  // namespace

void bind_dispatch(py::module_& m) {
  m.def("dispatch", &bind_dispatch_tokens, py::arg("indices"), py::arg("weights"), py::arg("num_experts"),
        py::arg("groups"), py::arg("priority"));
  m.def("renormalize_kept", &bind_renormalize, py::arg("weights"), py::arg("assignment_row"), py::arg("scale"));
  m.def("renormalize_kept_backward", &bind_renormalize_backward, py::arg("weights"), py::arg("assignment_row"),
        py::arg("scale"), py::arg("dweights"));
  m.def("combine", &bind_combine, py::arg("rows"), py::arg("offsets"), py::arg("row_token"), py::arg("row_assignment"),
        py::arg("num_tokens"), py::arg("top_k"), py::arg("weights"));
  m.def("combine_backward", &bind_combine_backward, py::arg("dy"), py::arg("rows"), py::arg("offsets"),
        py::arg("row_token"), py::arg("row_assignment"), py::arg("top_k"), py::arg("weights"));
}

}  // namespace numoe::bindings
