// cpu_prefix_attention and its backward; kernels/prefix_attention.py states the mathematics.
//
// Keys and values are packed once. One task is one key head of a part of a group: it takes blocks of rows, a row being
// a query head of a token, against blocks of keys; gradients of keys and values are summed inside the task, segment
// after segment, and then part after part. Keys are cut into blocks from the beginning of the prompt and from that of
// the segment, so a response's output and query gradient have the same bits whatever other responses there are; its key
// and value gradients too, where the group is one part.
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

// Keys or values of all groups, for each group and head [tokens, width] in panels of columns.
class Columns {
 public:
  Columns(const Job& job, const Heads<const float>& x, int64_t tokens)
      : job_(job), memory_(tokens * job.key_heads * job.padded()) {
    at::parallel_for(0, job.groups.size() * job.key_heads, 1, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        const Group& g = job.groups[i / job.key_heads];
        pack(g, x, i % job.key_heads);
      }
    });
  }

  Panels of(const Group& g, int64_t head) const { return {at(g, head), g.tokens() * job_.k.panel, job_.panels}; }

 private:
  float* at(const Group& g, int64_t head) const {
    return memory_ + (g.begin() * job_.key_heads + g.tokens() * head) * job_.padded();
  }
  void pack(const Group& g, const Heads<const float>& x, int64_t head) {
    const int64_t panel = job_.k.panel;
    float* out = at(g, head);
    for (int64_t d = 0; d < job_.width; d += panel) {
      const int64_t n = std::min(panel, job_.width - d);
      for (int64_t t = 0; t < g.tokens(); ++t, out += panel) {
        std::copy_n(x.at(g.begin() + t, head) + d, n, out);
        std::fill(out + n, out + panel, 0.0f);
      }
    }
  }

  const Job& job_;
  Scratch memory_;
};

// The same transposed, [width, tokens] in panels of tokens; every segment begins a panel.
class Transposed {
 public:
  Transposed(const Job& job, const Heads<const float>& x)
      : job_(job), memory_(job.key_panels() * job.key_heads * size()) {
    at::parallel_for(0, job.groups.size() * job.key_heads, 1, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        const Group& g = job.groups[i / job.key_heads];
        for (const Segment& s : g.segments) pack(s, x, i % job.key_heads, at(g, i % job.key_heads) + s.panel * size());
      }
    });
  }

  // From the panel on.
  Panels of(const Group& g, int64_t head, int64_t panel) const { return {at(g, head) + panel * size(), size(), 0}; }

 private:
  int64_t size() const { return job_.k.panel * job_.width; }
  float* at(const Group& g, int64_t head) const {
    return memory_ + (g.first_panel * job_.key_heads + g.key_panels(job_.k.panel) * head) * size();
  }
  void pack(const Segment& s, const Heads<const float>& x, int64_t head, float* out) {
    const int64_t panel = job_.k.panel;
    for (int64_t i = 0; i < s.length; i += panel, out += size()) {
      const int64_t n = std::min(panel, s.length - i);
      if (n < panel) std::fill_n(out, size(), 0.0f);
      for (int64_t j = 0; j < n; ++j) {
        const float* row = x.at(s.begin + i + j, head);
        for (int64_t d = 0; d < job_.width; ++d) out[d * panel + j] = row[d];
      }
    }
  }

  const Job& job_;
  Scratch memory_;
};

struct KeyBlock {
  // First of the group's keys, and the panel that it begins.
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
  const Group& g = job.groups[part.group];
  for (const Piece& p : part.pieces) {
    const Keys before{0, p.segment.token == 0 ? 0 : g.prompt().length, {0, 0}};
    const Keys own{before.length, p.segment.length, {p.segment.token, p.segment.panel}};
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

// Calls each(first token of the group, tokens, whether no earlier part has them) for the keys that a part sees.
template <class Each>
void keys_of(const Job& job, const Part& part, const Each& each) {
  const Group& g = job.groups[part.group];
  if (part.pieces.front().segment.token != 0) each(0, g.prompt().length, false);
  for (const Piece& p : part.pieces) each(p.segment.token, p.segment.length, p.from == 0);
}

// Sums [tokens of the group, padded] of a part go to the rows of `to`.
void add_sums(const Job& job, const Part& part, const float* sums, int64_t head, const Heads<float>& to) {
  const int64_t begin = job.groups[part.group].begin();
  keys_of(job, part, [&](int64_t token, int64_t n, bool first) {
    for (int64_t t = token; t < token + n; ++t) {
      const float* sum = sums + t * job.padded();
      float* row = to.at(begin + t, head);
      for (int64_t i = 0; i < job.width; ++i) row[i] = first ? sum[i] : row[i] + sum[i];
    }
  });
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
  const int64_t padded = job.padded();
  const Transposed keys(job, k);
  const Columns values(job, v, key.size(0));

  share_out(job, [&](const auto& next) {
    const Scratch x(job.rows() * job.width), sums(job.rows() * padded), scores(job.rows() * kScores);
    std::vector<float> max(job.rows()), sum(job.rows());
    Bounds bounds(job.rows());
    for (int64_t task = next(); task < job.tasks(); task = next()) {
      const Part& part = job.parts[task / job.key_heads];
      const Group& g = job.groups[part.group];
      const int64_t head = task % job.key_heads, first_head = head * job.shared;
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
            job.k.scores(seen, x, job.width, job.width, keys.of(g, head, at.panel), scores);
            job.k.softmax(seen, scores, max.data(), sum.data(), sums, padded);
            job.k.add_over_keys(seen, scores, values.of(g, head).from(at.token * job.k.panel), sums);
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
  const int64_t padded = job.padded(), most_tokens = job.most_tokens();
  const Transposed keys_t(job, k), values_t(job, v);
  const Columns keys(job, k, key.size(0));

  // Parts whose sums a head of a group has taken in.
  std::vector<std::atomic<int64_t>> turns(job.groups.size() * job.key_heads);

  share_out(job, [&](const auto& next) {
    const Scratch dk_sums(most_tokens * padded), dv_sums(most_tokens * padded), dq_sums(job.rows() * padded);
    // Rows of query and d out, zeros up to whole panels.
    const Scratch x(job.rows() * padded), d(job.rows() * padded);
    std::fill_n(&x[0], job.rows() * padded, 0.0f);
    std::fill_n(&d[0], job.rows() * padded, 0.0f);
    const Scratch scores(job.rows() * kScores), slopes(job.rows() * kScores);
    std::vector<float> row_lse(job.rows()), delta(job.rows());
    Bounds bounds(job.rows());
    for (int64_t task = next(); task < job.tasks(); task = next()) {
      const Part& part = job.parts[task / job.key_heads];
      const Group& g = job.groups[part.group];
      const int64_t head = task % job.key_heads, first_head = head * job.shared;
      keys_of(job, part, [&](int64_t token, int64_t n, bool) {
        std::fill_n(dk_sums + token * padded, n * padded, 0.0f);
        std::fill_n(dv_sums + token * padded, n * padded, 0.0f);
      });
      walk(
          job, part, bounds,
          [&](int64_t token, int64_t rows) {
            for (int64_t r = 0; r < rows; ++r) {
              const int64_t t = token + r / job.shared, h = first_head + r % job.shared;
              const float *q_row = q.at(t, h), *d_row = d_out.at(t, h);
              for (int64_t i = 0; i < job.width; ++i) x[r * padded + i] = job.scale * q_row[i];
              std::copy_n(d_row, job.width, &d[r * padded]);
              row_lse[r] = lse_p[t * job.query_heads + h];
              delta[r] = vector.dot(d_row, o.at(t, h), job.width);
            }
            std::fill_n(&dq_sums[0], rows * padded, 0.0f);
          },
          [&](const Seen& seen, const KeyBlock& at) {
            job.k.scores(seen, x, padded, job.width, keys_t.of(g, head, at.panel), scores);
            job.k.scores(seen, d, padded, job.width, values_t.of(g, head, at.panel), slopes);
            job.k.softmax_backward(seen, scores, slopes, row_lse.data(), delta.data());
            job.k.add_over_rows(seen, scores, d, padded, dv_sums + at.token * padded);
            job.k.add_over_rows(seen, slopes, x, padded, dk_sums + at.token * padded);
            job.k.add_over_keys(seen, slopes, keys.of(g, head).from(at.token * job.k.panel), dq_sums);
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
