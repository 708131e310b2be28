// cpu_linear_grpo_loss; kernels/linear_grpo_loss.py states the mathematics.
//
// One pass over chunks of tokens. A chunk's logits, transposed, fill one reused buffer: block by block of the vocabulary
// they are computed and, still in the cache, become exp((z - max of their segment) / T). Once the sums are known so are
// the losses, and each segment needs one factor per token to become d logits, which again happens block by block, just
// before the products that use them.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <tuple>

#include "head.h"

namespace gadcore {
namespace {

using at::Tensor;

// A chunk's logits take about this much. Larger chunks read and write d weight less often; at 40 MiB (208 tokens of a
// vocabulary of 49152) that is hidden behind the products.
constexpr int64_t kChunkBytes = 40 << 20;
// Below this the products lose more than the memory is worth, whatever the vocabulary.
constexpr int64_t kLeastChunk = 112;
constexpr int64_t kMostChunk = 1008;

int64_t chunk_tokens(int64_t tokens, int64_t vocabulary) {
  const int64_t affordable = kChunkBytes / (4 * vocabulary) / kLaneUnit * kLaneUnit;
  const int64_t most = std::min(std::max(affordable, kLeastChunk), kMostChunk);
  const int64_t chunks = (tokens + most - 1) / most;
  // Even chunks: a small last one would be a slow one.
  return lane_count((tokens + chunks - 1) / chunks);
}

enum Row { kLoss, kLogprob, kKl, kRatio, kClipped, kEntropy, kRows };

struct Job {
  const Tensor &hidden, &weight;
  const float* bias;
  const int64_t* targets;
  const float *advantages, *ref, *old, *sampler;  // all but the first may be null
  double inv_t, denominator;
  float clip_low, clip_high, kl_coef, importance_cap;
  bool entropy, need_bias;
  const std::optional<Tensor>& add_to;
  Tensor stats;

  float* row(Row r) const { return stats.data_ptr<float>() + r * stats.size(1); }
};

// Writes the statistics of `count` tokens, tokens[t0], .., and returns their slopes.
std::vector<float> losses(const Job& job, const TokenList& tokens, int64_t t0, int64_t count, const TokenSums& sums) {
  const int64_t lanes = lane_count(count);
  std::vector<float> in(4 * lanes), out(5 * lanes);
  float *logprob = in.data(), *advantages = logprob + lanes, *ref = advantages + lanes, *old = ref + lanes;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t t = tokens[t0 + i];
    logprob[i] = static_cast<float>(sums.logprob(i, job.inv_t));
    advantages[i] = job.advantages[t];
    if (job.ref) ref[i] = job.ref[t];
    if (job.old) old[i] = job.old[t];
    if (job.sampler) {
      const float importance = std::exp((job.old ? old[i] : logprob[i]) - job.sampler[t]);
      // In this order NaN stays NaN.
      advantages[i] *= importance > job.importance_cap ? job.importance_cap : importance;
    }
  }
  float *loss = out.data(), *kl = loss + lanes, *ratio = kl + lanes, *clipped = ratio + lanes, *slope = clipped + lanes;
  vector_kernels().ratio_loss({logprob, advantages, job.ref ? ref : nullptr, job.old ? old : nullptr, job.clip_low,
                               job.clip_high, job.kl_coef, loss, kl, ratio, clipped, slope},
                              0, lanes);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t t = tokens[t0 + i];
    job.row(kLoss)[t] = loss[i];
    job.row(kLogprob)[t] = logprob[i];
    job.row(kKl)[t] = kl[i];
    job.row(kRatio)[t] = ratio[i];
    job.row(kClipped)[t] = clipped[i];
    if (job.entropy) job.row(kEntropy)[t] = static_cast<float>(sums.entropy(i));
  }
  return {slope, slope + count};
}

// The gradients of `tokens`, and the statistics.
std::tuple<Tensor, Tensor, Tensor> gradient_pass(const Job& job, const TokenList& tokens, bool need_hidden,
                                                 bool need_weight) {
  const int64_t n = tokens.size(), vocabulary = job.weight.size(0), width = job.weight.size(1);
  const int64_t chunk = n ? chunk_tokens(n, vocabulary) : 0;
  HeadGradients gradients(job.hidden, job.weight, n, vocabulary, need_hidden, need_weight, job.need_bias,
                          job.add_to);
  if (n == 0) return gradients.finish(tokens);
  const int64_t block = vocabulary_block(vocabulary, chunk, width);
  const LogitBuffer buffer(vocabulary, chunk);
  SegmentSums segments(segments_of(vocabulary), chunk, job.entropy);
  RowBlocks weights(job.weight, block), states(tokens.gather(job.hidden), chunk);
  const std::vector<int64_t> target = tokens.gather(job.targets);
  const VectorKernels& k = vector_kernels();
  for (int64_t t0 = 0; t0 < n; t0 += chunk) {
    const int64_t count = std::min(chunk, n - t0);
    const int64_t* y = target.data() + t0;
    const Tensor h = states.rows(t0, count);
    TokenSums sums(count, job.entropy);
    for (int64_t v0 = 0; v0 < vocabulary; v0 += block) {
      const int64_t rows = std::min(block, vocabulary - v0);
      segment_sums(buffer, {v0, v0, rows, count}, weights.rows(v0, rows), h, job.bias, y,
                   static_cast<float>(job.inv_t), true, segments, v0 / kSegment, sums.target.data());
    }
    merge(segments, segments_of(vocabulary), job.inv_t, sums, 0, count);

    const std::vector<float> slope = losses(job, tokens, t0, count, sums);
    std::vector<float> coefficient(lane_count(count)), at_target(count);
    for (int64_t t = 0; t < count; ++t) {
      const double s = slope[t] / job.denominator * job.inv_t;
      coefficient[t] = static_cast<float>(-s / sums.sum[t]);
      // 1 - p without the cancellation where the model is sure
      at_target[t] = static_cast<float>(-s * std::expm1(sums.logprob(t, job.inv_t)));
    }
    for (int64_t v0 = 0; v0 < vocabulary; v0 += block) {
      const int64_t rows = std::min(block, vocabulary - v0);
      for_segments(buffer, {v0, v0, rows, count}, [&](int64_t segment, int64_t row, const LaneBlock& lanes) {
        // merge() has left exp((max of the segment - max of the token) / T)
        float* factor = segments.max_of(v0 / kSegment + segment);
        for (int64_t t = 0; t < lanes.lanes; ++t) factor[t] *= coefficient[t];
        k.segment_scale(lanes, factor);
        for (int64_t t = 0; t < count; ++t) {
          const int64_t r = y[t] - v0 - row;
          if (r >= 0 && r < lanes.rows) lanes.z[r * lanes.stride + t] = at_target[t];
        }
        if (job.need_bias) k.segment_row_sums(lanes, gradients.bias_sums() + v0 + row);
      });
      gradients.add(buffer.block(v0, rows, count), weights.rows(v0, rows), h, v0, t0);
      if (t0 + chunk >= n) gradients.finish_weight(v0, rows);
    }
  }
  return gradients.finish(tokens);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> linear_grpo(
    const Tensor& hidden, const Tensor& weight, const std::optional<Tensor>& bias_in, const Tensor& targets_in,
    const Tensor& advantages_in, const std::optional<Tensor>& ref_in, const std::optional<Tensor>& old_in,
    double temperature, double clip_low, double clip_high, double kl_coef, double denominator, bool entropy,
    bool need_hidden, bool need_weight, bool need_bias, const std::optional<Tensor>& add_to,
    const std::optional<Tensor>& sampler_in, std::optional<double> importance_cap) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  const char* op = "cpu_linear_grpo_loss";
  check_head(op, hidden, weight, bias_in, targets_in, temperature);
  const int64_t tokens = hidden.size(0);
  check_vector(op, "advantages", advantages_in, tokens);
  if (ref_in) check_vector(op, "ref_logprob", *ref_in, tokens);
  if (old_in) check_vector(op, "old_logprob", *old_in, tokens);
  if (sampler_in) check_vector(op, "sampler_logprob", *sampler_in, tokens);
  TORCH_CHECK(sampler_in.has_value() == importance_cap.has_value(), op,
              ": sampler_logprob and importance_cap come together");
  TORCH_CHECK(!add_to || (add_to->sizes() == weight.sizes() && add_to->scalar_type() == at::kFloat &&
                          weight.scalar_type() == at::kFloat && add_to->is_contiguous()),
              op, ": add_to must be contiguous float32 as weight, which is ", weight.scalar_type(), " ", weight.sizes());
  TORCH_CHECK(denominator > 0, op, ": denominator must be above 0, is ", denominator);
  const Tensor targets = targets_in.contiguous(), advantages = advantages_in.contiguous();
  const Tensor ref = ref_in ? ref_in->contiguous() : Tensor(), old = old_in ? old_in->contiguous() : Tensor();
  const Tensor sampler = sampler_in ? sampler_in->contiguous() : Tensor();
  const Bias bias(bias_in);
  const Job job{hidden,
                weight,
                bias.data(),
                targets.const_data_ptr<int64_t>(),
                advantages.const_data_ptr<float>(),
                ref.defined() ? ref.const_data_ptr<float>() : nullptr,
                old.defined() ? old.const_data_ptr<float>() : nullptr,
                sampler.defined() ? sampler.const_data_ptr<float>() : nullptr,
                1.0 / temperature,
                denominator,
                static_cast<float>(clip_low),
                static_cast<float>(clip_high),
                static_cast<float>(kl_coef),
                static_cast<float>(importance_cap.value_or(1.0)),
                entropy,
                need_bias,
                add_to,
                at::zeros({kRows, tokens}, hidden.options().dtype(at::kFloat))};
  // An advantage of 0 (a group whose rewards are all equal) without a KL term leaves no gradient, whatever the logits.
  const bool any_gradient = need_hidden || need_weight || need_bias, kl_gradient = job.ref && kl_coef != 0;
  std::vector<int64_t> with_gradient, without;
  for (int64_t t = 0; t < tokens; ++t) {
    if (job.targets[t] == kIgnored) continue;
    (any_gradient && (kl_gradient || job.advantages[t] != 0) ? with_gradient : without).push_back(t);
  }
  const TokenList statistics(std::move(without), tokens);
  const TokenSums sums =
      head_sums(statistics.gather(hidden), weight, job.bias, statistics.gather(job.targets), job.inv_t, entropy);
  losses(job, statistics, 0, statistics.size(), sums);
  auto [d_hidden, d_weight, d_bias] =
      gradient_pass(job, TokenList(std::move(with_gradient), tokens), need_hidden, need_weight);
  return {job.stats, d_hidden, d_weight, d_bias};
}

}  // namespace
}  // namespace gadcore

TORCH_LIBRARY_FRAGMENT(gadcore, m) {
  m.def(
      "cpu_linear_grpo_loss(Tensor hidden, Tensor weight, Tensor? bias, Tensor targets, Tensor advantages, "
      "Tensor? ref_logprob, Tensor? old_logprob, float temperature, float clip_low, float clip_high, float kl_coef, "
      "float denominator, bool entropy, bool need_hidden, bool need_weight, bool need_bias, Tensor(a!)? add_to=None, "
      "Tensor? sampler_logprob=None, float? importance_cap=None) -> (Tensor, Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(gadcore, CPU, m) { m.impl("cpu_linear_grpo_loss", &gadcore::linear_grpo); }
