// cpu_swiglu and its backward; kernels/cpu/swiglu.py states the mathematics.
//
// One pass over memory each way, where the separate operations of a model file make five or more, each through tensors
// of the size of its input.
#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <tuple>

#include "decoding.h"
#include "vec.h"

namespace gadcore {
namespace {

using at::Tensor;

// Numbers for which a thread is worth starting.
constexpr int64_t kGrain = 16384;

struct Kernels {
  void (*swiglu)(const float* gate, const float* up, float* y, int64_t n);
  void (*swiglu_backward)(const float* grad, const float* gate, const float* up, float* dgate, float* dup, int64_t n);
};

template <int W>
struct Loops {
  using V = Vec<W>;
  using F = typename V::F;

  static GADCORE_INLINE F sigmoid(F x) { return V::splat(1.0f) / (V::splat(1.0f) + V::exp(-x)); }

  static GADCORE_INLINE void swiglu(const float* gate, const float* up, float* y, int64_t n) {
    V::over(n, [&](int64_t i, auto load, auto store) GADCORE_LAMBDA {
      const F g = load(gate + i);
      store(y + i, g * sigmoid(g) * load(up + i));
    });
  }

  static GADCORE_INLINE void swiglu_backward(const float* grad, const float* gate, const float* up, float* dgate,
                                             float* dup, int64_t n) {
    const F one = V::splat(1.0f);
    V::over(n, [&](int64_t i, auto load, auto store) GADCORE_LAMBDA {
      const F d = load(grad + i), g = load(gate + i), s = sigmoid(g), silu = g * s;
      store(dup + i, d * silu);
      store(dgate + i, d * load(up + i) * (s + silu * (one - s)));
    });
  }
};

#define GADCORE_LEVEL(NAME, W, TARGET)                                                                                    \
  namespace NAME {                                                                                                        \
  TARGET void swiglu(const float* g, const float* u, float* y, int64_t n) { Loops<W>::swiglu(g, u, y, n); }               \
  TARGET void swiglu_backward(const float* d, const float* g, const float* u, float* dg, float* du, int64_t n) {          \
    Loops<W>::swiglu_backward(d, g, u, dg, du, n);                                                                        \
  }                                                                                                                       \
  constexpr Kernels kTable = {swiglu, swiglu_backward};                                                                   \
  }

GADCORE_LEVELS(GADCORE_LEVEL)

constexpr const Kernels* kTables[kLevels] = GADCORE_TABLES;

// A matrix with contiguous rows, not all of them next to each other.
bool is_rows(const Tensor& t) { return t.dim() == 2 && t.stride(1) == 1 && !t.is_contiguous(); }

int64_t grain(int64_t width) { return std::max<int64_t>(1, kGrain / std::max<int64_t>(1, width)); }

// dgate and dup may be grad, or any other tensor whose numbers are not needed any more.
void swiglu_backward_into(const Tensor& grad, const Tensor& gate, const Tensor& up, Tensor& dgate, Tensor& dup) {
  const float *d = grad.const_data_ptr<float>(), *g = gate.const_data_ptr<float>(), *u = up.const_data_ptr<float>();
  float *dg = dgate.data_ptr<float>(), *du = dup.data_ptr<float>();
  const Kernels& k = *kTables[level()];
  at::parallel_for(0, gate.numel(), kGrain, [&](int64_t begin, int64_t end) {
    k.swiglu_backward(d + begin, g + begin, u + begin, dg + begin, du + begin, end - begin);
  });
}

std::tuple<Tensor, Tensor> swiglu_backward(const Tensor& grad_in, const Tensor& gate_in, const Tensor& up_in) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  check_float32("cpu_swiglu_backward", "grad", grad_in, gate_in.sizes());
  const Tensor grad = grad_in.contiguous(), gate = gate_in.contiguous(), up = up_in.contiguous();
  Tensor dgate = at::empty(gate.sizes(), gate.options()), dup = at::empty(gate.sizes(), gate.options());
  swiglu_backward_into(grad, gate, up, dgate, dup);
  return {dgate, dup};
}

// The gradient of up takes the place of grad, that of gate the place of `other`.
void swiglu_backward_in_place(Tensor& grad, const Tensor& gate, const Tensor& up, Tensor& other) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  const char* op = "cpu_swiglu_backward_in_place";
  check_float32(op, "grad", grad, gate.sizes());
  check_float32(op, "up", up, gate.sizes());
  check_float32(op, "other", other, gate.sizes());
  TORCH_CHECK(grad.is_contiguous() && gate.is_contiguous() && up.is_contiguous() && other.is_contiguous(), op,
              ": all tensors must be contiguous");
  swiglu_backward_into(grad, gate, up, other, grad);
}

}  // namespace

Tensor swiglu(const Tensor& gate_in, const Tensor& up_in) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  check_float32("cpu_swiglu", "gate", gate_in, gate_in.sizes());
  check_float32("cpu_swiglu", "up", up_in, gate_in.sizes());
  const Kernels& k = *kTables[level()];
  if (is_rows(gate_in) && is_rows(up_in)) {
    // Halves of one tensor, without a copy.
    Tensor y = at::empty(gate_in.sizes(), gate_in.options());
    const int64_t width = y.size(1), g_row = gate_in.stride(0), u_row = up_in.stride(0);
    const float *g = gate_in.const_data_ptr<float>(), *u = up_in.const_data_ptr<float>();
    float* out = y.data_ptr<float>();
    at::parallel_for(0, y.size(0), grain(width), [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) k.swiglu(g + r * g_row, u + r * u_row, out + r * width, width);
    });
    return y;
  }
  const Tensor gate = gate_in.contiguous(), up = up_in.contiguous();
  Tensor y = at::empty(gate.sizes(), gate.options());
  const float *g = gate.const_data_ptr<float>(), *u = up.const_data_ptr<float>();
  float* out = y.data_ptr<float>();
  at::parallel_for(0, gate.numel(), kGrain,
                   [&](int64_t begin, int64_t end) { k.swiglu(g + begin, u + begin, out + begin, end - begin); });
  return y;
}

}  // namespace gadcore

TORCH_LIBRARY_FRAGMENT(gadcore, m) {
  m.def("cpu_swiglu(Tensor gate, Tensor up) -> Tensor");
  m.def("cpu_swiglu_backward(Tensor grad, Tensor gate, Tensor up) -> (Tensor, Tensor)");
  m.def("cpu_swiglu_backward_in_place(Tensor(a!) grad, Tensor gate, Tensor up, Tensor(b!) other) -> ()");
}

TORCH_LIBRARY_IMPL(gadcore, CPU, m) {
  m.impl("cpu_swiglu", &gadcore::swiglu);
  m.impl("cpu_swiglu_backward", &gadcore::swiglu_backward);
  m.impl("cpu_swiglu_backward_in_place", &gadcore::swiglu_backward_in_place);
}
