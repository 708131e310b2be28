// cpu_decode_layer: a layer of Llama's kind in a decoding step, one token of each request, in one call.
//
// What a step of a small model spends between its products, in Python and in the dispatcher, is as long as its
// attention. Norms, products, activation and attention are those of cpu_rms_norm, cpu_linear_few_rows, cpu_swiglu and
// cpu_decode_attention; rotation and the write into the cache are here.
//
// qkv: float32 [M, (Hq + 2 Hk) D], the rotated queries take the place of the queries. positions: int64 [M]. cos_sin:
// float32 [positions, D], cosines of the D / 2 angles and then their sines. kv_cache: float32 [N, Hk, B, 2 D] without
// gaps, as vLLM's CPU backend fills it: of a block and head first the keys as [D, B], then the values as [B, D]. slots:
// int64 [M], block * B + place, negative for what is not to be kept. Anything else is an error.
//
// Beside a product there may be adapters (decoding.h): queries, keys and values are one product with adapters of their
// own.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <tuple>

#include "decoding.h"

namespace gadcore {
namespace {

using at::Tensor;

void rotate_into_cache(Tensor& qkv, const Tensor& positions, const Tensor& cos_sin, Tensor& kv_cache,
                       const Tensor& slots) {
  const char* op = "cpu_decode_layer";
  TORCH_CHECK(kv_cache.dim() == 4 && kv_cache.scalar_type() == at::kFloat && kv_cache.is_contiguous() &&
                  kv_cache.size(1) > 0 && kv_cache.size(2) > 0 && kv_cache.size(3) > 0 && kv_cache.size(3) % 4 == 0,
              op, ": kv_cache must be contiguous float32 [N, Hk, B, 2 D] with an even D, is ", kv_cache.scalar_type(),
              " ", kv_cache.sizes());
  const int64_t heads = kv_cache.size(1), block = kv_cache.size(2), width = kv_cache.size(3) / 2, half = width / 2;
  const int64_t m = qkv.dim() == 2 ? qkv.size(0) : 0, key = qkv.dim() == 2 ? qkv.size(1) - 2 * heads * width : 0;
  TORCH_CHECK(qkv.dim() == 2 && qkv.scalar_type() == at::kFloat && qkv.is_contiguous() && key > 0 && key % width == 0,
              op, ": qkv must be contiguous float32 [M, (Hq + 2 * ", heads, ") * ", width, "], is ", qkv.scalar_type(),
              " ", qkv.sizes());
  for (const Tensor& x : {positions, slots}) {
    TORCH_CHECK(x.dim() == 1 && x.size(0) == m && x.scalar_type() == at::kLong && x.is_contiguous(), op,
                ": positions and slots must be contiguous int64 [", m, "], got ", x.scalar_type(), " ", x.sizes());
  }
  TORCH_CHECK(cos_sin.dim() == 2 && cos_sin.size(1) == width && cos_sin.scalar_type() == at::kFloat &&
                  cos_sin.is_contiguous(),
              op, ": cos_sin must be contiguous float32 [positions, ", width, "], is ", cos_sin.scalar_type(), " ",
              cos_sin.sizes());
  const int64_t *place = positions.const_data_ptr<int64_t>(), *slot = slots.const_data_ptr<int64_t>();
  const int64_t most = cos_sin.size(0), places = kv_cache.size(0) * block;
  for (int64_t r = 0; r < m; ++r) {
    TORCH_CHECK(place[r] >= 0 && place[r] < most, op, ": positions[", r, "] must be 0 to ", most - 1, ", is ",
                place[r]);
    TORCH_CHECK(slot[r] < places, op, ": slots[", r, "] must be below ", places, ", is ", slot[r]);
  }
  float *rows = qkv.data_ptr<float>(), *cache = kv_cache.data_ptr<float>();
  const float* angles = cos_sin.const_data_ptr<float>();
  for (int64_t r = 0; r < m; ++r) {
    float* row = rows + r * qkv.size(1);
    const float *cos = angles + place[r] * width, *sin = cos + half;
    // Queries and keys lie behind each other.
    for (float* x = row; x < row + key + heads * width; x += width) {
      for (int64_t d = 0; d < half; ++d) {
        const float a = x[d], b = x[half + d];
        x[d] = a * cos[d] - b * sin[d];
        x[half + d] = b * cos[d] + a * sin[d];
      }
    }
    if (slot[r] < 0) continue;
    const int64_t column = slot[r] % block;
    for (int64_t h = 0; h < heads; ++h) {
      float* to = cache + (slot[r] / block * heads + h) * 2 * block * width;
      const float *k = row + key + h * width, *v = k + heads * width;
      for (int64_t d = 0; d < width; ++d) to[d * block + column] = k[d];
      std::copy_n(v, width, to + (block + column) * width);
    }
  }
}

// Adapters of the four products. downs: A, where a product has some. ups: their B, product by product. starts: where
// each of them begins in y. scales: one a product.
struct OfProducts {
  const c10::List<std::optional<Tensor>>& downs;
  at::TensorList ups;
  at::IntArrayRef starts;
  at::ArrayRef<double> scales;
  size_t next = 0;

  // Of the products in their order: what stands beside product i.
  std::optional<Adapters> take(size_t i) {
    const std::optional<Tensor> down = downs.get(i);
    if (!down) return std::nullopt;
    const size_t first = next;
    for (int64_t column = 0; column < down->size(0); ++next) {
      TORCH_CHECK(next < ups.size(), "cpu_decode_layer: product ", i, " has a matrix A of ", down->size(0),
                  " rows and not as many columns of B");
      TORCH_CHECK(ups[next].dim() == 2 && ups[next].size(1) > 0, "cpu_decode_layer: B must be [N, rank], is ",
                  ups[next].sizes());
      column += ups[next].size(1);
    }
    return Adapters{*down, ups.slice(first, next - first), starts.slice(first, next - first), scales[i]};
  }
};

// weights: of the norm before the attention, of the queries, keys and values, of the attention's output, of the norm
// before the MLP, of gate and up, of down. biases: those of the four products.
std::tuple<Tensor, Tensor> decode_layer(const Tensor& hidden, const std::optional<Tensor>& residual,
                                        const Tensor& positions, const Tensor& cos_sin, at::TensorList weights,
                                        const c10::List<std::optional<Tensor>>& biases, double eps_before,
                                        double eps_after, Tensor& kv_cache, const Tensor& block_table,
                                        const Tensor& seq_lens, const Tensor& slots, double scale,
                                        const c10::List<std::optional<Tensor>>& downs, at::TensorList ups,
                                        at::IntArrayRef starts, at::ArrayRef<double> scales) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  TORCH_CHECK(weights.size() == 6 && biases.size() == 4, "cpu_decode_layer: takes 6 weights and 4 biases, got ",
              weights.size(), " and ", biases.size());
  TORCH_CHECK(downs.size() == 4 && scales.size() == 4 && ups.size() == starts.size(),
              "cpu_decode_layer: takes 4 A (or None), 4 scales and as many starts as B, got ", downs.size(), ", ",
              scales.size(), ", ", starts.size(), " and ", ups.size());
  OfProducts of_products{downs, ups, starts, scales};
  const auto product = [&](size_t i, const Tensor& x, const Tensor& weight) {
    const std::optional<Adapters> adapters = of_products.take(i);
    return linear_few_rows(x, weight, biases.get(i), adapters ? &*adapters : nullptr);
  };
  const Tensor total = residual ? hidden.add(*residual) : hidden;
  Tensor qkv = product(0, std::get<0>(rms_norm(total, weights[0], eps_before, 0.0)), weights[1]);
  rotate_into_cache(qkv, positions, cos_sin, kv_cache, slots);
  const int64_t blocks = kv_cache.size(0), heads = kv_cache.size(1), block = kv_cache.size(2);
  const int64_t width = kv_cache.size(3) / 2, m = qkv.size(0), query_heads = qkv.size(1) / width - 2 * heads;
  const Tensor query = qkv.narrow(1, 0, query_heads * width).unflatten(1, {query_heads, width});
  const Tensor cache = kv_cache.view({blocks, heads, 2 * block, width});
  const Tensor attended = at::empty({m, query_heads, width}, qkv.options());
  decode_attention(query, cache.narrow(2, 0, block), cache.narrow(2, block, block), block_table, seq_lens, scale,
                   attended);
  Tensor after = product(1, attended.view({m, -1}), weights[2]);
  after.add_(total);
  const Tensor both = product(2, std::get<0>(rms_norm(after, weights[3], eps_after, 0.0)), weights[4]);
  const int64_t inner = both.size(1) / 2;
  const Tensor activated = swiglu(both.narrow(1, 0, inner), both.narrow(1, inner, inner));
  const Tensor down = product(3, activated, weights[5]);
  TORCH_CHECK(of_products.next == ups.size(), "cpu_decode_layer: ", ups.size() - of_products.next,
              " matrices B stand beside no product");
  return {down, after};
}

}  // namespace
}  // namespace gadcore

TORCH_LIBRARY_FRAGMENT(gadcore, m) {
  m.def(
      "cpu_decode_layer(Tensor hidden, Tensor? residual, Tensor positions, Tensor cos_sin, Tensor[] weights, Tensor?[] "
      "biases, float eps_before, float eps_after, Tensor(a!) kv_cache, Tensor block_table, Tensor seq_lens, Tensor "
      "slots, float scale, Tensor?[] downs, Tensor[] ups, int[] starts, float[] scales) -> (Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(gadcore, CPU, m) { m.impl("cpu_decode_layer", &gadcore::decode_layer); }
