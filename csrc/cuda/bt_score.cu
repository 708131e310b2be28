// The Bradley-Terry last-token op; kernels/bt_triton.py states the mathematics, and does the same in Triton.
//
// What CUDA C++ adds here: the forward launch also sums the loss (the last block to finish sums what the groups left,
// in a fixed order; an integer counts the blocks), where Triton's result needs a second launch for that; and a first
// call compiles nothing. What it does not add: bytes. Both versions read S H elements forward, and read S H and write
// T H backward, by 128-bit accesses; for T much above S the backward launch is a memset in either, and the choice
// between them is one of launch overhead. Neither has been timed against the other yet.
//
// The order of every sum is fixed by the arguments' shapes: the same bits on every run.
#include <type_traits>

#include "device.cuh"

namespace gadcore {
namespace {

constexpr int kForwardThreads = 512, kForwardWarps = kForwardThreads / 32;
constexpr int kBackwardThreads = 256, kBackwardWarps = kBackwardThreads / 32;
// Rows of d_hidden that a block owns. Every block looks through last_index: 8 bytes a sequence, from the caches, for
// kOutRows rows written.
constexpr int kOutRows = 16;

// The rows of hidden in which the sequences end. column_stride is 1 wherever vectors are loaded.
template <class T>
struct LastRows {
  const T* hidden;
  int64_t row_stride, column_stride;
  const int64_t* last_index;
  int width;

  __device__ const T* row(int64_t sequence) const { return hidden + last_index[sequence] * row_stride; }
};

__device__ __forceinline__ float softplus(float x) { return fmaxf(x, 0.0f) + log1pf(expf(-fabsf(x))); }

__device__ __forceinline__ float sigmoid(float x) {
  const float e = expf(-fabsf(x));
  return (x >= 0.0f ? 1.0f : e) / (1.0f + e);
}

// N elements of a row as they lie, or one element of a row of any stride.
template <int N, class T>
__device__ __forceinline__ Vector<T, N> load_columns(const T* row, int column, int64_t column_stride) {
  if constexpr (N == 1) {
    return {{row[column * column_stride]}};
  } else {
    return load<N>(row + column);
  }
}

template <int N>
__device__ __forceinline__ void load_weight(const float* weight, int column, float (&w)[N]) {
  constexpr int kPart = N < 4 ? N : 4;
#pragma unroll
  for (int part = 0; part < N; part += kPart) {
    const Vector<float, kPart> four = load<kPart>(weight + column + part);
#pragma unroll
    for (int k = 0; k < kPart; ++k) w[part + k] = four.at[k];
  }
}

// w . row, by one warp, in every lane. fma by name: the same instructions for every row, so equal rows score equally.
template <int N, class T>
__device__ __forceinline__ float score_of(
    const T* row, int64_t column_stride, const float* weight, int width, int lane) {
  // So many loads are asked for before the first is waited for: a warp has its row to itself.
  constexpr int kBatch = 4;
  float sum = 0.0f;
  for (int begin = lane * N; begin < width; begin += kBatch * 32 * N) {
    Vector<T, N> x[kBatch] = {};
    float w[kBatch][N] = {};
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      const int column = begin + j * 32 * N;
      if (column >= width) continue;
      x[j] = load_columns<N>(row, column, column_stride);
      load_weight<N>(weight, column, w[j]);
    }
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      if (begin + j * 32 * N >= width) continue;
#pragma unroll
      for (int k = 0; k < N; ++k) sum = fmaf(to_float(x[j].at[k]), w[j][k], sum);
    }
  }
  return warp_sum(sum);
}

struct Pairs {
  float *scores, *pair_loss, *margin, *slope;
};

// The pairs of the sequences start .. end - 1, from their scores, by one warp. The group's loss, in every lane.
__device__ __forceinline__ float form_pairs(int64_t start, int64_t end, bool taught, const Pairs& out, int lane) {
  const float teacher = taught && start < end ? out.scores[start] : 0.0f;
  float loss = 0.0f, slopes = 0.0f;
  for (int64_t s = start + lane; s < end; s += 32) {
    const bool paired = taught && s > start;
    const float margin = paired ? teacher - out.scores[s] : 0.0f;
    const float pair_loss = paired ? softplus(-margin) : 0.0f;
    const float slope = paired ? sigmoid(-margin) : 0.0f;
    out.margin[s] = margin;
    out.pair_loss[s] = pair_loss;
    if (!taught || s > start) out.slope[s] = slope;
    loss += pair_loss;
    slopes += slope;
  }
  slopes = warp_sum(slopes);
  if (lane == 0 && taught && start < end) out.slope[start] = -slopes;
  return warp_sum(loss);
}

// A block per group: a warp per sequence, then one warp for the pairs; the last block to come here sums the loss.
// One block on an SM is enough, as there are few groups: the registers are better spent on loads in flight.
template <class T, int N>
__global__ void __launch_bounds__(kForwardThreads, 1) bt_forward_kernel(
    LastRows<T> rows, const float* __restrict__ weight, const float* __restrict__ bias,
    const int64_t* __restrict__ offsets, const uint8_t* __restrict__ has_teacher, int groups, Pairs out,
    float* group_loss, float* loss, unsigned* blocks_done) {
  __shared__ float partial[kForwardWarps];
  __shared__ bool last;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int group = blockIdx.x;

  if (group < groups) {  // there is a block also where there is no group: the loss is 0 then
    const int64_t start = offsets[group], end = offsets[group + 1];
    const float b = bias ? *bias : 0.0f;
    for (int64_t s = start + warp; s < end; s += kForwardWarps) {
      const float score = score_of<N>(rows.row(s), rows.column_stride, weight, rows.width, lane) + b;
      if (lane == 0) out.scores[s] = score;
    }
    __syncthreads();
    if (warp == 0) {
      const float sum = form_pairs(start, end, has_teacher[group], out, lane);
      if (lane == 0) group_loss[group] = sum;
    }
  }
  if (threadIdx.x == 0) {
    // group_loss must be seen by whoever sees the count.
    __threadfence();
    last = atomicAdd(blocks_done, 1u) == gridDim.x - 1;
  }
  __syncthreads();
  if (!last) return;

  __threadfence();
  float sum = 0.0f;
  // Past this SM's L1, where another block's stores do not show.
  for (int g = threadIdx.x; g < groups; g += kForwardThreads) sum += __ldcg(group_loss + g);
  sum = warp_sum(sum);
  if (lane == 0) partial[warp] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    float total = 0.0f;
    for (int w = 0; w < kForwardWarps; ++w) total += partial[w];
    *loss = total;
    *blocks_done = 0;  // as the next launch on this stream expects it
  }
}

// d_weight for a block of columns, and d_bias in the first block.
template <class T, int N>
__device__ __forceinline__ void reduce_columns(
    const LastRows<T>& rows, const float* grad_scores, int sequences, float* d_weight, float* d_bias) {
  // With vectors, one cache line of a row: the least that a gather should fetch.
  constexpr int kLanes = N == 1 ? 32 : 128 / 16;
  constexpr int kColumns = kLanes * N;
  constexpr int kRows = kBackwardThreads / kLanes;
  __shared__ float partial[kRows][kColumns + 1];
  __shared__ float partial_bias[kRows];
  const int row_lane = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
  const int first = blockIdx.x * kColumns, column = first + lane * N;

  float sum[N] = {};
  float total = 0.0f;
  if (column < rows.width) {
    constexpr int kBatch = 4;
    for (int begin = row_lane; begin < sequences; begin += kBatch * kRows) {
      Vector<T, N> x[kBatch] = {};
      float g[kBatch] = {};
#pragma unroll
      for (int j = 0; j < kBatch; ++j) {
        const int s = begin + j * kRows;
        if (s >= sequences) continue;
        g[j] = grad_scores[s];
        x[j] = load_columns<N>(rows.row(s), column, rows.column_stride);
      }
#pragma unroll
      for (int j = 0; j < kBatch; ++j) {
        if (begin + j * kRows >= sequences) continue;
#pragma unroll
        for (int k = 0; k < N; ++k) sum[k] = fmaf(g[j], to_float(x[j].at[k]), sum[k]);
        total += g[j];
      }
    }
  }
#pragma unroll
  for (int k = 0; k < N; ++k) partial[row_lane][lane * N + k] = sum[k];
  if (lane == 0) partial_bias[row_lane] = total;
  __syncthreads();
  for (int c = threadIdx.x; c < kColumns && first + c < rows.width; c += kBackwardThreads) {
    float all = 0.0f;
    for (int r = 0; r < kRows; ++r) all += partial[r][c];
    d_weight[first + c] = all;
  }
  if (blockIdx.x == 0 && threadIdx.x == 0) {
    float all = 0.0f;
    for (int r = 0; r < kRows; ++r) all += partial_bias[r];
    *d_bias = all;
  }
}

// kOutRows rows of d_hidden from `first` on: 0, or (sum of the gradients of the sequences that end there) * w.
template <class T, int N>
__device__ __forceinline__ void fill_rows(
    const int64_t* last_index, const float* grad_scores, int sequences, const float* weight, int width, int64_t first,
    int64_t tokens, T* d_hidden) {
  __shared__ unsigned hit;  // bit r: a sequence ends in row first + r
  __shared__ float factor[kOutRows];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (threadIdx.x == 0) hit = 0;
  __syncthreads();
  unsigned mine = 0;
#pragma unroll 4
  for (int s = threadIdx.x; s < sequences; s += kBackwardThreads) {
    const int64_t r = last_index[s] - first;
    if (r >= 0 && r < kOutRows) mine |= 1u << r;
  }
  if (mine) atomicOr(&hit, mine);
  __syncthreads();
  const unsigned hits = hit;

  const int rows = static_cast<int>(tokens - first < kOutRows ? tokens - first : kOutRows);
  T* const to = d_hidden + first * width;
  if (!hits) {
    // Nearly every block. The rows are one run of memory that begins at a multiple of 16 bytes, whatever width is.
    constexpr int kFill = 16 / sizeof(T);
    const int64_t count = static_cast<int64_t>(rows) * width, whole = count / kFill * kFill;
    Vector<T, kFill> zeros;
#pragma unroll
    for (int k = 0; k < kFill; ++k) zeros.at[k] = from_float<T>(0.0f);
    for (int64_t i = threadIdx.x * kFill; i < whole; i += kBackwardThreads * kFill) store(to + i, zeros);
    if (whole + threadIdx.x < count) to[whole + threadIdx.x] = zeros.at[0];
    return;
  }

  for (int r = warp; r < kOutRows; r += kBackwardWarps) {
    if (!(hits >> r & 1)) continue;
    float sum = 0.0f;
    for (int s = lane; s < sequences; s += 32) sum += last_index[s] == first + r ? grad_scores[s] : 0.0f;
    sum = warp_sum(sum);
    if (lane == 0) factor[r] = sum;
  }
  __syncthreads();
  for (int r = 0; r < rows; ++r) {
    const bool ends_here = hits >> r & 1;
    const float scale = ends_here ? factor[r] : 0.0f;
    for (int column = threadIdx.x * N; column < width; column += kBackwardThreads * N) {
      float w[N];
      load_weight<N>(weight, column, w);
      Vector<T, N> values;
      // Not 0 * w: a row that no sequence ends in stays 0 whatever w holds.
#pragma unroll
      for (int k = 0; k < N; ++k) values.at[k] = from_float<T>(ends_here ? scale * w[k] : 0.0f);
      store(to + static_cast<int64_t>(r) * width + column, values);
    }
  }
}

// Four blocks on an SM: left to itself, the compiler would spill registers to fit eight.
template <class T, int N>
__global__ void __launch_bounds__(kBackwardThreads, 4) bt_backward_kernel(
    LastRows<T> rows, const float* __restrict__ grad_scores, const float* __restrict__ weight, int64_t tokens,
    int sequences, int weight_blocks, T* __restrict__ d_hidden, float* __restrict__ d_weight,
    float* __restrict__ d_bias) {
  const int block = blockIdx.x;
  if (block < weight_blocks) {
    // First in the grid: these wait for gathered rows, and the rest of the grid hides that.
    reduce_columns<T, N>(rows, grad_scores, sequences, d_weight, d_bias);
  } else {
    const int64_t first = static_cast<int64_t>(block - weight_blocks) * kOutRows;
    fill_rows<T, N>(rows.last_index, grad_scores, sequences, weight, rows.width, first, tokens, d_hidden);
  }
}

bool aligned(const void* address) { return reinterpret_cast<uintptr_t>(address) % 16 == 0; }

// Whether every row can be read, and written, by vectors of 16 bytes.
template <class T>
bool by_vectors(const LastRows<T>& rows, const float* weight) {
  constexpr int kVector = 16 / sizeof(T);
  return rows.column_stride == 1 && rows.row_stride % kVector == 0 && rows.width % kVector == 0 &&
         aligned(rows.hidden) && aligned(weight);
}

template <class T>
void forward(
    const LastRows<T>& rows, const float* weight, const float* bias, const int64_t* offsets, const uint8_t* has_teacher,
    int groups, const Pairs& out, float* group_loss, float* loss, unsigned* blocks_done, void* stream) {
  constexpr int kVector = 16 / sizeof(T);
  const unsigned blocks = groups > 0 ? groups : 1;
  if (by_vectors(rows, weight)) {
    GADCORE_LAUNCH((bt_forward_kernel<T, kVector>), blocks, kForwardThreads, stream, rows, weight, bias, offsets,
                   has_teacher, groups, out, group_loss, loss, blocks_done);
  } else {
    GADCORE_LAUNCH((bt_forward_kernel<T, 1>), blocks, kForwardThreads, stream, rows, weight, bias, offsets, has_teacher,
                   groups, out, group_loss, loss, blocks_done);
  }
}

template <class T>
void backward(
    const LastRows<T>& rows, const float* grad_scores, const float* weight, int64_t tokens, int sequences,
    void* d_hidden, float* d_weight, float* d_bias, void* stream) {
  constexpr int kVector = 16 / sizeof(T);
  const bool vectors = by_vectors(rows, weight);
  const int columns = vectors ? 128 / static_cast<int>(sizeof(T)) : 32;
  const int weight_blocks = (rows.width + columns - 1) / columns;
  const unsigned blocks = weight_blocks + static_cast<unsigned>((tokens + kOutRows - 1) / kOutRows);
  T* const out = static_cast<T*>(d_hidden);
  if (vectors) {
    GADCORE_LAUNCH((bt_backward_kernel<T, kVector>), blocks, kBackwardThreads, stream, rows, grad_scores, weight,
                   tokens, sequences, weight_blocks, out, d_weight, d_bias);
  } else {
    GADCORE_LAUNCH((bt_backward_kernel<T, 1>), blocks, kBackwardThreads, stream, rows, grad_scores, weight, tokens,
                   sequences, weight_blocks, out, d_weight, d_bias);
  }
}

// Calls `launch` with the rows of the type that `dtype` names.
template <class Launch>
int for_dtype(
    int dtype, const void* hidden, int64_t row_stride, int64_t column_stride, const int64_t* last_index, int64_t width,
    const Launch& launch) {
  const auto go = [&](auto* typed) {
    launch(LastRows<std::remove_const_t<std::remove_pointer_t<decltype(typed)>>>{
        typed, row_stride, column_stride, last_index, static_cast<int>(width)});
  };
  switch (dtype) {
    case kFloat32: go(static_cast<const float*>(hidden)); break;
    case kBfloat16: go(static_cast<const __nv_bfloat16*>(hidden)); break;
    default: go(static_cast<const __half*>(hidden));
  }
  return static_cast<int>(cudaGetLastError());
}

}  // namespace
}  // namespace gadcore

// hidden: [T, width] of dtype, strides in elements; last_index: [S]; weight: [width]; bias: one number or null;
// offsets: [groups + 1]; has_teacher: [groups]; scores, pair_loss, margin, slope: [S]; group_loss: [groups], scratch;
// loss: one number, the sum of pair_loss; blocks_done: one number, 0 before and after.
GADCORE_EXPORT int gadcore_bt_forward(
    int dtype, const void* hidden, int64_t row_stride, int64_t column_stride, const int64_t* last_index,
    const float* weight, const float* bias, const int64_t* offsets, const uint8_t* has_teacher, int64_t groups,
    int64_t width, float* scores, float* pair_loss, float* margin, float* slope, float* group_loss, float* loss,
    unsigned* blocks_done, void* stream) {
  using namespace gadcore;
  return for_dtype(dtype, hidden, row_stride, column_stride, last_index, width, [&](const auto& rows) {
    forward(rows, weight, bias, offsets, has_teacher, static_cast<int>(groups),
            Pairs{scores, pair_loss, margin, slope}, group_loss, loss, blocks_done, stream);
  });
}

// As above; grad_scores: [sequences]; d_hidden: [tokens, width] of dtype, contiguous, at a multiple of 16 bytes;
// d_weight: [width]; d_bias: one number.
GADCORE_EXPORT int gadcore_bt_backward(
    int dtype, const float* grad_scores, const void* hidden, int64_t row_stride, int64_t column_stride,
    const int64_t* last_index, const float* weight, int64_t tokens, int64_t sequences, int64_t width, void* d_hidden,
    float* d_weight, float* d_bias, void* stream) {
  using namespace gadcore;
  return for_dtype(dtype, hidden, row_stride, column_stride, last_index, width, [&](const auto& rows) {
    backward(rows, grad_scores, weight, tokens, static_cast<int>(sequences), d_hidden, d_weight, d_bias, stream);
  });
}
