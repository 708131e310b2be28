// The element-wise and reducing loops of the ops, one table of functions for each level (levels.h).
//
// Logits lie in lanes: z[v * stride + t], the tokens of a block contiguous. So a vector holds one vocabulary entry of W
// tokens, sums never cross lanes, and the matrix products that make and use z read the weight in its own order, which
// they do faster.
#pragma once

#include <cstdint>

#include "levels.h"

namespace gadcore {

// Vocabulary rows of a segment: the unit over which float32 sums run.
constexpr int64_t kSegment = 64;
// Token lanes come in multiples of the widest vector.
constexpr int64_t kLaneUnit = 16;

// z: [rows, stride], of which `lanes` (a multiple of kLaneUnit) columns count.
struct LaneBlock {
  float* z;
  int64_t stride, rows, lanes;
};

struct RatioLoss {
  const float *logprob, *advantages, *ref, *old;  // ref and old may be null
  float clip_low, clip_high, kl_coef;
  float *loss, *kl, *ratio, *clipped, *slope;
};

struct VectorKernels {
  // Lanes. For rows <= kSegment:
  //   max[t] = max_v z, sum[t] = sum_v e, weighted[t] = sum_v e log e   with e = exp((z - max[t]) / T), z + bias[v] for z
  // bias and weighted may be null; keep: e takes the place of z.
  void (*segment_exp)(const LaneBlock& b, const float* bias, float inv_t, bool keep, float* max, float* sum,
                      float* weighted);
  // z = scale[t] exp((z + bias[v] - shift[t]) / T - log_sum[t])
  void (*segment_softmax)(const LaneBlock& b, const float* bias, float inv_t, const float* shift, const float* log_sum,
                          const float* scale);
  // z *= factor[t]
  void (*segment_scale)(const LaneBlock& b, const float* factor);
  // out[v] += sum over t
  void (*segment_row_sums)(const LaneBlock& b, float* out);
  // x[t] = exp((x[t] - shift[t]) / T); n a multiple of kLaneUnit
  void (*lanes_exp)(float* x, int64_t n, const float* shift, float inv_t);
  // kernels/grpo_ratio_loss.py states the mathematics
  void (*ratio_loss)(const RatioLoss& a, int64_t begin, int64_t end);

  float (*dot)(const float* a, const float* b, int64_t n);
};

// Those of level().
const VectorKernels& vector_kernels();

}  // namespace gadcore
