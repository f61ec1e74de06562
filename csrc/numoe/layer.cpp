#include "numoe/layer.h"

#include <algorithm>
#include <numeric>
#include <utility>

#include "numoe/eigen.h"
#include "numoe/matmul.h"
#include "numoe/parallel.h"

namespace numoe {
namespace {

template <class T>
MatrixView<T> matrix(std::vector<T>& buffer, Index rows, Index cols) {
  buffer.resize(static_cast<std::size_t>(rows * cols));
  return {buffer.data(), rows, cols, cols};
}

template <class T>
Index numbers(const std::vector<T>& buffer) {
  return static_cast<Index>(buffer.size());
}

template <class T>
std::vector<T> copy(MatrixView<const T> a) {
  return a ? std::vector<T>(a.data, a.data + a.rows * a.cols) : std::vector<T>{};
}

template <class T>
MatrixView<const T> bias_view(const std::vector<T>& bias, Index experts) {
  if (bias.empty()) return {};
  const Index cols = static_cast<Index>(bias.size()) / experts;
  return {bias.data(), experts, cols, cols};
}

}  // namespace

template <class T>
struct Pass {
  std::vector<T> logits, weights;
  Buffer<T> y;  // of the shared expert
  std::vector<std::int32_t> indices, row_token, row_assignment, assignment_row;
  std::vector<std::int64_t> offset;

  // (rows, cols), uninitialised
  MatrixView<T> shared_result(Index rows, Index cols) {
    if (y.size() < rows * cols) {
      y = Buffer<T>();
      y = Buffer<T>(rows * cols);
    }
    return {y.data(), rows, cols, cols};
  }
  Index bytes() const {
    const Index floats = numbers(logits) + numbers(weights) + y.size();
    const Index ints = numbers(indices) + numbers(row_token) + numbers(row_assignment) + numbers(assignment_row);
    return floats * static_cast<Index>(sizeof(T)) + ints * static_cast<Index>(sizeof(std::int32_t));
  }

  DispatchView sort(MatrixView<const std::int32_t> chosen, Index num_experts) {
    offset.assign(static_cast<std::size_t>(num_experts) + 1, 0);
    count_assignments(chosen, {}, std::span(offset).subspan(1));
    std::partial_sum(offset.begin(), offset.end(), offset.begin());
    row_token.resize(static_cast<std::size_t>(offset.back()));
    row_assignment.resize(row_token.size());
    sort_by_expert(chosen, {}, offset, row_token, row_assignment, matrix(assignment_row, chosen.rows, chosen.cols));
    return {offset, row_token, row_assignment};
  }
};

namespace {

// A Pass that a thread keeps between calls, unless it is unusually large; a call in the middle of another (from a signal handler)
// gets a fresh one.
template <class T>
class BorrowedPass {
 public:
  BorrowedPass() : pass_(std::move(kept())) {}
  BorrowedPass(const BorrowedPass&) = delete;
  BorrowedPass& operator=(const BorrowedPass&) = delete;
  ~BorrowedPass() {
    constexpr Index most_bytes = Index{64} << 20;
    if (pass_.bytes() <= most_bytes) kept() = std::move(pass_);
  }
  Pass<T>* operator->() { return &pass_; }
  Pass<T>& operator*() { return pass_; }

 private:
  static Pass<T>& kept() {
    thread_local Pass<T> pass;
    return pass;
  }
  Pass<T> pass_;
};

}  // namespace

template <class S>
template <class Source>
PackedBranch<S>::PackedBranch(const ExpertWeights<Source>& weights, const ExpertOptions& expert_options)
    : experts(weights),
      options(expert_options),
      gate_bias(copy(weights.gate_bias)),
      up_bias(copy(weights.up_bias)),
      down_bias(copy(weights.down_bias)) {}

template <class S>
Index PackedBranch<S>::bytes() const {
  return experts.bytes() + static_cast<Index>(sizeof(T)) * (numbers(gate_bias) + numbers(up_bias) + numbers(down_bias));
}

template <class S>
ExpertBiases<Compute<S>> PackedBranch<S>::biases() const {
  const Index E = experts.num_experts();
  return {bias_view(gate_bias, E), bias_view(up_bias, E), bias_view(down_bias, E)};
}

template <class S>
void PackedBranch<S>::forward(MatrixView<const T> x, const DispatchView& dispatch, MatrixView<const T> weights,
                              MatrixView<T> y) const {
  experts_forward(x, dispatch, weights, experts, biases(), options, y);
}

template <class S>
PackedLayer<S>::PackedLayer(MatrixView<const T> w_router, std::span<const T> b_router, std::span<const T> choice_bias,
                            const RouterOptions& router, PackedBranch<S> routed, std::optional<PackedBranch<S>> shared,
                            std::span<const T> shared_score)
    : b_router_(b_router.begin(), b_router.end()),
      choice_bias_(choice_bias.begin(), choice_bias.end()),
      shared_score_(shared_score.begin(), shared_score.end()),
      router_(router),
      routed_(std::move(routed)),
      shared_(std::move(shared)) {
  const Index width = kernels<T>().tile_cols;
  router_panels_ = Buffer<T>(num_panels(w_router.cols, width) * width * w_router.rows);
  pack_panels(operand(w_router), w_router.rows, 0, w_router.cols, width, router_panels_.data());
}

template <class S>
Index PackedLayer<S>::bytes() const {
  return routed_.bytes() + (shared_ ? shared_->bytes() : 0) +
         static_cast<Index>(sizeof(T)) *
             (router_panels_.size() + numbers(b_router_) + numbers(choice_bias_) + numbers(shared_score_));
}

template <class S>
void PackedLayer<S>::forward(MatrixView<const T> x, MatrixView<T> y) const {
  BorrowedPass<T> pass;
  const Index tokens = x.rows, choices = router_.top_k;
  const auto weights = matrix(pass->weights, tokens, choices);
  const auto indices = matrix(pass->indices, tokens, choices);
  route_tokens(x, indices, weights);
  routed_.forward(x, pass->sort(indices, num_experts()), weights, y);
  if (shared_) add_shared(*pass, x, y);
}

template <class S>
void PackedLayer<S>::forward_routed(MatrixView<const T> x, MatrixView<const std::int32_t> indices,
                                    MatrixView<const T> weights, MatrixView<T> y) const {
  BorrowedPass<T> pass;
  routed_.forward(x, pass->sort(indices, num_experts()), weights, y);
  if (shared_) add_shared(*pass, x, y);
}

// A task routes its tokens as soon as it has their logits, so all logits (T, E) never exist at once: with many experts
// they would be more than anything else.
template <class S>
void PackedLayer<S>::route_tokens(MatrixView<const T> x, MatrixView<std::int32_t> indices,
                                  MatrixView<T> weights) const {
  constexpr Index tiles_per_task = 4;
  const Index E = num_experts(), height = kernels<T>().tile_rows;
  parallel_ranges(x.rows, tiles_per_task * height, [&](Index begin, Index end) {
    const MatrixView<T> logits{scratch<T, Slot::passing>((end - begin) * E), end - begin, E, E};
    const RowTiles tiles{end - begin, height};
    multiply_tiles(operand(x.row_range(begin, end)), tiles, {0, tiles.count()}, x.cols, router_panels_.data(),
                   Store::overwrite, logits);
    add_router_bias<T>(b_router_, logits);
    route_serial<T>(logits, choice_bias_, {}, router_, begin, indices.row_range(begin, end),
                    weights.row_range(begin, end));
  });
}

// The shared expert is an MoE of one expert that every token visits, with weight sigmoid(x · score) or 1.
template <class S>
void PackedLayer<S>::add_shared(Pass<T>& pass, MatrixView<const T> x, MatrixView<T> y) const {
  const auto weights = matrix(pass.weights, x.rows, 1);
  const auto indices = matrix(pass.indices, x.rows, 1);
  std::fill_n(indices.data, x.rows, 0);
  MatrixView<const T> used{};
  if (!shared_score_.empty()) {
    const auto score = matrix(pass.logits, x.rows, 1);
    matmul(operand(x), Operand<T>{shared_score_.data(), 1, 1}, x.cols, score);
    const RouterOptions gate{.top_k = 1, .score = Score::sigmoid, .normalize = Normalize::none};
    route<T>(score, {}, {}, gate, indices, weights);
    used = weights;
  }
  const auto y_shared = pass.shared_result(y.rows, y.cols);
  shared_->forward(x, pass.sort(indices, 1), used, y_shared);
  parallel_ranges(y.rows, 64, [&](Index begin, Index end) {
    as_array(y.row_range(begin, end)) += as_array(y_shared.row_range(begin, end));
  });
}

template <class S>
void layer_forward(MatrixView<const Compute<S>> x, std::span<const bool> mask, const RouterWeights<Compute<S>>& weights,
                   const RouterOptions& router, const ExpertWeights<S>& experts, const ExpertOptions& options,
                   MatrixView<Compute<S>> y) {
  using T = Compute<S>;
  Pass<T> pass;  // of this call only: batches may be much larger than those that a thread should keep memory for
  const Index tokens = x.rows, E = experts.num_experts();
  const auto shares = matrix(pass.weights, tokens, router.top_k);
  const auto indices = matrix(pass.indices, tokens, router.top_k);
  Buffer<T> logits_buffer(checked_product(tokens, E));
  const MatrixView<T> logits{logits_buffer.data(), tokens, E, E};
  matmul(operand(x), operand(weights.w), x.cols, logits);
  add_router_bias(weights.b, logits);
  route<T>(logits, weights.choice_bias, mask, router, indices, shares);
  experts_forward<S>(x, pass.sort(indices, E), shares, experts, options, true, {}, y);
}

template struct PackedBranch<float>;
template struct PackedBranch<double>;
template struct PackedBranch<bfloat16>;
template PackedBranch<float>::PackedBranch(const ExpertWeights<float>&, const ExpertOptions&);
template PackedBranch<double>::PackedBranch(const ExpertWeights<double>&, const ExpertOptions&);
template PackedBranch<bfloat16>::PackedBranch(const ExpertWeights<float>&, const ExpertOptions&);
template PackedBranch<bfloat16>::PackedBranch(const ExpertWeights<bfloat16>&, const ExpertOptions&);
template class PackedLayer<float>;
template class PackedLayer<double>;
template class PackedLayer<bfloat16>;
template void layer_forward(MatrixView<const float>, std::span<const bool>, const RouterWeights<float>&,
                            const RouterOptions&, const ExpertWeights<float>&, const ExpertOptions&, MatrixView<float>);
template void layer_forward(MatrixView<const double>, std::span<const bool>, const RouterWeights<double>&,
                            const RouterOptions&, const ExpertWeights<double>&, const ExpertOptions&,
                            MatrixView<double>);
template void layer_forward(MatrixView<const float>, std::span<const bool>, const RouterWeights<float>&,
                            const RouterOptions&, const ExpertWeights<bfloat16>&, const ExpertOptions&,
                            MatrixView<float>);

}  // namespace numoe
