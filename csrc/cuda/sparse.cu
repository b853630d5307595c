// A linear of which some entries train. Entries are sorted flat positions in W [N, K] with a value
// each: they are added to a dense copy of W, or multiplied with few rows of x as a term of their
// own; their gradient is a dot product of a column of dy and one of x, which lie in rows of
// transposed copies. No atomics: entries are unique, and a warp or block makes each sum.

#include "../common/convert.h"
#include "primitives.cuh"

namespace pk {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kTile = 64;   // of a transpose, both ways
constexpr int kEntries = 4; // whose rows a warp reads at a time
constexpr int kVector = 8;  // neighbouring elements of a row that a lane takes

__device__ __forceinline__ int count_bits(uint32_t u) {
    u -= (u >> 1) & 0x55555555u;
    u = (u & 0x33333333u) + ((u >> 2) & 0x33333333u);
    return (int)((((u + (u >> 4)) & 0x0f0f0f0fu) * 0x01010101u) >> 24);
}

// How many of the sorted indices lie below `want`: a warp narrows the range 33-fold at a time.
__device__ __forceinline__ int64_t below(const int64_t* indices, int64_t entries, int64_t want,
                                         int lane) {
    int64_t low = 0, high = entries; // the answer is in [low, high]
    while (low < high) {
        int64_t step = (high - low) / 33 + 1;
        int64_t probe = low + (lane + 1) * step - 1;
        bool less = probe < high && indices[probe] < want;
        int passed = count_bits(__ballot_sync(0xffffffffu, less));
        low += passed * step;
        high = min64(high, low + step - 1);
    }
    return low;
}

// weight[row, col] += value, summed in fp32 and rounded once.
template <int kDtype>
__global__ void __launch_bounds__(kThreads)
    scatter_add_kernel(void* weight, const int64_t* indices, const void* values, int values_dtype,
                       int64_t entries, int64_t n, int64_t k, int64_t stride_row,
                       int64_t stride_col) {
    int64_t e = blockIdx.x * (int64_t)kThreads + threadIdx.x;
    if (e >= entries)
        return;
    int64_t index = indices[e];
    if (index < 0 || index >= n * k)
        return;
    int64_t row = index / k;
    int64_t place = row * stride_row + (index - row * k) * stride_col;
    float sum = load_as_float(weight, kDtype, place) + load_as_float(values, values_dtype, e);
    store_from_float(weight, kDtype, place, sum);
}

// out[c, m] = x[m, c]; rows of `out` are `stride` long, zero behind M.
template <class T>
__global__ void __launch_bounds__(kThreads)
    transpose_kernel(const T* x, T* out, int64_t m, int64_t c, int64_t stride) {
    // Pitches of an odd number of words: no bank conflicts down the columns.
    constexpr int kPitch = kTile + (sizeof(T) == 2 ? 2 : 1);
    PK_SHARED(T, tile, kTile * kPitch);
    int64_t first_m = blockIdx.x * (int64_t)kTile, first_c = blockIdx.y * (int64_t)kTile;
    int across = (int)threadIdx.x % kTile;
    for (int down = (int)threadIdx.x / kTile; down < kTile; down += kThreads / kTile) {
        int64_t i = first_m + down, j = first_c + across;
        tile[down * kPitch + across] = i < m && j < c ? x[i * c + j] : (T)0;
    }
    __syncthreads();
    for (int down = (int)threadIdx.x / kTile; down < kTile; down += kThreads / kTile) {
        int64_t j = first_c + down, i = first_m + across;
        if (j < c && i < stride)
            out[j * stride + i] = tile[across * kPitch + down];
    }
}

struct TermArgs {
    void* y;       // [M, N], added to in place
    const void* x; // [M, K]
    const int64_t* indices;
    const void* values;
    int values_dtype;
    int64_t entries, m, n, k;
};

// y[m, n] += sum over the entries of row n of value x[m, column]: a warp for each n, up to kM rows.
template <int kDtype, int kM>
__global__ void __launch_bounds__(kThreads) sparse_term_kernel(TermArgs a) {
    int lane = (int)threadIdx.x % 32;
    int64_t n = blockIdx.x * (int64_t)kWarps + (int)threadIdx.x / 32;
    if (n >= a.n)
        return;
    float acc[kM] = {};
    int64_t first = n * a.k;
    for (int64_t e = below(a.indices, a.entries, first, lane) + lane;; e += 32) {
        int64_t column = e < a.entries ? a.indices[e] - first : a.k;
        bool own = column >= 0 && column < a.k;
        if (!__any_sync(0xffffffffu, own))
            break;
        if (own) {
            float value = load_as_float(a.values, a.values_dtype, e);
#pragma unroll
            for (int m = 0; m < kM; ++m)
                if (m < a.m)
                    acc[m] = fmaf(value, load_as_float(a.x, kDtype, m * a.k + column), acc[m]);
        }
    }
#pragma unroll
    for (int m = 0; m < kM; ++m)
        for (int d = 16; d > 0; d >>= 1)
            acc[m] += __shfl_xor_sync(0xffffffffu, acc[m], d);
#pragma unroll
    for (int m = 0; m < kM; ++m)
        if (lane == m && m < a.m) {
            float sum = load_as_float(a.y, kDtype, m * a.n + n) + acc[m];
            store_from_float(a.y, kDtype, m * a.n + n, sum);
        }
}

template <int kDtype>
__device__ __forceinline__ void load_eight(const void* p, int64_t i, float v[kVector]) {
    if (kDtype == kF32) {
        const float4* f = (const float4*)((const float*)p + i);
        float4 a = f[0], b = f[1];
        v[0] = a.x, v[1] = a.y, v[2] = a.z, v[3] = a.w;
        v[4] = b.x, v[5] = b.y, v[6] = b.z, v[7] = b.w;
        return;
    }
    uint4 a = *(const uint4*)((const uint16_t*)p + i);
    const uint32_t w[4] = {a.x, a.y, a.z, a.w};
#pragma unroll
    for (int j = 0; j < kVector; ++j) {
        uint16_t h = (uint16_t)(w[j / 2] >> 16 * (j % 2));
        v[j] = kDtype == kBF16 ? bf16_to_float(h) : half_to_float(h);
    }
}

struct SampledArgs {
    const void* dy; // [N, stride]: dy transposed
    const void* x;  // [K, stride]: x transposed
    const int64_t* indices;
    int64_t entries, n, k, stride; // stride: a multiple of kVector
    float* out;                    // [entries]
};

// out[e] = dot product of row `index / k` of dy and row `index % k` of x. A warp takes kEntries
// neighbours in the list, which mostly share their row of dy; kSpread: all warps of a block take
// the same ones, each its share of the rows.
template <int kDtype, bool kSpread>
__global__ void __launch_bounds__(kThreads) sampled_rows_kernel(SampledArgs a) {
    PK_SHARED(float, partial, kWarps* kEntries);
    int lane = (int)threadIdx.x % 32, warp = (int)threadIdx.x / 32;
    int64_t group = kSpread ? (int64_t)blockIdx.x : blockIdx.x * (int64_t)kWarps + warp;
    int64_t first = group * kEntries;
    int64_t left[kEntries], right[kEntries];
    bool shared_row = true;
#pragma unroll
    for (int i = 0; i < kEntries; ++i) {
        // Behind the end, and for a position out of range, the first entry or position stands in.
        int64_t index = first < a.entries ? a.indices[min64(first + i, a.entries - 1)] : 0;
        index = index >= 0 && index < a.n * a.k ? index : 0;
        int64_t row = index / a.k;
        left[i] = row * a.stride, right[i] = (index - row * a.k) * a.stride;
        shared_row = shared_row && left[i] == left[0];
    }
    float acc[kEntries] = {};
    int64_t start = ((kSpread ? warp * 32 : 0) + lane) * (int64_t)kVector;
    for (int64_t m = start; m < a.stride; m += (kSpread ? kThreads : 32) * kVector) {
        float x[kEntries][kVector], dy[kVector];
#pragma unroll
        for (int i = 0; i < kEntries; ++i)
            load_eight<kDtype>(a.x, right[i] + m, x[i]);
        load_eight<kDtype>(a.dy, left[0] + m, dy);
#pragma unroll
        for (int i = 0; i < kEntries; ++i) {
            if (i > 0 && !shared_row)
                load_eight<kDtype>(a.dy, left[i] + m, dy);
#pragma unroll
            for (int j = 0; j < kVector; ++j)
                acc[i] = fmaf(x[i][j], dy[j], acc[i]);
        }
    }
#pragma unroll
    for (int i = 0; i < kEntries; ++i) {
        for (int d = 16; d > 0; d >>= 1)
            acc[i] += __shfl_xor_sync(0xffffffffu, acc[i], d);
        if (!kSpread && lane == i && first + i < a.entries)
            a.out[first + i] = acc[i];
        if (kSpread && lane == 0)
            partial[warp * kEntries + i] = acc[i];
    }
    if (!kSpread)
        return;
    __syncthreads();
    int i = (int)threadIdx.x;
    if (i < kEntries && first + i < a.entries) {
        float sum = 0.0f;
        for (int w = 0; w < kWarps; ++w)
            sum += partial[w * kEntries + i];
        a.out[first + i] = sum;
    }
}

template <int kDtype>
int run_sampled(const SampledArgs& a, void* stream) {
    constexpr int64_t kFills = 4 * 132 * (int64_t)kWarps; // warps that fill a large GPU
    int64_t groups = ceil_div(a.entries, kEntries);
    bool spread = groups < kFills && a.stride > 32 * kVector;
    auto kernel = spread ? sampled_rows_kernel<kDtype, true> : sampled_rows_kernel<kDtype, false>;
    unsigned blocks = (unsigned)(spread ? groups : ceil_div(groups, kWarps));
    return launch("sampled_rows", kernel, blocks, kThreads, 0, stream, a);
}

} // namespace
} // namespace pk

extern "C" {

int pk_cuda_scatter_add(void* weight, int dtype, int64_t n, int64_t k, int64_t stride_row,
                        int64_t stride_col, const int64_t* indices, const void* values,
                        int values_dtype, int64_t entries, void* stream) {
    if (entries == 0)
        return pk::kOk;
    auto kernel = dtype == pk::kF32    ? pk::scatter_add_kernel<pk::kF32>
                  : dtype == pk::kBF16 ? pk::scatter_add_kernel<pk::kBF16>
                                       : pk::scatter_add_kernel<pk::kF16>;
    unsigned blocks = (unsigned)pk::ceil_div(entries, pk::kThreads);
    return pk::launch("scatter_add", kernel, blocks, pk::kThreads, 0, stream, weight, indices,
                      values, values_dtype, entries, n, k, stride_row, stride_col);
}
PK_LAUNCHER(scatter_add)

// x [M, C] of elements of 2 or 4 bytes; out [C, stride].
int pk_cuda_transpose(const void* x, int size, int64_t m, int64_t c, int64_t stride, void* out,
                      void* stream) {
    if (stride == 0 || c == 0)
        return pk::kOk;
    dim3 grid((unsigned)pk::ceil_div(stride, pk::kTile), (unsigned)pk::ceil_div(c, pk::kTile));
    if (size == 4)
        return pk::launch("transpose", pk::transpose_kernel<uint32_t>, grid, pk::kThreads, 0,
                          stream, (const uint32_t*)x, (uint32_t*)out, m, c, stride);
    return pk::launch("transpose", pk::transpose_kernel<uint16_t>, grid, pk::kThreads, 0, stream,
                      (const uint16_t*)x, (uint16_t*)out, m, c, stride);
}
PK_LAUNCHER(transpose)

// At most 8 rows.
int pk_cuda_sparse_term(void* y, const void* x, int dtype, int64_t m, int64_t n, int64_t k,
                        const int64_t* indices, const void* values, int values_dtype,
                        int64_t entries, void* stream) {
    if (m == 0 || n == 0 || entries == 0)
        return pk::kOk;
    if (m > 8)
        return pk::kBadArgument;
    pk::TermArgs a = {y, x, indices, values, values_dtype, entries, m, n, k};
    auto kernel = m == 1 ? (dtype == pk::kF32    ? pk::sparse_term_kernel<pk::kF32, 1>
                            : dtype == pk::kBF16 ? pk::sparse_term_kernel<pk::kBF16, 1>
                                                 : pk::sparse_term_kernel<pk::kF16, 1>)
                         : (dtype == pk::kF32    ? pk::sparse_term_kernel<pk::kF32, 8>
                            : dtype == pk::kBF16 ? pk::sparse_term_kernel<pk::kBF16, 8>
                                                 : pk::sparse_term_kernel<pk::kF16, 8>);
    unsigned blocks = (unsigned)pk::ceil_div(n, pk::kWarps);
    return pk::launch("sparse_term", kernel, blocks, pk::kThreads, 0, stream, a);
}
PK_LAUNCHER(sparse_term)

// dy and x transposed, rows of `stride` elements (a multiple of 8) that begin on 16 bytes.
int pk_cuda_sampled_rows(const void* dy, const void* x, int dtype, int64_t n, int64_t k,
                         int64_t stride, const int64_t* indices, int64_t entries, float* out,
                         void* stream) {
    if (entries == 0)
        return pk::kOk;
    if (stride % pk::kVector != 0 || (uintptr_t)dy % 16 != 0 || (uintptr_t)x % 16 != 0)
        return pk::kBadArgument;
    pk::SampledArgs a = {dy, x, indices, entries, n, k, stride, out};
    return dtype == pk::kF32    ? pk::run_sampled<pk::kF32>(a, stream)
           : dtype == pk::kBF16 ? pk::run_sampled<pk::kBF16>(a, stream)
                                : pk::run_sampled<pk::kF16>(a, stream);
}
PK_LAUNCHER(sampled_rows)
}
