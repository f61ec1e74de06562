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

// The arrays of a call are copied before they are checked: while the core runs without the GIL, other threads may write to
// the originals.  Binds M; needs T, K and E to be bound.
class CheckedDispatch {
 public:
  CheckedDispatch(Dims& dims, const py::array& offset, const py::array& row_token, const py::array& row_assignment) {
    check_assignments(dims["T"], dims["K"]);
    if (dims["E"] < 0) throw py::value_error("offsets must hold E + 1 numbers; got none; use numoe.dispatch");
    dims.bind("E+1", dims["E"] + 1);
    offset_ = copy(dims.vector<std::int64_t>(offset, "offsets", "E+1"));
    row_token_ = copy(dims.vector<std::int32_t>(row_token, "row_token", "M"));
    row_assignment_ = copy(dims.vector<std::int32_t>(row_assignment, "row_assignment", "M"));
    view_ = {offset_, row_token_, row_assignment_};
    bool ascending = view_.offset.front() == 0 && view_.offset.back() == view_.num_rows();
    for (Index e = 0; e < view_.num_experts(); ++e) ascending = ascending && view_.rows(e) >= 0;
    if (!ascending) throw py::value_error("offsets must ascend from 0 to the number of rows; use numoe.dispatch");
    check_range(view_.row_token, dims["T"], "row_token");
    check_range(view_.row_assignment, dims["T"] * dims["K"], "row_assignment");
    check_one_row_each(view_, dims["T"] * dims["K"], dims["K"]);
  }
  CheckedDispatch(const CheckedDispatch&) = delete;
  CheckedDispatch& operator=(const CheckedDispatch&) = delete;

  const DispatchView& view() const { return view_; }

 private:
  template <class T>
  static std::vector<T> copy(std::span<const T> values) {
    return {values.begin(), values.end()};
  }

  std::vector<std::int64_t> offset_;
  std::vector<std::int32_t> row_token_, row_assignment_;
  DispatchView view_;
};

}  // namespace numoe::bindings
