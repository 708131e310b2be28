// What a call of cpu_prefix_attention works on: its groups, cut into parts that threads share out.
//
// Parts follow from the lengths of a group alone, so no bit depends on the number of threads.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "prefix_tiles.h"

namespace gadcore {

inline int64_t blocks_of(int64_t n, int64_t unit) { return (n + unit - 1) / unit; }

// Tokens of a prompt or of a response.
struct Segment {
  int64_t begin, length;
  // Its first token among those of its group, and the panel that begins there when every segment begins one.
  int64_t token, panel;
};

// A prompt and its responses.
struct Group {
  std::vector<Segment> segments;
  // Panels of the groups before it.
  int64_t first_panel;

  const Segment& prompt() const { return segments.front(); }
  int64_t begin() const { return prompt().begin; }
  int64_t tokens() const { return segments.back().token + segments.back().length; }
  int64_t key_panels(int64_t panel) const { return segments.back().panel + blocks_of(segments.back().length, panel); }
};

// The rows of the tokens [from, to) of a segment.
struct Piece {
  Segment segment;
  int64_t from, to;
};

// Consecutive blocks of rows of a group.
struct Part {
  int64_t group, number;
  std::vector<Piece> pieces;
};

struct Job {
  const PrefixKernels& k;
  std::vector<Group> groups;
  // Query heads, key heads, query heads of a key head, width of a head, the same in panels, tokens of a block of rows.
  int64_t query_heads, key_heads, shared, width, panels, block_tokens;
  float scale;
  int64_t window;
  // First parts of all groups, then second ones and so on.
  std::vector<Part> parts;

  int64_t rows() const { return block_tokens * shared; }
  // Width of a head in whole panels.
  int64_t padded() const { return panels * k.panel; }
  int64_t tasks() const { return static_cast<int64_t>(parts.size()) * key_heads; }
  int64_t key_panels() const {
    return groups.empty() ? 0 : groups.back().first_panel + groups.back().key_panels(k.panel);
  }
  int64_t most_tokens() const {
    int64_t most = 0;
    for (const Group& g : groups) most = std::max(most, g.tokens());
    return most;
  }
};

// Checks the operands of the op. Raises for types, shapes and offsets that do not fit.
Job make_job(const char* op, const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
             const at::Tensor& offsets, const at::Tensor& prompt_of, double scale, int64_t window);

}  // namespace gadcore
