// Written once for any width (vec.h), compiled for every level.
#include "prefix_tiles.h"

#include <algorithm>

#include "vec.h"

namespace gadcore {
namespace {

// Rows of a tile: 2 R sums, two vectors of a panel and a broadcast number fill the 16 registers of AVX2.
constexpr int64_t kTile = 6;

template <int W>
struct Tiles {
  using V = Vec<W>;
  using F = typename V::F;
  static constexpr int64_t kPanel = 2 * W;
  static_assert(kKeys % kPanel == 0 && kKeys + W <= kScores);

  // c [R, panel] (+)= sum over k of a(r, k) b[k, :], with a(r, k) = a[r * a_row + k * a_k].
  template <int R>
  static GADCORE_INLINE void tile(const float* a, int64_t a_row, int64_t a_k, const float* b, int64_t depth, float* c,
                                  int64_t c_row, bool add) {
    F low[R], high[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      low[r] = add ? V::load(c + r * c_row) : V::splat(0.0f);
      high[r] = add ? V::load(c + r * c_row + W) : V::splat(0.0f);
    }
    for (int64_t k = 0; k < depth; ++k, a += a_k, b += kPanel) {
      const F b_low = V::load(b), b_high = V::load(b + W);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        // A scalar operand becomes one broadcast; V::splat GCC assembles lane by lane, at a third of the speed.
        const float x = a[r * a_row];
        low[r] = low[r] + x * b_low;
        high[r] = high[r] + x * b_high;
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      V::store(c + r * c_row, low[r]);
      V::store(c + r * c_row + W, high[r]);
    }
  }

  template <bool kAdd, bool kTransposed>
  static GADCORE_INLINE void tile_of(int64_t rows, const float* a, int64_t a_stride, const float* b, int64_t depth,
                                     float* c, int64_t c_row) {
    const int64_t a_row = kTransposed ? 1 : a_stride, a_k = kTransposed ? a_stride : 1;
    switch (rows) {
      case 6:
        return tile<6>(a, a_row, a_k, b, depth, c, c_row, kAdd);
      case 5:
        return tile<5>(a, a_row, a_k, b, depth, c, c_row, kAdd);
      case 4:
        return tile<4>(a, a_row, a_k, b, depth, c, c_row, kAdd);
      case 3:
        return tile<3>(a, a_row, a_k, b, depth, c, c_row, kAdd);
      case 2:
        return tile<2>(a, a_row, a_k, b, depth, c, c_row, kAdd);
      default:
        return tile<1>(a, a_row, a_k, b, depth, c, c_row, kAdd);
    }
  }

  static GADCORE_INLINE void scores(const Seen& seen, const float* x, int64_t width, const Panels& keys, float* out) {
    for (int64_t p = seen.begin() / kPanel, j = p * kPanel; j < seen.end(); ++p, j += kPanel) {
      for (int64_t r = 0; r < seen.rows; r += kTile) {
        const int64_t n = std::min(kTile, seen.rows - r);
        if (seen.to[r + n - 1] <= j || seen.from[r] >= j + kPanel) continue;
        tile_of<false, false>(n, x + r * width, width, keys.data + p * keys.stride, width, out + r * kScores + j,
                              kScores);
      }
    }
  }

  static GADCORE_INLINE void add_over_keys(const Seen& seen, const float* p, const Panels& b, float* out) {
    const int64_t width = b.count * kPanel;
    for (int64_t i = 0; i < b.count; ++i) {
      for (int64_t r = 0; r < seen.rows; r += kTile) {
        const int64_t n = std::min(kTile, seen.rows - r), first = seen.from[r], depth = seen.to[r + n - 1] - first;
        if (depth <= 0) continue;
        tile_of<true, false>(n, p + r * kScores + first, kScores, b.data + i * b.stride + first * kPanel, depth,
                             out + r * width + i * kPanel, width);
      }
    }
  }

  static GADCORE_INLINE void add_over_rows(const Seen& seen, const float* p, const Panels& x, float* out) {
    const int64_t width = x.count * kPanel;
    for (int64_t i = 0; i < x.count; ++i) {
      // The rows [first, last) see some of the tile's keys.
      int64_t first = 0, last = 0;
      for (int64_t j = seen.begin(); j < seen.end(); j += kTile) {
        const int64_t n = std::min(kTile, seen.end() - j);
        while (seen.to[first] <= j) ++first;
        while (last < seen.rows && seen.from[last] < j + n) ++last;
        if (first >= last) continue;
        tile_of<true, true>(n, p + first * kScores + j, kScores, x.data + i * x.stride + first * kPanel, last - first,
                            out + j * width + i * kPanel, width);
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
  TARGET void scores(const Seen& seen, const float* x, int64_t width, const Panels& keys, float* out) {                \
    Tiles<W>::scores(seen, x, width, keys, out);                                                                       \
  }                                                                                                                    \
  TARGET void add_over_keys(const Seen& seen, const float* p, const Panels& b, float* out) {                           \
    Tiles<W>::add_over_keys(seen, p, b, out);                                                                          \
  }                                                                                                                    \
  TARGET void add_over_rows(const Seen& seen, const float* p, const Panels& x, float* out) {                           \
    Tiles<W>::add_over_rows(seen, p, x, out);                                                                          \
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

GADCORE_LEVEL(scalar, 1, )
GADCORE_LEVEL(baseline, kBaselineWidth, )
#ifdef GADCORE_X86
GADCORE_LEVEL(avx2, 8, GADCORE_AVX2)
GADCORE_LEVEL(avx512, 16, GADCORE_AVX512)
GADCORE_LEVEL(wide, 16, GADCORE_AVX2)
#endif

constexpr const PrefixKernels* kTables[kLevels] = {
    &scalar::kTable,
    &baseline::kTable,
#ifdef GADCORE_X86
    &avx2::kTable,
    &avx512::kTable,
    &wide::kTable,
#endif
};

}  // namespace

const PrefixKernels& prefix_kernels() { return *kTables[level()]; }

}  // namespace gadcore
