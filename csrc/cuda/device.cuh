// What kernels share: element types seen as float, and accesses of up to 128 bits.
#pragma once

#include <cstdint>

#include "simt.h"

namespace gadcore {

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }

template <class T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ __forceinline__ __half from_float<__half>(float x) {
  return __float2half_rn(x);
}

// N neighbours that one instruction loads or stores: N * sizeof(T) is 16 bytes or less, the address a multiple of it.
template <class T, int N>
struct alignas(sizeof(T) * N) Vector {
  T at[N];
};

template <int N, class T>
__device__ __forceinline__ Vector<T, N> load(const T* from) {
  simt::check_aligned(from, sizeof(T) * N);
  return *reinterpret_cast<const Vector<T, N>*>(from);
}

template <class T, int N>
__device__ __forceinline__ void store(T* to, const Vector<T, N>& values) {
  simt::check_aligned(to, sizeof(T) * N);
  *reinterpret_cast<Vector<T, N>*>(to) = values;
}

}  // namespace gadcore
