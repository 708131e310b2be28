#include "prefix_job.h"

namespace gadcore {
namespace {

using at::Tensor;

// Rows of a block, as far as whole tokens give so many.
constexpr int64_t kRows = 96;
// A group whose rows see more keys than kPartCost, all heads of a key head added up, is cut into parts, kParts at most:
// a single group of a model with three key heads would keep two threads busy for the time of four heads, not three.
constexpr int64_t kParts = 4, kPartCost = 1 << 17;

std::vector<Group> groups_of(const char* op, const Tensor& offsets, const Tensor& prompt_of, int64_t tokens,
                             int64_t panel) {
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
      const Group* last = groups.empty() ? nullptr : &groups.back();
      groups.push_back({{}, last ? last->first_panel + last->key_panels(panel) : 0});
      last_prompt = k;
    }
    TORCH_CHECK(last_prompt >= 0 && prompt[k] == last_prompt, op, ": the prompt of segment ", k, " is ", prompt[k],
                ", must be itself or the last prompt before it, ", last_prompt);
    Group& g = groups.back();
    const bool first = g.segments.empty();
    const int64_t token = first ? 0 : g.tokens(), at = first ? 0 : g.key_panels(panel);
    g.segments.push_back({offset[k], offset[k + 1] - offset[k], token, at});
  }
  return groups;
}

// Calls each(segment, from, to, cost) for the blocks of rows of a group; cost: keys that the block sees, over its rows.
template <class Each>
void blocks(const Job& job, const Group& g, const Each& each) {
  for (const Segment& s : g.segments) {
    const int64_t before = s.token == 0 ? 0 : g.prompt().length;
    for (int64_t i = 0; i < s.length; i += job.block_tokens) {
      const int64_t n = std::min(job.block_tokens, s.length - i), keys = before + i + n;
      each(s, i, i + n, n * job.shared * (job.window ? std::min(keys, job.window) : keys));
    }
  }
}

void cut_into_parts(Job& job) {
  for (size_t g = 0; g < job.groups.size(); ++g) {
    const Group& group = job.groups[g];
    int64_t total = 0, done = 0;
    blocks(job, group, [&](const Segment&, int64_t, int64_t, int64_t cost) { total += cost; });
    const int64_t count = std::clamp<int64_t>(total / kPartCost, 1, kParts);
    std::vector<Part> parts;
    blocks(job, group, [&](const Segment& s, int64_t from, int64_t to, int64_t cost) {
      const int64_t number = (2 * done + cost) * count / (2 * total);
      done += cost;
      if (parts.empty() || number != parts.back().number) {
        parts.push_back({static_cast<int64_t>(g), number, {}});
      }
      std::vector<Piece>& pieces = parts.back().pieces;
      if (pieces.empty() || pieces.back().segment.token != s.token) pieces.push_back({s, from, to});
      pieces.back().to = to;
    });
    // A block may be larger than a part: no number is left out in the turns.
    for (size_t i = 0; i < parts.size(); ++i) parts[i].number = i;
    job.parts.insert(job.parts.end(), parts.begin(), parts.end());
  }
  std::stable_sort(job.parts.begin(), job.parts.end(),
                   [](const Part& a, const Part& b) { return a.number < b.number; });
}

}  // namespace

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
  Job job{k,
          groups_of(op, offsets, prompt_of, query.size(0), k.panel),
          query.size(1),
          key.size(1),
          shared,
          query.size(2),
          blocks_of(query.size(2), k.panel),
          std::max<int64_t>(1, kRows / shared),
          static_cast<float>(scale),
          window,
          {}};
  cut_into_parts(job);
  return job;
}

}  // namespace gadcore
