// Vectors of W floats by the compiler's vector extension: one source for every width and instruction set.
//
// Everything here is inlined into functions that carry a target attribute (levels.h), so the same code becomes AVX2,
// AVX-512 or what the baseline has. Other compilers get W = 1, plain scalars.
#pragma once

#include <cstdint>
#include <cstring>

#include "levels.h"

#ifdef __GNUC__
#define GADCORE_INLINE inline __attribute__((always_inline))
#define GADCORE_LAMBDA __attribute__((always_inline))
// Nothing of this crosses a function call: the ABI of wide vectors does not matter.
#pragma GCC diagnostic ignored "-Wpsabi"
#else
#define GADCORE_INLINE inline
#define GADCORE_LAMBDA
#endif

namespace gadcore {

template <int W>
struct Lanes {
#ifdef __GNUC__
  // Not `using`: GCC forgets the attribute there when the size depends on W.
  typedef float Float __attribute__((vector_size(4 * W)));
  typedef int32_t Int __attribute__((vector_size(4 * W)));
#endif
};

template <>
struct Lanes<1> {
  using Float = float;
  using Int = int32_t;
};

template <int W>
struct Vec {
  using F = typename Lanes<W>::Float;
  using I = typename Lanes<W>::Int;

  static GADCORE_INLINE F splat(float x) {
#ifdef __GNUC__
    // GCC assembles x - F{} lane by lane, in some sixty dependent instructions; this becomes one broadcast.
    if (!__builtin_constant_p(x)) {
      float lanes[W];
      for (int i = 0; i < W; ++i) lanes[i] = x;
      return load(lanes);
    }
#endif
    return x - F{};
  }

  static GADCORE_INLINE F load(const float* p) {
    F v;
    std::memcpy(&v, p, sizeof v);
    return v;
  }

  static GADCORE_INLINE void store(float* p, F v) { std::memcpy(p, &v, sizeof v); }

  // The last n < W numbers, filled up.
  static GADCORE_INLINE F load_tail(const float* p, int64_t n, float fill) {
    float buffer[W];
    for (int i = 0; i < W; ++i) buffer[i] = i < n ? p[i] : fill;
    return load(buffer);
  }

  static GADCORE_INLINE void store_tail(float* p, int64_t n, F v) {
    float buffer[W];
    store(buffer, v);
    for (int i = 0; i < n; ++i) p[i] = buffer[i];
  }

  static GADCORE_INLINE F as_float(I v) {
    F out;
    std::memcpy(&out, &v, sizeof out);
    return out;
  }

  static GADCORE_INLINE I as_int(F v) {
    I out;
    std::memcpy(&out, &v, sizeof out);
    return out;
  }

  // b where a is NaN.
  static GADCORE_INLINE F max(F a, F b) { return a > b ? a : b; }
  static GADCORE_INLINE F min(F a, F b) { return a < b ? a : b; }

  // Halves are added to each other, so the order of the additions does not depend on the instruction set.
  static GADCORE_INLINE float sum(F v) {
    if constexpr (W == 1) {
      return v;
    } else {
      typename Vec<W / 2>::F low, high;
      halve(v, low, high);
      return Vec<W / 2>::sum(low + high);
    }
  }

  static GADCORE_INLINE float largest(F v) {
    if constexpr (W == 1) {
      return v;
    } else if constexpr (W == 4) {
      // GCC compares vectors of two lane by lane through general registers.
      const float a = v[0] > v[1] ? v[0] : v[1], b = v[2] > v[3] ? v[2] : v[3];
      return a > b ? a : b;
    } else {
      typename Vec<W / 2>::F low, high;
      halve(v, low, high);
      return Vec<W / 2>::largest(Vec<W / 2>::max(low, high));
    }
  }

  template <class Half>
  static GADCORE_INLINE void halve(F v, Half& low, Half& high) {
    if constexpr (W == 2) {
      low = v[0];
      high = v[1];
    } else {
      float lane[W];
      store(lane, v);
      low = Vec<W / 2>::load(lane);
      high = Vec<W / 2>::load(lane + W / 2);
    }
  }

  // Cephes: x = n log 2 + r with |r| <= log(2) / 2. The sum rounds x / log 2 to an integer that stands in the low bits.
  static GADCORE_INLINE F reduce(F x, F& r) {
    const F shifter = splat(12582912.0f);  // 1.5 * 2^23
    const F shifted = x * splat(1.44269504f) + shifter;
    const F n = shifted - shifter;
    r = x - n * splat(0.693359375f);
    r = r - n * splat(-2.12194440e-4f);
    return shifted;
  }

  static GADCORE_INLINE F exp_of_rest(F r) {
    F p = splat(1.9875691500e-4f);
    p = p * r + splat(1.3981999507e-3f);
    p = p * r + splat(8.3334519073e-3f);
    p = p * r + splat(4.1665795894e-2f);
    p = p * r + splat(1.6666665459e-1f);
    p = p * r + splat(5.0000001201e-1f);
    return p * (r * r) + (r + splat(1.0f));
  }

  // exp(x) for x <= 0 (and a little above), below 2 ulp; exactly 0 under the smallest normal number, NaN for NaN.
  static GADCORE_INLINE F exp_shifted(F x) {
    const F lowest = splat(kLowest);
    const auto vanishes = x < lowest;
    F r;
    const F n = reduce(max(lowest, x), r);  // in this order NaN stays NaN
    const I bits = (as_int(n) << 23) + (127 << 23);
    return vanishes ? splat(0.0f) : exp_of_rest(r) * as_float(bits);
  }

  // exp(x) for any x: inf above the range, subnormal numbers below it.
  static GADCORE_INLINE F exp(F x) {
    F r;
    const F n = reduce(min(splat(89.0f), max(splat(-104.0f), x)), r);
    const I whole = as_int(n) - 0x4B400000, half = whole >> 1;
    return exp_of_rest(r) * as_float((half + 127) << 23) * as_float((whole - half + 127) << 23);
  }

  // exp(x) - x - 1 without the cancellation around 0; e is exp(x).
  static GADCORE_INLINE F exp_excess(F x, F e) {
    F p = splat(1.0f / 3628800);
    p = p * x + splat(1.0f / 362880);
    p = p * x + splat(1.0f / 40320);
    p = p * x + splat(1.0f / 5040);
    p = p * x + splat(1.0f / 720);
    p = p * x + splat(1.0f / 120);
    p = p * x + splat(1.0f / 24);
    p = p * x + splat(1.0f / 6);
    p = p * x + splat(0.5f);
    const auto small = x * x <= splat(1.0f);
    return small ? p * x * x : (e - splat(1.0f)) - x;
  }

  // body(i, load, store) for every W of n numbers and then for what is left of them, where load fills up with zeros.
  template <class Body>
  static GADCORE_INLINE void over(int64_t n, Body body) {
    int64_t i = 0;
    for (; i + W <= n; i += W) body(i, [](const float* p) GADCORE_LAMBDA { return load(p); },
                                    [](float* p, F v) GADCORE_LAMBDA { store(p, v); });
    if (i < n) {
      const int64_t rest = n - i;
      body(i, [rest](const float* p) GADCORE_LAMBDA { return load_tail(p, rest, 0.0f); },
           [rest](float* p, F v) GADCORE_LAMBDA { store_tail(p, rest, v); });
    }
  }

  static constexpr float kLowest = -87.3f;
};

}  // namespace gadcore
