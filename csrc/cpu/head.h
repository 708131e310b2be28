// What the ops on a language-model head share: its matrix products and the sums over its vocabulary.
//
// Logits are computed transposed, z[v, t] = sum_h weight[v, h] hidden[t, h] (vector_kernels.h, "lanes"). With row-major
// hidden and weight all products then read and write contiguous rows.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <functional>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "vector_kernels.h"

namespace gadcore {

constexpr int64_t kIgnored = -100;
// Tokens of one product where logits are not kept; a multiple of kLaneUnit.
constexpr int64_t kTokenBlock = 496;

// Throws where the operands of a head do not fit together; `op` starts the message.
void check_head(const std::string& op, const at::Tensor& hidden, const at::Tensor& weight,
                const std::optional<at::Tensor>& bias, const at::Tensor& targets, double temperature);

// Throws unless `values` is a float32 [n] vector.
void check_vector(const std::string& op, const char* name, const at::Tensor& values, int64_t n);

// out (+)= a b for a [m, k] and b [k, n], both float32 or both bfloat16; out float32 with contiguous rows.
void multiply(at::Tensor& out, const at::Tensor& a, const at::Tensor& b, bool add);

// A matrix whose blocks of rows become operands of multiply(): views where that can be, else copies in one reused
// scratch. All of a 16-bit matrix never exists in float32.
class RowBlocks {
 public:
  RowBlocks(const at::Tensor& matrix, int64_t most_rows);
  at::Tensor rows(int64_t begin, int64_t n);
  at::ScalarType dtype() const { return dtype_; }

 private:
  at::Tensor matrix_, scratch_;
  at::ScalarType dtype_;
};

// The tokens that an op computes, in its order, out of all T; the others cost nothing.
class TokenList {
 public:
  explicit TokenList(std::vector<int64_t> index, int64_t total);
  int64_t size() const { return static_cast<int64_t>(index_.size()); }
  int64_t operator[](int64_t i) const { return index_[i]; }
  bool all() const { return all_; }
  // Rows of the listed tokens; `rows` itself where those are all.
  at::Tensor gather(const at::Tensor& rows) const;
  // [T, ..] with the listed rows, 0 elsewhere; `rows` itself where those are all.
  at::Tensor scatter(const at::Tensor& rows) const;
  std::vector<int64_t> gather(const int64_t* values) const;
  // Filled up with zeros to full lanes.
  std::vector<float> gather(const float* values) const;

 private:
  std::vector<int64_t> index_;
  int64_t total_;
  bool all_;
};

// A bias as float32 numbers, or nothing.
struct Bias {
  at::Tensor values;
  explicit Bias(const std::optional<at::Tensor>& bias);
  const float* data() const { return values.defined() ? values.const_data_ptr<float>() : nullptr; }
};

// Memory for the logits of up to `tokens` tokens and `rows` vocabulary entries, and how it is cut.
struct LogitBuffer {
  at::Tensor memory;
  int64_t stride;

  LogitBuffer(int64_t rows, int64_t tokens);
  // Columns [t0, ..) of `logits`, float32 [rows, stride].
  LogitBuffer(const at::Tensor& logits, int64_t t0);
  at::Tensor block(int64_t row, int64_t rows, int64_t tokens) const;
  // With zeros in the lanes that fill up the tokens.
  LaneBlock lanes(int64_t row, int64_t rows, int64_t tokens) const;
};

// A multiple of the vector width that is no multiple of 128 bytes: rows at power-of-two distances share cache sets.
int64_t lane_stride(int64_t tokens);
int64_t lane_count(int64_t tokens);

// Rows of a vocabulary block, a multiple of kSegment, whose logits stay in the cache of the cores that use them. width: H.
int64_t vocabulary_block(int64_t vocabulary, int64_t tokens, int64_t width);

// Maxima and sums of the segments of a vocabulary block or of all blocks, [segments, stride].
struct SegmentSums {
  int64_t stride;
  std::vector<float> max, sum, weighted;

  SegmentSums(int64_t segments, int64_t tokens, bool entropy);
  float* max_of(int64_t segment) { return max.data() + segment * stride; }
  float* sum_of(int64_t segment) { return sum.data() + segment * stride; }
  float* weighted_of(int64_t segment) { return weighted.empty() ? nullptr : weighted.data() + segment * stride; }
};

// Over the vocabulary seen so far, for each token: max z, sum of e = exp((z - max) / T), sum of e log e, and the target's z.
struct TokenSums {
  std::vector<float> max, target;
  std::vector<double> sum, weighted;

  TokenSums(int64_t tokens, bool entropy);
  double logprob(int64_t t, double inv_t) const;
  double entropy(int64_t t) const;
};

// Vocabulary rows [v0, v0 + rows) for some tokens, whose logits lie in rows [at, ..) of a buffer.
struct HeadBlock {
  int64_t at, v0, rows, tokens;
};

inline int64_t segments_of(int64_t rows) { return (rows + kSegment - 1) / kSegment; }

// body(index of the segment in the block, its first row in the block, its logits), in parallel over the segments.
void for_segments(const LogitBuffer& buffer, const HeadBlock& b,
                  const std::function<void(int64_t segment, int64_t row, const LaneBlock& lanes)>& body);

// Computes the logits of a block, then maxima and sums of its segments into `sums` from `first` on. The logits get their
// bias; keep: they become exp((z - max of the segment) / T).
void segment_sums(const LogitBuffer& buffer, const HeadBlock& b, const at::Tensor& weight, const at::Tensor& hidden,
                  const float* bias, const int64_t* targets, float inv_t, bool keep, SegmentSums& sums, int64_t first,
                  float* target_logit);

// Adds segments [0, n) of `sums` to the sums of tokens [t0, t0 + count). max of the segments then holds exp((max of the
// segment - max of the token) / T).
void merge(SegmentSums& sums, int64_t n, double inv_t, TokenSums& total, int64_t t0, int64_t count);

// The sums of all listed tokens over the whole vocabulary. held: float32 [V, columns], columns = lane_stride(..), which is
// left with the logits, bias included, of the first `columns` tokens.
TokenSums head_sums(const at::Tensor& hidden, const at::Tensor& weight, const float* bias,
                    const std::vector<int64_t>& targets, double inv_t, bool entropy,
                    const std::optional<at::Tensor>& held = std::nullopt);

// How many tokens from t0 on, of n whose first `held` have their logits already, are computed together: either kind alone.
inline int64_t tokens_together(int64_t t0, int64_t held, int64_t n) {
  return std::min(kTokenBlock, (t0 < held ? held : n) - t0);
}

// d hidden, d weight and d bias of n listed tokens, summed in float32 over blocks of vocabulary and tokens.
class HeadGradients {
 public:
  // weight_rows: how many rows of d weight are being summed at a time, V or one vocabulary block. add_to: what d weight
  // is added to, float32 as weight, instead of being returned.
  HeadGradients(const at::Tensor& hidden, const at::Tensor& weight, int64_t n, int64_t weight_rows, bool need_hidden,
                bool need_weight, bool need_bias, const std::optional<at::Tensor>& add_to = std::nullopt);
  // Adds what d logits z (of vocabulary rows [v0, ..) and listed tokens [t0, ..), with the operands of the logits w and h)
  // contribute. Blocks with t0 = 0 must come first for d weight, those with v0 = 0 for d hidden.
  void add(const at::Tensor& z, const at::Tensor& w, const at::Tensor& h, int64_t v0, int64_t t0);
  // Nothing more will be added to these rows of d weight.
  void finish_weight(int64_t v0, int64_t rows);
  std::tuple<at::Tensor, at::Tensor, at::Tensor> finish(const TokenList& tokens);
  float* bias_sums() { return bias_sums_.data(); }

 private:
  at::Tensor weight_sums(int64_t v0, int64_t rows) const;

  at::TensorOptions hidden_options_;
  at::Tensor hidden_, weight_, weight_sums_, z16_;
  std::vector<float> bias_sums_;
  bool any_, need_hidden_, need_weight_, added_;
};

}  // namespace gadcore
