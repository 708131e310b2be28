// cpu_linear_few_rows: x W^T + bias for up to 64 rows of x; cpu_adapted_few_rows: with adapters beside it (decoding.h).
// kernels/cpu/linear_few_rows.py
#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/zeros.h>
#include <c10/util/SmallVector.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>

#include "decoding.h"
#include "few_rows_tile.h"

namespace gadcore {
namespace {

using namespace few_rows;

#ifdef GADCORE_X86
// Columns of the result that are collected before they are written: whole cache lines, and a multiple of every C.
constexpr int64_t kColumns = 48;

GADCORE_AVX2 void block_avx2(const Product& p, int64_t n0, int64_t columns, float* out) {
  Kernel<8, 3>::block(p, n0, columns, out);
}
GADCORE_AVX512 void block_avx512(const Product& p, int64_t n0, int64_t columns, float* out) {
  Kernel<16, 6>::block(p, n0, columns, out);
}
GADCORE_AVX2 void block_wide(const Product& p, int64_t n0, int64_t columns, float* out) {
  Kernel<16, 6>::block(p, n0, columns, out);
}

GADCORE_AVX2 void add_avx2(const Up& up, int64_t first, int64_t columns, int64_t m, float* sums) {
  Kernel<8, 3>::add(up, first, columns, m, sums);
}
GADCORE_AVX512 void add_avx512(const Up& up, int64_t first, int64_t columns, int64_t m, float* sums) {
  Kernel<16, 6>::add(up, first, columns, m, sums);
}
GADCORE_AVX2 void add_wide(const Up& up, int64_t first, int64_t columns, int64_t m, float* sums) {
  Kernel<16, 6>::add(up, first, columns, m, sums);
}

struct Kernels {
  void (*block)(const Product& p, int64_t n0, int64_t columns, float* out);
  void (*add)(const Up& up, int64_t first, int64_t columns, int64_t m, float* sums);
};

// Null where torch's own product is the better choice.
const Kernels* kernels_of_level() {
  static constexpr Kernels avx2{block_avx2, add_avx2}, avx512{block_avx512, add_avx512}, wide{block_wide, add_wide};
  switch (level()) {
    case kAvx2:
      return &avx2;
    case kAvx512:
      return &avx512;
    case kWide:
      return &wide;
    default:
      return nullptr;
  }
}

// y[:, n0 ..) = collected^T + bias
void write(const float* collected, int64_t m, int64_t n, int64_t n0, int64_t columns, const float* bias, float* y) {
  int64_t c = 0;
  for (; c + 4 <= columns; c += 4) {
    const float* from = collected + c * kMaxRows;
    const __m128 b = bias ? _mm_loadu_ps(bias + n0 + c) : _mm_setzero_ps();
    for (int64_t r = 0; r < m; r += 4) {
      __m128 rows[4];
      for (int i = 0; i < 4; ++i) rows[i] = _mm_load_ps(from + i * kMaxRows + r);
      _MM_TRANSPOSE4_PS(rows[0], rows[1], rows[2], rows[3]);
      for (int64_t i = 0; i < std::min<int64_t>(4, m - r); ++i) {
        _mm_storeu_ps(y + (r + i) * n + n0 + c, _mm_add_ps(rows[i], b));
      }
    }
  }
  for (; c < columns; ++c) {
    for (int64_t r = 0; r < m; ++r) y[r * n + n0 + c] = collected[c * kMaxRows + r] + (bias ? bias[n0 + c] : 0.0f);
  }
}

// body(n0, columns) for pieces of n columns, on all threads. A thread is worth starting for about 20 microseconds of work.
template <class Body>
void over_columns(const Product& p, int64_t n, const Body& body) {
  const int64_t grain = std::max<int64_t>(1, (1 << 20) / (p.m * p.k * kColumns));
  at::parallel_for(0, (n + kColumns - 1) / kColumns, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) body(i * kColumns, std::min(kColumns, n - i * kColumns));
  });
}

// [sum of ranks, kMaxRows]: scale A x^T, and 0 for rows of x that there are not.
at::Tensor low_rank(const at::Tensor& x, const Adapters& adapters, const Kernels& kernels) {
  const int64_t m = x.size(0), k = x.size(1), ranks = adapters.down.size(0);
  const at::Tensor low = at::zeros({ranks, kMaxRows}, x.options());
  const Product p{x.const_data_ptr<float>(), adapters.down.const_data_ptr<float>(), k, k, m, k};
  float* out = low.data_ptr<float>();
  const float scale = static_cast<float>(adapters.scale);
  over_columns(p, ranks, [&](int64_t n0, int64_t columns) {
    kernels.block(p, n0, columns, out + n0 * kMaxRows);
    for (int64_t c = n0; c < n0 + columns; ++c) {
      for (int64_t r = 0; r < m; ++r) out[c * kMaxRows + r] *= scale;
    }
  });
  return low;
}

at::Tensor multiply(const at::Tensor& x_in, const at::Tensor& weight, const std::optional<at::Tensor>& bias_in,
                    const Adapters* adapters, const Kernels& kernels) {
  const int64_t m = x_in.size(0), k = x_in.size(1), n = weight.size(0);
  const at::Tensor x = x_in.contiguous(), bias = bias_in ? bias_in->contiguous() : at::Tensor();
  at::Tensor y = at::empty({m, n}, x.options());
  const Product p{x.const_data_ptr<float>(), weight.const_data_ptr<float>(), k, weight.stride(0), m, k};
  const float* b = bias.defined() ? bias.const_data_ptr<float>() : nullptr;
  float* out = y.data_ptr<float>();
  at::Tensor low;
  c10::SmallVector<Up, 3> ups;
  if (adapters) {
    low = low_rank(x, *adapters, kernels);
    const float* its = low.const_data_ptr<float>();
    for (size_t i = 0; i < adapters->ups.size(); ++i) {
      const at::Tensor& up = adapters->ups[i];
      ups.push_back({up.const_data_ptr<float>(), adapters->starts[i], up.size(0), up.size(1), its});
      its += up.size(1) * kMaxRows;
    }
  }
  over_columns(p, n, [&](int64_t n0, int64_t columns) {
    alignas(64) float collected[kColumns * kMaxRows];
    // The last vector of rows of x may be longer than they are.
    if (adapters && m % 16) std::fill_n(collected, columns * kMaxRows, 0.0f);
    kernels.block(p, n0, columns, collected);
    for (const Up& up : ups) {
      const int64_t begin = std::max(n0, up.start), end = std::min(n0 + columns, up.start + up.n);
      if (begin < end) kernels.add(up, begin - up.start, end - begin, m, collected + (begin - n0) * kMaxRows);
    }
    write(collected, m, n, n0, columns, b, out);
  });
  return y;
}

#endif

void check(const char* op, const Adapters& adapters, const at::Tensor& weight) {
  const at::Tensor& down = adapters.down;
  TORCH_CHECK(down.dim() == 2 && down.size(1) == weight.size(1) && down.scalar_type() == at::kFloat &&
                  down.is_contiguous(),
              op, ": A must be contiguous float32 [sum of ranks, ", weight.size(1), "], is ", down.scalar_type(), " ",
              down.sizes());
  TORCH_CHECK(adapters.ups.size() == adapters.starts.size(), op, ": takes as many starts as B, got ",
              adapters.starts.size(), " and ", adapters.ups.size());
  int64_t ranks = 0;
  for (size_t i = 0; i < adapters.ups.size(); ++i) {
    const at::Tensor& up = adapters.ups[i];
    const int64_t start = adapters.starts[i];
    TORCH_CHECK(up.dim() == 2 && up.scalar_type() == at::kFloat && up.is_contiguous(), op,
                ": B must be contiguous float32 [n, rank], is ", up.scalar_type(), " ", up.sizes());
    TORCH_CHECK(start >= 0 && start <= weight.size(0) - up.size(0), op, ": B ", up.sizes(), " from column ", start,
                " on does not fit ", weight.size(0), " columns");
    ranks += up.size(1);
  }
  TORCH_CHECK(ranks == down.size(0), op, ": A has ", down.size(0), " rows, and all B have ", ranks, " columns");
}

// y with what the adapters add, by torch.
void add_by_torch(const at::Tensor& x, const Adapters& adapters, at::Tensor& y) {
  const at::Tensor low = at::linear(x, adapters.down);
  int64_t column = 0;
  for (size_t i = 0; i < adapters.ups.size(); ++i) {
    const at::Tensor& up = adapters.ups[i];
    const at::Tensor its = low.narrow(1, column, up.size(1));
    y.narrow(1, adapters.starts[i], up.size(0)).addmm_(its, up.t(), 1, adapters.scale);
    column += up.size(1);
  }
}

}  // namespace

at::Tensor linear_few_rows(const at::Tensor& x_in, const at::Tensor& weight, const std::optional<at::Tensor>& bias_in,
                           const Adapters* adapters) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  const char* op = "cpu_linear_few_rows";
  TORCH_CHECK(x_in.dim() == 2 && x_in.scalar_type() == at::kFloat && x_in.size(0) >= 1 && x_in.size(0) <= kMaxRows, op,
              ": x must be float32 [M, K] with 1 <= M <= ", kMaxRows, ", is ", x_in.scalar_type(), " ", x_in.sizes());
  TORCH_CHECK(weight.dim() == 2 && weight.scalar_type() == at::kFloat && weight.size(1) == x_in.size(1), op,
              ": weight must be float32 [N, ", x_in.size(1), "], is ", weight.scalar_type(), " ", weight.sizes());
  TORCH_CHECK(!bias_in || (bias_in->dim() == 1 && bias_in->size(0) == weight.size(0) &&
                           bias_in->scalar_type() == at::kFloat),
              op, ": bias must be float32 [", weight.size(0), "]");
  if (adapters) check(op, *adapters, weight);
#ifdef GADCORE_X86
  const Kernels* kernels = kernels_of_level();
  if (kernels && weight.stride(1) == 1 && weight.size(1) > 0) {
    return multiply(x_in, weight, bias_in, adapters, *kernels);
  }
#endif
  at::Tensor y = at::linear(x_in, weight, bias_in);
  if (adapters) add_by_torch(x_in, *adapters, y);
  return y;
}

namespace {

at::Tensor plain(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias) {
  return linear_few_rows(x, weight, bias);
}

at::Tensor adapted(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                   const at::Tensor& down, at::TensorList ups, at::IntArrayRef starts, double scale) {
  const Adapters adapters{down, ups, starts, scale};
  return linear_few_rows(x, weight, bias, &adapters);
}

}  // namespace
}  // namespace gadcore

TORCH_LIBRARY_FRAGMENT(gadcore, m) {
  m.def("cpu_linear_few_rows(Tensor x, Tensor weight, Tensor? bias) -> Tensor");
  m.def(
      "cpu_adapted_few_rows(Tensor x, Tensor weight, Tensor? bias, Tensor down, Tensor[] ups, int[] starts, float "
      "scale) -> Tensor");
}

TORCH_LIBRARY_IMPL(gadcore, CPU, m) {
  m.impl("cpu_linear_few_rows", &gadcore::plain);
  m.impl("cpu_adapted_few_rows", &gadcore::adapted);
}
