// Names of the Python configuration → enumerations of the core.
#pragma once

#include <initializer_list>
#include <string>
#include <utility>

#include "bindings/arrays.h"
#include "numoe/router.h"

namespace numoe::bindings {

template <class Enum>
Enum parse(const std::string& name, const char* argument, std::initializer_list<std::pair<const char*, Enum>> known) {
  for (const auto& [text, value] : known) {
    if (name == text) return value;
  }
  throw py::value_error(std::string(argument) + "='" + name + "' is unknown");
}

// ValueError if a router with these options cannot choose among so many experts.
void check_options(const RouterOptions& options, Index num_experts);

}  // namespace numoe::bindings
