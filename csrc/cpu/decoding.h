// The ops that cpu_decode_layer is made of, under the names of their files, and a check that some of them share.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

namespace gadcore {

inline void check_float32(const char* op, const char* name, const at::Tensor& t, at::IntArrayRef sizes) {
  TORCH_CHECK(t.scalar_type() == at::kFloat && t.sizes() == sizes, op, ": ", name, " must be float32 ", sizes, ", is ",
              t.scalar_type(), " ", t.sizes());
}

// Adapters beside a product with W [N, K]: y[:, start : start + n] += scale (x A^T) B^T for every B [n, rank]. down: the A
// of all, one matrix [sum of ranks, K]. ups, starts: their B in the same order, and where each begins in y.
struct Adapters {
  at::Tensor down;
  at::TensorList ups;
  at::IntArrayRef starts;
  double scale;
};

at::Tensor linear_few_rows(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                           const Adapters* adapters = nullptr);

std::tuple<at::Tensor, at::Tensor> rms_norm(const at::Tensor& x, const at::Tensor& weight, double eps, double shift);

// gate, up: [rows, width], or both one tensor's halves.
at::Tensor swiglu(const at::Tensor& gate, const at::Tensor& up);

void decode_attention(const at::Tensor& query, const at::Tensor& key_cache, const at::Tensor& value_cache,
                      const at::Tensor& block_table, const at::Tensor& seq_lens, double scale, const at::Tensor& out);

}  // namespace gadcore
