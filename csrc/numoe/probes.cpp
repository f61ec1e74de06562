#include "numoe/probes.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "numoe/kernels/matrix_unit.h"
#include "numoe/parallel.h"

namespace numoe {
namespace {

// ── loops ───────────────────────────────────────────────────────────────────────────────────────────────────────────
// Macros, because the instruction set of a function is an attribute, and attributes cannot be template parameters.

// ACCUMULATORS chains sum = sum * factor + addend (towards 4: never subnormal, never infinite), enough of them to hide
// the latency, few enough to stay in registers.  A compiler that spills one makes the probe read a third of the truth;
// the loops are exported under plain names so that a test can disassemble them in the built module.  As float32 both
// halves of factor and addend are bfloat16 numbers, 0.75 and 1, for chains sum = sum + dot(factor, addend), which stop
// growing where a step is less than their last bit.
#define NUMOE_PEAK_LOOP(NAME, TARGET, T, BYTES, ACCUMULATORS, REGISTER, MULTIPLY_ADD)            \
  extern "C" TARGET [[gnu::visibility("default")]] void numoe_peak_##NAME(Index steps, T* out) { \
    using V [[gnu::vector_size(BYTES)]] = T;                                                     \
    V factor = V{} + T(0x1.807e8p-1), addend = V{} + T(0x1.007fp0), sum[ACCUMULATORS];           \
    _Pragma("GCC unroll 16") for (int i = 0; i < ACCUMULATORS; ++i) sum[i] = V{} + T(i);         \
    for (Index step = 0; step < steps; ++step) {                                                 \
      asm volatile("" : "+" REGISTER(factor), "+" REGISTER(addend)); /* nothing is hoisted */    \
      _Pragma("GCC unroll 16") for (int i = 0; i < ACCUMULATORS; ++i) {                          \
        sum[i] = MULTIPLY_ADD(sum[i], factor, addend);                                           \
      }                                                                                          \
    }                                                                                            \
    _Pragma("GCC unroll 16") for (int i = 1; i < ACCUMULATORS; ++i) sum[0] += sum[i];            \
    std::memcpy(out, &sum[0], sizeof(V));                                                        \
  }

// Adds up the buffer, `passes` times, as one stream or as four side by side, 256 KB apart.  What comes from memory is
// faster one way or the other, depending on the CPU: as one stream with lines 4 KB further asked for, or as four, which
// the hardware's prefetchers follow.  Asking takes load slots where everything comes from a cache.
enum class Way { one_stream, one_stream_asking, four_streams };
#define NUMOE_READ_LOOP(NAME, TARGET, BYTES)                                                                    \
  template <Way way>                                                                                            \
  TARGET void read_##NAME(const char* data, Index size, Index passes, unsigned* out) {                          \
    using V [[gnu::vector_size(BYTES), gnu::may_alias]] = unsigned;                                             \
    constexpr Index streams = way == Way::four_streams ? 4 : 1, vectors = 8 / streams, piece = vectors * BYTES; \
    constexpr Index region = Index{1} << 20;                                                                    \
    V sum[8] = {};                                                                                              \
    for (Index pass = 0; pass < passes; ++pass) {                                                               \
      for (Index begin = 0; begin < size; begin += region) {                                                    \
        const Index length = (size - begin < region ? size - begin : region) / streams;                         \
        for (const char *p = data + begin, *end = p + length; p < end; p += piece) {                            \
          _Pragma("GCC unroll 8") for (int i = 0; way == Way::one_stream_asking && i < 8 * BYTES; i += 64) {    \
            __builtin_prefetch(p + 4096 + i);                                                                   \
          }                                                                                                     \
          _Pragma("GCC unroll 8") for (int i = 0; i < 8; ++i) {                                                 \
            sum[i] += *reinterpret_cast<const V*>(p + i / vectors * length + i % vectors * BYTES);              \
          }                                                                                                     \
        }                                                                                                       \
      }                                                                                                         \
      asm volatile("" ::: "memory"); /* a pass is not remembered from the one before */                         \
    }                                                                                                           \
    _Pragma("GCC unroll 8") for (int i = 1; i < 8; ++i) sum[0] += sum[i];                                       \
    std::memcpy(out, &sum[0], sizeof(V));                                                                       \
  }

#define NUMOE_UNFUSED(sum, factor, addend) ((sum) * (factor) + (addend))
#define NUMOE_TARGET_PORTABLE

#if defined(__x86_64__)
#define NUMOE_TARGET_AVX512 __attribute__((target("avx512f")))
#define NUMOE_TARGET_AVX512_BF16 __attribute__((target("avx512f,avx512bf16")))
#define NUMOE_TARGET_AVX2 __attribute__((target("avx2,fma")))
#define NUMOE_DOT(sum, factor, addend) \
  _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(factor), reinterpret_cast<__m512bh>(addend))
NUMOE_PEAK_LOOP(avx512_bf16, NUMOE_TARGET_AVX512_BF16, float, 64, 14, "v", NUMOE_DOT)
NUMOE_PEAK_LOOP(avx512_f32, NUMOE_TARGET_AVX512, float, 64, 14, "v", _mm512_fmadd_ps)
NUMOE_PEAK_LOOP(avx512_f64, NUMOE_TARGET_AVX512, double, 64, 14, "v", _mm512_fmadd_pd)
NUMOE_PEAK_LOOP(avx2_f32, NUMOE_TARGET_AVX2, float, 32, 12, "x", _mm256_fmadd_ps)
NUMOE_PEAK_LOOP(avx2_f64, NUMOE_TARGET_AVX2, double, 32, 12, "x", _mm256_fmadd_pd)
NUMOE_PEAK_LOOP(portable_f32, NUMOE_TARGET_PORTABLE, float, 16, 13, "x", NUMOE_UNFUSED)
NUMOE_PEAK_LOOP(portable_f64, NUMOE_TARGET_PORTABLE, double, 16, 13, "x", NUMOE_UNFUSED)

// Four sums, as the tile for most rows has them.
constexpr int amx_flops = 4 * 2 * matrix_side * matrix_side * 2 * matrix_side;
extern "C" [[gnu::visibility("default")]] void numoe_peak_amx_bf16(Index steps, float*) {
  Amx unit;
  unit.shape(2 * matrix_side);
  for (Index step = 0; step < steps; ++step) {
    unit.multiply_add<0, 4, 6>();
    unit.multiply_add<1, 4, 7>();
    unit.multiply_add<2, 5, 6>();
    unit.multiply_add<3, 5, 7>();
  }
  unit.give_back();
}
NUMOE_READ_LOOP(avx512, NUMOE_TARGET_AVX512, 64)
NUMOE_READ_LOOP(avx2, NUMOE_TARGET_AVX2, 32)
#elif defined(__aarch64__)
#define NUMOE_NEON_F32(sum, factor, addend) vfmaq_f32(addend, sum, factor)
#define NUMOE_NEON_F64(sum, factor, addend) vfmaq_f64(addend, sum, factor)
NUMOE_PEAK_LOOP(neon_f32, NUMOE_TARGET_PORTABLE, float, 16, 16, "w", NUMOE_NEON_F32)
NUMOE_PEAK_LOOP(neon_f64, NUMOE_TARGET_PORTABLE, double, 16, 16, "w", NUMOE_NEON_F64)
NUMOE_PEAK_LOOP(portable_f32, NUMOE_TARGET_PORTABLE, float, 16, 16, "w", NUMOE_UNFUSED)
NUMOE_PEAK_LOOP(portable_f64, NUMOE_TARGET_PORTABLE, double, 16, 16, "w", NUMOE_UNFUSED)
#else
NUMOE_PEAK_LOOP(portable_f32, NUMOE_TARGET_PORTABLE, float, 16, 13, "m", NUMOE_UNFUSED)
NUMOE_PEAK_LOOP(portable_f64, NUMOE_TARGET_PORTABLE, double, 16, 13, "m", NUMOE_UNFUSED)
#endif
NUMOE_READ_LOOP(portable, NUMOE_TARGET_PORTABLE, 16)

// Each step multiplies and adds as many numbers as the accumulators hold.
template <class Factor, class T>
constexpr PeakLoop<T> peak_loop(void (*run)(Index, T*), int accumulators, int bytes) {
  return {2 * accumulators * bytes / static_cast<int>(sizeof(Factor)), run};
}

#if defined(__x86_64__)
bool has_avx512() { return __builtin_cpu_supports("avx512f"); }
bool has_avx512_bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }
#endif

constexpr PeakProbe probes[] = {
#if defined(__x86_64__)
    {"amx_bf16",
     "64-byte vectors, fused multiply-add, bfloat16 products of matrices",
     [] { return has_avx512_bf16() && has_amx_bf16(); },
     peak_loop<float>(numoe_peak_avx512_f32, 14, 64),
     peak_loop<double>(numoe_peak_avx512_f64, 14, 64),
     {amx_flops, numoe_peak_amx_bf16}},
    {"avx512_bf16", "64-byte vectors, fused multiply-add, bfloat16 dot products", has_avx512_bf16,
     peak_loop<float>(numoe_peak_avx512_f32, 14, 64), peak_loop<double>(numoe_peak_avx512_f64, 14, 64),
     peak_loop<bfloat16>(numoe_peak_avx512_bf16, 14, 64)},
    {"avx512", "64-byte vectors, fused multiply-add", has_avx512, peak_loop<float>(numoe_peak_avx512_f32, 14, 64),
     peak_loop<double>(numoe_peak_avx512_f64, 14, 64)},
    {"avx2", "32-byte vectors, fused multiply-add",
     [] { return __builtin_cpu_supports("avx2") != 0 && __builtin_cpu_supports("fma") != 0; },
     peak_loop<float>(numoe_peak_avx2_f32, 12, 32), peak_loop<double>(numoe_peak_avx2_f64, 12, 32)},
    {"portable", "16-byte vectors, multiply then add", [] { return true; },
     peak_loop<float>(numoe_peak_portable_f32, 13, 16), peak_loop<double>(numoe_peak_portable_f64, 13, 16)},
#elif defined(__aarch64__)
    {"neon", "16-byte vectors, fused multiply-add", [] { return true; }, peak_loop<float>(numoe_peak_neon_f32, 16, 16),
     peak_loop<double>(numoe_peak_neon_f64, 16, 16)},
    {"portable", "16-byte vectors, multiply then add", [] { return true; },
     peak_loop<float>(numoe_peak_portable_f32, 16, 16), peak_loop<double>(numoe_peak_portable_f64, 16, 16)},
#else
    {"portable", "16-byte vectors, multiply then add", [] { return true; },
     peak_loop<float>(numoe_peak_portable_f32, 13, 16), peak_loop<double>(numoe_peak_portable_f64, 13, 16)},
#endif
};

template <Way way>
ReadLoop widest_read_loop() {
#if defined(__x86_64__)
  if (has_avx512()) return read_avx512<way>;
  if (__builtin_cpu_supports("avx2")) return read_avx2<way>;
#endif
  return read_portable<way>;
}

// ── clocks ──────────────────────────────────────────────────────────────────────────────────────────────────────────

template <class Work>
double seconds_of(Work work) {
  const auto start = std::chrono::steady_clock::now();
  work();
  return std::max(std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count(), 1e-9);
}

constexpr Index kPage = Index{1} << 21;  // a huge page of x86-64 and of most ARM systems
constexpr Index kReadBlock = 512;        // bytes of one step of the widest read loop
constexpr Index kLargeShare = 1 << 20;   // bytes per thread from which the way of reading matters

}  // namespace

std::span<const PeakProbe> peak_probes() { return probes; }

template <class T>
double peak_rate(const PeakLoop<T>& loop, int threads, double seconds) {
  const auto run = [&loop](Index steps) {
    alignas(64) T out[64 / sizeof(T)];
    loop.run(steps, out);
  };
  constexpr Index trial = 1 << 14;
  constexpr double task_seconds = 1e-3;  // short, so that threads that start late or are interrupted cost little
  run(trial);                            // the wide units have to wake up
  const double step = seconds_of([&] { run(trial); }) / trial;
  const Index steps = std::max<Index>(trial, static_cast<Index>(task_seconds / step));
  const double each = step * static_cast<double>(steps);
  const Index tasks = threads * std::max<Index>(1, static_cast<Index>(std::lround(seconds / each)));
  const double spent = seconds_of([&] { parallel_for(tasks, [&](Index) { run(steps); }, threads); });
  return static_cast<double>(tasks * steps * loop.flops) / spent;
}
template double peak_rate(const PeakLoop<float>&, int, double);
template double peak_rate(const PeakLoop<double>&, int, double);

ReadProbe::ReadProbe(Index bytes) : buffer_((bytes + kPage - 1) / kPage * kPage) {
  // Written by all threads: pages go to the memory of whoever touches them first.
  parallel_for(size() / kPage, [this](Index page) { std::memset(buffer_.data() + page * kPage, 1, kPage); });
}

double ReadProbe::rate(Index bytes, int threads) const {
  const Index share = std::max(kReadBlock, bytes / threads / kReadBlock * kReadBlock);
  if (share < kLargeShare) return rate_of(widest_read_loop<Way::one_stream>(), share, threads);
  return std::max(rate_of(widest_read_loop<Way::one_stream_asking>(), share, threads),
                  rate_of(widest_read_loop<Way::four_streams>(), share, threads));
}

double ReadProbe::rate_of(ReadLoop loop, Index share, int threads) const {
  const Index readers = std::min<Index>(threads, size() / share);
  const auto read = [&](Index passes) {
    return seconds_of([&] {
      parallel_for(
          readers,
          [&](Index i) {
            alignas(64) unsigned out[16];
            loop(buffer_.data() + i * share, share, passes, out);
          },
          threads);
    });
  };
  constexpr double long_enough = 5e-3;
  double best = read(1);  // also fills the caches
  const Index passes = std::max<Index>(1, static_cast<Index>(long_enough / best));
  for (int i = 0; i < (passes == 1 ? 2 : 3); ++i) {
    const double pass = read(passes) / static_cast<double>(passes);
    best = i == 0 && passes > 1 ? pass : std::min(best, pass);
  }
  return static_cast<double>(share * readers) / best;
}

}  // namespace numoe
