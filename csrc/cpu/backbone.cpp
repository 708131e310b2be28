// cpu_rms_norm and cpu_swiglu with their backward passes; kernels/rms_norm.py and kernels/swiglu.py state the mathematics.
//
// One pass over memory each way, where the separate operations of a model file make five or more, each through tensors
// of the size of its input.
#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <tuple>

#include "decoding.h"
#include "vec.h"

namespace gadcore {
namespace {

using at::Tensor;

// Rows whose share of the weight's gradient is summed in one go; fixed, so that the number of threads changes no bit.
constexpr int64_t kRows = 64;
// Numbers for which a thread is worth starting.
constexpr int64_t kGrain = 16384;

struct Norm {
  const float *x, *weight, *rstd_in, *grad;
  float *y, *rstd, *dx, *dweight;  // dweight [blocks of kRows, width]
  int64_t rows, width;
  float eps, shift;
};

template <int W>
struct Kernel {
  using V = Vec<W>;
  using F = typename V::F;

  template <class Body>
  static GADCORE_INLINE void over(int64_t n, Body body) {
    int64_t i = 0;
    for (; i + W <= n; i += W) body(i, [](const float* p) GADCORE_LAMBDA { return V::load(p); },
                                    [](float* p, F v) GADCORE_LAMBDA { V::store(p, v); });
    if (i < n) {
      const int64_t rest = n - i;
      body(i, [rest](const float* p) GADCORE_LAMBDA { return V::load_tail(p, rest, 0.0f); },
           [rest](float* p, F v) GADCORE_LAMBDA { V::store_tail(p, rest, v); });
    }
  }

  static GADCORE_INLINE void norm(const Norm& a, int64_t begin, int64_t end) {
    const F shift = V::splat(a.shift);
    for (int64_t r = begin; r < end; ++r) {
      const float* x = a.x + r * a.width;
      float* y = a.y + r * a.width;
      F squares = V::splat(0.0f);
      over(a.width, [&](int64_t i, auto load, auto) GADCORE_LAMBDA {
        const F v = load(x + i);
        squares = squares + v * v;
      });
      const float rstd = 1.0f / std::sqrt(V::sum(squares) / static_cast<float>(a.width) + a.eps);
      a.rstd[r] = rstd;
      const F scale = V::splat(rstd);
      over(a.width, [&](int64_t i, auto load, auto store) GADCORE_LAMBDA {
        store(y + i, load(x + i) * scale * (load(a.weight + i) + shift));
      });
    }
  }

  static GADCORE_INLINE void norm_backward(const Norm& a, int64_t begin, int64_t end) {
    const F shift = V::splat(a.shift);
    for (int64_t block = begin; block < end; ++block) {
      float* dweight = a.dweight + block * a.width;
      std::fill_n(dweight, a.width, 0.0f);
      for (int64_t r = block * kRows; r < std::min(a.rows, (block + 1) * kRows); ++r) {
        const float *x = a.x + r * a.width, *grad = a.grad + r * a.width;
        float* dx = a.dx + r * a.width;
        const F rstd = V::splat(a.rstd_in[r]);
        F dot = V::splat(0.0f);
        over(a.width, [&](int64_t i, auto load, auto store) GADCORE_LAMBDA {
          const F normed = load(x + i) * rstd, g = load(grad + i);
          dot = dot + normed * g * (load(a.weight + i) + shift);
          store(dweight + i, load(dweight + i) + normed * g);
        });
        const F mean = V::splat(V::sum(dot) / static_cast<float>(a.width));
        over(a.width, [&](int64_t i, auto load, auto store) GADCORE_LAMBDA {
          const F normed = load(x + i) * rstd;
          store(dx + i, rstd * (load(grad + i) * (load(a.weight + i) + shift) - normed * mean));
        });
      }
    }
  }

  static GADCORE_INLINE F sigmoid(F x) { return V::splat(1.0f) / (V::splat(1.0f) + V::exp(-x)); }

  static GADCORE_INLINE void swiglu(const float* gate, const float* up, float* y, int64_t n) {
    over(n, [&](int64_t i, auto load, auto store) GADCORE_LAMBDA {
      const F g = load(gate + i);
      store(y + i, g * sigmoid(g) * load(up + i));
    });
  }

  static GADCORE_INLINE void swiglu_backward(const float* grad, const float* gate, const float* up, float* dgate,
                                             float* dup, int64_t n) {
    const F one = V::splat(1.0f);
    over(n, [&](int64_t i, auto load, auto store) GADCORE_LAMBDA {
      const F d = load(grad + i), g = load(gate + i), s = sigmoid(g), silu = g * s;
      store(dup + i, d * silu);
      store(dgate + i, d * load(up + i) * (s + silu * (one - s)));
    });
  }
};

#define GADCORE_BACKBONE(target, name, width)                                                                      \
  target void name##_norm(const Norm& a, int64_t b, int64_t e) { Kernel<width>::norm(a, b, e); }                    \
  target void name##_norm_backward(const Norm& a, int64_t b, int64_t e) { Kernel<width>::norm_backward(a, b, e); }  \
  target void name##_swiglu(const float* g, const float* u, float* y, int64_t n) { Kernel<width>::swiglu(g, u, y, n); } \
  target void name##_swiglu_backward(const float* d, const float* g, const float* u, float* dg, float* du, int64_t n) { \
    Kernel<width>::swiglu_backward(d, g, u, dg, du, n);                                                             \
  }

GADCORE_BACKBONE(, scalar, 1)
GADCORE_BACKBONE(, baseline, kBaselineWidth)
#ifdef GADCORE_X86
GADCORE_BACKBONE(GADCORE_AVX2, avx2, 8)
GADCORE_BACKBONE(GADCORE_AVX512, avx512, 16)
GADCORE_BACKBONE(GADCORE_AVX2, wide, 16)
#endif

struct Kernels {
  void (*norm)(const Norm&, int64_t, int64_t);
  void (*norm_backward)(const Norm&, int64_t, int64_t);
  void (*swiglu)(const float*, const float*, float*, int64_t);
  void (*swiglu_backward)(const float*, const float*, const float*, float*, float*, int64_t);
};

#define GADCORE_TABLE(name) {name##_norm, name##_norm_backward, name##_swiglu, name##_swiglu_backward}

const Kernels& kernels() {
  static const Kernels tables[kLevels] = {
      GADCORE_TABLE(scalar),
      GADCORE_TABLE(baseline),
#ifdef GADCORE_X86
      GADCORE_TABLE(avx2),
      GADCORE_TABLE(avx512),
      GADCORE_TABLE(wide),
#else
      GADCORE_TABLE(baseline),
      GADCORE_TABLE(baseline),
      GADCORE_TABLE(baseline),
#endif
  };
  return tables[level()];
}

void check(const char* op, const char* name, const Tensor& t, at::IntArrayRef sizes) {
  TORCH_CHECK(t.scalar_type() == at::kFloat && t.sizes() == sizes, op, ": ", name, " must be float32 ", sizes, ", is ",
              t.scalar_type(), " ", t.sizes());
}

// A matrix with contiguous rows, not all of them next to each other.
bool is_rows(const Tensor& t) { return t.dim() == 2 && t.stride(1) == 1 && !t.is_contiguous(); }

int64_t grain(int64_t width) { return std::max<int64_t>(1, kGrain / std::max<int64_t>(1, width)); }

std::tuple<Tensor, Tensor> rms_norm_backward(const Tensor& grad_in, const Tensor& x_in, const Tensor& weight_in,
                                             const Tensor& rstd, double shift) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  check("cpu_rms_norm_backward", "grad", grad_in, x_in.sizes());
  const Tensor grad = grad_in.contiguous(), x = x_in.contiguous(), weight = weight_in.contiguous();
  const int64_t rows = x.size(0), width = x.size(1), blocks = (rows + kRows - 1) / kRows;
  Tensor dx = at::empty(x.sizes(), x.options()), parts = at::empty({blocks, width}, x.options());
  Norm a{};
  a.x = x.const_data_ptr<float>();
  a.weight = weight.const_data_ptr<float>();
  a.rstd_in = rstd.const_data_ptr<float>();
  a.grad = grad.const_data_ptr<float>();
  a.dx = dx.data_ptr<float>();
  a.dweight = parts.data_ptr<float>();
  a.rows = rows;
  a.width = width;
  a.shift = static_cast<float>(shift);
  const Kernels& k = kernels();
  at::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) { k.norm_backward(a, begin, end); });
  return {dx, parts.sum(0)};
}

// dgate and dup may be grad, or any other tensor whose numbers are not needed any more.
void swiglu_backward_into(const Tensor& grad, const Tensor& gate, const Tensor& up, Tensor& dgate, Tensor& dup) {
  const float *d = grad.const_data_ptr<float>(), *g = gate.const_data_ptr<float>(), *u = up.const_data_ptr<float>();
  float *dg = dgate.data_ptr<float>(), *du = dup.data_ptr<float>();
  const Kernels& k = kernels();
  at::parallel_for(0, gate.numel(), kGrain, [&](int64_t begin, int64_t end) {
    k.swiglu_backward(d + begin, g + begin, u + begin, dg + begin, du + begin, end - begin);
  });
}

std::tuple<Tensor, Tensor> swiglu_backward(const Tensor& grad_in, const Tensor& gate_in, const Tensor& up_in) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  check("cpu_swiglu_backward", "grad", grad_in, gate_in.sizes());
  const Tensor grad = grad_in.contiguous(), gate = gate_in.contiguous(), up = up_in.contiguous();
  Tensor dgate = at::empty(gate.sizes(), gate.options()), dup = at::empty(gate.sizes(), gate.options());
  swiglu_backward_into(grad, gate, up, dgate, dup);
  return {dgate, dup};
}

// The gradient of up takes the place of grad, that of gate the place of `other`.
void swiglu_backward_in_place(Tensor& grad, const Tensor& gate, const Tensor& up, Tensor& other) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  const char* op = "cpu_swiglu_backward_in_place";
  check(op, "grad", grad, gate.sizes());
  check(op, "up", up, gate.sizes());
  check(op, "other", other, gate.sizes());
  TORCH_CHECK(grad.is_contiguous() && gate.is_contiguous() && up.is_contiguous() && other.is_contiguous(), op,
              ": all tensors must be contiguous");
  swiglu_backward_into(grad, gate, up, other, grad);
}

}  // namespace

std::tuple<Tensor, Tensor> rms_norm(const Tensor& x_in, const Tensor& weight_in, double eps, double shift) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  TORCH_CHECK(x_in.dim() == 2, "cpu_rms_norm: x must be [T, H], is ", x_in.sizes());
  check("cpu_rms_norm", "x", x_in, x_in.sizes());
  check("cpu_rms_norm", "weight", weight_in, {x_in.size(1)});
  const Tensor x = x_in.contiguous(), weight = weight_in.contiguous();
  Tensor y = at::empty(x.sizes(), x.options()), rstd = at::empty({x.size(0)}, x.options());
  Norm a{};
  a.x = x.const_data_ptr<float>();
  a.weight = weight.const_data_ptr<float>();
  a.y = y.data_ptr<float>();
  a.rstd = rstd.data_ptr<float>();
  a.rows = x.size(0);
  a.width = x.size(1);
  a.eps = static_cast<float>(eps);
  a.shift = static_cast<float>(shift);
  const Kernels& k = kernels();
  at::parallel_for(0, a.rows, grain(a.width), [&](int64_t begin, int64_t end) { k.norm(a, begin, end); });
  return {y, rstd};
}

Tensor swiglu(const Tensor& gate_in, const Tensor& up_in) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  check("cpu_swiglu", "gate", gate_in, gate_in.sizes());
  check("cpu_swiglu", "up", up_in, gate_in.sizes());
  const Kernels& k = kernels();
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
  m.def("cpu_rms_norm(Tensor x, Tensor weight, float eps, float shift) -> (Tensor, Tensor)");
  m.def("cpu_rms_norm_backward(Tensor grad, Tensor x, Tensor weight, Tensor rstd, float shift) -> (Tensor, Tensor)");
  m.def("cpu_swiglu(Tensor gate, Tensor up) -> Tensor");
  m.def("cpu_swiglu_backward(Tensor grad, Tensor gate, Tensor up) -> (Tensor, Tensor)");
  m.def("cpu_swiglu_backward_in_place(Tensor(a!) grad, Tensor gate, Tensor up, Tensor(b!) other) -> ()");
}

TORCH_LIBRARY_IMPL(gadcore, CPU, m) {
  m.impl("cpu_rms_norm", &gadcore::rms_norm);
  m.impl("cpu_rms_norm_backward", &gadcore::rms_norm_backward);
  m.impl("cpu_swiglu", &gadcore::swiglu);
  m.impl("cpu_swiglu_backward", &gadcore::swiglu_backward);
  m.impl("cpu_swiglu_backward_in_place", &gadcore::swiglu_backward_in_place);
}
