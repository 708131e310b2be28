// Lets one .cu file be built twice: by nvcc for a GPU, and by a C++17 compiler for the CPU, where this header runs it.
//
// Why: the tests run where there is no GPU. They test the very source that nvcc compiles, not a second version of it.
//
// How: blocks run one after the other, and so do the threads of a block, in ascending order or in a random one
// (simt::seed): a result that changes with the seed is a race.
//
// What it tells: misaligned vector accesses. One ends the launch with the error code that cudaGetLastError would give.
//
// What it cannot tell: anything about time; blocks or threads that run at the same time; addresses out of bounds (the
// tests put canaries around what they hand out).
//
// Only what the kernels here use is there: no shared memory, no barriers, no shuffles. Build with -fno-strict-aliasing:
// like nvcc, kernels see one array as scalars and as vectors.
#pragma once

// The libraries hide everything else: two emulated ones in a process would share their machine.
#define GADCORE_EXPORT extern "C" __attribute__((visibility("default")))

#ifdef __CUDACC__

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

// The kernel is put in parentheses: the commas of a template's arguments would split a macro's.
#define GADCORE_LAUNCH(kernel, blocks, threads, stream, ...) \
  GADCORE_BARE kernel<<<(blocks), (threads), 0, static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__)
#define GADCORE_BARE(...) __VA_ARGS__

namespace simt {
__device__ __forceinline__ void check_aligned(const void*, unsigned) {}
}  // namespace simt

#else

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <mutex>
#include <numeric>
#include <random>
#include <vector>

#define __global__ static
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define GADCORE_LAUNCH(kernel, blocks, threads, stream, ...) \
  (static_cast<void>(stream), simt::launch((blocks), (threads), [=] { GADCORE_BARE kernel(__VA_ARGS__); }))
#define GADCORE_BARE(...) __VA_ARGS__

using cudaStream_t = void*;
using cudaError_t = int;

namespace simt {

enum Error : cudaError_t { kNone = 0, kMisaligned = 716 };

struct Index {
  unsigned x = 0, y = 0, z = 0;
};

// The index variables that a kernel reads: those of the thread that runs now.
inline Index block_index, thread_index, block_size, grid_size;

inline std::uint64_t seed = 0;  // 0: ascending order
inline cudaError_t last_error = kNone;

inline const char* message(cudaError_t error) {
  switch (error) {
    case kNone: return "no error";
    case kMisaligned: return "misaligned address";
    default: return "unknown error";
  }
}

// 0 .. n - 1 in the order of the seed, another one at every call of a launch.
inline std::vector<unsigned> order(unsigned n, std::uint64_t call) {
  std::vector<unsigned> indices(n);
  std::iota(indices.begin(), indices.end(), 0u);
  if (seed) {
    std::mt19937_64 random(seed + call);
    std::shuffle(indices.begin(), indices.end(), random);
  }
  return indices;
}

inline void launch(unsigned blocks, unsigned threads, const std::function<void()>& kernel) {
  // Index variables exist once.
  static std::mutex mutex;
  const std::lock_guard<std::mutex> lock(mutex);
  block_size = {threads, 1, 1};
  grid_size = {blocks, 1, 1};
  std::uint64_t calls = 0;
  try {
    for (unsigned block : order(blocks, calls++)) {
      block_index = {block, 0, 0};
      for (unsigned thread : order(threads, calls++)) {
        thread_index = {thread, 0, 0};
        kernel();
      }
    }
  } catch (Error error) {
    last_error = error;
    std::fprintf(stderr, "simt: %s (block %u, thread %u)\n", message(error), block_index.x, thread_index.x);
  }
}

// Ends the launch where a thread has done what a GPU would not go on after.
inline void check_aligned(const void* address, unsigned bytes) {
  if (reinterpret_cast<std::uintptr_t>(address) % bytes) throw kMisaligned;
}

template <class T, class U>
T bits_of(U value) {
  static_assert(sizeof(T) == sizeof(U), "the same size");
  T result;
  std::memcpy(&result, &value, sizeof result);
  return result;
}

}  // namespace simt

#define blockIdx simt::block_index
#define threadIdx simt::thread_index
#define blockDim simt::block_size
#define gridDim simt::grid_size

inline cudaError_t cudaGetLastError() {
  const cudaError_t error = simt::last_error;
  simt::last_error = simt::kNone;
  return error;
}

inline const char* cudaGetErrorString(cudaError_t error) { return simt::message(error); }

// 16-bit floats, by their bits. Rounding is to nearest even; a NaN becomes 0x7fff, as the GPU's conversions give it.
struct __nv_bfloat16 {
  std::uint16_t bits;
};
struct __half {
  std::uint16_t bits;
};

inline float __bfloat162float(__nv_bfloat16 x) {
  return simt::bits_of<float>(static_cast<std::uint32_t>(x.bits) << 16);
}

inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  if (std::isnan(x)) return {0x7fff};
  const auto bits = simt::bits_of<std::uint32_t>(x);
  return {static_cast<std::uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}

inline float __half2float(__half x) {
  const int exponent = (x.bits >> 10) & 31, mantissa = x.bits & 1023;
  float magnitude;
  if (exponent == 31) {
    magnitude = mantissa ? NAN : INFINITY;
  } else if (exponent == 0) {
    magnitude = std::ldexp(static_cast<float>(mantissa), -24);
  } else {
    magnitude = std::ldexp(static_cast<float>(1024 + mantissa), exponent - 25);
  }
  return x.bits & 0x8000 ? -magnitude : magnitude;
}

inline __half __float2half_rn(float x) {
  if (std::isnan(x)) return {0x7fff};
  const float magnitude = std::fabs(x);
  unsigned bits;
  if (magnitude >= 65520.0f) {
    bits = 0x7c00;
  } else if (magnitude < 0x1p-14f) {
    // A multiple of the smallest subnormal; 1024 of them are the smallest normal number, bits and all.
    bits = static_cast<unsigned>(std::nearbyint(std::ldexp(magnitude, 24)));
  } else {
    // A mantissa that rounds up to 2048 carries into the exponent by itself.
    const int exponent = std::ilogb(magnitude);
    bits = static_cast<unsigned>(std::nearbyint(std::ldexp(magnitude, 10 - exponent))) + ((exponent + 14) << 10);
  }
  return {static_cast<std::uint16_t>(bits | (std::signbit(x) ? 0x8000u : 0u))};
}

#endif
