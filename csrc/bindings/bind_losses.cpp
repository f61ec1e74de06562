// Auxiliary losses for Python: tuples of the value and the gradients.
#include "bindings/arrays.h"
#include "bindings/options.h"
#include "numoe/losses.h"

namespace numoe::bindings {
namespace {

constexpr std::initializer_list<std::pair<const char*, BalanceConvention>> conventions = {
    {"switch", BalanceConvention::switch_first},
    {"gshard", BalanceConvention::gshard_paper},
    {"megatron", BalanceConvention::megatron},
    {"hf", BalanceConvention::hugging_face},
    {"deepseek-sequence", BalanceConvention::deepseek_sequence}};

constexpr std::initializer_list<std::pair<const char*, Score>> scores = {{"softmax", Score::softmax},
                                                                         {"softmax_chosen", Score::softmax_chosen},
                                                                         {"sigmoid", Score::sigmoid},
                                                                         {"sqrt_softplus", Score::sqrt_softplus}};

// The core walks the rows of logits by them.
void check_lengths(std::span<const std::int64_t> lengths, Index num_tokens) {
  if (lengths.empty()) return;
  Index rest = num_tokens;
  for (const Index length : lengths) {
    if (length < 0 || length > rest) throw py::value_error("sequence_lengths must be in 0..T and sum to T");
    rest -= length;
  }
  if (rest != 0) throw py::value_error("sequence_lengths must sum to T");
}

py::tuple load_balance(const py::array& logits_, const py::array& indices_, const std::string& convention_,
                       const std::string& score_, const py::object& mask_, const py::object& lengths_) {
  return with_dtype(logits_, [&]<class T>() -> py::tuple {
    Dims dims;
    const auto logits = dims.matrix<T>(logits_, "logits", "T E");
    const auto indices = dims.matrix<std::int32_t>(indices_, "indices", "T K");
    const auto mask = dims.optional_vector<bool>(mask_, "mask", "T");
    const auto given = dims.optional_vector<std::int64_t>(lengths_, "sequence_lengths", "B");
    const std::vector<std::int64_t> lengths(given.begin(), given.end());  // a copy, like Copied
    check_lengths(lengths, logits.rows);
    const auto convention = parse<BalanceConvention>(convention_, "convention", conventions);
    const auto score = parse<Score>(score_, "score", scores);
    auto dlogits = dims.empty<T>("T E");
    double value = 0;
    {
      const auto out = dlogits.matrix();
      ReleasedGil nogil;
      value = load_balance_loss<T>(logits, indices, convention, score, mask, lengths, out);
    }
    return py::make_tuple(value, dlogits.array);
  });
}

py::tuple importance(const py::array& weights_, const py::array& indices_, Index num_experts, const py::object& mask_) {
  if (num_experts < 1) throw py::value_error("num_experts must be >= 1; got " + std::to_string(num_experts));
  return with_dtype(weights_, [&]<class T>() -> py::tuple {
    Dims dims;
    const auto weights = dims.matrix<T>(weights_, "weights", "T K");
    const auto indices = dims.matrix<std::int32_t>(indices_, "indices", "T K");
    const auto mask = dims.optional_vector<bool>(mask_, "mask", "T");
    auto dweights = dims.empty<T>("T K");
    double value = 0;
    {
      const auto out = dweights.matrix();
      ReleasedGil nogil;
      value = importance_loss<T>(weights, indices, num_experts, mask, out);
    }
    return py::make_tuple(value, dweights.array);
  });
}

py::tuple load(const py::array& logits_, const py::array& noisy_logits_, const py::array& noise_std_, Index top_k,
               const py::object& mask_) {
  if (top_k < 1) throw py::value_error("top_k must be >= 1; got " + std::to_string(top_k));
  return with_dtype(logits_, [&]<class T>() -> py::tuple {
    Dims dims;
    const auto logits = dims.matrix<T>(logits_, "logits", "T E");
    const auto noisy = dims.matrix<T>(noisy_logits_, "noisy_logits", "T E");
    const auto noise_std = dims.matrix<T>(noise_std_, "noise_std", "T E");
    const auto mask = dims.optional_vector<bool>(mask_, "mask", "T");
    auto dlogits = dims.empty<T>("T E"), dnoisy = dims.empty<T>("T E"), dnoise_std = dims.empty<T>("T E");
    double value = 0;
    {
      const auto out = dlogits.matrix(), out_noisy = dnoisy.matrix(), out_std = dnoise_std.matrix();
      ReleasedGil nogil;
      value = load_loss<T>(logits, noisy, noise_std, top_k, mask, out, out_noisy, out_std);
    }
    return py::make_tuple(value, dlogits.array, dnoisy.array, dnoise_std.array);
  });
}

py::tuple z(const py::array& logits_, const py::object& mask_) {
  return with_dtype(logits_, [&]<class T>() -> py::tuple {
    Dims dims;
    const auto logits = dims.matrix<T>(logits_, "logits", "T E");
    const auto mask = dims.optional_vector<bool>(mask_, "mask", "T");
    auto dlogits = dims.empty<T>("T E");
    double value = 0;
    {
      const auto out = dlogits.matrix();
      ReleasedGil nogil;
      value = z_loss<T>(logits, mask, out);
    }
    return py::make_tuple(value, dlogits.array);
  });
}

}  // namespace

void bind_losses(py::module_& m) {
  using py::arg;
  m.def("load_balance_loss", &load_balance, arg("logits"), arg("indices"), arg("convention"), arg("score"), arg("mask"),
        arg("sequence_lengths"));
  m.def("importance_loss", &importance, arg("weights"), arg("indices"), arg("num_experts"), arg("mask"));
  m.def("load_loss", &load, arg("logits"), arg("noisy_logits"), arg("noise_std"), arg("top_k"), arg("mask"));
  m.def("z_loss", &z, arg("logits"), arg("mask"));
}

}  // namespace numoe::bindings
