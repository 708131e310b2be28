// Written once for any width (vec.h), compiled for every level.
#include "vector_kernels.h"

#include "vec.h"

namespace gadcore {
namespace {

template <int W>
struct Loops {
  using V = Vec<W>;
  using F = typename V::F;

  // R rows at a time, so that a lane's maximum and sum are loaded and stored once for R numbers.
  template <int R, bool kBias>
  static GADCORE_INLINE void max_of_rows(float* z, int64_t stride, int64_t lanes, const float* bias, float* max) {
    F b[R];
    for (int r = 0; r < R; ++r) b[r] = V::splat(kBias ? bias[r] : 0.0f);
    for (int64_t t = 0; t < lanes; t += W) {
      F most = V::load(max + t);
      for (int r = 0; r < R; ++r) {
        float* p = z + r * stride + t;
        F x = V::load(p);
        if (kBias) {
          x = x + b[r];
          V::store(p, x);
        }
        most = V::max(x, most);
      }
      V::store(max + t, most);
    }
  }

  template <int R, bool kKeep, bool kWeighted>
  static GADCORE_INLINE void exp_of_rows(float* z, int64_t stride, int64_t lanes, float inv_t, const float* max,
                                         float* sum, float* weighted) {
    const F scale = V::splat(inv_t);
    for (int64_t t = 0; t < lanes; t += W) {
      const F most = V::load(max + t);
      // Nothing but -inf: any finite shift will do, -inf itself would make NaN.
      const F shift = most == V::splat(-kInf) ? V::splat(0.0f) : most;
      F total = V::splat(0.0f), total_weighted = V::splat(0.0f);
      for (int r = 0; r < R; ++r) {
        float* p = z + r * stride + t;
        const F y = (V::load(p) - shift) * scale;
        const F e = V::exp_shifted(y);
        if (kKeep) V::store(p, e);
        total = total + e;
        // Kept above -inf, which has e = 0 and counts for nothing.
        if (kWeighted) total_weighted = total_weighted + e * V::max(V::splat(V::kLowest), y);
      }
      V::store(sum + t, V::load(sum + t) + total);
      if (kWeighted) V::store(weighted + t, V::load(weighted + t) + total_weighted);
    }
  }

  static constexpr int kRows = 4;

  template <bool kBias>
  static GADCORE_INLINE void segment_max(const LaneBlock& b, const float* bias, float* max) {
    for (int64_t t = 0; t < b.lanes; t += W) V::store(max + t, V::splat(-kInf));
    int64_t r = 0;
    for (; r + kRows <= b.rows; r += kRows) {
      max_of_rows<kRows, kBias>(b.z + r * b.stride, b.stride, b.lanes, kBias ? bias + r : nullptr, max);
    }
    for (; r < b.rows; ++r) {
      max_of_rows<1, kBias>(b.z + r * b.stride, b.stride, b.lanes, kBias ? bias + r : nullptr, max);
    }
  }

  template <bool kKeep, bool kWeighted>
  static GADCORE_INLINE void segment_sum(const LaneBlock& b, float inv_t, const float* max, float* sum,
                                         float* weighted) {
    for (int64_t t = 0; t < b.lanes; t += W) {
      V::store(sum + t, V::splat(0.0f));
      if (kWeighted) V::store(weighted + t, V::splat(0.0f));
    }
    int64_t r = 0;
    for (; r + kRows <= b.rows; r += kRows) {
      exp_of_rows<kRows, kKeep, kWeighted>(b.z + r * b.stride, b.stride, b.lanes, inv_t, max, sum, weighted);
    }
    for (; r < b.rows; ++r) {
      exp_of_rows<1, kKeep, kWeighted>(b.z + r * b.stride, b.stride, b.lanes, inv_t, max, sum, weighted);
    }
  }

  static GADCORE_INLINE void segment_exp(const LaneBlock& b, const float* bias, float inv_t, bool keep, float* max,
                                         float* sum, float* weighted) {
    bias ? segment_max<true>(b, bias, max) : segment_max<false>(b, bias, max);
    if (keep) {
      weighted ? segment_sum<true, true>(b, inv_t, max, sum, weighted)
               : segment_sum<true, false>(b, inv_t, max, sum, weighted);
    } else {
      weighted ? segment_sum<false, true>(b, inv_t, max, sum, weighted)
               : segment_sum<false, false>(b, inv_t, max, sum, weighted);
    }
  }

  static GADCORE_INLINE void segment_softmax(const LaneBlock& b, const float* bias, float inv_t, const float* shift,
                                             const float* log_sum, const float* scale) {
    const F inverse = V::splat(inv_t);
    for (int64_t r = 0; r < b.rows; ++r) {
      const F add = V::splat(bias ? bias[r] : 0.0f);
      for (int64_t t = 0; t < b.lanes; t += W) {
        float* p = b.z + r * b.stride + t;
        const F y = (V::load(p) + add - V::load(shift + t)) * inverse - V::load(log_sum + t);
        V::store(p, V::load(scale + t) * V::exp_shifted(y));
      }
    }
  }

  static GADCORE_INLINE void segment_scale(const LaneBlock& b, const float* factor) {
    for (int64_t r = 0; r < b.rows; ++r) {
      float* p = b.z + r * b.stride;
      for (int64_t t = 0; t < b.lanes; t += W) V::store(p + t, V::load(p + t) * V::load(factor + t));
    }
  }

  static GADCORE_INLINE void segment_row_sums(const LaneBlock& b, float* out) {
    for (int64_t r = 0; r < b.rows; ++r) {
      const float* p = b.z + r * b.stride;
      F total = V::splat(0.0f);
      for (int64_t t = 0; t < b.lanes; t += W) total = total + V::load(p + t);
      out[r] += V::sum(total);
    }
  }

  static GADCORE_INLINE void lanes_exp(float* x, int64_t n, const float* shift, float inv_t) {
    for (int64_t t = 0; t < n; t += W) {
      const F most = V::load(shift + t);
      const F finite = most == V::splat(-kInf) ? V::splat(0.0f) : most;
      V::store(x + t, V::exp_shifted((V::load(x + t) - finite) * V::splat(inv_t)));
    }
  }

  static GADCORE_INLINE F get(const float* p, int64_t i, int64_t end) {
    return i + W <= end ? V::load(p + i) : V::load_tail(p + i, end - i, 0.0f);
  }

  static GADCORE_INLINE void put(float* p, int64_t i, int64_t end, F v) {
    i + W <= end ? V::store(p + i, v) : V::store_tail(p + i, end - i, v);
  }

  static GADCORE_INLINE void ratio_loss(const RatioLoss& a, int64_t begin, int64_t end) {
    const F zero = V::splat(0.0f), one = V::splat(1.0f);
    const F low = V::splat(1.0f - a.clip_low), high = V::splat(1.0f + a.clip_high), kl_coef = V::splat(a.kl_coef);
    for (int64_t i = begin; i < end; i += W) {
      const F logprob = get(a.logprob, i, end), advantage = get(a.advantages, i, end);
      const F ratio = a.old ? V::exp(logprob - get(a.old, i, end)) : one;
      // In this order NaN stays NaN.
      const F clipped_ratio = V::max(low, V::min(high, ratio));
      const F surrogate = ratio * advantage, clipped = clipped_ratio * advantage;
      const auto is_clipped = clipped < surrogate;
      F loss = -(is_clipped ? clipped : surrogate), kl = zero, slope = is_clipped ? zero : -surrogate;
      if (a.ref) {
        const F gap = get(a.ref, i, end) - logprob;
        kl = V::exp_excess(gap, V::exp(gap));
        loss = loss + kl_coef * kl;
        slope = slope - kl_coef * (gap + kl);
      }
      put(a.loss, i, end, loss);
      put(a.kl, i, end, kl);
      put(a.ratio, i, end, ratio);
      put(a.clipped, i, end, is_clipped ? one : zero);
      put(a.slope, i, end, slope);
    }
  }

  static GADCORE_INLINE float dot(const float* a, const float* b, int64_t n) {
    F s0 = V::splat(0.0f), s1 = s0, s2 = s0, s3 = s0;
    int64_t i = 0;
    for (; i + 4 * W <= n; i += 4 * W) {
      s0 = s0 + V::load(a + i) * V::load(b + i);
      s1 = s1 + V::load(a + i + W) * V::load(b + i + W);
      s2 = s2 + V::load(a + i + 2 * W) * V::load(b + i + 2 * W);
      s3 = s3 + V::load(a + i + 3 * W) * V::load(b + i + 3 * W);
    }
    for (; i + W <= n; i += W) s0 = s0 + V::load(a + i) * V::load(b + i);
    if (i < n) s1 = s1 + V::load_tail(a + i, n - i, 0.0f) * V::load_tail(b + i, n - i, 0.0f);
    return V::sum((s0 + s1) + (s2 + s3));
  }
};

#define GADCORE_LEVEL(NAME, W, TARGET)                                                                                 \
  namespace NAME {                                                                                                     \
  TARGET void segment_exp(const LaneBlock& b, const float* bias, float inv_t, bool keep, float* max, float* sum,       \
                          float* weighted) {                                                                           \
    Loops<W>::segment_exp(b, bias, inv_t, keep, max, sum, weighted);                                                   \
  }                                                                                                                    \
  TARGET void segment_softmax(const LaneBlock& b, const float* bias, float inv_t, const float* shift,                  \
                              const float* log_sum, const float* scale) {                                              \
    Loops<W>::segment_softmax(b, bias, inv_t, shift, log_sum, scale);                                                  \
  }                                                                                                                    \
  TARGET void segment_scale(const LaneBlock& b, const float* factor) { Loops<W>::segment_scale(b, factor); }           \
  TARGET void segment_row_sums(const LaneBlock& b, float* out) { Loops<W>::segment_row_sums(b, out); }                 \
  TARGET void lanes_exp(float* x, int64_t n, const float* shift, float inv_t) {                                        \
    Loops<W>::lanes_exp(x, n, shift, inv_t);                                                                           \
  }                                                                                                                    \
  TARGET void ratio_loss(const RatioLoss& a, int64_t begin, int64_t end) { Loops<W>::ratio_loss(a, begin, end); }      \
  TARGET float dot(const float* a, const float* b, int64_t n) { return Loops<W>::dot(a, b, n); }                       \
  constexpr VectorKernels kTable = {segment_exp, segment_softmax, segment_scale, segment_row_sums, lanes_exp,          \
                                    ratio_loss,  dot};                                                                 \
  }

GADCORE_LEVELS(GADCORE_LEVEL)

constexpr const VectorKernels* kTables[kLevels] = GADCORE_TABLES;

}  // namespace

const VectorKernels& vector_kernels() { return *kTables[level()]; }

}  // namespace gadcore
