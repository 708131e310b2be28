// add_product(), and the gradients of weights that kernels/cpu/linear.py calls.
//
// Blocks of b, [kDepth, kWidth], are copied into panels of kPanel columns, which stay in the L2 cache; strips of kRows rows
// of a, [kRows, kDepth], into L1. A tile of kRows by kPanel sums is then kept in registers over all of kDepth.
#include "product.h"

#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>

#include "vec.h"

namespace gadcore {
namespace {

constexpr int kLanes = 16, kVectors = 4, kRows = 6;
constexpr int64_t kPanel = kLanes * kVectors;
constexpr int64_t kDepth = 208, kWidth = 12 * kPanel;

struct Block {
  const float* panels;  // of kPanel columns and `depth` rows each
  int64_t depth, columns;
  float* out;
  int64_t stride;
  bool add;
};

// out [R, kPanel] (+)= a b; a: [depth, kRows], b: [depth, kPanel]
template <int R>
GADCORE_INLINE void tile(const float* a, const float* b, int64_t depth, float* out, int64_t stride, bool add) {
  using V = Vec<kLanes>;
  typename V::F sum[R][kVectors];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      sum[r][v] = V::splat(0.0f);
      __builtin_prefetch(out + r * stride + v * kLanes, 1);
    }
  }
  for (int64_t k = 0; k < depth; ++k, a += kRows, b += kPanel) {
    typename V::F column[kVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) column[v] = V::load(b + v * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      // A scalar operand: one broadcast from memory.
      const float x = a[r];
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) sum[r][v] = sum[r][v] + x * column[v];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      float* o = out + r * stride + v * kLanes;
      V::store(o, add ? V::load(o) + sum[r][v] : sum[r][v]);
    }
  }
}

template <int R>
GADCORE_INLINE void strip(const float* a, const Block& b, float* out) {
  int64_t n = 0;
  for (; n + kPanel <= b.columns; n += kPanel) {
    tile<R>(a, b.panels + n * b.depth, b.depth, out + n, b.stride, b.add);
  }
  if (n == b.columns) return;
  float last[kRows * kPanel];
  tile<R>(a, b.panels + n * b.depth, b.depth, last, kPanel, false);
  for (int64_t r = 0; r < R; ++r) {
    float* o = out + r * b.stride;
    for (int64_t c = n; c < b.columns; ++c) o[c] = (b.add ? o[c] : 0.0f) + last[r * kPanel + c - n];
  }
}

// Rows [0, rows) of out; a: [depth, kRows], of which `rows` columns count.
GADCORE_INLINE void rows(const float* a, int64_t rows, const Block& b, float* out) {
  switch (rows) {
    case 6:
      return strip<6>(a, b, out);
    case 5:
      return strip<5>(a, b, out);
    case 4:
      return strip<4>(a, b, out);
    case 3:
      return strip<3>(a, b, out);
    case 2:
      return strip<2>(a, b, out);
    default:
      return strip<1>(a, b, out);
  }
}

using Rows = void (*)(const float* a, int64_t rows, const Block& b, float* out);

#ifdef GADCORE_X86
GADCORE_AVX512 void rows_avx512(const float* a, int64_t n, const Block& b, float* out) { rows(a, n, b, out); }
GADCORE_AVX2 void rows_wide(const float* a, int64_t n, const Block& b, float* out) { rows(a, n, b, out); }
#endif

// Null where torch's own product is the better choice.
Rows rows_kernel() {
#ifdef GADCORE_X86
  if (level() == kAvx512) return rows_avx512;
  if (level() == kWide) return rows_wide;
#endif
  return nullptr;
}

void copy_panels(const float* b, int64_t stride, int64_t depth, int64_t columns, float* panels) {
  const int64_t count = (columns + kPanel - 1) / kPanel;
  at::parallel_for(0, count, 1 + (1 << 15) / (depth * kPanel), [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      const int64_t width = std::min(kPanel, columns - p * kPanel);
      for (int64_t k = 0; k < depth; ++k) {
        const float* from = b + k * stride + p * kPanel;
        float* to = panels + (p * depth + k) * kPanel;
        std::copy_n(from, width, to);
        std::fill(to + width, to + kPanel, 0.0f);
      }
    }
  });
}

void copy_strip(const float* a, int64_t row_stride, int64_t column_stride, int64_t rows, int64_t depth, float* strip) {
  if (rows == kRows && row_stride == 1) {
    // Not copy_n: GCC calls memmove for these 24 bytes.
    for (int64_t k = 0; k < depth; ++k) std::memcpy(strip + k * kRows, a + k * column_stride, kRows * sizeof(float));
    return;
  }
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t k = 0; k < depth; ++k) strip[k * kRows + r] = a[r * row_stride + k * column_stride];
  }
}

void check(const char* op, const at::Tensor& grad, const at::Tensor& x) {
  TORCH_CHECK(grad.dim() == 2 && grad.scalar_type() == at::kFloat, op, ": grad must be float32 [T, N], is ",
              grad.scalar_type(), " ", grad.sizes());
  TORCH_CHECK(x.dim() == 2 && x.scalar_type() == at::kFloat && x.size(0) == grad.size(0), op, ": x must be float32 [",
              grad.size(0), ", K], is ", x.scalar_type(), " ", x.sizes());
}

at::Tensor weight_gradient(const at::Tensor& grad, const at::Tensor& x) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  check("cpu_weight_gradient", grad, x);
  if (!product_is_ours() || x.size(0) == 0) return at::mm(grad.t(), x);
  at::Tensor out = at::empty({grad.size(1), x.size(1)}, x.options());
  add_product(out, grad.t(), x.stride(1) == 1 ? x : x.contiguous(), false);
  return out;
}

void add_weight_gradient(at::Tensor& into, const at::Tensor& grad, const at::Tensor& x) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  check("cpu_add_weight_gradient", grad, x);
  TORCH_CHECK(into.scalar_type() == at::kFloat && into.sizes() == at::IntArrayRef({grad.size(1), x.size(1)}),
              "cpu_add_weight_gradient: into must be float32 [", grad.size(1), ", ", x.size(1), "], is ",
              into.scalar_type(), " ", into.sizes());
  if (x.size(0) == 0) return;
  if (product_is_ours() && into.stride(1) == 1) {
    add_product(into, grad.t(), x.stride(1) == 1 ? x : x.contiguous(), true);
  } else {
    into.addmm_(grad.t(), x);
  }
}

}  // namespace

bool product_is_ours() { return rows_kernel() != nullptr; }

void add_product(at::Tensor& out, const at::Tensor& a, const at::Tensor& b, bool add) {
  const Rows kernel = rows_kernel();
  const int64_t m = a.size(0), k = a.size(1), n = b.size(1);
  const float *a_data = a.const_data_ptr<float>(), *b_data = b.const_data_ptr<float>();
  float* out_data = out.data_ptr<float>();
  const int64_t panels = (std::min(n, kWidth) + kPanel - 1) / kPanel;
  const at::Tensor memory = at::empty({panels * kPanel * std::min(k, kDepth)}, out.options());
  float* copied = memory.data_ptr<float>();
  for (int64_t n0 = 0; n0 < n; n0 += kWidth) {
    for (int64_t k0 = 0; k0 < k; k0 += kDepth) {
      const Block block{copied, std::min(kDepth, k - k0), std::min(kWidth, n - n0), out_data + n0, out.stride(0),
                        add || k0 > 0};
      copy_panels(b_data + k0 * b.stride(0) + n0, b.stride(0), block.depth, block.columns, copied);
      // A thread is worth starting for about 20 microseconds of work.
      const int64_t grain = 1 + (1 << 20) / (kRows * block.depth * block.columns);
      at::parallel_for(0, (m + kRows - 1) / kRows, grain, [&](int64_t begin, int64_t end) {
        alignas(64) float strip[kDepth * kRows] = {};
        for (int64_t i = begin * kRows; i < std::min(end * kRows, m); i += kRows) {
          const int64_t count = std::min<int64_t>(kRows, m - i);
          copy_strip(a_data + i * a.stride(0) + k0 * a.stride(1), a.stride(0), a.stride(1), count, block.depth, strip);
          kernel(strip, count, block, block.out + i * block.stride);
        }
      });
    }
  }
}

}  // namespace gadcore

TORCH_LIBRARY_FRAGMENT(gadcore, m) {
  m.def("cpu_weight_gradient(Tensor grad, Tensor x) -> Tensor");
  m.def("cpu_add_weight_gradient(Tensor(a!) into, Tensor grad, Tensor x) -> ()");
}

TORCH_LIBRARY_IMPL(gadcore, CPU, m) {
  m.impl("cpu_weight_gradient", &gadcore::weight_gradient);
  m.impl("cpu_add_weight_gradient", &gadcore::add_weight_gradient);
}
