// What this machine can do at most: the yardsticks that `python -m numoe bench` holds a layer against.
//
// Compute is measured on registers alone, reading on a buffer that nothing else touches.  Both measure the machine, not
// the library: they use the widest vectors the CPU has, whichever kernel target is running.
#pragma once

#include <span>

#include "numoe/view.h"

namespace numoe {

// A loop of independent multiply-adds on registers.  One step is `flops` operations; the sum goes to `out` (64 bytes),
// so that no compiler can leave the work out.
template <class T>
struct PeakLoop {
  Index flops;
  void (*run)(Index steps, T* out);
};

// One kind of vector instruction.
struct PeakProbe {
  const char* name;  // that of the kernel target with the same vectors
  const char* description;
  bool (*supported)();  // running it on a CPU without is an illegal instruction
  PeakLoop<float> f32;
  PeakLoop<double> f64;
  PeakLoop<float> bf16 = {};  // products of bfloat16 pairs, added up in float32; run is null without them
};

// Widest first; the last one, "portable", runs everywhere.
std::span<const PeakProbe> peak_probes();

// Floating-point operations per second of `threads` threads together, over about `seconds`.
template <class T>
double peak_rate(const PeakLoop<T>& loop, int threads, double seconds);

using ReadLoop = void (*)(const char* data, Index size, Index passes, unsigned* out);

// A buffer on huge pages (where the system has them), and how fast it can be read.
class ReadProbe {
 public:
  explicit ReadProbe(Index bytes);  // throws std::bad_alloc

  Index size() const { return buffer_.size(); }

  // Bytes per second of `threads` threads that read the first `bytes` (<= size()) again and again, each its own part;
  // the best of three measurements.  A buffer as large as what a layer reads is served from the same caches.
  double rate(Index bytes, int threads) const;

 private:
  double rate_of(ReadLoop loop, Index share, int threads) const;  // each of the threads reads `share` bytes

  Buffer<char> buffer_;
};

}  // namespace numoe
