// numoe._core: what the bind_*.cpp bind, threads and targets.  Private; the public functions are Python.
#include <pthread.h>
#include <pybind11/stl.h>

#include <atomic>

#include "bindings/arrays.h"
#include "bindings/gil.h"
#include "numoe/kernels/target.h"
#include "numoe/parallel.h"

namespace numoe::bindings {

void bind_bfloat16(py::module_& m);
void bind_router(py::module_& m);
void bind_dispatch(py::module_& m);
void bind_experts(py::module_& m);
void bind_layer(py::module_& m);
void bind_losses(py::module_& m);
void bind_packed(py::module_& m);
void bind_probes(py::module_& m);

namespace {

// Python's main thread; after fork() the one that forked.
std::atomic<unsigned long> main_thread{0};
void know_main_thread() { main_thread = PyThread_get_thread_ident(); }

// Ctrl-C: runs Python's pending signal handlers.  They run in the main thread only, so that other threads need not wait for
// the GIL to look.
void check_signals() {
  if (PyThread_get_thread_ident() != main_thread || interpreter_is_going_away()) return;
  PyGILState_STATE state{};
  wait_for_gil([&] { state = PyGILState_Ensure(); });
  const bool raised = PyErr_CheckSignals() != 0;
  if (raised) {
    py::error_already_set error;  // takes the Python exception along
    PyGILState_Release(state);
    throw error;
  }
  PyGILState_Release(state);
}

template <class T>
py::tuple tile_of(const Kernels<T>& kernels) {
  return py::make_tuple(kernels.tile_rows, kernels.tile_cols);
}

py::list describe(std::span<const KernelTable* const> tables) {
  py::list list;
  for (const KernelTable* table : tables) {
    list.append(py::dict(py::arg("name") = table->name, py::arg("description") = table->description,
                         py::arg("supported") = table->supported(), py::arg("float32_tile") = tile_of(table->f32),
                         py::arg("float64_tile") = tile_of(table->f64),
                         py::arg("bfloat16_pairs") = static_cast<bool>(table->f32.pairs)));
  }
  return list;
}

py::dict build_info() {
  return py::dict(py::arg("compiler") = NUMOE_COMPILER, py::arg("flags") = NUMOE_FLAGS,
                  py::arg("build_type") = NUMOE_BUILD_TYPE, py::arg("eigen") = NUMOE_EIGEN_VERSION,
                  py::arg("pybind11") = NUMOE_PYBIND11_VERSION);
}

// The value of NUMOE_NUM_THREADS if it cannot be understood, else None.
py::object start_threads() {
  const char* complaint = nullptr;
  const int wanted = num_threads_from_environment(&complaint);
  if (wanted > 0) set_default_num_threads(wanted);
  main_thread = py::module_::import("threading").attr("main_thread")().attr("ident").cast<unsigned long>();
  pthread_atfork(nullptr, nullptr, know_main_thread);
  set_interrupt_check(check_signals);
  return complaint ? py::object(py::str(complaint)) : py::none();
}

}  // namespace
}  // namespace numoe::bindings

PYBIND11_MODULE(_core, m) {
  using namespace numoe;
  kernel_table();  // an unknown NUMOE_TARGET fails here, with its sentence, and not in the middle of a run
  bindings::bind_bfloat16(m);
  bindings::bind_router(m);
  bindings::bind_dispatch(m);
  bindings::bind_experts(m);
  bindings::bind_layer(m);
  bindings::bind_losses(m);
  bindings::bind_packed(m);
  bindings::bind_probes(m);
  m.def("num_threads", &num_threads);
  m.def("set_num_threads", &set_num_threads, bindings::py::arg("n"));
  m.def("available_cpus", &available_cpus);
  m.def("target", [] { return kernel_table().name; });
  m.def("targets", [] { return bindings::describe(kernel_tables()); });
  m.def("emulated_targets", [] { return bindings::describe(emulated_tables()); });
  m.def(
      "line_aligned_zeros",
      [](const std::vector<bindings::py::ssize_t>& shape, const bindings::py::dtype& dtype) {
        return bindings::line_aligned("zeros", shape, dtype);
      },
      bindings::py::arg("shape"), bindings::py::arg("dtype"));
  m.def("build_info", &bindings::build_info);
  m.attr("bad_num_threads") = bindings::start_threads();
}
