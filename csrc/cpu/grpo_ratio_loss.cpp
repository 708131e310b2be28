// cpu_grpo_ratio_loss; kernels/grpo_ratio_loss.py states the mathematics, vector_kernels.cpp computes it.
#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <optional>

#include "head.h"

namespace gadcore {
namespace {

using at::Tensor;

// A multiple of every vector width, so that the threads' shares begin where one thread's vectors would.
constexpr int64_t kShare = 4096;

Tensor grpo_ratio_loss(const Tensor& logprob_in, const Tensor& advantages_in, const std::optional<Tensor>& ref_in,
                       const std::optional<Tensor>& old_in, double clip_low, double clip_high, double kl_coef) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  const char* op = "cpu_grpo_ratio_loss";
  const int64_t n = logprob_in.numel();
  check_vector(op, "logprob", logprob_in, n);
  check_vector(op, "advantages", advantages_in, n);
  if (ref_in) check_vector(op, "ref_logprob", *ref_in, n);
  if (old_in) check_vector(op, "old_logprob", *old_in, n);
  const Tensor logprob = logprob_in.contiguous(), advantages = advantages_in.contiguous();
  const Tensor ref = ref_in ? ref_in->contiguous() : Tensor(), old = old_in ? old_in->contiguous() : Tensor();
  Tensor stats = at::empty({5, n}, logprob.options());
  float* out = stats.data_ptr<float>();
  const RatioLoss job{logprob.const_data_ptr<float>(),
                      advantages.const_data_ptr<float>(),
                      ref.defined() ? ref.const_data_ptr<float>() : nullptr,
                      old.defined() ? old.const_data_ptr<float>() : nullptr,
                      static_cast<float>(clip_low),
                      static_cast<float>(clip_high),
                      static_cast<float>(kl_coef),
                      out,
                      out + n,
                      out + 2 * n,
                      out + 3 * n,
                      out + 4 * n};
  const VectorKernels& k = vector_kernels();
  at::parallel_for(0, (n + kShare - 1) / kShare, 4, [&](int64_t begin, int64_t end) {
    k.ratio_loss(job, begin * kShare, std::min(end * kShare, n));
  });
  return stats;
}

}  // namespace
}  // namespace gadcore

TORCH_LIBRARY_FRAGMENT(gadcore, m) {
  m.def(
      "cpu_grpo_ratio_loss(Tensor logprob, Tensor advantages, Tensor? ref_logprob, Tensor? old_logprob, "
      "float clip_low, float clip_high, float kl_coef) -> Tensor");
}

TORCH_LIBRARY_IMPL(gadcore, CPU, m) { m.impl("cpu_grpo_ratio_loss", &gadcore::grpo_ratio_loss); }
