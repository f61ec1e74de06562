#include <memory>
#include <string>

#include "bindings/arrays.h"
#include "numoe/parallel.h"
#include "numoe/probes.h"
#include "numoe/products.h"

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
                         py::arg("bfloat16_pairs") = probe.bf16.run != nullptr));
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

void check_seconds(double seconds) {
  if (!(seconds > 0 && seconds <= 60)) {
    throw py::value_error("seconds must be > 0 and <= 60; got " + std::to_string(seconds));
  }
}

double probe_peak(const std::string& vectors, const std::string& dtype, int threads, double seconds) {
  const PeakProbe& probe = peak_probe(vectors);
  check_threads(threads);
  const bool bfloat16_pairs = dtype == "bfloat16" && probe.bf16.run;
  if (dtype != "float32" && dtype != "float64" && !bfloat16_pairs) {
    throw py::value_error("dtype must be 'float32' or 'float64', or 'bfloat16' for vectors that multiply it; got '" +
                          dtype + "' for '" + vectors + "'");
  }
  check_seconds(seconds);
  ReleasedGil nogil;
  if (dtype == "float64") return peak_rate(probe.f64, threads, seconds);
  return peak_rate(bfloat16_pairs ? probe.bf16 : probe.f32, threads, seconds);
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

constexpr std::pair<const char*, Product> product_names[] = {{"packed", Product::packed},
                                                             {"row-major", Product::row_major},
                                                             {"transposed", Product::transposed},
                                                             {"outer", Product::outer}};

std::unique_ptr<ProductProbe> make_product_probe(const std::string& name, Index rows, Index depth, Index cols,
                                                 Index matrices, const std::string& dtype) {
  const bool pairs = dtype == "bfloat16" && kernels<float>().pairs;
  if (dtype != "float32" && !pairs) {
    throw py::value_error("dtype must be 'float32', or 'bfloat16' where the target multiplies it; got '" + dtype + "'");
  }
  constexpr Index most = Index{1} << 30;  // numbers, of the matrices and of the rows
  for (const auto& [known, product] : product_names) {
    if (name != known) continue;
    const bool positive = rows >= 1 && depth >= 1 && cols >= 1 && matrices >= 1;
    if (!positive || depth > most / cols || depth * cols > most / matrices || rows > most / std::max(depth, cols)) {
      throw py::value_error("rows, depth, cols and matrices must be >= 1, and together at most 2^30 numbers; got " +
                            std::to_string(rows) + ", " + std::to_string(depth) + ", " + std::to_string(cols) + ", " +
                            std::to_string(matrices));
    }
    ReleasedGil nogil;
    return std::make_unique<ProductProbe>(product, pairs, rows, depth, cols, matrices);
  }
  std::string names;
  for (const auto& [known, product] : product_names) names += std::string(names.empty() ? "" : ", ") + known;
  throw py::value_error("product='" + name + "' is unknown; pass one of: " + names);
}

double product_rate(ProductProbe& probe, double seconds) {
  check_seconds(seconds);
  ReleasedGil nogil;
  return probe.rate(seconds);
}

}  // namespace

void bind_probes(py::module_& m) {
  m.def("peak_probes", &list_peak_probes);
  m.def("probe_peak", &probe_peak, py::arg("vectors"), py::arg("dtype"), py::arg("threads"), py::arg("seconds"));
  py::class_<ReadProbe>(m, "ReadProbe")
      .def(py::init(&make_read_probe), py::arg("bytes"))
      .def_property_readonly("size", &ReadProbe::size)
      .def("rate", &read_rate, py::arg("bytes"), py::arg("threads"));
  py::class_<ProductProbe>(m, "ProductProbe")
      .def(py::init(&make_product_probe), py::arg("product"), py::arg("rows"), py::arg("depth"), py::arg("cols"),
           py::arg("matrices"), py::arg("dtype"))
      .def("rate", &product_rate, py::arg("seconds"));
}

}  // namespace numoe::bindings
