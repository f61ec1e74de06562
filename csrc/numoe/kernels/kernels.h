// The table of hot loops, one per CPU target.  Everything outside kernels/ is written on top of it.
//
// A kernel gets raw pointers and sizes; it starts no thread, allocates nothing and throws nothing.  Every kernel
// computes each output element by one fixed sequence of operations that depends neither on the element's place in a
// tile nor on its neighbours: that is what makes a token's bits independent of the batch around it.
#pragma once

#include "numoe/view.h"

namespace numoe {

enum class Activation { silu, gelu, gelu_tanh, relu, relu2, quick_gelu };

// What a tile does with its sums.
enum class Store {
  overwrite,
  accumulate,  // starts from what is in c
  add,         // adds the complete sums to what is in c
  stream,      // overwrites past the caches: for results that nobody reads soon; c and c_stride in whole vectors
};

// Tiles of packed panels multiply so many k's between counts; Ahead says what to ask for with each such round.
constexpr Index k_at_once = 4;

// How lines go: through the caches, and then into which one those that follow are asked for, or past them, if nobody reads
// them soon.
enum class Route { through_l2, through_l1, past_caches };

// Lines of memory that are moved from rows to rows, by a tile while it computes or at once.  Whoever moved `lines` of
// them leaves from, to and left_in_row at the next one.
struct Carry {
  static constexpr Index line = 64;  // bytes
  Route route = Route::through_l2;   // past_caches: `to` consists of whole lines
  const char* from = nullptr;
  char* to = nullptr;
  Index lines = 0;
  Index lines_in_row = 0, left_in_row = 0;  // left: before the next jump
  Index from_jump = 0, to_jump = 0;         // bytes from the end of a row to the start of the next
  Index lead = 0;                           // so many bytes further lines are asked for
  Index odd = 0;                            // bytes from a line to that with which it is zipped, if it is
};

// Memory that a tile asks for while it computes: what will be read after it.
struct Ahead {
  const void* at = nullptr;
  Index lines = 0;  // addresses to ask for with each k_at_once k's
  Index step = 0;   // bytes from one of them to the next

  // `bytes` from `at` on, while `depth` k's are multiplied; a request brings so many bytes.
  static Ahead spread(const void* at, Index bytes, Index depth, Index request) {
    const Index times = depth / k_at_once;
    if (times == 0) return {};
    const Index each = bytes / times, lines = (each + request - 1) / request;
    return {at, lines, lines > 0 ? each / lines : 0};
  }
};

// c[r, j] (+)= Σ_k a[k, r] · b[k, j] for j < W, k ascending.
template <class T, class B = T>
struct TileArgs {
  Index depth = 0;
  const T* a = nullptr;  // packed [depth][rows], or rows where they are
  Index a_stride = 0;    // from one of those to the next
  const B* b = nullptr;  // a panel, or, for tiles that sweep or carry: row k starts at b + k * b_stride
  Index b_stride = 0;
  T* c = nullptr;  // row r starts at c + r * c_stride
  Index c_stride = 0;
  Store store = Store::overwrite;
  Index near = 1024;  // how many bytes further b is asked for, if the tile does so: 0 if not
  Ahead ahead = {};   // tiles that neither sweep nor carry
};

// Several panels in one call: how many numbers it is from one to the next, and from its sums to the next ones.
struct Neighbours {
  Index panels = 1, b_step = 0, c_step = 0;
};
constexpr Index max_side_by_side = 4;  // panels

// Scores that depend on one logit alone.
enum class Curve {
  sigmoid,        // σ(z)
  log_sigmoid,    // ln σ(z)
  sqrt_softplus,  // √ln(1 + eᶻ)
};

constexpr Index max_top_k = 64;  // of RoutingKernels::top_k

template <class T>
struct RoutingKernels {
  // best[0..k) = positions of the k <= max_top_k largest of n values, sorted by (value descending, position ascending)
  // with -0 = +0 and NaN below everything; the same on every target, for every bit pattern.
  void (*top_k)(Index n, Index k, const T* values, std::int32_t* best);
  // two = the largest and the second largest value (-inf for n = 1); both NaN if a value is.
  void (*two_largest)(Index n, const T* values, T* two);
  // p = softmax(z), possibly in place.  A maximum counts as e⁰ even if infinite, so infinite maxima share the weight.
  // NaN anywhere makes all of p NaN; n times -inf gives zeros.
  void (*softmax)(Index n, const T* z, T* p);
  void (*curve)(Curve, Index n, const T* z, T* s);  // s = curve(z), possibly in place
};

// Products of bfloat16 pairs: of numbers that are pairs in a and b, so that depth counts pairs and a bfloat16 panel is such a
// b.  A pair is two numbers in the 32 bits of a T, that of the even k in the lower half.  Subnormal numbers count as 0.
// All of it is absent where the target has no instructions for them, and for double.
template <class T>
struct PairKernels {
  Index tile_rows = 0;     // R
  Index rows_at_once = 0;  // a tile of more rows passes over its panel several times
  Index together = 1;      // G: a is [depth / G][rows][G], of zeros beyond depth

  void (*tile)(Index rows, const TileArgs<T>&) = nullptr;
  void (*sweeping_tile)(Index rows, const TileArgs<T>&, const Neighbours&) = nullptr;  // of packed panels
  void (*broad_tile)(Index rows, const TileArgs<T>&, const Neighbours&) = nullptr;     // absent if it does not pay
  Index unpacked_rows = 0, unpacked_part = 0;
  void (*unpacked_tile)(Index rows, const TileArgs<T>&, const Neighbours&, Index last) = nullptr;

  // sweeping_tile that pairs the rows of a matrix itself, for a few rows of a; absent if zipping_rows are none.
  Index zipping_rows = 0;
  void (*zipping_tile)(Index rows, const TileArgs<T, bfloat16>&, const Neighbours&) = nullptr;

  // tile that moves lines meanwhile: those of two rows of bfloat16 numbers, zipped, so that one becomes two.  Both are absent
  // together.
  void (*carrying_tile)(Index rows, const TileArgs<T>&, Carry&) = nullptr;
  void (*carry)(Carry&) = nullptr;

  // Rounding, to bfloat16 with subnormal numbers as 0: pairs[i] = factor * x[2i] and factor * x[2i + 1], the last of an odd
  // n paired with 0.  Possibly in place.
  void (*round)(Index n, T factor, const T* x, T* pairs) = nullptr;
  // pairs[j] = even_factor * even[j] and odd_factor * odd[j], rounded; an absent row counts as 0.
  void (*zip_rounded)(Index n, T even_factor, const T* even, T odd_factor, const T* odd, T* pairs) = nullptr;
  // Rows of a matrix, `stride` numbers apart, two by two → pairs of what stands in one column, the last of odd `rows` paired
  // with 0.  Panel p, [rows / 2][W], starts at pairs + p * step; what lies `near` bytes beyond the rows is asked for.
  void (*zip)(Index rows, Index panels, const bfloat16* b, Index stride, T* pairs, Index step, Index near) = nullptr;

  Index passes(Index rows) const { return (rows + rows_at_once - 1) / rows_at_once; }
  explicit operator bool() const { return tile != nullptr; }
};

template <class T>
struct Kernels {
  Index tile_rows;  // R, the largest `rows` of a tile
  Index tile_cols;  // W, the width of a panel

  void (*tile)(Index rows, const TileArgs<T>&);  // rows <= R
  // tile for one panel after the other; nothing is asked `ahead`.
  void (*sweeping_tile)(Index rows, const TileArgs<T>&, const Neighbours&);
  // sweeping_tile with rows that are not packed: a[r * a_stride + k], rows <= unpacked_rows.  The last panel is computed up
  // to column `last`, a multiple of unpacked_part.  While the tile passes over the first one, it asks for what is `ahead`.
  // Store::overwrite or accumulate.
  Index unpacked_rows, unpacked_part;
  void (*unpacked_tile)(Index rows, const TileArgs<T>&, const Neighbours&, Index last);
  // tile for all panels at every k, which reads as many streams of memory: rows * panels <= R, at most max_side_by_side
  // panels.  Nothing is asked for: the hardware does better where it follows several streams.
  void (*broad_tile)(Index rows, const TileArgs<T>&, const Neighbours&);
  // tile while it moves lines; nothing is asked `ahead`.
  void (*carrying_tile)(Index rows, const TileArgs<T>&, Carry&);
  void (*carry)(Carry&);

  // tile and broad_tile with bfloat16 panels, widened in registers: b is [depth/2][W][2], pairs of k side by side, the
  // last k of an odd depth paired with 0; b_stride is ignored.  Absent for double.
  void (*tile_bf16)(Index rows, const TileArgs<T, bfloat16>&);
  void (*broad_tile_bf16)(Index rows, const TileArgs<T, bfloat16>&, const Neighbours&);
  // sweeping_tile with rows of bfloat16 numbers, as a matrix has them.  Absent for double.
  void (*sweeping_tile_narrow)(Index rows, const TileArgs<T, bfloat16>&, const Neighbours&);

  PairKernels<T> pairs;

  // Rows of W numbers, `stride` apart → a panel [depth][W].
  void (*copy_panel)(Index depth, const T* b, Index stride, T* panel);
  // Rows of n bfloat16 numbers in another type.  Absent for double.
  void (*widen)(Index rows, Index n, const bfloat16* narrow, Index stride, T* wide, Index wide_stride);
  // n numbers rounded to bfloat16: to nearest, ties to even; NaN stays NaN.  Absent for double.
  void (*narrow)(Index n, const T* wide, bfloat16* narrow);
  // A bfloat16 panel [depth/2][W][2] → the panel [depth][W] of the same numbers.  Absent for double.
  void (*widen_panel)(Index depth, const bfloat16* narrow, T* wide);
  // packed[k * stride + r] = row[r][k] for r < rows, k < depth.  stride = rows: a tile's a.  stride = W: the columns of a
  // panel, padded with zeros.
  void (*transpose)(Index depth, Index rows, const T* const* row, T* packed, Index stride);

  void (*stream_end)();                 // after the last Store::stream, before anybody else may read
  void (*stream_zeros)(Index n, T* p);  // p[0..n) = 0 past the caches, for everybody to read

  // h = act(pre) * linear, possibly in place; linear == nullptr: h = act(pre).
  void (*activate)(Activation, Index n, const T* pre, const T* linear, T* h);
  // The adjoint of weight * h, and that product again in h: dpre = weight * dh * act'(pre) * linear,
  // dlinear = weight * dh * act(pre).  Returns ⟨dh, act(pre) * linear⟩.  dh may be one of the outputs.
  T (*activate_backward)(Activation, Index n, T weight, const T* pre, const T* linear, const T* dh, T* h, T* dpre,
                         T* dlinear);

  void (*axpy)(Index n, T alpha, const T* x, T* y);  // y += alpha * x
  // y[token[r]] += weight[r] * sums[r] for r < rows in order; rows of n numbers; weight == nullptr: 1.
  void (*add_rows)(Index rows, Index n, const T* weight, const T* sums, Index sums_stride, const std::int32_t* token,
                   T* y, Index y_stride);
  T (*dot)(Index n, const T* a, const T* b);  // Σ a·b in a fixed order

  RoutingKernels<T> routing;

  // Lines of memory that the sums of a tile are.
  Index lines_of_sums() const { return tile_rows * tile_cols * static_cast<Index>(sizeof(T)) / Carry::line; }
  // Whether these are fewer than a core has under way, so that they may come and go in one burst.
  bool few_lines_of_sums() const { return lines_of_sums() <= 12; }
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

// How the cores of this CPU like to read matrices from memory, where one way is not better on all.  As it stands: Zen 3 and 4.
struct Habits {
  // Panels that are read side by side: one that is asked for ahead, or several that are not.
  Index streams = max_side_by_side;
  Index rows_of_a_sweep = 64;          // of a row-major matrix, by high tiles
  Index tiles_on_matrices = 8;         // high tiles that read a row-major matrix where it is
  bool row_by_row = false;             // prefetchers follow one row of a matrix far better than several
  Index request = Carry::line;         // bytes that memory sends when one of them is asked for
  Index lines_ahead = 64;              // a line that goes to a stage is asked for so many lines before
  Route to_stage = Route::through_l2;  // and into which cache
  bool bursts_past_caches = true;      // a tile's sums go there quickly even if they go at once
  bool half_vectors = true;            // half a 64-byte vector is multiplied in half the time
};
const Habits& habits();  // of this CPU, or of one for which the table in use stands

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
