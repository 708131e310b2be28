// Written once for any width (vec.h), compiled for every level.
#include "prefix_tiles.h"

#include <algorithm>

#include "product_tile.h"

namespace gadcore {
namespace {

template <int W>
struct Tiles {
  using V = Vec<W>;
  using F = typename V::F;
  static constexpr int64_t kPanel = ProductTile<W>::kPanel;
  static_assert(kKeys % kPanel == 0 && kKeys + W <= kScores);

  static GADCORE_INLINE void scores(const Seen& seen, const float* x, int64_t x_row, int64_t width,
                                    const Panels& keys, float* out) {
    for (int64_t p = seen.begin() / kPanel, j = p * kPanel; j < seen.end(); ++p, j += kPanel) {
      for (int64_t r = 0; r < seen.rows; r += kTile) {
        const int64_t n = std::min(kTile, seen.rows - r);
        if (seen.to[r + n - 1] <= j || seen.from[r] >= j + kPanel) continue;
        ProductTile<W>::template of<false, false>(n, x + r * x_row, x_row, keys.data + p * keys.stride, kPanel, width,
                                                  out + r * kScores + j, kScores);
      }
    }
  }

  static GADCORE_INLINE void add_over_keys(const Seen& seen, const float* p, const Panels& b, float* out) {
    const int64_t width = b.count * kPanel;
    for (int64_t i = 0; i < b.count; ++i) {
      for (int64_t r = 0; r < seen.rows; r += kTile) {
        const int64_t n = std::min(kTile, seen.rows - r), first = seen.from[r], depth = seen.to[r + n - 1] - first;
        if (depth <= 0) continue;
        ProductTile<W>::template of<true, false>(n, p + r * kScores + first, kScores,
                                                 b.data + i * b.stride + first * kPanel, kPanel, depth,
                                                 out + r * width + i * kPanel, width);
      }
    }
  }

  static GADCORE_INLINE void add_over_rows(const Seen& seen, const float* p, const float* x, int64_t width,
                                           float* out) {
    for (int64_t i = 0; i < width; i += kPanel) {
      // The rows [first, last) see some of the tile's keys.
      int64_t first = 0, last = 0;
      for (int64_t j = seen.begin(); j < seen.end(); j += kTile) {
        const int64_t n = std::min(kTile, seen.end() - j);
        while (seen.to[first] <= j) ++first;
        while (last < seen.rows && seen.from[last] < j + n) ++last;
        if (first >= last) continue;
        ProductTile<W>::template of<true, true>(n, p + first * kScores + j, kScores,
                                                x + first * width + i, width, last - first, out + j * width + i,
                                                width);
      }
    }
  }

  // Zeros in [begin, end) beside the keys that row r sees. Those next to the last one hold what its vector wrote.
  static GADCORE_INLINE void clear_unseen(const Seen& seen, int64_t r, float* row) {
    std::fill(row + seen.begin(), row + seen.from[r], 0.0f);
    if (seen.to[r] < seen.end()) std::fill(row + seen.to[r], row + seen.end(), 0.0f);
  }

  static GADCORE_INLINE void softmax(const Seen& seen, float* scores, float* max, float* sum, float* out,
                                     int64_t width) {
    for (int64_t r = 0; r < seen.rows; ++r, scores += kScores, out += width) {
      float *x = scores + seen.from[r], *end = scores + seen.to[r];
      if (x < end) {
        V::store(end, V::splat(-kInf));
        F most = V::splat(max[r]);
        for (const float* p = x; p < end; p += W) most = V::max(V::load(p), most);
        const float before = max[r], now = V::largest(most);
        // Nothing but -inf so far: any finite shift will do, -inf itself would make NaN.
        const F shift = V::splat(now == -kInf ? 0.0f : now);
        F total = V::splat(0.0f);
        for (float* p = x; p < end; p += W) {
          const F e = V::exp_shifted(V::load(p) - shift);
          V::store(p, e);
          total = total + e;
        }
        if (now != before) {
          float lane[W];
          V::store(lane, V::exp_shifted(V::splat(before) - shift));
          const float factor = lane[0];
          sum[r] *= factor;
          for (int64_t i = 0; i < width; i += W) V::store(out + i, V::load(out + i) * V::splat(factor));
        }
        max[r] = now;
        sum[r] += V::sum(total);
      }
      clear_unseen(seen, r, scores);
    }
  }

  static GADCORE_INLINE void softmax_backward(const Seen& seen, float* scores, float* slopes, const float* lse,
                                              const float* delta) {
    for (int64_t r = 0; r < seen.rows; ++r, scores += kScores, slopes += kScores) {
      const F shift = V::splat(lse[r]), mean = V::splat(delta[r]);
      for (int64_t i = seen.from[r]; i < seen.to[r]; i += W) {
        const F p = V::exp_shifted(V::load(scores + i) - shift);
        V::store(scores + i, p);
        V::store(slopes + i, p * (V::load(slopes + i) - mean));
      }
      clear_unseen(seen, r, scores);
      clear_unseen(seen, r, slopes);
    }
  }
};

#define GADCORE_LEVEL(NAME, W, TARGET)                                                                                 \
  namespace NAME {                                                                                                     \
  TARGET void scores(const Seen& seen, const float* x, int64_t x_row, int64_t width, const Panels& keys, float* out) { \
    Tiles<W>::scores(seen, x, x_row, width, keys, out);                                                                \
  }                                                                                                                    \
  TARGET void add_over_keys(const Seen& seen, const float* p, const Panels& b, float* out) {                           \
    Tiles<W>::add_over_keys(seen, p, b, out);                                                                          \
  }                                                                                                                    \
  TARGET void add_over_rows(const Seen& seen, const float* p, const float* x, int64_t width, float* out) {             \
    Tiles<W>::add_over_rows(seen, p, x, width, out);                                                                   \
  }                                                                                                                    \
  TARGET void softmax(const Seen& seen, float* scores, float* max, float* sum, float* out, int64_t width) {            \
    Tiles<W>::softmax(seen, scores, max, sum, out, width);                                                             \
  }                                                                                                                    \
  TARGET void softmax_backward(const Seen& seen, float* scores, float* slopes, const float* lse, const float* delta) { \
    Tiles<W>::softmax_backward(seen, scores, slopes, lse, delta);                                                      \
  }                                                                                                                    \
  constexpr PrefixKernels kTable = {Tiles<W>::kPanel, scores,  add_over_keys,                                          \
                                    add_over_rows,    softmax, softmax_backward};                                      \
  }

GADCORE_LEVELS(GADCORE_LEVEL)

constexpr const PrefixKernels* kTables[kLevels] = GADCORE_TABLES;

}  // namespace

const PrefixKernels& prefix_kernels() { return *kTables[level()]; }

}  // namespace gadcore
