// Lets one .cu file be built twice: by nvcc for a GPU, and by a C++17 compiler for the CPU, where this header runs it.
//
// Why: the tests run where there is no GPU. They test the very source that nvcc compiles, not a second version of it.
//
// How: a thread of a block is a fiber (ucontext) with a stack of its own. It runs until it waits for others: at
// __syncthreads for the whole block, in a shuffle for its warp. The blocks of a launch run one after the other. Blocks,
// and the threads of a block between two barriers, run in ascending order or in a random one (simt::seed): a result
// that changes with the seed, or with a thread that runs far ahead of the others, is a missing barrier or a race.
//
// What it tells: threads that wait at different barriers or leave while others wait, shuffles without the whole warp,
// misaligned vector accesses. Each ends the launch with an error code, as cudaGetLastError would give one.
//
// What it cannot tell: anything about time; orders of memory weaker than a CPU's (a missing __threadfence); blocks that
// run at the same time; addresses out of bounds (the tests put canaries around what they hand out).
//
// Only what the kernels here use is there. Shared memory is `static`, so a kernel finds in it what the block before
// left there, as on a GPU. Build with -fno-strict-aliasing: like nvcc, kernels see one array as scalars and as vectors.
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

#include <math.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <vector>

#define __global__ static
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static
#define GADCORE_LAUNCH(kernel, blocks, threads, stream, ...) \
  (static_cast<void>(stream), simt::launch((blocks), (threads), [=] { GADCORE_BARE kernel(__VA_ARGS__); }))
#define GADCORE_BARE(...) __VA_ARGS__

using cudaStream_t = void*;
using cudaError_t = int;

namespace simt {

enum Error : cudaError_t { kNone = 0, kMisaligned = 716, kDivergent = 10001, kPartialWarp = 10002 };

struct Index {
  unsigned x = 0, y = 0, z = 0;
};

// The index variables that a kernel reads: those of the fiber that runs now.
inline Index block_index, thread_index, block_size, grid_size;

inline std::uint64_t seed = 0;  // 0: ascending order
inline cudaError_t last_error = kNone;

inline const char* message(cudaError_t error) {
  switch (error) {
    case kNone: return "no error";
    case kMisaligned: return "misaligned address";
    case kDivergent: return "__syncthreads without the whole block";
    case kPartialWarp: return "a shuffle without the whole warp";
    default: return "unknown error";
  }
}

class Machine {
 public:
  static Machine& get() {
    static Machine machine;
    return machine;
  }

  void launch(unsigned blocks, unsigned threads, const std::function<void()>& kernel) {
    // Index variables and shared memory exist once.
    const std::lock_guard<std::mutex> lock(mutex_);
    kernel_ = &kernel;
    prepare(threads);
    block_size = {threads, 1, 1};
    grid_size = {blocks, 1, 1};
    for (unsigned block : order(blocks)) {
      if (last_error != kNone) return;
      block_index = {block, 0, 0};
      run_block(threads);
    }
  }

  void wait_for_block() { wait(kAtBlock); }

  // Hands `value` to the warp and gives that of `lane`.
  std::uint64_t exchange(std::uint64_t value, unsigned lane) {
    slots_[running_] = value;
    wait(kAtWarp);
    const std::uint64_t result = slots_[(running_ & ~31u) | lane];
    // Nobody overwrites a slot that another lane has yet to read.
    wait(kAtWarp);
    return result;
  }

  unsigned lane() const { return running_ & 31u; }

  // Ends the launch where a thread has done what a GPU would not go on after. Does not return.
  void fail(Error error) {
    report(error);
    wait(kDone);
    std::abort();
  }

 private:
  static constexpr std::size_t kStack = 64 << 10;
  enum State : char { kReady, kAtBlock, kAtWarp, kDone };

  std::vector<unsigned> order(unsigned n) {
    std::vector<unsigned> indices(n);
    std::iota(indices.begin(), indices.end(), 0u);
    if (seed) {
      std::mt19937_64 random(seed + drawn_++);
      std::shuffle(indices.begin(), indices.end(), random);
    }
    return indices;
  }

  void prepare(unsigned threads) {
    while (stacks_.size() < threads) stacks_.push_back(std::make_unique<char[]>(kStack));
    fibers_.resize(threads);
    states_.resize(threads);
    slots_.resize((threads + 31) & ~31u);
    drawn_ = 0;
  }

  void run_block(unsigned threads) {
    for (unsigned t = 0; t < threads; ++t) {
      getcontext(&fibers_[t]);
      fibers_[t].uc_stack.ss_sp = stacks_[t].get();
      fibers_[t].uc_stack.ss_size = kStack;
      fibers_[t].uc_link = &scheduler_;
      makecontext(&fibers_[t], &Machine::enter, 0);
      states_[t] = kReady;
    }
    do {
      for (unsigned t : order(threads)) {
        if (states_[t] != kReady) continue;
        running_ = t;
        thread_index = {t, 0, 0};
        swapcontext(&scheduler_, &fibers_[t]);
        if (last_error != kNone) return;
      }
    } while (release(threads));
  }

  // After every fiber has run to its next wait: lets those go on that have met. False when nothing is left to run.
  bool release(unsigned threads) {
    bool any = false;
    for (unsigned warp = 0; warp < threads; warp += 32) {
      const auto first = states_.begin() + warp, last = states_.begin() + std::min(warp + 32, threads);
      if (std::count(first, last, kAtWarp) != last - first) continue;
      std::fill(first, last, kReady);
      any = true;
    }
    if (any) return true;
    const auto waiting = std::count(states_.begin(), states_.end(), kAtBlock);
    if (waiting == threads) {
      std::fill(states_.begin(), states_.end(), kReady);
      return true;
    }
    if (std::count(states_.begin(), states_.end(), kAtWarp)) {
      report(kPartialWarp);
    } else if (waiting) {
      report(kDivergent);
    }
    return false;
  }

  static void report(Error error) {
    last_error = error;
    std::fprintf(stderr, "simt: %s (block %u, thread %u)\n", message(error), block_index.x, thread_index.x);
  }

  void wait(State state) {
    states_[running_] = state;
    swapcontext(&fibers_[running_], &scheduler_);
  }

  static void enter() {
    Machine& machine = get();
    (*machine.kernel_)();
    machine.states_[machine.running_] = kDone;
  }

  std::mutex mutex_;
  const std::function<void()>* kernel_ = nullptr;
  ucontext_t scheduler_{};
  std::vector<std::unique_ptr<char[]>> stacks_;
  std::vector<ucontext_t> fibers_;
  std::vector<State> states_;
  std::vector<std::uint64_t> slots_;
  unsigned running_ = 0;
  std::uint64_t drawn_ = 0;
};

inline void launch(unsigned blocks, unsigned threads, const std::function<void()>& kernel) {
  Machine::get().launch(blocks, threads, kernel);
}

inline void check_aligned(const void* address, unsigned bytes) {
  if (reinterpret_cast<std::uintptr_t>(address) % bytes) Machine::get().fail(kMisaligned);
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

inline void __syncthreads() { simt::Machine::get().wait_for_block(); }

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes) {
  static_assert(sizeof(T) == 4, "32 bits");
  simt::Machine& machine = simt::Machine::get();
  if (mask != ~0u) machine.fail(simt::kPartialWarp);
  const auto bits = simt::bits_of<std::uint32_t>(value);
  return simt::bits_of<T>(static_cast<std::uint32_t>(machine.exchange(bits, machine.lane() ^ lanes)));
}

// A fiber is never interrupted, so these are atomic as they stand, and a fence has nothing to order.
inline void __threadfence() {}
inline unsigned atomicAdd(unsigned* address, unsigned value) {
  const unsigned before = *address;
  *address += value;
  return before;
}
inline unsigned atomicOr(unsigned* address, unsigned value) {
  const unsigned before = *address;
  *address |= value;
  return before;
}

template <class T>
T __ldcg(const T* address) {
  return *address;
}

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
