// cpu_bt_score and its backward; kernels/bt_score.py states the mathematics.
#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

#include "vector_kernels.h"

namespace gadcore {
namespace {

using at::Tensor;

constexpr int64_t kColumns = 256;

void check(const char* op, const Tensor& hidden, const Tensor& last_index, const Tensor& weight) {
  TORCH_CHECK(hidden.dim() == 2 && hidden.is_floating_point(), op, ": hidden must be floating point [T, H], is ",
              hidden.scalar_type(), " ", hidden.sizes());
  TORCH_CHECK(weight.dim() == 1 && weight.size(0) == hidden.size(1) && weight.is_floating_point(), op,
              ": weight must be floating point [", hidden.size(1), "], is ", weight.scalar_type(), " ", weight.sizes());
  TORCH_CHECK(last_index.dim() == 1 && last_index.scalar_type() == at::kLong, op, ": last_index must be int64 [S], is ",
              last_index.scalar_type(), " ", last_index.sizes());
  const auto index = last_index.accessor<int64_t, 1>();
  for (int64_t s = 0; s < index.size(0); ++s) {
    TORCH_CHECK(index[s] >= 0 && index[s] < hidden.size(0), op, ": last_index[", s, "] is ", index[s], ", not in [0, ",
                hidden.size(0), ")");
  }
}

// The scored rows in float32, contiguous: few, whatever T.
Tensor last_rows(const Tensor& hidden, const Tensor& last_index) {
  return hidden.index_select(0, last_index).to(at::kFloat).contiguous();
}

// Sums of a block are float32, sums of blocks float64; every row goes through the same instructions.
double score_of(const VectorKernels& k, const float* row, const float* weight, int64_t width) {
  double sum = 0;
  for (int64_t i = 0; i < width; i += kColumns) sum += k.dot(row + i, weight + i, std::min(kColumns, width - i));
  return sum;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> forward(const Tensor& hidden, const Tensor& last_index,
                                                   const Tensor& weight_in, const std::optional<Tensor>& bias,
                                                   const Tensor& group_offsets, const Tensor& has_teacher) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  const char* op = "cpu_bt_score";
  check(op, hidden, last_index, weight_in);
  const int64_t sequences = last_index.size(0), width = hidden.size(1), groups = has_teacher.numel();
  TORCH_CHECK(!bias || (bias->numel() == 1 && bias->is_floating_point()), op, ": bias must be one number");
  TORCH_CHECK(has_teacher.dim() == 1 && has_teacher.scalar_type() == at::kBool, op, ": has_teacher must be bool [G]");
  TORCH_CHECK(group_offsets.dim() == 1 && group_offsets.size(0) == groups + 1 &&
                  group_offsets.scalar_type() == at::kLong,
              op, ": group_offsets must be int64 [", groups + 1, "]");
  const auto offset = group_offsets.accessor<int64_t, 1>();
  const auto taught = has_teacher.accessor<bool, 1>();
  TORCH_CHECK(offset[0] == 0 && offset[groups] == sequences, op, ": group_offsets must run from 0 to ", sequences);
  for (int64_t g = 0; g < groups; ++g) {
    TORCH_CHECK(offset[g] <= offset[g + 1], op, ": group_offsets must not fall, does at ", g);
  }

  const Tensor rows = last_rows(hidden, last_index), weight = weight_in.to(at::kFloat).contiguous();
  const double b = bias ? bias->item().toDouble() : 0.0;
  const auto options = rows.options();
  Tensor scores = at::empty({sequences}, options), pair_loss = at::zeros({sequences}, options);
  Tensor margin = at::zeros({sequences}, options), slope = at::zeros({sequences}, options);
  const float *x = rows.const_data_ptr<float>(), *w = weight.const_data_ptr<float>();
  float *score = scores.data_ptr<float>(), *loss_p = pair_loss.data_ptr<float>();
  float *margin_p = margin.data_ptr<float>(), *slope_p = slope.data_ptr<float>();
  const VectorKernels& k = vector_kernels();
  at::parallel_for(0, sequences, std::max<int64_t>(1, 32768 / std::max<int64_t>(width, 1)),
                   [&](int64_t begin, int64_t end) {
                     for (int64_t s = begin; s < end; ++s) {
                       score[s] = static_cast<float>(score_of(k, x + s * width, w, width) + b);
                     }
                   });
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t teacher = offset[g];
    if (!taught[g] || teacher == offset[g + 1]) continue;
    double teacher_slope = 0;
    for (int64_t s = teacher + 1; s < offset[g + 1]; ++s) {
      const double d = static_cast<double>(score[teacher]) - score[s];
      const double small = std::exp(-std::abs(d)), sigmoid = (d > 0 ? small : 1.0) / (1.0 + small);
      margin_p[s] = static_cast<float>(d);
      loss_p[s] = static_cast<float>(std::max(-d, 0.0) + std::log1p(small));
      slope_p[s] = static_cast<float>(sigmoid);
      teacher_slope -= sigmoid;
    }
    slope_p[teacher] = static_cast<float>(teacher_slope);
  }
  return {scores, pair_loss, margin, slope};
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad_in, const Tensor& hidden, const Tensor& last_index,
                                            const Tensor& weight_in) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  const char* op = "cpu_bt_score_backward";
  check(op, hidden, last_index, weight_in);
  const int64_t sequences = last_index.size(0), width = hidden.size(1);
  TORCH_CHECK(grad_in.dim() == 1 && grad_in.size(0) == sequences && grad_in.scalar_type() == at::kFloat, op,
              ": grad_scores must be float32 [", sequences, "], is ", grad_in.scalar_type(), " ", grad_in.sizes());
  const Tensor rows = last_rows(hidden, last_index), weight = weight_in.to(at::kFloat).contiguous(), grad = grad_in.contiguous();
  const float *g = grad.const_data_ptr<float>(), *x = rows.const_data_ptr<float>();
  // Summed before anything is rounded to hidden's dtype: a row that several sequences end in adds them up.
  std::vector<double> row_grad(hidden.size(0), 0.0);
  const auto index = last_index.accessor<int64_t, 1>();
  for (int64_t s = 0; s < sequences; ++s) row_grad[index[s]] += g[s];
  Tensor d_rows = at::empty(rows.sizes(), rows.options());
  const float* w = weight.const_data_ptr<float>();
  float* d_rows_p = d_rows.data_ptr<float>();
  for (int64_t s = 0; s < sequences; ++s) {
    const float factor = static_cast<float>(row_grad[index[s]]);
    for (int64_t j = 0; j < width; ++j) d_rows_p[s * width + j] = factor * w[j];
  }
  const Tensor d_hidden =
      at::zeros(hidden.sizes(), hidden.options()).index_copy_(0, last_index, d_rows.to(hidden.scalar_type()));
  Tensor d_weight = at::empty({width}, weight.options());
  float* d_weight_p = d_weight.data_ptr<float>();
  at::parallel_for(0, (width + kColumns - 1) / kColumns, 1, [&](int64_t begin, int64_t end) {
    std::vector<double> sum(kColumns);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t from = i * kColumns, n = std::min(kColumns, width - from);
      std::fill(sum.begin(), sum.end(), 0.0);
      for (int64_t s = 0; s < sequences; ++s) {
        for (int64_t j = 0; j < n; ++j) sum[j] += static_cast<double>(g[s]) * x[s * width + from + j];
      }
      std::copy_n(sum.begin(), n, d_weight_p + from);
    }
  });
  double d_bias = 0;
  for (int64_t s = 0; s < sequences; ++s) d_bias += g[s];
  Tensor bias = at::empty({}, grad.options());
  *bias.data_ptr<float>() = static_cast<float>(d_bias);
  return {d_hidden, d_weight.to(weight_in.scalar_type()), bias};
}

}  // namespace
}  // namespace gadcore

TORCH_LIBRARY_FRAGMENT(gadcore, m) {
  m.def(
      "cpu_bt_score(Tensor hidden, Tensor last_index, Tensor weight, Tensor? bias, Tensor group_offsets, "
      "Tensor has_teacher) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "cpu_bt_score_backward(Tensor grad_scores, Tensor hidden, Tensor last_index, Tensor weight) "
      "-> (Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(gadcore, CPU, m) {
  m.impl("cpu_bt_score", &gadcore::forward);
  m.impl("cpu_bt_score_backward", &gadcore::backward);
}
