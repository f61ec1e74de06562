#include <memory>
#include <string>

#include "bindings/arrays.h"
#include "numoe/parallel.h"
#include "numoe/probes.h"

namespace numoe::bindings {
namespace {

void check_threads(int threads) {
  if (threads < 1 || threads > kMaxThreads) {
    throw py::value_error("threads must be in 1.." + std::to_string(kMaxThreads) + "; got " + std::to_string(threads));
  }
}

py::list list_peak_probes() {
  py::list list;
  for (const PeakProbe& probe : peak_probes()) {
    list.append(py::dict(py::arg("name") = probe.name, py::arg("description") = probe.description,
                         py::arg("supported") = probe.supported(),
                         py::arg("bfloat16_dots") = probe.bf16.run != nullptr));
  }
  return list;
}

const PeakProbe& peak_probe(const std::string& name) {
  std::string names;
  for (const PeakProbe& probe : peak_probes()) {
    if (!probe.supported()) continue;
    if (name == probe.name) return probe;
    if (!names.empty()) names += ", ";
    names += probe.name;
  }
  throw py::value_error("vectors='" + name + "' is not what this CPU and this build have; pass one of: " + names);
}

double probe_peak(const std::string& vectors, const std::string& dtype, int threads, double seconds) {
  const PeakProbe& probe = peak_probe(vectors);
  check_threads(threads);
  const bool bfloat16_dots = dtype == "bfloat16" && probe.bf16.run;
  if (dtype != "float32" && dtype != "float64" && !bfloat16_dots) {
    throw py::value_error(
        "dtype must be 'float32' or 'float64', or 'bfloat16' for vectors with its dot products; got '" + dtype +
        "' for '" + vectors + "'");
  }
  if (!(seconds > 0 && seconds <= 60)) {
    throw py::value_error("seconds must be > 0 and <= 60; got " + std::to_string(seconds));
  }
  ReleasedGil nogil;
  if (dtype == "float64") return peak_rate(probe.f64, threads, seconds);
  return peak_rate(bfloat16_dots ? probe.bf16 : probe.f32, threads, seconds);
}

double read_rate(const ReadProbe& probe, Index bytes, int threads) {
  check_threads(threads);
  if (bytes < 1 || bytes > probe.size()) {
    throw py::value_error("bytes must be in 1.." + std::to_string(probe.size()) + ", the size of the probe; got " +
                          std::to_string(bytes));
  }
  ReleasedGil nogil;
  return probe.rate(bytes, threads);
}

std::unique_ptr<ReadProbe> make_read_probe(Index bytes) {
  constexpr Index limit = Index{1} << 40;
  if (bytes < 1 || bytes > limit) {
    throw py::value_error("bytes must be in 1.." + std::to_string(limit) + "; got " + std::to_string(bytes));
  }
  ReleasedGil nogil;
  return std::make_unique<ReadProbe>(bytes);
}

}  // namespace

void bind_probes(py::module_& m) {
  m.def("peak_probes", &list_peak_probes);
  m.def("probe_peak", &probe_peak, py::arg("vectors"), py::arg("dtype"), py::arg("threads"), py::arg("seconds"));
  py::class_<ReadProbe>(m, "ReadProbe")
      .def(py::init(&make_read_probe), py::arg("bytes"))
      .def_property_readonly("size", &ReadProbe::size)
      .def("rate", &read_rate, py::arg("bytes"), py::arg("threads"));
}

}  // namespace numoe::bindings
