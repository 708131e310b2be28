// selected_logprob and its backward for float32 on the CPU; kernels/selected_logprob.py states the mathematics.
//
// One pass over a row: blocks that stay in the L1 cache, each shifted by the largest logit so far. Sums of a block are
// float32, sums of blocks are float64. The shift works on the raw logits, so large logits lose no digits to lse.
#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>
#include <tuple>

#if defined(__x86_64__) && defined(__GNUC__)
#define GADCORE_AVX2 1
#include <immintrin.h>
#define TARGET_AVX2 __attribute__((target("avx2,fma")))
#endif

namespace {

constexpr int64_t kIgnored = -100;
constexpr int64_t kBlock = 1024;
constexpr float kInf = std::numeric_limits<float>::infinity();

struct RowSum {
  float max;
  double sum;  // of exp((x - max) / T)
};

using BlockMax = float (*)(const float* x, int64_t n);
// sum of exp((x - shift) / T)
using BlockSum = double (*)(const float* x, int64_t n, float shift, float inv_t);
// out = scale * exp((x - shift) / T - log_sum)
using ScaledSoftmax = void (*)(
    const float* x, float* out, int64_t n, float shift, float inv_t, float log_sum, float scale);

float block_max_scalar(const float* x, int64_t n) {
  float m = -kInf;
  for (int64_t i = 0; i < n; ++i) m = x[i] > m ? x[i] : m;
  return m;
}

double block_sum_scalar(const float* x, int64_t n, float shift, float inv_t) {
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += std::exp((x[i] - shift) * inv_t);
  return sum;
}

void scaled_softmax_scalar(
    const float* x, float* out, int64_t n, float shift, float inv_t, float log_sum, float scale) {
  for (int64_t i = 0; i < n; ++i) out[i] = scale * std::exp((x[i] - shift) * inv_t - log_sum);
}

#ifdef GADCORE_AVX2

// exp(x) for x <= 0 (and a little above), below 2 ulp; exactly 0 under the smallest normal number, NaN for NaN.
// Cephes: x = n log 2 + r, |r| <= log(2) / 2, exp(r) by a polynomial.
TARGET_AVX2 inline __m256 exp8(__m256 x) {
  const __m256 lowest = _mm256_set1_ps(-87.3f);
  const __m256 vanishes = _mm256_cmp_ps(x, lowest, _CMP_LT_OQ);
  x = _mm256_max_ps(lowest, x);  // in this order NaN stays NaN
  const __m256 n =
      _mm256_round_ps(_mm256_mul_ps(x, _mm256_set1_ps(1.44269504f)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  __m256 r = _mm256_fnmadd_ps(n, _mm256_set1_ps(0.693359375f), x);
  r = _mm256_fnmadd_ps(n, _mm256_set1_ps(-2.12194440e-4f), r);
  __m256 p = _mm256_set1_ps(1.9875691500e-4f);
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.3981999507e-3f));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(8.3334519073e-3f));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(4.1665795894e-2f));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.6666665459e-1f));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(5.0000001201e-1f));
  p = _mm256_fmadd_ps(p, _mm256_mul_ps(r, r), _mm256_add_ps(r, _mm256_set1_ps(1.0f)));
  const __m256i bits = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
  return _mm256_andnot_ps(vanishes, _mm256_mul_ps(p, _mm256_castsi256_ps(bits)));
}

// The last n < 8 numbers, filled up with -inf, whose exponential is 0.
TARGET_AVX2 inline __m256 load_tail(const float* x, int64_t n) {
  alignas(32) float buffer[8];
  std::fill_n(std::copy_n(x, n, buffer), 8 - n, -kInf);
  return _mm256_load_ps(buffer);
}

TARGET_AVX2 inline __m256 shifted(__m256 x, __m256 shift, __m256 inv_t) {
  return _mm256_mul_ps(_mm256_sub_ps(x, shift), inv_t);
}

TARGET_AVX2 float block_max_avx2(const float* x, int64_t n) {
  __m256 m0 = _mm256_set1_ps(-kInf), m1 = m0;
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    m0 = _mm256_max_ps(_mm256_loadu_ps(x + i), m0);
    m1 = _mm256_max_ps(_mm256_loadu_ps(x + i + 8), m1);
  }
  m0 = _mm256_max_ps(m0, m1);
  for (; i + 8 <= n; i += 8) m0 = _mm256_max_ps(_mm256_loadu_ps(x + i), m0);
  if (i < n) m0 = _mm256_max_ps(load_tail(x + i, n - i), m0);
  alignas(32) float lanes[8];
  _mm256_store_ps(lanes, m0);
  return *std::max_element(lanes, lanes + 8);
}

TARGET_AVX2 double block_sum_avx2(const float* x, int64_t n, float shift, float inv_t) {
  const __m256 s = _mm256_set1_ps(shift), t = _mm256_set1_ps(inv_t);
  __m256 a0 = _mm256_setzero_ps(), a1 = a0;
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    a0 = _mm256_add_ps(a0, exp8(shifted(_mm256_loadu_ps(x + i), s, t)));
    a1 = _mm256_add_ps(a1, exp8(shifted(_mm256_loadu_ps(x + i + 8), s, t)));
  }
  for (; i + 8 <= n; i += 8) a0 = _mm256_add_ps(a0, exp8(shifted(_mm256_loadu_ps(x + i), s, t)));
  if (i < n) a1 = _mm256_add_ps(a1, exp8(shifted(load_tail(x + i, n - i), s, t)));
  alignas(32) float lanes[16];
  _mm256_store_ps(lanes, a0);
  _mm256_store_ps(lanes + 8, a1);
  double sum = 0;
  for (float lane : lanes) sum += lane;
  return sum;
}

TARGET_AVX2 void scaled_softmax_avx2(
    const float* x, float* out, int64_t n, float shift, float inv_t, float log_sum, float scale) {
  const __m256 s = _mm256_set1_ps(shift), t = _mm256_set1_ps(inv_t);
  const __m256 l = _mm256_set1_ps(log_sum), c = _mm256_set1_ps(scale);
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    const __m256 y = _mm256_fmsub_ps(_mm256_sub_ps(_mm256_loadu_ps(x + i), s), t, l);
    _mm256_storeu_ps(out + i, _mm256_mul_ps(c, exp8(y)));
  }
  if (i < n) {
    alignas(32) float lanes[8];
    const __m256 y = _mm256_fmsub_ps(_mm256_sub_ps(load_tail(x + i, n - i), s), t, l);
    _mm256_store_ps(lanes, _mm256_mul_ps(c, exp8(y)));
    std::copy_n(lanes, n - i, out + i);
  }
}

#endif

struct Kernels {
  BlockMax block_max = block_max_scalar;
  BlockSum block_sum = block_sum_scalar;
  ScaledSoftmax scaled_softmax = scaled_softmax_scalar;
};

// torch's own choice, so that ATEN_CPU_CAPABILITY=default means the same here.
const Kernels& kernels() {
  static const Kernels chosen = [] {
    Kernels k;
#ifdef GADCORE_AVX2
    const std::string capability = at::get_cpu_capability();
    if (capability.rfind("AVX2", 0) == 0 || capability.rfind("AVX512", 0) == 0) {
      k = {block_max_avx2, block_sum_avx2, scaled_softmax_avx2};
    }
#endif
    return k;
  }();
  return chosen;
}

RowSum row_sum(const Kernels& k, const float* x, int64_t n, float inv_t) {
  RowSum row{-kInf, 0};
  for (int64_t start = 0; start < n; start += kBlock) {
    const int64_t length = std::min(kBlock, n - start);
    const float m = k.block_max(x + start, length);
    if (m > row.max) {
      row.sum *= std::exp((static_cast<double>(row.max) - m) * inv_t);
      row.max = m;
    }
    // Nothing but -inf so far: any finite shift will do, -inf itself would make NaN.
    row.sum += k.block_sum(x + start, length, row.max == -kInf ? 0.0f : row.max, inv_t);
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
  const Kernels& k = kernels();
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
  const Kernels& k = kernels();
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
      k.scaled_softmax(row, d, vocab, shift[i], static_cast<float>(inv_t), log_sum_p[i],
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

TORCH_LIBRARY_FRAGMENT(gadcore, m) {
  m.def("selected_logprob(Tensor logits, Tensor targets, float temperature) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "selected_logprob_backward(Tensor grad_logprob, Tensor grad_lse, Tensor logits, Tensor targets, "
      "Tensor row_max, Tensor log_sum, float temperature) -> Tensor");
}

TORCH_LIBRARY_IMPL(gadcore, CPU, m) {
  m.impl("selected_logprob", &forward);
  m.impl("selected_logprob_backward", &backward);
}
