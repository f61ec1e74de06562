// The three integer arrays of a numoe.Dispatch, checked and viewed: the core indexes memory with them.
#pragma once

#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "bindings/arrays.h"
#include "numoe/dispatch.h"

namespace numoe::bindings {

inline void check_assignments(Index tokens, Index choices) {
  if (tokens < 0 || choices < 1) throw py::value_error("T must be >= 0 and K >= 1");
  if (checked_product(tokens, choices) > std::numeric_limits<std::int32_t>::max()) {
    throw std::overflow_error("T * K = " + std::to_string(tokens) + " * " + std::to_string(choices) +
                              " assignments do not fit 32-bit indices; split the batch");
  }
}

inline void check_range(std::span<const std::int32_t> values, Index limit, const char* name) {
  for (std::size_t i = 0; i < values.size(); ++i) {
    if (values[i] < 0 || values[i] >= limit) {
      throw py::value_error(std::string(name) + "[" + std::to_string(i) + "] = " + std::to_string(values[i]) +
                            " is not in 0.." + std::to_string(limit - 1) + "; use a Dispatch made by numoe.dispatch");
    }
  }
}

// Every row belongs to an assignment of its token, and no assignment has two rows.
inline void check_one_row_each(const DispatchView& view, Index num_assignments, Index top_k) {
  std::vector<bool> taken(static_cast<std::size_t>(num_assignments));
  for (std::size_t r = 0; r < view.row_token.size(); ++r) {
    const auto assignment = static_cast<std::size_t>(view.row_assignment[r]);
    if (taken[assignment] || view.row_assignment[r] / top_k != view.row_token[r]) {
      throw py::value_error("row_assignment[" + std::to_string(r) + "] = " + std::to_string(assignment) +
                            (taken[assignment] ? " has another row already" : " is not of the row's token") +
                            "; use a Dispatch made by numoe.dispatch");
    }
    taken[assignment] = true;
  }
}

// Binds M; needs T, K and E to be bound.
inline DispatchView dispatch_view(Dims& dims, const py::array& offset_, const py::array& row_token_,
                                  const py::array& row_assignment_) {
  check_assignments(dims["T"], dims["K"]);
  if (dims["E"] < 0) throw py::value_error("offsets must hold E + 1 numbers; got none; use numoe.dispatch");
  dims.bind("E+1", dims["E"] + 1);
  DispatchView view{dims.vector<std::int64_t>(offset_, "offsets", "E+1"),
                    dims.vector<std::int32_t>(row_token_, "row_token", "M"),
                    dims.vector<std::int32_t>(row_assignment_, "row_assignment", "M")};
  bool ascending = view.offset.front() == 0 && view.offset.back() == view.num_rows();
  for (Index e = 0; e < view.num_experts(); ++e) ascending = ascending && view.rows(e) >= 0;
  if (!ascending) throw py::value_error("offsets must ascend from 0 to the number of rows; use numoe.dispatch");
  check_range(view.row_token, dims["T"], "row_token");
  check_range(view.row_assignment, dims["T"] * dims["K"], "row_assignment");
  check_one_row_each(view, dims["T"] * dims["K"], dims["K"]);
  return view;
}

}  // namespace numoe::bindings
