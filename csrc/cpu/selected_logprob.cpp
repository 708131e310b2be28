// selected_logprob and its backward for float32 on the CPU; kernels/selected_logprob.py states the mathematics.
//
// One pass over a row: blocks that stay in the L1 cache, each shifted by the largest logit so far. Sums of a block are
// float32, sums of blocks are float64. The shift works on the raw logits, so large logits lose no digits to lse.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <tuple>

#include "vector_kernels.h"

namespace gadcore {
namespace {

constexpr int64_t kIgnored = -100;
constexpr int64_t kBlock = 1024;

struct RowSum {
  float max;
  double sum;  // of exp((x - max) / T)
};

RowSum row_sum(const VectorKernels& k, const float* x, int64_t n, float inv_t) {
  RowSum row{-kInf, 0};
  for (int64_t start = 0; start < n; start += kBlock) {
    const int64_t length = std::min(kBlock, n - start);
    const float m = k.row_max(x + start, length);
    if (m > row.max) {
      row.sum *= std::exp((static_cast<double>(row.max) - m) * inv_t);
      row.max = m;
    }
    // Nothing but -inf so far: any finite shift will do, -inf itself would make NaN.
    row.sum += k.row_exp_sum(x + start, length, row.max == -kInf ? 0.0f : row.max, inv_t);
  }
  return row;
}

int64_t grain(int64_t vocab) { return std::max<int64_t>(1, 32768 / vocab); }

at::Tensor rows_with_unit_stride(const at::Tensor& logits) {
  return logits.stride(1) == 1 || logits.size(1) == 1 ? logits : logits.contiguous();
}

void check(const at::Tensor& logits, const at::Tensor& targets, double temperature) {
  TORCH_CHECK(logits.dim() == 2 && logits.size(1) > 0 && logits.scalar_type() == at::kFloat,
              "selected_logprob: logits must be float32 [T, V] with V > 0");
  TORCH_CHECK(targets.dim() == 1 && targets.size(0) == logits.size(0) && targets.scalar_type() == at::kLong,
              "selected_logprob: targets must be int64 [T]");
  TORCH_CHECK(temperature > 0, "selected_logprob: temperature must be above 0, is ", temperature);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> forward(
    const at::Tensor& logits_in, const at::Tensor& targets_in, double temperature) {
  check(logits_in, targets_in, temperature);
  const at::Tensor logits = rows_with_unit_stride(logits_in), targets = targets_in.contiguous();
  const int64_t rows = logits.size(0), vocab = logits.size(1), stride = logits.stride(0);
  const int64_t* target = targets.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < rows; ++i) {
    TORCH_CHECK((target[i] >= 0 && target[i] < vocab) || target[i] == kIgnored,
                "selected_logprob: target ", target[i], " of row ", i, " is not below the vocabulary's ", vocab);
  }
  at::Tensor logprob = at::empty({rows}, logits.options()), lse = at::empty({rows}, logits.options());
  at::Tensor row_max = at::empty({rows}, logits.options()), log_sum = at::empty({rows}, logits.options());
  const float* x = logits.const_data_ptr<float>();
  float *logprob_p = logprob.data_ptr<float>(), *lse_p = lse.data_ptr<float>();
  float *row_max_p = row_max.data_ptr<float>(), *log_sum_p = log_sum.data_ptr<float>();
  const double inv_t = 1.0 / temperature;
  const VectorKernels& k = vector_kernels();
  at::parallel_for(0, rows, grain(vocab), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const float* row = x + i * stride;
      const RowSum r = row_sum(k, row, vocab, static_cast<float>(inv_t));
      const double log_of_sum = std::log(r.sum);
      row_max_p[i] = r.max;
      log_sum_p[i] = static_cast<float>(log_of_sum);
      lse_p[i] = static_cast<float>(r.max * inv_t + log_of_sum);
      logprob_p[i] = target[i] == kIgnored
          ? 0.0f
          : static_cast<float>((static_cast<double>(row[target[i]]) - r.max) * inv_t - log_of_sum);
    }
  });
  return {logprob, lse, row_max, log_sum};
}

at::Tensor backward(const at::Tensor& grad_logprob_in, const at::Tensor& grad_lse_in, const at::Tensor& logits_in,
                    const at::Tensor& targets_in, const at::Tensor& row_max_in, const at::Tensor& log_sum_in,
                    double temperature) {
  check(logits_in, targets_in, temperature);
  const at::Tensor logits = rows_with_unit_stride(logits_in), targets = targets_in.contiguous();
  const at::Tensor grad_logprob = grad_logprob_in.contiguous(), grad_lse = grad_lse_in.contiguous();
  const at::Tensor row_max = row_max_in.contiguous(), log_sum = log_sum_in.contiguous();
  const int64_t rows = logits.size(0), vocab = logits.size(1), stride = logits.stride(0);
  at::Tensor grad = at::empty({rows, vocab}, logits.options());
  const float *x = logits.const_data_ptr<float>(), *g_logprob = grad_logprob.const_data_ptr<float>();
  const float *g_lse = grad_lse.const_data_ptr<float>(), *shift = row_max.const_data_ptr<float>();
  const float* log_sum_p = log_sum.const_data_ptr<float>();
  const int64_t* target = targets.const_data_ptr<int64_t>();
  float* out = grad.data_ptr<float>();
  const double inv_t = 1.0 / temperature;
  const VectorKernels& k = vector_kernels();
  at::parallel_for(0, rows, grain(vocab), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const float* row = x + i * stride;
      float* d = out + i * vocab;
      const bool ignored = target[i] == kIgnored;
      const double g = ignored ? 0.0 : g_logprob[i], h = g_lse[i];
      if (g == 0 && h == 0) {
        std::fill_n(d, vocab, 0.0f);
        continue;
      }
      k.row_softmax(row, d, vocab, shift[i], static_cast<float>(inv_t), log_sum_p[i],
                       static_cast<float>((h - g) * inv_t));
      if (!ignored) {
        // 1 - p without the cancellation where the model is sure
        const double logp = (static_cast<double>(row[target[i]]) - shift[i]) * inv_t - log_sum_p[i];
        d[target[i]] = static_cast<float>((h * std::exp(logp) - g * std::expm1(logp)) * inv_t);
      }
    }
  });
  return grad;
}

}  // namespace
}  // namespace gadcore

TORCH_LIBRARY_FRAGMENT(gadcore, m) {
  m.def("selected_logprob(Tensor logits, Tensor targets, float temperature) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "selected_logprob_backward(Tensor grad_logprob, Tensor grad_lse, Tensor logits, Tensor targets, "
      "Tensor row_max, Tensor log_sum, float temperature) -> Tensor");
}

TORCH_LIBRARY_IMPL(gadcore, CPU, m) {
  m.impl("selected_logprob", &gadcore::forward);
  m.impl("selected_logprob_backward", &gadcore::backward);
}
