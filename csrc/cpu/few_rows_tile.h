// A product with up to 64 rows of x, and what adapters add to it, in registers: cpu_linear_few_rows is made of it.
//
// Dot products along K, R rows of x by C rows of W at a time: R C sums stay in registers, no operand is rearranged, and W
// is read once, in its own order. A result depends on its row of x and its row of W alone, never on the other rows.
//
// What an adapter adds goes into the same sums before they are written: a lane a row of x there, and a number of B for all
// of them, so that B is read once and in its own order too.
#pragma once

#include <algorithm>
#include <cstdint>

#include "vec.h"

#ifdef GADCORE_X86
#include <xmmintrin.h>
#endif

namespace gadcore::few_rows {

constexpr int64_t kMaxRows = 64;

#ifdef GADCORE_X86
// Columns that share a pass over x: their piece of W and four rows of x stay in the L1 cache. Up to eight rows stay there
// too, and fewer columns wait less for W.
constexpr int64_t shared_columns(int64_t m) { return m <= 8 ? 3 : 6; }
// Longest piece of K: short enough for L1, long enough to make the sums across lanes cheap.
constexpr int64_t kMostDepth = 640;

struct Product {
  const float *x, *w;
  int64_t x_stride, w_stride, m, k;
};

// What a strip of x asks for of the rows of W that come next, `rows` further down: each strip its share of bytes, so that
// the memory is busy all the time and not just while the first strip waits for it.
struct Prefetch {
  int64_t rows, begin, step;
};

// B [n, rank] of an adapter, without gaps, beside the columns start .. start + n - 1 of the product. low: [rank,
// kMaxRows], scale x A^T; rows of x that there are not are 0 there.
struct Up {
  const float* b;
  int64_t start, n, rank;
  const float* low;
};

template <int W, int C>
struct Kernel {
  using V = Vec<W>;
  using F = typename V::F;

  template <int R, int kC>
  static GADCORE_INLINE void tile(const float* x, const float* w, const Product& p, int64_t depth, bool add,
                                  const Prefetch& next, float* out) {
    F sum[R][kC];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
      for (int c = 0; c < kC; ++c) sum[r][c] = V::splat(0.0f);
    }
    const char* ahead = reinterpret_cast<const char*>(w + next.rows * p.w_stride) + next.begin;
    int64_t k = 0;
    for (; k + W <= depth; k += W, ahead += next.step) {
      F column[kC];
#pragma GCC unroll 8
      for (int c = 0; c < kC; ++c) {
        column[c] = V::load(w + c * p.w_stride + k);
        _mm_prefetch(ahead + 4 * c * p.w_stride, _MM_HINT_T1);
      }
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const F row = V::load(x + r * p.x_stride + k);
#pragma GCC unroll 8
        for (int c = 0; c < kC; ++c) sum[r][c] = sum[r][c] + row * column[c];
      }
    }
    if (k < depth) {
      F column[kC];
#pragma GCC unroll 8
      for (int c = 0; c < kC; ++c) column[c] = V::load_tail(w + c * p.w_stride + k, depth - k, 0.0f);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const F row = V::load_tail(x + r * p.x_stride + k, depth - k, 0.0f);
#pragma GCC unroll 8
        for (int c = 0; c < kC; ++c) sum[r][c] = sum[r][c] + row * column[c];
      }
    }
#pragma GCC unroll 8
    for (int c = 0; c < kC; ++c) {
      float* o = out + c * kMaxRows;
      if constexpr (R == 4) {
        const __m128 total = sums_of_lanes(sum[0][c], sum[1][c], sum[2][c], sum[3][c]);
        _mm_store_ps(o, add ? _mm_add_ps(_mm_load_ps(o), total) : total);
      } else {
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) o[r] = add ? o[r] + V::sum(sum[r][c]) : V::sum(sum[r][c]);
      }
    }
  }

  // {V::sum(a), V::sum(b), V::sum(c), V::sum(d)}, added in the same order.
  static GADCORE_INLINE __m128 sums_of_lanes(F a, F b, F c, F d) {
    const __m128 x = fold(a), y = fold(b), z = fold(c), w = fold(d);
    const __m128 xy = _mm_add_ps(_mm_unpacklo_ps(x, y), _mm_unpackhi_ps(x, y));
    const __m128 zw = _mm_add_ps(_mm_unpacklo_ps(z, w), _mm_unpackhi_ps(z, w));
    return _mm_add_ps(_mm_movelh_ps(xy, zw), _mm_movehl_ps(zw, xy));
  }

  static GADCORE_INLINE __m128 fold(F v) {
    typename Vec<8>::F eight;
    if constexpr (W == 16) {
      typename Vec<8>::F high;
      V::halve(v, eight, high);
      eight = eight + high;
    } else {
      eight = v;
    }
    typename Vec<4>::F low, high;
    Vec<8>::halve(eight, low, high);
    return low + high;
  }

  template <int R>
  static GADCORE_INLINE void strip(const float* x, const float* w, const Product& p, int64_t columns, int64_t depth,
                                   bool add, const Prefetch& next, float* out) {
    int64_t c = 0;
    for (; c + C <= columns; c += C) tile<R, C>(x, w + c * p.w_stride, p, depth, add, next, out + c * kMaxRows);
    for (; c < columns; ++c) tile<R, 1>(x, w + c * p.w_stride, p, depth, add, next, out + c * kMaxRows);
  }

  // out [columns, kMaxRows], of which p.m count, = (rows [n0, n0 + columns) of W) x^T
  static GADCORE_INLINE void block(const Product& p, int64_t n0, int64_t columns, float* out) {
    const int64_t pieces = (p.k + kMostDepth - 1) / kMostDepth;
    const int64_t piece = (p.k + pieces * 16 - 1) / (pieces * 16) * 16;
    const int64_t strips = (p.m + 3) / 4, group = std::max<int64_t>(C, shared_columns(p.m));
    for (int64_t k = 0; k < p.k; k += piece) {
      const int64_t depth = std::min(piece, p.k - k), share = 4 * depth / strips;
      for (int64_t c = 0; c < columns; c += group) {
        const int64_t shared = std::min(group, columns - c);
        const float* w = p.w + (n0 + c) * p.w_stride + k;
        float* o = out + c * kMaxRows;
        Prefetch next{group, 0, 4 * W / strips};
        int64_t m = 0;
        for (; m + 4 <= p.m; m += 4, next.begin += share) {
          strip<4>(p.x + m * p.x_stride + k, w, p, shared, depth, k > 0, next, o + m);
        }
        const float* x = p.x + m * p.x_stride + k;
        if (p.m - m == 3) strip<3>(x, w, p, shared, depth, k > 0, next, o + m);
        if (p.m - m == 2) strip<2>(x, w, p, shared, depth, k > 0, next, o + m);
        if (p.m - m == 1) strip<1>(x, w, p, shared, depth, k > 0, next, o + m);
      }
    }
  }

  // sums [columns, kMaxRows] += B low, kB rows of B and kV vectors of rows of x at a time.
  template <int kB, int kV>
  static GADCORE_INLINE void add_tile(const Up& up, const float* b, const float* low, float* sums) {
    F sum[kB][kV];
#pragma GCC unroll 8
    for (int c = 0; c < kB; ++c) {
#pragma GCC unroll 8
      for (int v = 0; v < kV; ++v) sum[c][v] = V::load(sums + c * kMaxRows + v * W);
    }
    for (int64_t k = 0; k < up.rank; ++k) {
      F rows[kV];
#pragma GCC unroll 8
      for (int v = 0; v < kV; ++v) rows[v] = V::load(low + k * kMaxRows + v * W);
#pragma GCC unroll 8
      for (int c = 0; c < kB; ++c) {
        const F each = V::splat(b[c * up.rank + k]);
#pragma GCC unroll 8
        for (int v = 0; v < kV; ++v) sum[c][v] = sum[c][v] + each * rows[v];
      }
    }
#pragma GCC unroll 8
    for (int c = 0; c < kB; ++c) {
#pragma GCC unroll 8
      for (int v = 0; v < kV; ++v) V::store(sums + c * kMaxRows + v * W, sum[c][v]);
    }
  }

  // Of the rows [first, first + columns) of B; sums begin at theirs.
  static GADCORE_INLINE void add(const Up& up, int64_t first, int64_t columns, int64_t m, float* sums) {
    for (int64_t r = 0; r < m; r += 2 * W) {
      const float *b = up.b + first * up.rank, *low = up.low + r;
      const bool two = r + W < m;
      float* to = sums + r;
      int64_t c = 0;
      for (; c + 4 <= columns; c += 4, b += 4 * up.rank, to += 4 * kMaxRows) {
        two ? add_tile<4, 2>(up, b, low, to) : add_tile<4, 1>(up, b, low, to);
      }
      for (; c < columns; ++c, b += up.rank, to += kMaxRows) {
        two ? add_tile<1, 2>(up, b, low, to) : add_tile<1, 1>(up, b, low, to);
      }
    }
  }
};

#endif

}  // namespace gadcore::few_rows
