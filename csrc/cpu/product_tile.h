// A product of a few rows with a panel, in registers: what the attention of training and that of decoding are made of.
#pragma once

#include <cstdint>

#include "vec.h"

namespace gadcore {

// Rows of a tile: 2 R sums, two vectors of a panel and a broadcast number fill the 16 registers of AVX2.
constexpr int64_t kTile = 6;

struct Nothing {
  GADCORE_INLINE void operator()() const {}
};

// A number of the product is one chain of additions along k: its bits do not depend on the other rows of its tile.
template <int W>
struct ProductTile {
  using V = Vec<W>;
  using F = typename V::F;
  static constexpr int64_t kPanel = 2 * W;

  // c [R, kPanel] (+)= sum over k of a(r, k) b[k * b_row + ...], with a(r, k) = a[r * a_row + k * a_k]. Calls aside()
  // for every k.
  template <int R, class Aside>
  static GADCORE_INLINE void tile(const float* a, int64_t a_row, int64_t a_k, const float* b, int64_t b_row,
                                  int64_t depth, float* c, int64_t c_row, bool add, Aside& aside) {
    F low[R], high[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      low[r] = add ? V::load(c + r * c_row) : V::splat(0.0f);
      high[r] = add ? V::load(c + r * c_row + W) : V::splat(0.0f);
    }
    for (int64_t k = 0; k < depth; ++k, a += a_k, b += b_row) {
      const F b_low = V::load(b), b_high = V::load(b + W);
      aside();
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        // A scalar operand: one broadcast from memory.
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

  // The same for 1 to kTile rows.
  template <bool kAdd, bool kTransposed, class Aside>
  static GADCORE_INLINE void of(int64_t rows, const float* a, int64_t a_stride, const float* b, int64_t b_row,
                                int64_t depth, float* c, int64_t c_row, Aside& aside) {
    const int64_t a_row = kTransposed ? 1 : a_stride, a_k = kTransposed ? a_stride : 1;
    switch (rows) {
      case 6:
        return tile<6>(a, a_row, a_k, b, b_row, depth, c, c_row, kAdd, aside);
      case 5:
        return tile<5>(a, a_row, a_k, b, b_row, depth, c, c_row, kAdd, aside);
      case 4:
        return tile<4>(a, a_row, a_k, b, b_row, depth, c, c_row, kAdd, aside);
      case 3:
        return tile<3>(a, a_row, a_k, b, b_row, depth, c, c_row, kAdd, aside);
      case 2:
        return tile<2>(a, a_row, a_k, b, b_row, depth, c, c_row, kAdd, aside);
      default:
        return tile<1>(a, a_row, a_k, b, b_row, depth, c, c_row, kAdd, aside);
    }
  }

  template <bool kAdd, bool kTransposed>
  static GADCORE_INLINE void of(int64_t rows, const float* a, int64_t a_stride, const float* b, int64_t b_row,
                                int64_t depth, float* c, int64_t c_row) {
    Nothing aside;
    of<kAdd, kTransposed>(rows, a, a_stride, b, b_row, depth, c, c_row, aside);
  }
};

}  // namespace gadcore
