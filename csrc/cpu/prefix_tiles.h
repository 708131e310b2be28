// The products and row operations of prefix_attention.cpp, one table of functions for each level (levels.h).
//
// A number of a product is one chain of additions along the summed index, wherever its tile lies and however the sum is
// cut into blocks: bits depend on the operands alone.
#pragma once

#include <cstdint>

namespace gadcore {

// Keys of a block: with the rows of a block (prefix_attention.cpp) their scores and those keys stay in the L2 cache.
constexpr int64_t kKeys = 128;
// Numbers between the scores of two rows. More than kKeys: vectors write past the last key, and rows at power-of-two
// distances share cache sets.
constexpr int64_t kScores = kKeys + 16;

// Which keys of a block its rows see: row r those in [from[r], to[r]). Neither ever falls from one row to the next.
struct Seen {
  int64_t rows;
  const int32_t *from, *to;

  int64_t begin() const { return from[0]; }
  int64_t end() const { return to[rows - 1]; }
};

// A matrix cut into panels of PrefixKernels::panel columns, filled up with zeros: panel p is [rows, panel] at
// data + p * stride.
struct Panels {
  const float* data;
  int64_t stride, count;

  // Without the first `numbers` of every panel.
  Panels from(int64_t numbers) const { return {data + numbers, stride, count}; }
};

struct PrefixKernels {
  // Columns of a panel; divides kKeys.
  int64_t panel;

  // scores[r, j] = sum_d x[r, d] keys[d, j], at least for the keys that row r sees. x: [rows, width], rows x_row apart.
  void (*scores)(const Seen& seen, const float* x, int64_t x_row, int64_t width, const Panels& keys, float* scores);
  // out[r, :] += sum_j p[r, j] b[j, :] over [begin, end). out: [rows, b.count * panel].
  void (*add_over_keys)(const Seen& seen, const float* p, const Panels& b, float* out);
  // out[j, :] += sum_r p[r, j] x[r, :]. x: [rows, width], out: [keys, width]; width: whole panels.
  void (*add_over_rows)(const Seen& seen, const float* p, const float* x, int64_t width, float* out);

  // Online softmax. max[r] and sum[r], of exp(s - max), take in the scores of the block, which become exp(s - max[r]),
  // and 0 for the keys in [begin, end) that row r does not see; out[r, :] [width] follows the change of max[r].
  void (*softmax)(const Seen& seen, float* scores, float* max, float* sum, float* out, int64_t width);
  // scores = exp(scores - lse[r]) and slopes = scores (slopes - delta[r]), both 0 as above.
  void (*softmax_backward)(const Seen& seen, float* scores, float* slopes, const float* lse, const float* delta);
};

// Those of level().
const PrefixKernels& prefix_kernels();

}  // namespace gadcore
