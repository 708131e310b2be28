// Which instruction set the vector kernels use: chosen at run time, once compiled for each.
#pragma once

#include <cstdint>
#include <limits>

#if defined(__x86_64__) && defined(__GNUC__)
#define GADCORE_X86 1
#define GADCORE_AVX2 __attribute__((target("avx2,fma")))
#define GADCORE_AVX512 __attribute__((target("avx512f,avx512dq,avx512vl,avx512bw,avx2,fma")))
#endif

namespace gadcore {

constexpr float kInf = std::numeric_limits<float>::infinity();

// kWide is the code of kAvx512, 16 lanes, that the compiler lowers to AVX2: it lets a machine without AVX-512 test it.
enum Level : int { kScalar, kBaseline, kAvx2, kAvx512, kWide, kLevels };

#ifdef __GNUC__
constexpr int kBaselineWidth = 4;
#else
constexpr int kBaselineWidth = 1;
#endif

// A file that is compiled for every level defines EACH(name, width, target): a namespace of that name with a kTable in
// it. GADCORE_TABLES lists those tables in the order of Level.
#ifdef GADCORE_X86
#define GADCORE_LEVELS(EACH) \
  EACH(scalar, 1, ) EACH(baseline, kBaselineWidth, ) EACH(avx2, 8, GADCORE_AVX2) EACH(avx512, 16, GADCORE_AVX512) \
  EACH(wide, 16, GADCORE_AVX2)
#define GADCORE_TABLES {&scalar::kTable, &baseline::kTable, &avx2::kTable, &avx512::kTable, &wide::kTable}
#else
#define GADCORE_LEVELS(EACH) EACH(scalar, 1, ) EACH(baseline, kBaselineWidth, )
#define GADCORE_TABLES {&scalar::kTable, &baseline::kTable}
#endif

// torch's own choice (ATEN_CPU_CAPABILITY counts), unless a test has asked for another.
Level level();

// Whether torch came with a bfloat16 product that accumulates in float32 (head.cpp).
bool bf16_gemm_linked();

// Whether products of bfloat16 heads go to the CPU's matrix instructions instead of through float32 copies.
bool bf16_products();

}  // namespace gadcore
