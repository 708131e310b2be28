// cpu_linear_logprob and its backward; kernels/linear_logprob.py states the mathematics.
//
// Both walk over blocks of the vocabulary and, inside, over blocks of tokens. The weight is read once from memory, the
// logits of a block never leave the cache, but for those of as many tokens as the caller has memory for, and the backward
// pass, which computes the others again, finishes one block of d weight before it begins the next.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <tuple>

#include "head.h"
#include "kept.h"

namespace gadcore {
namespace {

using at::Tensor;

// held_columns: of the logits that are kept, 0 for none, else a lane_stride().
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> forward(const Tensor& hidden, const Tensor& weight,
                                                           const std::optional<Tensor>& bias_in,
                                                           const Tensor& targets_in, double temperature, bool entropy,
                                                           int64_t held_columns) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  check_head("cpu_linear_logprob", hidden, weight, bias_in, targets_in, temperature);
  TORCH_CHECK(held_columns == 0 || held_columns == lane_stride(held_columns),
              "cpu_linear_logprob: held_columns must be 0 or 16, 48, 80, .., is ", held_columns);
  const Tensor targets = targets_in.contiguous();
  const int64_t tokens = hidden.size(0), *target = targets.const_data_ptr<int64_t>();
  const double inv_t = 1.0 / temperature;
  std::vector<int64_t> index;
  for (int64_t t = 0; t < tokens; ++t) {
    if (target[t] != kIgnored) index.push_back(t);
  }
  const TokenList counted(std::move(index), tokens);
  const Tensor held = kept_memory({weight.size(0), held_columns});
  const TokenSums sums =
      head_sums(counted.gather(hidden), weight, Bias(bias_in).data(), counted.gather(target), inv_t, entropy, held);
  // Columns that no token has: the same op must give the same numbers.
  if (counted.size() < held_columns) held.narrow(1, counted.size(), held_columns - counted.size()).zero_();
  const auto zeros = [](int64_t n) { return at::zeros({n}, at::kFloat); };
  Tensor logprob = zeros(tokens), row_max = zeros(tokens), log_sum = zeros(tokens), h = zeros(entropy ? tokens : 0);
  float *logprob_p = logprob.data_ptr<float>(), *row_max_p = row_max.data_ptr<float>();
  float *log_sum_p = log_sum.data_ptr<float>(), *h_p = h.data_ptr<float>();
  for (int64_t i = 0; i < counted.size(); ++i) {
    const int64_t t = counted[i];
    logprob_p[t] = static_cast<float>(sums.logprob(i, inv_t));
    row_max_p[t] = sums.max[i];
    log_sum_p[t] = static_cast<float>(std::log(sums.sum[i]));
    if (entropy) h_p[t] = static_cast<float>(sums.entropy(i));
  }
  return {logprob, row_max, log_sum, h, held};
}

// Rows [v0, ..) of `count` columns of the held logits, which another backward pass may want as they are.
void take(const Tensor& held, int64_t v0, const int64_t* columns, int64_t count, const LaneBlock& out) {
  const bool adjacent = columns[count - 1] - columns[0] == count - 1;
  for (int64_t r = 0; r < out.rows; ++r) {
    const float* from = held.const_data_ptr<float>() + (v0 + r) * held.size(1);
    float* to = out.z + r * out.stride;
    if (adjacent) {
      std::copy_n(from + columns[0], count, to);
    } else {
      for (int64_t t = 0; t < count; ++t) to[t] = from[columns[t]];
    }
  }
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad_in, const Tensor& hidden, const Tensor& weight,
                                            const std::optional<Tensor>& bias_in, const Tensor& targets_in,
                                            const Tensor& row_max_in, const Tensor& log_sum_in, const Tensor& held,
                                            double temperature, bool need_hidden, bool need_weight, bool need_bias) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  const char* op = "cpu_linear_logprob_backward";
  check_head(op, hidden, weight, bias_in, targets_in, temperature);
  const int64_t tokens = hidden.size(0), vocabulary = weight.size(0), width = weight.size(1);
  check_vector(op, "grad_logprob", grad_in, tokens);
  check_vector(op, "row_max", row_max_in, tokens);
  check_vector(op, "log_sum", log_sum_in, tokens);
  const Tensor targets = targets_in.contiguous(), grad = grad_in.contiguous();
  const Tensor row_max = row_max_in.contiguous(), log_sum = log_sum_in.contiguous();
  TORCH_CHECK(held.dim() == 2 && held.size(0) == vocabulary && held.scalar_type() == at::kFloat && held.is_contiguous(),
              op, ": held must be contiguous float32 [", vocabulary, ", columns], is ", held.scalar_type(), " ",
              held.sizes());
  // Of the tokens that get a gradient; columns: where in `held` the logits of the first of them lie.
  std::vector<int64_t> index, columns;
  for (int64_t t = 0, column = 0; t < tokens; ++t) {
    if (targets.const_data_ptr<int64_t>()[t] == kIgnored) continue;
    if (grad.const_data_ptr<float>()[t] != 0) {
      index.push_back(t);
      if (column < held.size(1)) columns.push_back(column);
    }
    ++column;
  }
  // Blocks begin at full lanes, whose filling would be tokens of the next block else.
  const int64_t held_tokens = static_cast<int64_t>(columns.size());
  const int64_t known = held_tokens == static_cast<int64_t>(index.size()) ? held_tokens
                                                                          : held_tokens / kLaneUnit * kLaneUnit;
  const TokenList counted(std::move(index), tokens);
  const int64_t n = counted.size();
  const double inv_t = 1.0 / temperature;
  const Bias bias(bias_in);
  const std::vector<int64_t> target = counted.gather(targets.const_data_ptr<int64_t>());
  const std::vector<float> g = counted.gather(grad.const_data_ptr<float>());
  const std::vector<float> shift = counted.gather(row_max.const_data_ptr<float>());
  const std::vector<float> log_of_sum = counted.gather(log_sum.const_data_ptr<float>());
  std::vector<float> scale(g.size());
  for (size_t t = 0; t < g.size(); ++t) scale[t] = static_cast<float>(-g[t] * inv_t);

  const int64_t token_block = std::min(n, kTokenBlock), block = vocabulary_block(vocabulary, token_block, width);
  const LogitBuffer buffer(block, token_block);
  HeadGradients gradients(hidden, weight, n, block, need_hidden, need_weight, need_bias);
  RowBlocks weights(weight, block), states(counted.gather(hidden), token_block);
  const VectorKernels& k = vector_kernels();
  for (int64_t v0 = 0; n > 0 && v0 < vocabulary; v0 += block) {
    const int64_t rows = std::min(block, vocabulary - v0);
    const Tensor w = weights.rows(v0, rows);
    for (int64_t t0 = 0, count; t0 < n; t0 += count) {
      count = tokens_together(t0, known, n);
      const Tensor h = states.rows(t0, count);
      Tensor z = buffer.block(0, rows, count);
      if (t0 >= known) multiply(z, w, h.t(), false);
      // Held logits have it already.
      const float* b = t0 < known ? nullptr : bias.data();
      for_segments(buffer, {0, v0, rows, count}, [&](int64_t, int64_t row, const LaneBlock& lanes) {
        if (t0 < known) take(held, v0 + row, columns.data() + t0, count, lanes);
        std::vector<std::pair<float*, float>> at_target;
        for (int64_t t = t0; t < t0 + count; ++t) {
          const int64_t r = target[t] - v0 - row;
          if (r < 0 || r >= lanes.rows) continue;
          float* p = lanes.z + r * lanes.stride + t - t0;
          const float logit = *p + (b ? b[target[t]] : 0.0f);
          // 1 - p without the cancellation where the model is sure
          at_target.emplace_back(
              p, static_cast<float>(-g[t] * inv_t * std::expm1((static_cast<double>(logit) - shift[t]) * inv_t - log_of_sum[t])));
        }
        k.segment_softmax(lanes, b ? b + v0 + row : nullptr, static_cast<float>(inv_t), shift.data() + t0,
                          log_of_sum.data() + t0, scale.data() + t0);
        for (const auto& [p, value] : at_target) *p = value;
        if (need_bias) k.segment_row_sums(lanes, gradients.bias_sums() + v0 + row);
      });
      gradients.add(z, w, h, v0, t0);
    }
    gradients.finish_weight(v0, rows);
  }
  return gradients.finish(counted);
}

}  // namespace
}  // namespace gadcore

TORCH_LIBRARY_FRAGMENT(gadcore, m) {
  m.def(
      "cpu_linear_logprob(Tensor hidden, Tensor weight, Tensor? bias, Tensor targets, float temperature, "
      "bool entropy, int held_columns) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "cpu_linear_logprob_backward(Tensor grad_logprob, Tensor hidden, Tensor weight, Tensor? bias, Tensor targets, "
      "Tensor row_max, Tensor log_sum, Tensor held, float temperature, bool need_hidden, bool need_weight, "
      "bool need_bias) -> (Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(gadcore, CPU, m) {
  m.impl("cpu_linear_logprob", &gadcore::forward);
  m.impl("cpu_linear_logprob_backward", &gadcore::backward);
}
