// Many copies and casts in one launch: how a step's weights go, cast, into the rollout engine's own tensors.
//
// What CUDA C++ adds here over Triton: a copy's types and alignment are data, looked up in a table by whoever runs it,
// so one kernel serves every mixture without compiling for it. Over torch._foreach_copy_: slices of fused tensors, for
// which that falls back to a launch for each pair.
//
// A copy is cut into units, each N neighbouring elements of a row (N makes 16 bytes of the wider type, or is 1 where
// addresses do not allow that, and for the ends of rows, which are copies of their own in the table), and the units
// into chunks. Blocks take chunks in turn, so that the work is even whatever the sizes of the tensors are.
#include <type_traits>

#include "device.cuh"

namespace gadcore {
namespace {

constexpr int kThreads = 256;
constexpr int kUnitsPerThread = 8;
// So many loads are in flight before the first store.
constexpr int kBatch = 4;
// Also in kernels/cast_copy.py.
constexpr int kChunkUnits = kThreads * kUnitsPerThread;

// One copy, written by kernels/cast_copy.py: eight 64-bit numbers. Strides count elements.
struct Copy {
  const void* source;
  void* target;
  int64_t source_stride, target_stride;
  int64_t unit, units_per_row, units;  // unit: the elements of one
  int64_t kind;
};
static_assert(sizeof(Copy) == 64, "the layout that the wrapper writes");

// Twice one of the conversions, and 1 more where units are vectors; or kCopy plus the power of two of the bytes in an
// element, for a copy within a dtype: of whatever bits, so that a NaN keeps its payload.
enum Kind : int {
  kF32ToBf16,
  kF32ToF16,
  kBf16ToF32,
  kF16ToF32,
  kBf16ToF16,
  kF16ToBf16,
  kConversions,
  kCopy = 2 * kConversions,
};

using Bytes16 = Vector<uint32_t, 4>;

template <class To, class From>
__device__ __forceinline__ To convert(From x) {
  if constexpr (std::is_same_v<To, From>) {
    return x;
  } else {
    return from_float<To>(to_float(x));
  }
}

// kBatch units of a thread, by their elements' offsets; those from `count` on are beyond the copy's end.
struct Batch {
  int64_t from[kBatch], to[kBatch];
  int count;
};

template <class From, class To, int N>
__device__ __forceinline__ void move(const Copy& copy, const Batch& batch) {
  // Set, although only what was loaded is used: undefined values cost the compiler four times the registers.
  Vector<From, N> values[kBatch] = {};
#pragma unroll
  for (int j = 0; j < kBatch; ++j) {
    if (j < batch.count) values[j] = load<N>(static_cast<const From*>(copy.source) + batch.from[j]);
  }
#pragma unroll
  for (int j = 0; j < kBatch; ++j) {
    if (j >= batch.count) continue;
    Vector<To, N> out;
#pragma unroll
    for (int k = 0; k < N; ++k) out.at[k] = convert<To>(values[j].at[k]);
    store(static_cast<To*>(copy.target) + batch.to[j], out);
  }
}

template <class From, class To>
__device__ __forceinline__ void cast(const Copy& copy, const Batch& batch) {
  if (copy.kind % 2) {
    move<From, To, 16 / (sizeof(From) > sizeof(To) ? sizeof(From) : sizeof(To))>(copy, batch);
  } else {
    move<From, To, 1>(copy, batch);
  }
}

__device__ __forceinline__ void move_batch(const Copy& copy, const Batch& batch) {
  switch (copy.kind < kCopy ? copy.kind / 2 : copy.kind) {
    case kF32ToBf16: cast<float, __nv_bfloat16>(copy, batch); break;
    case kF32ToF16: cast<float, __half>(copy, batch); break;
    case kBf16ToF32: cast<__nv_bfloat16, float>(copy, batch); break;
    case kF16ToF32: cast<__half, float>(copy, batch); break;
    case kBf16ToF16: cast<__nv_bfloat16, __half>(copy, batch); break;
    case kF16ToBf16: cast<__half, __nv_bfloat16>(copy, batch); break;
    case kCopy + 0: move<uint8_t, uint8_t, 1>(copy, batch); break;
    case kCopy + 1: move<uint16_t, uint16_t, 1>(copy, batch); break;
    case kCopy + 2: move<uint32_t, uint32_t, 1>(copy, batch); break;
    case kCopy + 3: move<uint64_t, uint64_t, 1>(copy, batch); break;
    case kCopy + 4: move<Bytes16, Bytes16, 1>(copy, batch); break;
  }
}

__device__ __forceinline__ void copy_chunk(const Copy& copy, int64_t first) {
  const bool one_row = copy.units == copy.units_per_row;
  // One division of 64 bits for the chunk; the rest is within 32.
  const unsigned per_row = static_cast<unsigned>(copy.units_per_row);
  const int64_t first_row = one_row ? 0 : first / copy.units_per_row;
  const unsigned rest = static_cast<unsigned>(first - first_row * copy.units_per_row);
#pragma unroll 1
  for (int done = 0; done < kUnitsPerThread; done += kBatch) {
    Batch batch;
    batch.count = 0;
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      const unsigned offset = (done + j) * kThreads + threadIdx.x;
      if (first + offset >= copy.units) break;
      batch.count = j + 1;
      if (one_row) {
        batch.from[j] = batch.to[j] = (first + offset) * copy.unit;
      } else {
        const unsigned row = (rest + offset) / per_row;
        const int64_t column = (rest + offset - row * per_row) * copy.unit;
        batch.from[j] = (first_row + row) * copy.source_stride + column;
        batch.to[j] = (first_row + row) * copy.target_stride + column;
      }
    }
    move_batch(copy, batch);
  }
}

// chunk_starts: [count + 1], the number of chunks before each copy; the last is that of all.
__global__ void __launch_bounds__(kThreads)
    cast_copy_kernel(const Copy* __restrict__ copies, const int64_t* __restrict__ chunk_starts, int64_t count) {
  const int64_t chunks = chunk_starts[count];
  for (int64_t chunk = blockIdx.x; chunk < chunks; chunk += gridDim.x) {
    int64_t low = 0, high = count;  // chunk_starts[low] <= chunk < chunk_starts[high]
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      (chunk_starts[middle] <= chunk ? low : high) = middle;
    }
    const Copy copy = copies[low];
    const int64_t first = (chunk - chunk_starts[low]) * kChunkUnits;
    copy_chunk(copy, first);
  }
}

}  // namespace
}  // namespace gadcore

// table: `count` copies, then count + 1 chunk starts, in memory of the device. blocks: how many to launch, 1 or more.
GADCORE_EXPORT int gadcore_cast_copy(const void* table, int64_t count, int64_t blocks, void* stream) {
  using namespace gadcore;
  const Copy* const copies = static_cast<const Copy*>(table);
  const int64_t* const starts = reinterpret_cast<const int64_t*>(copies + count);
  GADCORE_LAUNCH((cast_copy_kernel), static_cast<unsigned>(blocks), kThreads, stream, copies, starts, count);
  return static_cast<int>(cudaGetLastError());
}
