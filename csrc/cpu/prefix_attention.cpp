// cpu_prefix_attention and its backward; kernels/prefix_attention.py states the mathematics.
//
// One task is one key head of one group. It packs the keys and values of the group once, then takes blocks of rows, a
// row being a query head of a token, against blocks of keys; gradients of keys and values are summed inside the task,
// segment after segment. Keys are cut into blocks from the beginning of the prompt and from that of the segment, so a
// response's bits do not depend on other responses, on its place among them or on the threads.
#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/core/impl/alloc_cpu.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <tuple>
#include <vector>

#include "prefix_tiles.h"
#include "vector_kernels.h"

namespace gadcore {
namespace {

using at::Tensor;

// Rows of a block, as far as whole tokens give so many.
constexpr int64_t kRows = 96;

int64_t blocks_of(int64_t n, int64_t unit) { return (n + unit - 1) / unit; }

struct Free {
  void operator()(float* memory) const { c10::free_cpu(memory); }
};

// Scratch of one thread, on cache lines.
class Scratch {
 public:
  explicit Scratch(int64_t n) : memory_(static_cast<float*>(c10::alloc_cpu(std::max<int64_t>(n, 1) * sizeof(float)))) {}
  operator float*() const { return memory_.get(); }

 private:
  std::unique_ptr<float, Free> memory_;
};

// A [T, heads, width] tensor whose rows of `width` numbers are contiguous.
template <class T>
struct Heads {
  T* data;
  int64_t token, head;

  T* at(int64_t t, int64_t h) const { return data + t * token + h * head; }
};

Heads<const float> read(const Tensor& x) { return {x.const_data_ptr<float>(), x.stride(0), x.stride(1)}; }
Heads<float> write(const Tensor& x) { return {x.data_ptr<float>(), x.stride(0), x.stride(1)}; }

Tensor with_unit_stride(const Tensor& x) { return x.stride(2) == 1 || x.size(2) == 1 ? x : x.contiguous(); }

struct Segment {
  int64_t begin, length;
};

// A prompt and its responses.
struct Group {
  std::vector<Segment> segments;

  int64_t begin() const { return segments.front().begin; }
  int64_t prompt() const { return segments.front().length; }
  int64_t tokens() const { return segments.back().begin + segments.back().length - begin(); }
  int64_t key_panels(int64_t panel) const {
    int64_t n = 0;
    for (const Segment& s : segments) n += blocks_of(s.length, panel);
    return n;
  }
};

std::vector<Group> groups_of(const char* op, const Tensor& offsets, const Tensor& prompt_of, int64_t tokens) {
  TORCH_CHECK(prompt_of.dim() == 1 && prompt_of.scalar_type() == at::kLong, op, ": prompt_of must be int64 [K], is ",
              prompt_of.scalar_type(), " ", prompt_of.sizes());
  const int64_t n = prompt_of.size(0);
  TORCH_CHECK(offsets.dim() == 1 && offsets.size(0) == n + 1 && offsets.scalar_type() == at::kLong, op,
              ": offsets must be int64 [", n + 1, "], is ", offsets.scalar_type(), " ", offsets.sizes());
  const auto offset = offsets.accessor<int64_t, 1>(), prompt = prompt_of.accessor<int64_t, 1>();
  TORCH_CHECK(offset[0] == 0 && offset[n] == tokens, op, ": offsets must run from 0 to ", tokens);
  std::vector<Group> groups;
  int64_t last_prompt = -1;
  for (int64_t k = 0; k < n; ++k) {
    TORCH_CHECK(offset[k] < offset[k + 1], op, ": segment ", k, " has no tokens");
    if (prompt[k] == k) {
      groups.emplace_back();
      last_prompt = k;
    }
    TORCH_CHECK(last_prompt >= 0 && prompt[k] == last_prompt, op, ": the prompt of segment ", k, " is ", prompt[k],
                ", must be itself or the last prompt before it, ", last_prompt);
    groups.back().segments.push_back({offset[k], offset[k + 1] - offset[k]});
  }
  return groups;
}

struct Job {
  const PrefixKernels& k;
  std::vector<Group> groups;
  // Query heads, key heads, query heads of a key head, width of a head, the same in panels, tokens of a block of rows.
  int64_t query_heads, key_heads, shared, width, panels, block_tokens;
  float scale;
  int64_t window;

  int64_t rows() const { return block_tokens * shared; }
  // Width of a head in whole panels.
  int64_t padded() const { return panels * k.panel; }
  int64_t most_tokens() const {
    int64_t most = 0;
    for (const Group& g : groups) most = std::max(most, g.tokens());
    return most;
  }
  int64_t most_key_panels() const {
    int64_t most = 0;
    for (const Group& g : groups) most = std::max(most, g.key_panels(k.panel));
    return most;
  }
};

Job make_job(const char* op, const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& offsets,
             const Tensor& prompt_of, double scale, int64_t window) {
  TORCH_CHECK(query.dim() == 3 && query.scalar_type() == at::kFloat && query.size(2) > 0, op,
              ": query must be float32 [T, Hq, D], is ", query.scalar_type(), " ", query.sizes());
  for (const Tensor& x : {key, value}) {
    TORCH_CHECK(x.dim() == 3 && x.scalar_type() == at::kFloat && x.size(0) == query.size(0) && x.size(1) > 0 &&
                    x.size(1) == key.size(1) && x.size(2) == query.size(2),
                op, ": key and value must be float32 [", query.size(0), ", Hk, ", query.size(2), "], got ",
                x.scalar_type(), " ", x.sizes());
  }
  TORCH_CHECK(query.size(1) > 0 && query.size(1) % key.size(1) == 0, op, ": ", key.size(1), " key heads do not divide ",
              query.size(1), " query heads");
  TORCH_CHECK(window >= 0, op, ": window must be 0 or more, is ", window);
  const PrefixKernels& k = prefix_kernels();
  const int64_t shared = query.size(1) / key.size(1);
  return {k,
          groups_of(op, offsets, prompt_of, query.size(0)),
          query.size(1),
          key.size(1),
          shared,
          query.size(2),
          blocks_of(query.size(2), k.panel),
          std::max<int64_t>(1, kRows / shared),
          static_cast<float>(scale),
          window};
}

// rows [n, width] -> panels of rows; panel p of `panel` columns goes to out + p * stride.
void pack_columns(const float* row, int64_t r, int64_t width, int64_t panel, int64_t stride, float* out) {
  for (int64_t d = 0; d < width; d += panel, out += stride) {
    float* to = out + r * panel;
    const int64_t n = std::min(panel, width - d);
    std::copy_n(row + d, n, to);
    std::fill(to + n, to + panel, 0.0f);
  }
}

// x of the group's tokens, [tokens, width] in panels of columns.
void pack(const Job& job, const Group& g, const Heads<const float>& x, int64_t head, float* out) {
  const int64_t stride = g.tokens() * job.k.panel;
  for (int64_t t = 0; t < g.tokens(); ++t) {
    pack_columns(x.at(g.begin() + t, head), t, job.width, job.k.panel, stride, out);
  }
}

// x transposed, [width, tokens] in panels of tokens; every segment begins a panel.
void pack_transposed(const Job& job, const Group& g, const Heads<const float>& x, int64_t head, float* out) {
  const int64_t panel = job.k.panel, size = panel * job.width;
  for (const Segment& s : g.segments) {
    for (int64_t i = 0; i < s.length; i += panel, out += size) {
      const int64_t n = std::min(panel, s.length - i);
      if (n < panel) std::fill_n(out, size, 0.0f);
      for (int64_t j = 0; j < n; ++j) {
        const float* row = x.at(s.begin + i + j, head);
        for (int64_t d = 0; d < job.width; ++d) out[d * panel + j] = row[d];
      }
    }
  }
}

struct KeyBlock {
  // First key in the group, and the panel that it begins.
  int64_t token, panel;
};

// Calls begin(first token, rows) for every block of rows of the group, each(seen, key block) for the blocks of keys
// that some of its rows see, and end(first token, rows).
template <class Begin, class Each, class End>
void walk(const Job& job, const Group& g, const Begin& begin, const Each& each, const End& end) {
  struct Piece {
    int64_t position, length;
    KeyBlock at;
  };
  std::vector<int32_t> from(job.rows()), to(job.rows());
  int64_t panel = 0;
  for (const Segment& s : g.segments) {
    const bool response = s.begin != g.begin();
    const Piece prompt{0, response ? g.prompt() : 0, {0, 0}};
    const Piece own{prompt.length, s.length, {s.begin - g.begin(), panel}};
    for (int64_t i = 0; i < s.length; i += job.block_tokens) {
      const int64_t n = std::min(job.block_tokens, s.length - i), rows = n * job.shared;
      begin(s.begin + i, rows);
      for (const Piece& piece : {prompt, own}) {
        for (int64_t j = 0; j < piece.length; j += kKeys) {
          const int64_t keys = std::min(kKeys, piece.length - j), first = piece.position + j;
          for (int64_t t = 0; t < n; ++t) {
            const int64_t position = own.position + i + t;
            const int64_t lowest = job.window ? position + 1 - job.window : 0;
            std::fill_n(&from[t * job.shared], job.shared, std::clamp<int64_t>(lowest - first, 0, keys));
            std::fill_n(&to[t * job.shared], job.shared, std::clamp<int64_t>(position + 1 - first, 0, keys));
          }
          const Seen seen{rows, from.data(), to.data()};
          if (seen.begin() < seen.end()) each(seen, KeyBlock{piece.at.token + j, piece.at.panel + j / job.k.panel});
        }
      }
      end(s.begin + i, rows);
    }
    panel += blocks_of(s.length, job.k.panel);
  }
}

std::tuple<Tensor, Tensor> forward(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& offsets,
                                   const Tensor& prompt_of, double scale, int64_t window, int64_t /*longest*/) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  const Job job = make_job("cpu_prefix_attention", query, key, value, offsets, prompt_of, scale, window);
  const Tensor q_in = with_unit_stride(query), k_in = with_unit_stride(key), v_in = with_unit_stride(value);
  Tensor out = at::empty(query.sizes(), query.options().memory_format(at::MemoryFormat::Contiguous));
  Tensor lse = at::empty({query.size(0), query.size(1)}, query.options());
  const auto q = read(q_in), k = read(k_in), v = read(v_in);
  const auto o = write(out);
  float* lse_p = lse.data_ptr<float>();
  const int64_t panel = job.k.panel, padded = job.padded(), most_tokens = job.most_tokens();

  at::parallel_for(0, job.groups.size() * job.key_heads, 1, [&](int64_t first, int64_t last) {
    const Scratch keys(job.most_key_panels() * panel * job.width), values(most_tokens * padded);
    const Scratch x(job.rows() * job.width), sums(job.rows() * padded), scores(job.rows() * kScores);
    std::vector<float> max(job.rows()), sum(job.rows());
    for (int64_t task = first; task < last; ++task) {
      const Group& g = job.groups[task / job.key_heads];
      const int64_t head = task % job.key_heads, first_head = head * job.shared, stride = g.tokens() * panel;
      pack_transposed(job, g, k, head, keys);
      pack(job, g, v, head, values);
      walk(
          job, g,
          [&](int64_t token, int64_t rows) {
            for (int64_t r = 0; r < rows; ++r) {
              const float* row = q.at(token + r / job.shared, first_head + r % job.shared);
              for (int64_t d = 0; d < job.width; ++d) x[r * job.width + d] = job.scale * row[d];
            }
            std::fill_n(&sums[0], rows * padded, 0.0f);
            std::fill_n(max.begin(), rows, -kInf);
            std::fill_n(sum.begin(), rows, 0.0f);
          },
          [&](const Seen& seen, const KeyBlock& at) {
            const int64_t size = panel * job.width;
            job.k.scores(seen, x, job.width, {keys + at.panel * size, size, 0}, scores);
            job.k.softmax(seen, scores, max.data(), sum.data(), sums, padded);
            job.k.add_over_keys(seen, scores, {values + at.token * panel, stride, job.panels}, sums);
          },
          [&](int64_t token, int64_t rows) {
            for (int64_t r = 0; r < rows; ++r) {
              const int64_t t = token + r / job.shared, h = first_head + r % job.shared;
              float* row = o.at(t, h);
              const float factor = 1.0f / sum[r];
              for (int64_t d = 0; d < job.width; ++d) row[d] = factor * sums[r * padded + d];
              lse_p[t * job.query_heads + h] = max[r] + std::log(sum[r]);
            }
          });
    }
  });
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad_in, const Tensor& query, const Tensor& key,
                                            const Tensor& value, const Tensor& out_in, const Tensor& lse_in,
                                            const Tensor& offsets, const Tensor& prompt_of, double scale,
                                            int64_t window, int64_t /*longest*/) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  const char* op = "cpu_prefix_attention_backward";
  const Job job = make_job(op, query, key, value, offsets, prompt_of, scale, window);
  for (const Tensor& each : {grad_in, out_in}) {
    TORCH_CHECK(each.sizes() == query.sizes() && each.scalar_type() == at::kFloat, op,
                ": grad_out and out must be float32 ", query.sizes(), ", got ", each.scalar_type(), " ", each.sizes());
  }
  TORCH_CHECK(lse_in.sizes() == query.sizes().slice(0, 2) && lse_in.scalar_type() == at::kFloat, op,
              ": lse must be float32 ", query.sizes().slice(0, 2), ", is ", lse_in.scalar_type(), " ", lse_in.sizes());
  const Tensor q_in = with_unit_stride(query), k_in = with_unit_stride(key), v_in = with_unit_stride(value);
  const Tensor d_in = with_unit_stride(grad_in), o_in = with_unit_stride(out_in), lse = lse_in.contiguous();
  Tensor d_query = at::empty(query.sizes(), query.options().memory_format(at::MemoryFormat::Contiguous));
  Tensor d_key = at::empty(key.sizes(), d_query.options()), d_value = at::empty(key.sizes(), d_query.options());
  const auto q = read(q_in), k = read(k_in), v = read(v_in), d_out = read(d_in), o = read(o_in);
  const auto dq = write(d_query), dk = write(d_key), dv = write(d_value);
  const float* lse_p = lse.const_data_ptr<float>();
  const VectorKernels& vector = vector_kernels();
  const int64_t panel = job.k.panel, padded = job.padded(), most_tokens = job.most_tokens();
  const int64_t transposed = job.most_key_panels() * panel * job.width;

  at::parallel_for(0, job.groups.size() * job.key_heads, 1, [&](int64_t first, int64_t last) {
    const Scratch keys_t(transposed), values_t(transposed), keys(most_tokens * padded);
    const Scratch dk_sums(most_tokens * padded), dv_sums(most_tokens * padded), dq_sums(job.rows() * padded);
    // Rows of query and d out, both as they are and in panels.
    const Scratch x(job.rows() * job.width), d(job.rows() * job.width);
    const Scratch x_panels(job.rows() * padded), d_panels(job.rows() * padded);
    const Scratch scores(job.rows() * kScores), slopes(job.rows() * kScores);
    std::vector<float> row_lse(job.rows()), delta(job.rows());
    for (int64_t task = first; task < last; ++task) {
      const Group& g = job.groups[task / job.key_heads];
      const int64_t head = task % job.key_heads, first_head = head * job.shared, stride = g.tokens() * panel;
      const int64_t row_stride = job.rows() * panel;
      pack_transposed(job, g, k, head, keys_t);
      pack_transposed(job, g, v, head, values_t);
      pack(job, g, k, head, keys);
      std::fill_n(&dk_sums[0], g.tokens() * padded, 0.0f);
      std::fill_n(&dv_sums[0], g.tokens() * padded, 0.0f);
      walk(
          job, g,
          [&](int64_t token, int64_t rows) {
            for (int64_t r = 0; r < rows; ++r) {
              const int64_t t = token + r / job.shared, h = first_head + r % job.shared;
              const float *q_row = q.at(t, h), *d_row = d_out.at(t, h);
              for (int64_t i = 0; i < job.width; ++i) x[r * job.width + i] = job.scale * q_row[i];
              std::copy_n(d_row, job.width, &d[r * job.width]);
              pack_columns(&x[r * job.width], r, job.width, panel, row_stride, x_panels);
              pack_columns(d_row, r, job.width, panel, row_stride, d_panels);
              row_lse[r] = lse_p[t * job.query_heads + h];
              delta[r] = vector.dot(d_row, o.at(t, h), job.width);
            }
            std::fill_n(&dq_sums[0], rows * padded, 0.0f);
          },
          [&](const Seen& seen, const KeyBlock& at) {
            const int64_t size = panel * job.width;
            job.k.scores(seen, x, job.width, {keys_t + at.panel * size, size, 0}, scores);
            job.k.scores(seen, d, job.width, {values_t + at.panel * size, size, 0}, slopes);
            job.k.softmax_backward(seen, scores, slopes, row_lse.data(), delta.data());
            job.k.add_over_rows(seen, scores, {d_panels, row_stride, job.panels}, dv_sums + at.token * padded);
            job.k.add_over_rows(seen, slopes, {x_panels, row_stride, job.panels}, dk_sums + at.token * padded);
            job.k.add_over_keys(seen, slopes, {keys + at.token * panel, stride, job.panels}, dq_sums);
          },
          [&](int64_t token, int64_t rows) {
            for (int64_t r = 0; r < rows; ++r) {
              float* row = dq.at(token + r / job.shared, first_head + r % job.shared);
              for (int64_t i = 0; i < job.width; ++i) row[i] = job.scale * dq_sums[r * padded + i];
            }
          });
      for (int64_t t = 0; t < g.tokens(); ++t) {
        std::copy_n(&dk_sums[t * padded], job.width, dk.at(g.begin() + t, head));
        std::copy_n(&dv_sums[t * padded], job.width, dv.at(g.begin() + t, head));
      }
    }
  });
  return {d_query, d_key, d_value};
}

}  // namespace
}  // namespace gadcore

TORCH_LIBRARY_FRAGMENT(gadcore, m) {
  m.def(
      "cpu_prefix_attention(Tensor query, Tensor key, Tensor value, Tensor offsets, Tensor prompt_of, float scale, "
      "int window, int longest) -> (Tensor, Tensor)");
  m.def(
      "cpu_prefix_attention_backward(Tensor grad_out, Tensor query, Tensor key, Tensor value, Tensor out, Tensor lse, "
      "Tensor offsets, Tensor prompt_of, float scale, int window, int longest) -> (Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(gadcore, CPU, m) {
  m.impl("cpu_prefix_attention", &gadcore::forward);
  m.impl("cpu_prefix_attention_backward", &gadcore::backward);
}
