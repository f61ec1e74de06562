#include "numoe/forward.h"

namespace numoe {

template <class S>
void experts_forward(MatrixView<const Compute<S>> x, const DispatchView& dispatch, MatrixView<const Compute<S>> weights,
                     const ExpertWeights<S>& experts, const ExpertOptions& options, bool combined,
                     ExpertCache<Compute<S>> cache, MatrixView<Compute<S>> result) {
  using T = Compute<S>;
  const auto run = [&]<class Weights>(const Weights& matrices) {
    Forward<T, Weights>(x, dispatch, weights, experts.d_model(), experts.d_ff(), options, combined, matrices,
                        experts.biases())
        .run(cache, result);
  };
  if constexpr (std::is_same_v<S, bfloat16>) {
    if (kernels<T>().pairs) return run(RowMajorWeights<T, S, true>(experts));
  }
  run(RowMajorWeights<T, S>(experts));
}

template <class S>
void experts_forward(MatrixView<const Compute<S>> x, const DispatchView& dispatch, MatrixView<const Compute<S>> weights,
                     const PackedExperts<S>& experts, const ExpertBiases<Compute<S>>& biases,
                     const ExpertOptions& options, MatrixView<Compute<S>> y) {
  using T = Compute<S>;
  const auto run = [&]<class Weights>(const Weights& matrices) {
    Forward<T, Weights>(x, dispatch, weights, experts.d_model(), experts.d_ff(), options, true, matrices, biases)
        .run({}, y);
  };
  if constexpr (std::is_same_v<S, bfloat16>) {
    if (kernels<T>().pairs) return run(PackedWeights<T, S, true>(experts));
  }
  run(PackedWeights<T, S>(experts));
}

#define NUMOE_INSTANTIATE(S)                                                                                     \
  template void experts_forward(MatrixView<const Compute<S>>, const DispatchView&, MatrixView<const Compute<S>>, \
                                const ExpertWeights<S>&, const ExpertOptions&, bool, ExpertCache<Compute<S>>,    \
                                MatrixView<Compute<S>>);                                                         \
  template void experts_forward(MatrixView<const Compute<S>>, const DispatchView&, MatrixView<const Compute<S>>, \
                                const PackedExperts<S>&, const ExpertBiases<Compute<S>>&, const ExpertOptions&,  \
                                MatrixView<Compute<S>>);
NUMOE_INSTANTIATE(float)
NUMOE_INSTANTIATE(double)
NUMOE_INSTANTIATE(bfloat16)
#undef NUMOE_INSTANTIATE

}  // namespace numoe
