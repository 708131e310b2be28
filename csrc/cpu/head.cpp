#include "head.h"

#include <ATen/Parallel.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <cmath>

#include "kept.h"
#include "product.h"

#ifdef GADCORE_X86
// MKL's, which torch's library exports where it was built with MKL; null elsewhere. It uses AMX where the CPU has it.
extern "C" __attribute__((weak)) void cblas_gemm_bf16bf16f32(
    int layout, int trans_a, int trans_b, int m, int n, int k, float alpha, const uint16_t* a, int lda,
    const uint16_t* b, int ldb, float beta, float* c, int ldc);
#endif

namespace gadcore {
namespace {

// One vocabulary block's logits take this much for each thread.
constexpr int64_t kBlockBytes = 1 << 20;
// A block of weight takes at most this, which bounds the float32 copies of a 16-bit head.
constexpr int64_t kWeightBytes = 16 << 20;

int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

bool rows_or_columns_contiguous(const at::Tensor& m) {
  const int64_t rows = m.size(0), columns = m.size(1);
  return (m.stride(1) == 1 && m.stride(0) >= std::max<int64_t>(1, columns)) ||
         (m.stride(0) == 1 && m.stride(1) >= std::max<int64_t>(1, rows));
}

#ifdef GADCORE_X86
struct BlasMatrix {
  const uint16_t* data;
  int trans, stride;

  explicit BlasMatrix(const at::Tensor& m) : data(static_cast<const uint16_t*>(m.const_data_ptr())) {
    const bool by_rows = m.stride(1) == 1 && m.stride(0) >= m.size(1);
    trans = by_rows ? 111 : 112;
    stride = static_cast<int>(std::max<int64_t>(by_rows ? m.stride(0) : m.stride(1), 1));
  }
};
#endif

}  // namespace

bool bf16_gemm_linked() {
#ifdef GADCORE_X86
  return cblas_gemm_bf16bf16f32 != nullptr;
#else
  return false;
#endif
}

void check_head(const std::string& op, const at::Tensor& hidden, const at::Tensor& weight,
                const std::optional<at::Tensor>& bias, const at::Tensor& targets, double temperature) {
  const at::ScalarType dtype = hidden.scalar_type();
  TORCH_CHECK(hidden.dim() == 2 && (dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf), op,
              ": hidden must be float32, bfloat16 or float16 [T, H], is ", dtype, " ", hidden.sizes());
  TORCH_CHECK(weight.dim() == 2 && weight.scalar_type() == dtype && weight.size(1) == hidden.size(1) &&
                  weight.size(0) > 0,
              op, ": weight must be ", dtype, " [V, ", hidden.size(1), "] with V > 0, is ", weight.scalar_type(), " ",
              weight.sizes());
  TORCH_CHECK(!bias || (bias->dim() == 1 && bias->size(0) == weight.size(0) && bias->scalar_type() == dtype), op,
              ": bias must be ", dtype, " [", weight.size(0), "]");
  TORCH_CHECK(targets.dim() == 1 && targets.size(0) == hidden.size(0) && targets.scalar_type() == at::kLong, op,
              ": targets must be int64 [", hidden.size(0), "], is ", targets.scalar_type(), " ", targets.sizes());
  TORCH_CHECK(temperature > 0, op, ": temperature must be above 0, is ", temperature);
  const auto y = targets.accessor<int64_t, 1>();
  for (int64_t t = 0; t < y.size(0); ++t) {
    TORCH_CHECK((y[t] >= 0 && y[t] < weight.size(0)) || y[t] == kIgnored, op, ": targets[", t, "] is ", y[t],
                ", neither in [0, ", weight.size(0), ") nor -100");
  }
}

void check_vector(const std::string& op, const char* name, const at::Tensor& values, int64_t n) {
  TORCH_CHECK(values.dim() == 1 && values.size(0) == n && values.scalar_type() == at::kFloat, op, ": ", name,
              " must be float32 [", n, "], is ", values.scalar_type(), " ", values.sizes());
}

void multiply(at::Tensor& out, const at::Tensor& a, const at::Tensor& b, bool add) {
  if (a.scalar_type() == at::kFloat) {
    if (product_is_ours() && b.stride(1) == 1) return add_product(out, a, b, add);
    add ? at::addmm_out(out, out, a, b) : at::mm_out(out, a, b);
    return;
  }
#ifdef GADCORE_X86
  const BlasMatrix x(a), y(b);
  cblas_gemm_bf16bf16f32(101, x.trans, y.trans, static_cast<int>(a.size(0)), static_cast<int>(b.size(1)),
                         static_cast<int>(a.size(1)), 1.0f, x.data, x.stride, y.data, y.stride, add ? 1.0f : 0.0f,
                         out.data_ptr<float>(), static_cast<int>(out.stride(0)));
#endif
}

RowBlocks::RowBlocks(const at::Tensor& matrix, int64_t most_rows)
    : matrix_(matrix),
      dtype_(matrix.scalar_type() == at::kBFloat16 && bf16_products() ? at::kBFloat16 : at::kFloat) {
  if (dtype_ != matrix.scalar_type() || !rows_or_columns_contiguous(matrix)) {
    scratch_ = at::empty({std::min(most_rows, matrix.size(0)), matrix.size(1)}, matrix.options().dtype(dtype_));
  }
}

at::Tensor RowBlocks::rows(int64_t begin, int64_t n) {
  const at::Tensor block = matrix_.narrow(0, begin, n);
  if (!scratch_.defined()) return block;
  return scratch_.narrow(0, 0, n).copy_(block);
}

TokenList::TokenList(std::vector<int64_t> index, int64_t total) : index_(std::move(index)), total_(total) {
  all_ = size() == total && std::is_sorted(index_.begin(), index_.end());
}

at::Tensor TokenList::gather(const at::Tensor& rows) const {
  if (all_) return rows;
  return rows.index_select(0, at::from_blob(const_cast<int64_t*>(index_.data()), {size()}, at::kLong));
}

at::Tensor TokenList::scatter(const at::Tensor& rows) const {
  if (all_) return rows;
  std::vector<int64_t> shape = rows.sizes().vec();
  shape[0] = total_;
  return at::zeros(shape, rows.options())
      .index_copy_(0, at::from_blob(const_cast<int64_t*>(index_.data()), {size()}, at::kLong), rows);
}

std::vector<int64_t> TokenList::gather(const int64_t* values) const {
  std::vector<int64_t> out(index_.size());
  for (size_t i = 0; i < index_.size(); ++i) out[i] = values[index_[i]];
  return out;
}

std::vector<float> TokenList::gather(const float* values) const {
  std::vector<float> out(lane_count(size()));
  for (size_t i = 0; i < index_.size(); ++i) out[i] = values[index_[i]];
  return out;
}

Bias::Bias(const std::optional<at::Tensor>& bias) {
  if (bias) values = bias->to(at::kFloat).contiguous();
}

int64_t lane_count(int64_t tokens) { return round_up(tokens, kLaneUnit); }

int64_t lane_stride(int64_t tokens) { return round_up(tokens + kLaneUnit, 2 * kLaneUnit) - kLaneUnit; }

int64_t vocabulary_block(int64_t vocabulary, int64_t tokens, int64_t width) {
  const int64_t rows = std::min(kBlockBytes * at::get_num_threads() / (4 * lane_stride(tokens)),
                                kWeightBytes / (4 * std::max<int64_t>(width, 1)));
  return std::min(vocabulary, std::max(kSegment, rows / kSegment * kSegment));
}

LogitBuffer::LogitBuffer(int64_t rows, int64_t tokens)
    : memory(at::empty({rows, lane_stride(tokens)}, at::kFloat)), stride(lane_stride(tokens)) {}

LogitBuffer::LogitBuffer(const at::Tensor& logits, int64_t t0)
    : memory(logits.narrow(1, t0, logits.size(1) - t0)), stride(logits.stride(0)) {}

at::Tensor LogitBuffer::block(int64_t row, int64_t rows, int64_t tokens) const {
  return memory.narrow(0, row, rows).narrow(1, 0, tokens);
}

LaneBlock LogitBuffer::lanes(int64_t row, int64_t rows, int64_t tokens) const {
  const LaneBlock lanes{memory.data_ptr<float>() + row * stride, stride, rows, lane_count(tokens)};
  for (int64_t r = 0; r < rows; ++r) std::fill_n(lanes.z + r * stride + tokens, lanes.lanes - tokens, 0.0f);
  return lanes;
}

SegmentSums::SegmentSums(int64_t segments, int64_t tokens, bool entropy)
    : stride(lane_count(tokens)),
      max(segments * stride),
      sum(segments * stride),
      weighted(entropy ? segments * stride : 0) {}

TokenSums::TokenSums(int64_t tokens, bool entropy)
    : max(lane_count(tokens), -kInf),
      target(lane_count(tokens)),
      sum(lane_count(tokens)),
      weighted(entropy ? lane_count(tokens) : 0) {}

double TokenSums::logprob(int64_t t, double inv_t) const {
  return (static_cast<double>(target[t]) - max[t]) * inv_t - std::log(sum[t]);
}

double TokenSums::entropy(int64_t t) const { return std::log(sum[t]) - weighted[t] / sum[t]; }

void for_segments(const LogitBuffer& buffer, const HeadBlock& b,
                  const std::function<void(int64_t segment, int64_t row, const LaneBlock&)>& body) {
  at::parallel_for(0, segments_of(b.rows), 1, [&](int64_t begin, int64_t end) {
    for (int64_t s = begin; s < end; ++s) {
      const int64_t row = s * kSegment;
      body(s, row, buffer.lanes(b.at + row, std::min(kSegment, b.rows - row), b.tokens));
    }
  });
}

void segment_sums(const LogitBuffer& buffer, const HeadBlock& b, const at::Tensor& weight, const at::Tensor& hidden,
                  const float* bias, const int64_t* targets, float inv_t, bool keep, SegmentSums& sums, int64_t first,
                  float* target_logit) {
  at::Tensor z = buffer.block(b.at, b.rows, b.tokens);
  multiply(z, weight, hidden.t(), false);
  const VectorKernels& k = vector_kernels();
  for_segments(buffer, b, [&](int64_t segment, int64_t row, const LaneBlock& lanes) {
    const int64_t v0 = b.v0 + row;
    for (int64_t t = 0; t < b.tokens; ++t) {
      const int64_t r = targets[t] - v0;
      if (r >= 0 && r < lanes.rows) target_logit[t] = lanes.z[r * lanes.stride + t] + (bias ? bias[targets[t]] : 0.0f);
    }
    const int64_t s = first + segment;
    k.segment_exp(lanes, bias ? bias + v0 : nullptr, inv_t, keep, sums.max_of(s), sums.sum_of(s), sums.weighted_of(s));
  });
}

void merge(SegmentSums& sums, int64_t n, double inv_t, TokenSums& total, int64_t t0, int64_t count) {
  const int64_t lanes = lane_count(count);
  float* top = total.max.data() + t0;
  double *sum = total.sum.data() + t0, *weighted = total.weighted.empty() ? nullptr : total.weighted.data() + t0;
  std::vector<float> before(top, top + lanes), gap(lanes);
  for (int64_t s = 0; s < n; ++s) {
    const float* max = sums.max_of(s);
    for (int64_t t = 0; t < lanes; ++t) top[t] = max[t] > top[t] ? max[t] : top[t];
  }
  for (int64_t t = 0; t < lanes; ++t) {
    if (top[t] == before[t] || sum[t] == 0) continue;
    const double fall = (static_cast<double>(before[t]) - top[t]) * inv_t, factor = std::exp(fall);
    if (weighted) weighted[t] = factor * (weighted[t] + sum[t] * fall);
    sum[t] *= factor;
  }
  const VectorKernels& k = vector_kernels();
  for (int64_t s = 0; s < n; ++s) {
    float *factor = sums.max_of(s), *partial = sums.sum_of(s), *partial_weighted = sums.weighted_of(s);
    std::copy_n(factor, lanes, gap.data());
    k.lanes_exp(factor, lanes, top, static_cast<float>(inv_t));
    for (int64_t t = 0; t < lanes; ++t) sum[t] += static_cast<double>(factor[t] * partial[t]);
    if (!weighted) continue;
    for (int64_t t = 0; t < lanes; ++t) {
      // A segment of nothing but -inf counts for nothing.
      const double fall = factor[t] == 0 ? 0.0 : (static_cast<double>(gap[t]) - top[t]) * inv_t;
      weighted[t] += factor[t] * (partial_weighted[t] + partial[t] * fall);
    }
  }
}

TokenSums head_sums(const at::Tensor& hidden, const at::Tensor& weight, const float* bias,
                    const std::vector<int64_t>& targets, double inv_t, bool entropy,
                    const std::optional<at::Tensor>& held) {
  const int64_t tokens = hidden.size(0), vocabulary = weight.size(0);
  TokenSums total(tokens, entropy);
  if (tokens == 0) return total;
  const int64_t token_block = std::min(tokens, kTokenBlock), kept = held ? std::min(tokens, held->size(1)) : 0;
  const int64_t block = vocabulary_block(vocabulary, token_block, weight.size(1));
  const LogitBuffer buffer(block, token_block);
  RowBlocks weights(weight, block), states(hidden, token_block);
  SegmentSums sums(segments_of(block), token_block, entropy);
  for (int64_t v0 = 0; v0 < vocabulary; v0 += block) {
    const int64_t rows = std::min(block, vocabulary - v0);
    const at::Tensor w = weights.rows(v0, rows);
    for (int64_t t0 = 0, n; t0 < tokens; t0 += n) {
      n = tokens_together(t0, kept, tokens);
      const bool keeps = t0 < kept;
      segment_sums(keeps ? LogitBuffer(*held, t0) : buffer, {keeps ? v0 : 0, v0, rows, n}, w, states.rows(t0, n), bias,
                   targets.data() + t0, static_cast<float>(inv_t), false, sums, 0, total.target.data() + t0);
      merge(sums, segments_of(rows), inv_t, total, t0, n);
    }
  }
  return total;
}

HeadGradients::HeadGradients(const at::Tensor& hidden, const at::Tensor& weight, int64_t n, int64_t weight_rows,
                             bool need_hidden, bool need_weight, bool need_bias,
                             const std::optional<at::Tensor>& add_to)
    : hidden_options_(hidden.options()),
      bias_sums_(need_bias ? weight.size(0) : 0),
      any_(n > 0),
      need_hidden_(need_hidden),
      need_weight_(need_weight),
      added_(need_weight && add_to) {
  const auto sums = hidden.options().dtype(at::kFloat);
  hidden_ = at::empty({need_hidden ? n : 0, hidden.size(1)}, sums);
  if (!need_weight) {
    weight_ = at::empty({0}, weight.options());
  } else if (added_) {
    weight_ = weight_sums_ = *add_to;
  } else {
    const bool direct = any_ && weight.scalar_type() == at::kFloat;
    weight_ = direct ? kept_memory(weight.sizes())
              : any_ ? at::empty(weight.sizes(), weight.options())
                     : at::zeros(weight.sizes(), weight.options());
    if (any_) weight_sums_ = direct ? weight_ : at::empty({weight_rows, weight.size(1)}, sums);
  }
}

at::Tensor HeadGradients::weight_sums(int64_t v0, int64_t rows) const {
  return weight_sums_.narrow(0, weight_sums_.size(0) == weight_.size(0) ? v0 : 0, rows);
}

void HeadGradients::add(const at::Tensor& z, const at::Tensor& w, const at::Tensor& h, int64_t v0, int64_t t0) {
  at::Tensor d = z;
  if (w.scalar_type() != at::kFloat) {
    if (!z16_.defined() || z16_.size(0) < z.size(0) || z16_.size(1) < z.size(1)) {
      z16_ = at::empty(z.sizes(), w.options());
    }
    d = z16_.narrow(0, 0, z.size(0)).narrow(1, 0, z.size(1)).copy_(z);
  }
  if (need_hidden_) {
    at::Tensor out = hidden_.narrow(0, t0, z.size(1));
    multiply(out, d.t(), w, v0 > 0);
  }
  if (need_weight_) {
    at::Tensor out = weight_sums(v0, z.size(0));
    multiply(out, d, h, added_ || t0 > 0);
  }
}

void HeadGradients::finish_weight(int64_t v0, int64_t rows) {
  if (need_weight_ && weight_.scalar_type() != at::kFloat) weight_.narrow(0, v0, rows).copy_(weight_sums(v0, rows));
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> HeadGradients::finish(const TokenList& tokens) {
  const auto dtype = hidden_options_.dtype();
  at::Tensor bias = at::empty({static_cast<int64_t>(bias_sums_.size())}, hidden_options_.dtype(at::kFloat));
  std::copy(bias_sums_.begin(), bias_sums_.end(), bias.data_ptr<float>());
  at::Tensor hidden = need_hidden_ ? tokens.scatter(hidden_.to(dtype)) : at::empty({0}, hidden_options_);
  return {hidden, added_ ? at::empty({0}, hidden_options_) : weight_, bias.to(dtype)};
}

}  // namespace gadcore
