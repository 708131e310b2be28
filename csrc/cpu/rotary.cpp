// cpu_rotary, forward and backward; kernels/rotary.py states the mathematics.
#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>

#include "vec.h"

namespace gadcore {
namespace {

using at::Tensor;

// Numbers for which a thread is worth starting.
constexpr int64_t kGrain = 16384;

struct Turn {
  const float *x, *cos, *sin;  // x [T, H, D] by its strides; cos, sin [T, D]
  float* y;                    // [T, H, D]
  int64_t token, head, heads, half;
  bool back;
};

template <int W>
struct Kernel {
  using V = Vec<W>;
  using F = typename V::F;

  template <class Load, class Store>
  static GADCORE_INLINE void part(const Turn& a, const float* x, const float* c, const float* s, float* y, Load load,
                                  Store store) {
    const int64_t h = a.half;
    const F low = load(x), high = load(x + h);
    // Backward turns the other way; each half of sin goes where its product came from.
    if (a.back) {
      store(y, low * load(c) + high * load(s + h));
      store(y + h, high * load(c + h) - low * load(s));
    } else {
      store(y, low * load(c) - high * load(s));
      store(y + h, high * load(c + h) + low * load(s + h));
    }
  }

  static GADCORE_INLINE void turn(const Turn& a, int64_t begin, int64_t end) {
    const int64_t width = 2 * a.half;
    for (int64_t t = begin; t < end; ++t) {
      const float *c = a.cos + t * width, *s = a.sin + t * width;
      for (int64_t h = 0; h < a.heads; ++h) {
        const float* x = a.x + t * a.token + h * a.head;
        float* y = a.y + (t * a.heads + h) * width;
        int64_t i = 0;
        for (; i + W <= a.half; i += W) {
          part(a, x + i, c + i, s + i, y + i, [](const float* p) GADCORE_LAMBDA { return V::load(p); },
               [](float* p, F v) GADCORE_LAMBDA { V::store(p, v); });
        }
        if (const int64_t rest = a.half - i; rest > 0) {
          part(a, x + i, c + i, s + i, y + i,
               [rest](const float* p) GADCORE_LAMBDA { return V::load_tail(p, rest, 0.0f); },
               [rest](float* p, F v) GADCORE_LAMBDA { V::store_tail(p, rest, v); });
        }
      }
    }
  }
};

#define GADCORE_ROTARY(target, name, width) \
  target void name##_turn(const Turn& a, int64_t b, int64_t e) { Kernel<width>::turn(a, b, e); }

GADCORE_ROTARY(, scalar, 1)
GADCORE_ROTARY(, baseline, kBaselineWidth)
#ifdef GADCORE_X86
GADCORE_ROTARY(GADCORE_AVX2, avx2, 8)
GADCORE_ROTARY(GADCORE_AVX512, avx512, 16)
GADCORE_ROTARY(GADCORE_AVX2, wide, 16)
#endif

using Rotate = void (*)(const Turn&, int64_t, int64_t);

Rotate kernel() {
  static const Rotate tables[kLevels] = {
      scalar_turn,
      baseline_turn,
#ifdef GADCORE_X86
      avx2_turn,
      avx512_turn,
      wide_turn,
#else
      baseline_turn,
      baseline_turn,
      baseline_turn,
#endif
  };
  return tables[level()];
}

Tensor rotary(const Tensor& x_in, const Tensor& cos_in, const Tensor& sin_in, bool back) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  const char* op = "cpu_rotary";
  TORCH_CHECK(x_in.dim() == 3 && x_in.size(2) % 2 == 0 && x_in.scalar_type() == at::kFloat, op,
              ": x must be float32 [T, H, D] with an even D, is ", x_in.scalar_type(), " ", x_in.sizes());
  const int64_t tokens = x_in.size(0), width = x_in.size(2);
  for (const Tensor& t : {cos_in, sin_in}) {
    TORCH_CHECK(t.scalar_type() == at::kFloat && t.sizes() == at::IntArrayRef({tokens, width}), op,
                ": cos and sin must be float32 [", tokens, ", ", width, "], one is ", t.scalar_type(), " ", t.sizes());
  }
  const Tensor x = x_in.stride(2) == 1 ? x_in : x_in.contiguous();
  const Tensor cos = cos_in.contiguous(), sin = sin_in.contiguous();
  Tensor y = at::empty(x.sizes(), x.options());
  const Turn a{x.const_data_ptr<float>(), cos.const_data_ptr<float>(), sin.const_data_ptr<float>(),
               y.data_ptr<float>(),       x.stride(0),                 x.stride(1),
               x.size(1),                 width / 2,                   back};
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, a.heads * width));
  const Rotate turn = kernel();
  at::parallel_for(0, tokens, grain, [&](int64_t begin, int64_t end) { turn(a, begin, end); });
  return y;
}

}  // namespace
}  // namespace gadcore

TORCH_LIBRARY_FRAGMENT(gadcore, m) {
  m.def("cpu_rotary(Tensor x, Tensor cos, Tensor sin, bool back) -> Tensor");
}

TORCH_LIBRARY_IMPL(gadcore, CPU, m) { m.impl("cpu_rotary", &gadcore::rotary); }
