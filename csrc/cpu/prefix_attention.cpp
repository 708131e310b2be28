// cpu_prefix_attention and its backward; kernels/prefix_attention.py states the mathematics.
//
// One task is one key head of a part of a group. It packs the keys and values that the part sees, then takes blocks of
// rows, a row being a query head of a token, against blocks of keys; gradients of keys and values are summed inside the
// task, segment after segment, and then part after part. Keys are cut into blocks from the beginning of the prompt and
// from that of the segment, so a response's output and query gradient have the same bits whatever other responses there
// are; its key and value gradients too, where the group is one part.
#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/core/impl/alloc_cpu.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <memory>
#include <thread>
#include <tuple>
#include <vector>

#include "prefix_job.h"
#include "vector_kernels.h"

namespace gadcore {
namespace {

using at::Tensor;

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

// Calls work(next) on every thread; next() gives the task, or job.tasks() where none is left. Tasks begin in order.
template <class Work>
void share_out(const Job& job, const Work& work) {
  std::atomic<int64_t> next{0};
  at::parallel_for(0, std::min<int64_t>(at::get_num_threads(), job.tasks()), 1, [&](int64_t, int64_t) {
    work([&] { return std::min(next++, job.tasks()); });
  });
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

// x of the part's tokens, [tokens, width] in panels of columns.
void pack(const Job& job, const Part& part, const Heads<const float>& x, int64_t head, float* out) {
  const int64_t stride = part.tokens() * job.k.panel;
  for (const Piece& p : part.pieces) {
    for (int64_t t = 0; t < p.segment.length; ++t) {
      pack_columns(x.at(p.segment.begin + t, head), p.token + t, job.width, job.k.panel, stride, out);
    }
  }
}

// x transposed, [width, tokens] in panels of tokens; every segment begins a panel.
void pack_transposed(const Job& job, const Part& part, const Heads<const float>& x, int64_t head, float* out) {
  const int64_t panel = job.k.panel, size = panel * job.width;
  for (const Piece& p : part.pieces) {
    for (int64_t i = 0; i < p.segment.length; i += panel, out += size) {
      const int64_t n = std::min(panel, p.segment.length - i);
      if (n < panel) std::fill_n(out, size, 0.0f);
      for (int64_t j = 0; j < n; ++j) {
        const float* row = x.at(p.segment.begin + i + j, head);
        for (int64_t d = 0; d < job.width; ++d) out[d * panel + j] = row[d];
      }
    }
  }
}

struct KeyBlock {
  // First of the part's keys, and the panel that it begins.
  int64_t token, panel;
};

// Which keys of a block each row sees; room for a block of rows.
struct Bounds {
  std::vector<int32_t> from, to;

  explicit Bounds(int64_t rows) : from(rows), to(rows) {}
};

// Calls begin(first token, rows) for every block of rows of the part, each(seen, key block) for the blocks of keys that
// some of its rows see, and end(first token, rows).
template <class Begin, class Each, class End>
void walk(const Job& job, const Part& part, Bounds& bounds, const Begin& begin, const Each& each, const End& end) {
  struct Keys {
    int64_t position, length;
    KeyBlock at;
  };
  const Piece& prompt = part.pieces.front();
  for (const Piece& p : part.pieces) {
    const Keys before{0, &p == &prompt ? 0 : prompt.segment.length, {0, 0}};
    const Keys own{before.length, p.segment.length, {p.token, p.panel}};
    for (int64_t i = p.from; i < p.to; i += job.block_tokens) {
      const int64_t n = std::min(job.block_tokens, p.to - i), rows = n * job.shared;
      begin(p.segment.begin + i, rows);
      for (const Keys& keys : {before, own}) {
        for (int64_t j = 0; j < keys.length; j += kKeys) {
          const int64_t count = std::min(kKeys, keys.length - j), first = keys.position + j;
          for (int64_t t = 0; t < n; ++t) {
            const int64_t position = own.position + i + t;
            const int64_t lowest = job.window ? position + 1 - job.window : 0;
            std::fill_n(&bounds.from[t * job.shared], job.shared, std::clamp<int64_t>(lowest - first, 0, count));
            std::fill_n(&bounds.to[t * job.shared], job.shared, std::clamp<int64_t>(position + 1 - first, 0, count));
          }
          const Seen seen{rows, bounds.from.data(), bounds.to.data()};
          if (seen.begin() < seen.end()) each(seen, KeyBlock{keys.at.token + j, keys.at.panel + j / job.k.panel});
        }
      }
      end(p.segment.begin + i, rows);
    }
  }
}

// Sums [tokens, padded] of a part go to its tokens' rows of `to`: set by the first part that has the segment's first
// row (the prompt's too), added by later ones.
void add_sums(const Job& job, const Part& part, const float* sums, int64_t head, const Heads<float>& to) {
  for (const Piece& p : part.pieces) {
    const bool first = p.from == 0 && (part.number == 0 || &p != &part.pieces.front());
    for (int64_t t = 0; t < p.segment.length; ++t) {
      const float* sum = sums + (p.token + t) * job.padded();
      float* row = to.at(p.segment.begin + t, head);
      if (first) {
        std::copy_n(sum, job.width, row);
      } else {
        for (int64_t i = 0; i < job.width; ++i) row[i] += sum[i];
      }
    }
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

  share_out(job, [&](const auto& next) {
    const Scratch keys(job.most_key_panels() * panel * job.width), values(most_tokens * padded);
    const Scratch x(job.rows() * job.width), sums(job.rows() * padded), scores(job.rows() * kScores);
    std::vector<float> max(job.rows()), sum(job.rows());
    Bounds bounds(job.rows());
    for (int64_t task = next(); task < job.tasks(); task = next()) {
      const Part& part = job.parts[task / job.key_heads];
      const int64_t head = task % job.key_heads, first_head = head * job.shared, stride = part.tokens() * panel;
      pack_transposed(job, part, k, head, keys);
      pack(job, part, v, head, values);
      walk(
          job, part, bounds,
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

  // Parts whose sums a head of a group has taken in.
  std::vector<std::atomic<int64_t>> turns(job.groups.size() * job.key_heads);

  share_out(job, [&](const auto& next) {
    const Scratch keys_t(transposed), values_t(transposed), keys(most_tokens * padded);
    const Scratch dk_sums(most_tokens * padded), dv_sums(most_tokens * padded), dq_sums(job.rows() * padded);
    // Rows of query and d out, both as they are and in panels.
    const Scratch x(job.rows() * job.width), d(job.rows() * job.width);
    const Scratch x_panels(job.rows() * padded), d_panels(job.rows() * padded);
    const Scratch scores(job.rows() * kScores), slopes(job.rows() * kScores);
    std::vector<float> row_lse(job.rows()), delta(job.rows());
    Bounds bounds(job.rows());
    for (int64_t task = next(); task < job.tasks(); task = next()) {
      const Part& part = job.parts[task / job.key_heads];
      const int64_t head = task % job.key_heads, first_head = head * job.shared, stride = part.tokens() * panel;
      const int64_t row_stride = job.rows() * panel;
      pack_transposed(job, part, k, head, keys_t);
      pack_transposed(job, part, v, head, values_t);
      pack(job, part, k, head, keys);
      std::fill_n(&dk_sums[0], part.tokens() * padded, 0.0f);
      std::fill_n(&dv_sums[0], part.tokens() * padded, 0.0f);
      walk(
          job, part, bounds,
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
      // The part before this one began before it, on this thread or another: it will end.
      std::atomic<int64_t>& turn = turns[part.group * job.key_heads + head];
      while (turn.load(std::memory_order_acquire) != part.number) std::this_thread::yield();
      add_sums(job, part, dk_sums, head, dk);
      add_sums(job, part, dv_sums, head, dv);
      turn.store(part.number + 1, std::memory_order_release);
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
