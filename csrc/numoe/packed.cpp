#include "numoe/packed.h"

#include "numoe/kernels/kernels.h"
#include "numoe/parallel.h"

namespace numoe {
namespace {

// One panel of `source`, in the packed type.
template <class S, class Source>
void pack_panel(MatrixView<const Source> source, Index col, Index width, S* packed) {
  if constexpr (std::is_same_v<S, bfloat16>) {
    pack_bf16_panel(source, col, width, packed);
  } else {
    pack_panels(operand(source), source.rows, col, std::min(width, source.cols - col), width, packed);
  }
}

}  // namespace

template <class S>
template <class Source>
PackedExperts<S>::PackedExperts(const ExpertWeights<Source>& w)
    : glu_(w.glu()), E_(w.num_experts()), D_(w.d_model()), F_(w.d_ff()), W_(kernels<Compute<S>>().tile_cols) {
  constexpr bool bf16 = std::is_same_v<S, bfloat16>;
  up_step_ = (glu_ ? 2 : 1) * panel_size(D_, W_, bf16);
  down_step_ = panel_size(F_, W_, bf16);
  up_size_ = num_panels(F_, W_) * up_step_;
  down_size_ = num_panels(D_, W_) * down_step_;
  up_ = Buffer<S>(checked_product(E_, up_size_));
  down_ = Buffer<S>(checked_product(E_, down_size_));
  const Index up_panels = num_panels(F_, W_), panels = up_panels + num_panels(D_, W_);
  parallel_for(E_ * panels, [&](Index task) {
    const Index e = task / panels, panel = task % panels;
    if (panel < up_panels) {
      S* target = const_cast<S*>(up(e, panel * W_));
      pack_panel(glu_ ? w.gate[e] : w.up[e], panel * W_, W_, target);
      if (glu_) pack_panel(w.up[e], panel * W_, W_, target + gate_to_up());
    } else {
      pack_panel(w.down[e], (panel - up_panels) * W_, W_, const_cast<S*>(down(e, (panel - up_panels) * W_)));
    }
  });
}

template class PackedExperts<float>;
template class PackedExperts<double>;
template class PackedExperts<bfloat16>;
template PackedExperts<float>::PackedExperts(const ExpertWeights<float>&);
template PackedExperts<double>::PackedExperts(const ExpertWeights<double>&);
template PackedExperts<bfloat16>::PackedExperts(const ExpertWeights<float>&);
template PackedExperts<bfloat16>::PackedExperts(const ExpertWeights<bfloat16>&);

}  // namespace numoe
