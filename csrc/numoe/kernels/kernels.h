// The table of hot loops, one per CPU target.  Everything outside kernels/ is written on top of it.
//
// A kernel gets raw pointers and sizes; it starts no thread, allocates nothing and throws nothing.  Every kernel
// computes each output element by one fixed sequence of operations that depends neither on the element's place in a
// tile nor on its neighbours: that is what makes a token's bits independent of the batch around it.
#pragma once

#include "numoe/view.h"

namespace numoe {

enum class Activation { silu, gelu, gelu_tanh, relu, relu2, quick_gelu };

template <class T>
struct Kernels {
  Index tile_rows;  // R, the largest `rows` of tile()
  Index tile_cols;  // W, the width of a panel

  // c[r, j] (+)= Σ_k a[k, r] · b[k, j] for r < rows <= R, j < W, k ascending.
  // a is packed [depth][rows], b [depth][W]; row r of c starts at c + r * c_stride.
  void (*tile)(Index depth, Index rows, const T* a, const T* b, T* c, Index c_stride, bool accumulate);

  // The same with bfloat16 weights, widened in registers: b is [depth/2][W][2], pairs of k side by side, the last k of
  // an odd depth paired with 0.  Absent for double.
  void (*tile_bf16)(Index depth, Index rows, const T* a, const bfloat16* b, T* c, Index c_stride);

  // A bfloat16 panel [depth/2][W][2] → the panel [depth][W] of the same numbers.  Absent for double.
  void (*widen_panel)(Index depth, const bfloat16* narrow, T* wide);

  // h = act(pre) * linear; linear == nullptr: h = act(pre).
  void (*activate)(Activation, Index n, const T* pre, const T* linear, T* h);
  // The adjoint, and h again: dpre = dh * act'(pre) * linear, dlinear = dh * act(pre).  dh may be one of the outputs.
  void (*activate_backward)(Activation, Index n, const T* pre, const T* linear, const T* dh, T* h, T* dpre, T* dlinear);

  void (*axpy)(Index n, T alpha, const T* x, T* y);  // y += alpha * x
  T (*dot)(Index n, const T* a, const T* b);         // Σ a·b in a fixed order
};

struct KernelTable {
  const char* name;
  const char* description;
  bool (*supported)();
  Kernels<float> f32;
  Kernels<double> f64;
};

// All targets of this build, best first; the last one, "portable", runs everywhere.
std::span<const KernelTable* const> kernel_tables();

// The table in use.  Chosen once: NUMOE_TARGET if set (std::runtime_error if this CPU or build lacks it), else the best.
const KernelTable& kernel_table();

// NUMOE_NUM_THREADS if it is set to a whole number >= 1; 0 otherwise, with *complaint naming the bad value if there is one.
int num_threads_from_environment(const char** complaint);

template <class T>
const Kernels<T>& kernels();
template <>
inline const Kernels<float>& kernels<float>() {
  return kernel_table().f32;
}
template <>
inline const Kernels<double>& kernels<double>() {
  return kernel_table().f64;
}

}  // namespace numoe
