// cpu_sample: draws a token of every row by the inverse of its distribution's sum, and gives all log-probabilities.
//
// logits: float32 [M, V]; numbers: float32 [M], of [0, 1). tokens int64 [M]: the first v with
// sum_{w <= v} p_w > numbers, p = softmax(logits), and never one whose exp(logit - max) is 0. logprobs: float32 [M, V].
// Three passes over a row that lies in the cache. Anything else is an error.
#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <tuple>
#include <vector>

#include "vec.h"

namespace gadcore {
namespace {

using at::Tensor;

// Logits whose exponentials are summed in float32; what is drawn is looked for in one such segment.
constexpr int64_t kSegment = 1024;

template <int W>
struct Row {
  using V = Vec<W>;
  using F = typename V::F;

  static GADCORE_INLINE F tail(const float* z, int64_t n) { return V::load_tail(z, n, -kInf); }

  static GADCORE_INLINE float max(const float* z, int64_t n) {
    F most = V::splat(-kInf);
    int64_t i = 0;
    for (; i + W <= n; i += W) most = V::max(V::load(z + i), most);
    if (i < n) most = V::max(tail(z + i, n - i), most);
    return V::largest(most);
  }

  // e = exp(z - max) where e is not null. Returns the sum.
  static GADCORE_INLINE float exp(const float* z, int64_t n, float max, float* e) {
    const F shift = V::splat(max);
    F sum = V::splat(0.0f);
    int64_t i = 0;
    for (; i + W <= n; i += W) {
      const F x = V::exp_shifted(V::load(z + i) - shift);
      if (e) V::store(e + i, x);
      sum = sum + x;
    }
    if (i < n) {
      const F x = V::exp_shifted(tail(z + i, n - i) - shift);
      if (e) V::store_tail(e + i, n - i, x);
      sum = sum + x;
    }
    return V::sum(sum);
  }
};

struct Kernels {
  float (*max)(const float* z, int64_t n);
  float (*exp)(const float* z, int64_t n, float max, float* e);
};

#define GADCORE_LEVEL(NAME, W, TARGET)                                                  \
  namespace NAME {                                                                      \
  TARGET float max(const float* z, int64_t n) { return Row<W>::max(z, n); }             \
  TARGET float exp(const float* z, int64_t n, float m, float* e) {                      \
    return Row<W>::exp(z, n, m, e);                                                     \
  }                                                                                     \
  constexpr Kernels kTable = {max, exp};                                                \
  }

GADCORE_LEVELS(GADCORE_LEVEL)

constexpr const Kernels* kTables[kLevels] = GADCORE_TABLES;

// The token whose share of `sums`, of the segments of z [n], holds `number`. e: scratch [kSegment].
int64_t draw(const Kernels& k, const float* z, int64_t n, float max, const std::vector<float>& sums, double total,
             float number, float* e) {
  const double goal = number * total;
  double sum = 0.0;
  size_t s = 0;
  while (s + 1 < sums.size() && sum + sums[s] <= goal) sum += sums[s++];
  // Rounding may leave the goal above all sums: the last token that can be drawn is the next best.
  while (s > 0 && sums[s] == 0.0f) sum -= sums[--s];
  const int64_t begin = s * kSegment, count = std::min(kSegment, n - begin);
  k.exp(z + begin, count, max, e);
  int64_t last = begin;
  for (int64_t i = 0; i < count; ++i) {
    if (e[i] == 0.0f) continue;
    last = begin + i;
    sum += e[i];
    if (sum > goal) break;
  }
  return last;
}

std::tuple<Tensor, Tensor> sample(const Tensor& logits, const Tensor& numbers) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  TORCH_CHECK(logits.dim() == 2 && logits.size(1) > 0 && logits.scalar_type() == at::kFloat && logits.is_contiguous(),
              "cpu_sample: logits must be contiguous float32 [M, V], is ", logits.scalar_type(), " ", logits.sizes());
  const int64_t m = logits.size(0), n = logits.size(1);
  TORCH_CHECK(numbers.dim() == 1 && numbers.size(0) == m && numbers.scalar_type() == at::kFloat &&
                  numbers.is_contiguous(),
              "cpu_sample: numbers must be contiguous float32 [", m, "], is ", numbers.scalar_type(), " ",
              numbers.sizes());
  Tensor tokens = at::empty({m}, logits.options().dtype(at::kLong));
  Tensor logprobs = at::empty(logits.sizes(), logits.options());
  const float *z = logits.const_data_ptr<float>(), *u = numbers.const_data_ptr<float>();
  int64_t* token = tokens.data_ptr<int64_t>();
  float* out = logprobs.data_ptr<float>();
  const Kernels& k = *kTables[level()];
  at::parallel_for(0, m, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> sums((n + kSegment - 1) / kSegment), scratch(kSegment);
    for (int64_t r = begin; r < end; ++r) {
      const float *row = z + r * n, max = k.max(row, n);
      double total = 0.0;
      for (size_t s = 0; s < sums.size(); ++s) {
        const int64_t first = s * kSegment;
        sums[s] = k.exp(row + first, std::min(kSegment, n - first), max, nullptr);
        total += sums[s];
      }
      token[r] = draw(k, row, n, max, sums, total, u[r], scratch.data());
      const float log_total = static_cast<float>(std::log(total));
      float* logprob = out + r * n;
      for (int64_t i = 0; i < n; ++i) logprob[i] = (row[i] - max) - log_total;
    }
  });
  return {tokens, logprobs};
}

}  // namespace
}  // namespace gadcore

TORCH_LIBRARY_FRAGMENT(gadcore, m) { m.def("cpu_sample(Tensor logits, Tensor numbers) -> (Tensor, Tensor)"); }

TORCH_LIBRARY_IMPL(gadcore, CPU, m) { m.impl("cpu_sample", &gadcore::sample); }
