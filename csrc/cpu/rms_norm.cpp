// cpu_rms_norm and its backward; kernels/rms_norm.py states the mathematics.
//
// One pass over memory each way, where the separate operations of a model file make five or more, each through tensors
// of the size of its input.
#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
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

struct Kernels {
  void (*norm)(const Norm&, int64_t begin, int64_t end);
  void (*norm_backward)(const Norm&, int64_t begin, int64_t end);
};

template <int W>
struct Loops {
  using V = Vec<W>;
  using F = typename V::F;

  static GADCORE_INLINE void norm(const Norm& a, int64_t begin, int64_t end) {
    const F shift = V::splat(a.shift);
    for (int64_t r = begin; r < end; ++r) {
      const float* x = a.x + r * a.width;
      float* y = a.y + r * a.width;
      F squares = V::splat(0.0f);
      V::over(a.width, [&](int64_t i, auto load, auto) GADCORE_LAMBDA {
        const F v = load(x + i);
        squares = squares + v * v;
      });
      const float rstd = 1.0f / std::sqrt(V::sum(squares) / static_cast<float>(a.width) + a.eps);
      a.rstd[r] = rstd;
      const F scale = V::splat(rstd);
      V::over(a.width, [&](int64_t i, auto load, auto store) GADCORE_LAMBDA {
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
        V::over(a.width, [&](int64_t i, auto load, auto store) GADCORE_LAMBDA {
          const F normed = load(x + i) * rstd, g = load(grad + i);
          dot = dot + normed * g * (load(a.weight + i) + shift);
          store(dweight + i, load(dweight + i) + normed * g);
        });
        const F mean = V::splat(V::sum(dot) / static_cast<float>(a.width));
        V::over(a.width, [&](int64_t i, auto load, auto store) GADCORE_LAMBDA {
          const F normed = load(x + i) * rstd;
          store(dx + i, rstd * (load(grad + i) * (load(a.weight + i) + shift) - normed * mean));
        });
      }
    }
  }
};

#define GADCORE_LEVEL(NAME, W, TARGET)                                                                  \
  namespace NAME {                                                                                      \
  TARGET void norm(const Norm& a, int64_t b, int64_t e) { Loops<W>::norm(a, b, e); }                    \
  TARGET void norm_backward(const Norm& a, int64_t b, int64_t e) { Loops<W>::norm_backward(a, b, e); }  \
  constexpr Kernels kTable = {norm, norm_backward};                                                     \
  }

GADCORE_LEVELS(GADCORE_LEVEL)

constexpr const Kernels* kTables[kLevels] = GADCORE_TABLES;

int64_t grain(int64_t width) { return std::max<int64_t>(1, kGrain / std::max<int64_t>(1, width)); }

std::tuple<Tensor, Tensor> rms_norm_backward(const Tensor& grad_in, const Tensor& x_in, const Tensor& weight_in,
                                             const Tensor& rstd, double shift) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  check_float32("cpu_rms_norm_backward", "grad", grad_in, x_in.sizes());
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
  const Kernels& k = *kTables[level()];
  at::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) { k.norm_backward(a, begin, end); });
  return {dx, parts.sum(0)};
}

}  // namespace

std::tuple<Tensor, Tensor> rms_norm(const Tensor& x_in, const Tensor& weight_in, double eps, double shift) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  TORCH_CHECK(x_in.dim() == 2, "cpu_rms_norm: x must be [T, H], is ", x_in.sizes());
  check_float32("cpu_rms_norm", "x", x_in, x_in.sizes());
  check_float32("cpu_rms_norm", "weight", weight_in, {x_in.size(1)});
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
  const Kernels& k = *kTables[level()];
  at::parallel_for(0, a.rows, grain(a.width), [&](int64_t begin, int64_t end) { k.norm(a, begin, end); });
  return {y, rstd};
}

}  // namespace gadcore

TORCH_LIBRARY_FRAGMENT(gadcore, m) {
  m.def("cpu_rms_norm(Tensor x, Tensor weight, float eps, float shift) -> (Tensor, Tensor)");
  m.def("cpu_rms_norm_backward(Tensor grad, Tensor x, Tensor weight, Tensor rstd, float shift) -> (Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(gadcore, CPU, m) {
  m.impl("cpu_rms_norm", &gadcore::rms_norm);
  m.impl("cpu_rms_norm_backward", &gadcore::rms_norm_backward);
}
