// What the AVX-512 targets share.
#pragma once

namespace numoe {
namespace {

// Every feature that their files are compiled with, bfloat16 dot products apart.
inline bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx2") &&
         __builtin_cpu_supports("fma");
}

}  // namespace
}  // namespace numoe
