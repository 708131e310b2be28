// cpu_decode_attention: one query token per request against a paged cache; blocks that requests share are read once.
//
// Requests that begin with the same blocks, the samples of a prompt, go through those together: a small product instead
// of one pass over memory for each. Every row, a query head of a request, takes its keys in their own order, 32 at a
// time, with a running maximum and sum, and the rows of a product do not see each other: what a row is computed beside,
// and on which thread, changes no bit.
//
// query and out: float32 [M, Hq, D]. key_cache and value_cache: float32 [N, Hk, B, D] as vLLM's CPU backend fills them,
// which stores the keys of a block and head as [D, B] and the values as [B, D]. block_table: int32 [M, blocks], whose
// row m lists the blocks of the first seq_lens[m] tokens, int32 [M]. B and D are multiples of 32. Anything else is an
// error.
#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "decoding.h"
#include "product_tile.h"

namespace gadcore {
namespace {

using at::Tensor;

// Keys that are taken in at a time; divides the blocks of every cache, and panels divide it.
constexpr int64_t kKeys = 32;

// Keys and values of at most kKeys tokens: keys [width, block] of which the first `count` columns are seen, values
// [count, width].
struct Piece {
  const float *keys, *values;
  int64_t block, count;
};

// Rows with their running softmax, all without gaps: x, scaled queries, and out are [count, width], max is [count], and
// sum has kKeys places a row, one for each lane.
struct Rows {
  int64_t count, width;
  float *x, *max, *sum, *out;

  Rows from(int64_t r) const { return {count - r, width, x + r * width, max + r, sum + r * kKeys, out + r * width}; }
};

template <int W>
struct Decode {
  using V = Vec<W>;
  using F = typename V::F;
  using P = ProductTile<W>;
  static_assert(kKeys % P::kPanel == 0);

  // scores [kKeys] of row r -> exp(scores - max), once max and what was summed have followed them.
  static GADCORE_INLINE void softmax(const Rows& rows, int64_t r, float* scores) {
    const float before = rows.max[r];
    F most = V::splat(before);
    for (int64_t i = 0; i < kKeys; i += W) most = V::max(V::load(scores + i), most);
    const float now = V::largest(most);
    // Nothing but -inf so far: any finite shift will do, -inf itself would make NaN.
    const F shift = V::splat(now == -kInf ? 0.0f : now);
    F sum = V::load(rows.sum + r * kKeys);
    if (now != before) {
      const F factor = V::exp_shifted(V::splat(before) - shift);
      float* out = rows.out + r * rows.width;
      for (int64_t i = 0; i < rows.width; i += W) V::store(out + i, V::load(out + i) * factor);
      sum = sum * factor;
      rows.max[r] = now;
    }
    for (int64_t i = 0; i < kKeys; i += W) {
      const F e = V::exp_shifted(V::load(scores + i) - shift);
      V::store(scores + i, e);
      sum = sum + e;
    }
    V::store(rows.sum + r * kKeys, sum);
  }

  // Asks for a strip's share of `bytes` from `begin` on, a little with every step of a product: so the memory is busy
  // while the strip computes, and the strip does not wait for a queue of requests.
  struct Prefetch {
    // A step of W lanes pays for so many lines.
    static constexpr int kLines = W < 8 ? 1 : W / 8;
    const char* next;
    int64_t step, apart;

    Prefetch(const float* begin, int64_t bytes, int64_t strip, int64_t strips, int64_t steps)
        : next(reinterpret_cast<const char*>(begin) + bytes / kLines * strip / strips),
          step(bytes / kLines / strips / steps),
          apart(bytes / kLines) {}

    GADCORE_INLINE void operator()() {
#ifdef __GNUC__
      // Into L2: L1 is full of what is being computed.
      for (int i = 0; i < kLines; ++i) __builtin_prefetch(next + i * apart, 0, 2);
#endif
      next += step;
    }
  };

  static GADCORE_INLINE void attend(const Rows& all, const Piece& piece, const Piece& next) {
    float scores[kTile * kKeys];
    const int64_t width = all.width, strips = (all.count + kTile - 1) / kTile;
    for (int64_t s = 0; s < strips; ++s) {
      const Rows rows = all.from(s * kTile);
      const int64_t n = std::min(kTile, rows.count);
      Prefetch keys(next.keys, 4 * kKeys * width, s, strips, width * (kKeys / P::kPanel));
      for (int64_t j = 0; j < piece.count; j += P::kPanel) {
        P::template of<false, false>(n, rows.x, width, piece.keys + j, piece.block, width, scores + j, kKeys, keys);
      }
      for (int64_t r = 0; r < n; ++r) {
        float* row = scores + r * kKeys;
        std::fill(row + piece.count, row + kKeys, -kInf);
        softmax(rows, r, row);
      }
      Prefetch values(next.values, 4 * next.count * width, s, strips, piece.count * (width / P::kPanel));
      for (int64_t d = 0; d < width; d += P::kPanel) {
        P::template of<true, false>(n, scores, kKeys, piece.values + d, width, piece.count, rows.out + d, width,
                                    values);
      }
    }
  }

  static GADCORE_INLINE float sum(const float* lanes) { return V::sum(V::load(lanes)); }
};

struct Kernels {
  void (*attend)(const Rows& rows, const Piece& piece, const Piece& next);
  float (*sum)(const float* lanes);
};

#define GADCORE_LEVEL(NAME, W, TARGET)                                                                                 \
  namespace NAME {                                                                                                     \
  TARGET void attend(const Rows& rows, const Piece& piece, const Piece& next) {                                        \
    Decode<W>::attend(rows, piece, next);                                                                              \
  }                                                                                                                    \
  TARGET float sum(const float* lanes) { return Decode<W>::sum(lanes); }                                               \
  constexpr Kernels kTable = {attend, sum};                                                                            \
  }

GADCORE_LEVELS(GADCORE_LEVEL)

constexpr const Kernels* kTables[kLevels] = GADCORE_TABLES;

// A request: its place in the batch, its keys, and how many of its blocks are full.
struct Request {
  int64_t place, keys, full;
  const int32_t* blocks;
};

// In the order of their full blocks, so that requests that begin alike stand together.
std::vector<Request> sorted_requests(const char* op, const Tensor& block_table, const Tensor& seq_lens, int64_t block,
                                     int64_t blocks_of_cache) {
  const int32_t *table = block_table.const_data_ptr<int32_t>(), *keys = seq_lens.const_data_ptr<int32_t>();
  const int64_t stride = block_table.stride(0), most = block_table.size(1) * block;
  std::vector<Request> requests;
  for (int64_t i = 0; i < seq_lens.size(0); ++i) {
    TORCH_CHECK(keys[i] >= 1 && keys[i] <= most, op, ": seq_lens[", i, "] must be 1 to ", most, ", is ", keys[i]);
    const Request r{i, keys[i], keys[i] / block, table + i * stride};
    for (int64_t j = 0; j * block < r.keys; ++j) {
      TORCH_CHECK(r.blocks[j] >= 0 && r.blocks[j] < blocks_of_cache, op, ": block_table[", i, ", ", j,
                  "] must be 0 to ", blocks_of_cache - 1, ", is ", r.blocks[j]);
    }
    requests.push_back(r);
  }
  std::stable_sort(requests.begin(), requests.end(), [](const Request& a, const Request& b) {
    return std::lexicographical_compare(a.blocks, a.blocks + a.full, b.blocks, b.blocks + b.full);
  });
  return requests;
}

// Requests [first, last) of a sorted run against `keys` keys of a block, from `from` on.
struct Step {
  int64_t first, last, block, from, keys;
};

void add_steps(const Request* requests, int64_t first, int64_t last, int64_t begin, int64_t end, int64_t block,
               std::vector<Step>& steps) {
  for (int64_t i = begin; i < end; i += kKeys) {
    steps.push_back({first, last, requests[first].blocks[i / block], i % block, std::min(kKeys, end - i)});
  }
}

// The way of requests [first, last), which share their first `depth` blocks, from there to their ends.
void plan(const Request* requests, int64_t first, int64_t last, int64_t depth, int64_t block,
          std::vector<Step>& steps) {
  const Request &one = requests[first], &other = requests[last - 1];
  if (last - first == 1) return add_steps(requests, first, last, depth * block, one.keys, block, steps);
  // What the first and the last of a sorted run have in common, all have.
  const int64_t most = std::min(one.full, other.full);
  int64_t common = depth;
  while (common < most && one.blocks[common] == other.blocks[common]) ++common;
  add_steps(requests, first, last, depth * block, common * block, block, steps);
  for (int64_t next; first < last; first = next) {
    next = first + 1;
    if (requests[first].full > common) {
      while (next < last && requests[next].blocks[common] == requests[first].blocks[common]) ++next;
    }
    plan(requests, first, next, common, block, steps);
  }
}

struct Cache {
  const float *keys, *values;
  int64_t key_block, key_head, value_block, value_head, block, width;

  Piece at(const Step& s, int64_t head) const {
    return {keys + s.block * key_block + head * key_head + s.from,
            values + s.block * value_block + head * value_head + s.from * width, block, s.keys};
  }
};

}  // namespace

void decode_attention(const Tensor& query, const Tensor& key_cache, const Tensor& value_cache,
                      const Tensor& block_table, const Tensor& seq_lens, double scale, const Tensor& out) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  const char* op = "cpu_decode_attention";
  TORCH_CHECK(query.dim() == 3 && query.scalar_type() == at::kFloat && query.stride(2) == 1 && query.size(2) > 0 &&
                  query.size(2) % kKeys == 0,
              op, ": query must be float32 [M, Hq, D] with D a multiple of ", kKeys, " and contiguous, is ",
              query.scalar_type(), " ", query.sizes());
  const int64_t m = query.size(0), query_heads = query.size(1), width = query.size(2);
  for (const Tensor& x : {key_cache, value_cache}) {
    TORCH_CHECK(x.dim() == 4 && x.scalar_type() == at::kFloat && x.sizes() == key_cache.sizes() && x.size(1) > 0 &&
                    x.size(2) > 0 && x.size(2) % kKeys == 0 && x.size(3) == width && x.stride(3) == 1 &&
                    x.stride(2) == width,
                op, ": key_cache and value_cache must be float32 [N, Hk, B, ", width, "] with B a multiple of ", kKeys,
                " and heads of a block without gaps, got ", x.scalar_type(), " ", x.sizes());
  }
  const int64_t key_heads = key_cache.size(1), block = key_cache.size(2);
  TORCH_CHECK(query_heads > 0 && query_heads % key_heads == 0, op, ": ", key_heads, " key heads do not divide ",
              query_heads, " query heads");
  TORCH_CHECK(block_table.dim() == 2 && block_table.size(0) == m && block_table.scalar_type() == at::kInt &&
                  (block_table.stride(1) == 1 || block_table.size(1) <= 1),
              op, ": block_table must be int32 [", m, ", blocks] with contiguous rows, is ", block_table.scalar_type(),
              " ", block_table.sizes());
  TORCH_CHECK(seq_lens.dim() == 1 && seq_lens.size(0) == m && seq_lens.scalar_type() == at::kInt &&
                  seq_lens.is_contiguous(),
              op, ": seq_lens must be contiguous int32 [", m, "], is ", seq_lens.scalar_type(), " ", seq_lens.sizes());
  TORCH_CHECK(out.sizes() == query.sizes() && out.scalar_type() == at::kFloat && out.stride(2) == 1, op,
              ": out must be float32 ", query.sizes(), ", is ", out.scalar_type(), " ", out.sizes());
  if (m == 0) return;

  const std::vector<Request> requests = sorted_requests(op, block_table, seq_lens, block, key_cache.size(0));
  const Cache cache{key_cache.const_data_ptr<float>(),
                    value_cache.const_data_ptr<float>(),
                    key_cache.stride(0),
                    key_cache.stride(1),
                    value_cache.stride(0),
                    value_cache.stride(1),
                    block,
                    width};
  const Kernels& kernels = *kTables[level()];
  const float* q = query.const_data_ptr<float>();
  float* o = out.data_ptr<float>();
  const int64_t q_row = query.stride(0), q_head = query.stride(1), o_row = out.stride(0), o_head = out.stride(1);
  const int64_t shared = query_heads / key_heads;
  const float factor = static_cast<float>(scale);
  // Requests stand behind each other, for one key head after the other, as long as their keys: threads get equal
  // lengths, and a group that lies on both sides of a cut is read by both threads.
  std::vector<int64_t> start;
  int64_t length = 0;
  for (const Request& r : requests) {
    start.push_back(length);
    length += r.keys;
  }
  // A thread is worth starting for about 20 microseconds of work.
  const int64_t grain = std::max<int64_t>(1, (1 << 18) / (shared * width));

  at::parallel_for(0, key_heads * length, grain, [&](int64_t from, int64_t to) {
    std::vector<float> memory;
    std::vector<Step> steps;
    for (int64_t head = from / length; head * length < to; ++head) {
      const auto place = [&](int64_t at) {
        return std::lower_bound(start.begin(), start.end(), at - head * length) - start.begin();
      };
      const int64_t first = place(from), count = place(to) - first, n = count * shared;
      memory.assign(n * (2 * width + kKeys), 0.0f);
      std::vector<float> max(n, -kInf);
      const Rows rows{n, width, memory.data(), max.data(), memory.data() + n * 2 * width, memory.data() + n * width};
      for (int64_t r = 0; r < n; ++r) {
        const float* row = q + requests[first + r / shared].place * q_row + (head * shared + r % shared) * q_head;
        for (int64_t d = 0; d < width; ++d) rows.x[r * width + d] = factor * row[d];
      }
      steps.clear();
      if (count > 0) plan(requests.data() + first, 0, count, 0, block, steps);
      for (size_t i = 0; i < steps.size(); ++i) {
        Rows some = rows.from(steps[i].first * shared);
        some.count = (steps[i].last - steps[i].first) * shared;
        const Piece piece = cache.at(steps[i], head);
        const bool last_of_head = i + 1 == steps.size(), last_of_all = last_of_head && (head + 1) * length >= to;
        kernels.attend(some, piece,
                       last_of_all ? piece : cache.at(steps[last_of_head ? 0 : i + 1], head + last_of_head));
      }
      for (int64_t r = 0; r < n; ++r) {
        float* row = o + requests[first + r / shared].place * o_row + (head * shared + r % shared) * o_head;
        const float whole = 1.0f / kernels.sum(rows.sum + r * kKeys);
        for (int64_t d = 0; d < width; ++d) row[d] = whole * rows.out[r * width + d];
      }
    }
  });
}

}  // namespace gadcore

TORCH_LIBRARY_FRAGMENT(gadcore, m) {
  m.def(
      "cpu_decode_attention(Tensor query, Tensor key_cache, Tensor value_cache, Tensor block_table, Tensor seq_lens, "
      "float scale, Tensor(a!) out) -> ()");
}

TORCH_LIBRARY_IMPL(gadcore, CPU, m) { m.impl("cpu_decode_attention", &gadcore::decode_attention); }
