// s = scale * dropout(x) a^T over the columns of 16-bit activations: S of LoRA, and dS with a =
// B^T. The mask is drawn again, x is read once, and nothing but s is written: the floor is the
// bytes of x. On the way the factors of a low-rank term are made for the product that takes them.
//
// A product does not care in which order its depth is summed, so a lane takes eight neighbours of a
// row, 16 bytes, and they are the fragment. fp32 operands are the sum of three bf16 (24 bits), so
// sums are as exact as fp32 ones.

#include "rank_passes.cuh"

namespace pk {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;

struct ShrinkArgs {
    const void* x; // [M, depth]
    const void* a; // [rank, depth], or transposed
    int64_t m, depth;
    int rank;
    float scale;
    Dropout dropout;
    float* s; // [M, rank], rows `s_stride` apart
    int64_t s_stride;
    // The factors of the low-rank term as bf16 parts, for a matmul that takes them as more depth:
    // u [M, columns] from s, v [outputs, columns] (across: [columns, outputs]) from `up`.
    uint16_t* u;
    uint16_t* v;
    const void* up; // [outputs, rank], or across: [rank, outputs]
    int up_dtype;
    bool across;
    bool whole; // up is bf16 itself: u = (high, low), v = (up, up); else (high, high, low) and
                // (high, low, high)
    float u_scale;
    int64_t outputs;
    int columns;
    int stages; // of a warp's ring
};

__device__ __forceinline__ uint16_t part_of(float v, bool low) {
    uint32_t parts[2];
    split_pair<2>(v, v, parts);
    return (uint16_t)(low ? parts[1] : parts[0]);
}

// Column c of u or v: which rank it belongs to, and whether it takes the low part.
struct Column {
    int rank;
    bool used, low;
    __device__ __forceinline__ Column(int c, const ShrinkArgs& a, bool of_u) {
        int third = c / a.rank;
        rank = c % a.rank;
        used = third < (a.whole ? 2 : 3);
        low = a.whole ? of_u && third == 1 : third == (of_u ? 2 : 1);
    }
};

// Threads `thread`, `thread` + `step` .. make v, each an output's column (across: a piece of a
// row).
__device__ __forceinline__ void make_v(const ShrinkArgs& a, unsigned thread, unsigned step) {
    unsigned outputs = (unsigned)a.outputs, columns = (unsigned)a.columns;
    if (a.across) { // eight outputs of one column at a time
        unsigned pieces = outputs / 8;
        for (unsigned i = thread; i < pieces * columns; i += step) {
            unsigned c = i / pieces, o = i % pieces * 8;
            Column column((int)c, a, false);
            uint32_t w[4] = {};
            if (column.used)
                for (int j = 0; j < 8; ++j) {
                    float v = load_as_float(a.up, a.up_dtype, column.rank * a.outputs + o + j);
                    w[j / 2] |= (uint32_t)part_of(v, column.low) << 16 * (j % 2);
                }
            *(uint4*)(a.v + (int64_t)c * outputs + o) = uint4{w[0], w[1], w[2], w[3]};
        }
        return;
    }
    for (unsigned i = thread; i < outputs * columns; i += step) {
        unsigned o = i / columns;
        Column column((int)(i % columns), a, false);
        a.v[i] = column.used
                     ? part_of(load_as_float(a.up, a.up_dtype, (int64_t)o * a.rank + column.rank),
                               column.low)
                     : (uint16_t)0;
    }
}

// 8 neighbours in depth of one row of a, as they are stored. kTransposed: depth is the slow axis.
template <int kParts, bool kTransposed>
struct AdapterRun {
    uint32_t words[kParts == 1 && !kTransposed ? 4 : 8]; // pairs of halves, one half or one fp32

    __device__ __forceinline__ void load(const ShrinkArgs& a, int r, int64_t k) {
        constexpr int kWords = kParts == 1 && !kTransposed ? 4 : 8;
#pragma unroll
        for (int i = 0; i < kWords; ++i)
            words[i] = 0;
        if (r >= a.rank || k >= a.depth)
            return;
        if constexpr (kTransposed) {
            int64_t at = k * a.rank + r;
#pragma unroll
            for (int i = 0; i < 8; ++i)
                words[i] = kParts == 1 ? ((const uint16_t*)a.a)[at + i * a.rank]
                                       : ((const uint32_t*)a.a)[at + i * a.rank];
        } else {
            const char* p = (const char*)a.a + (r * a.depth + k) * (kParts == 1 ? 2 : 4);
#pragma unroll
            for (int i = 0; i < kWords; i += 4) {
                uint4 v = *(const uint4*)(p + 4 * i);
                words[i] = v.x, words[i + 1] = v.y, words[i + 2] = v.z, words[i + 3] = v.w;
            }
        }
    }
    // Elements 2 i and the next as parts in pairs.
    __device__ __forceinline__ void pair(int i, uint32_t parts[kParts]) const {
        if constexpr (kParts > 1)
            split_pair<kParts>(bits_float(words[2 * i]), bits_float(words[2 * i + 1]), parts);
        else if constexpr (kTransposed)
            parts[0] = words[2 * i] | words[2 * i + 1] << 16;
        else
            parts[0] = words[i];
    }
};

// kRowTiles x 16 rows and 8 kTiles ranks a block; its warps share the depth. x comes through each
// warp's ring, the adapter a turn ahead in registers. Tensor cores cut off where they add, so 32 of
// the depth are summed on their own, small parts first, and added as fp32.
template <int kTiles, int kRowTiles>
struct ShrinkPlan {
    static constexpr int kRows = 16 * kRowTiles, kRanks = 8 * kTiles;
    static constexpr int kHalves = kTiles == 2 ? 2 : 1; // 32 of the depth each, in a turn of a warp
    static constexpr int kStep = 32 * kHalves;
    static constexpr int kChunks = kStep / 8; // of 16 bytes, in a row of a stage
    static constexpr int kStage = kRows * kStep * 2;
    static constexpr int kSums = kWarps * kRows * kRanks * 4; // where the rings were
    // Of a stage: where a row's chunk stands. Rows of 128 bytes change halves, so that the eight
    // lanes of a read meet eight banks' groups.
    static __device__ __forceinline__ int at(int row, int chunk) {
        int exchanged = kChunks == 8 ? chunk ^ (row & 1) << 2 : chunk;
        return (row * kChunks + exchanged) * 16;
    }
};

template <int kDtype, int kParts, bool kTransposed, bool kDropout, int kTiles, int kRowTiles>
__global__ void __launch_bounds__(kThreads, 1) shrink_kernel(ShrinkArgs a) {
    using P = ShrinkPlan<kTiles, kRowTiles>;
    constexpr int kHalves = P::kHalves, kStep = P::kStep, kStride = kWarps * kStep;
    PK_DYNAMIC_SHARED(memory);
    int tid = (int)threadIdx.x, lane = tid % 32, warp = tid / 32, g = lane / 4, t = lane % 4;
    unsigned char* ring = memory + warp * a.stages * P::kStage;
    int64_t first_m = blockIdx.x * (int64_t)P::kRows;
    int first_r = (int)blockIdx.y * P::kRanks;
    uint64_t key = kDropout ? (uint64_t)*a.dropout.seed : 0;
    float acc[kRowTiles][kTiles][4] = {};

    // This lane copies chunk lane % kChunks of every (32 / kChunks)-th row.
    constexpr int kApart = 32 / P::kChunks;
    int copy_row = lane / P::kChunks, copy_chunk = lane % P::kChunks, copy_slot = 0;
    int64_t copy_k = warp * kStep;
    const uint16_t* from =
        (const uint16_t*)a.x + (first_m + copy_row) * a.depth + copy_k + 8 * copy_chunk;
    auto copy = [&]() {
        if (copy_k < a.depth) {
            bool inside = copy_k + 8 * copy_chunk < a.depth;
#pragma unroll
            for (int i = 0; i < P::kRows / kApart; ++i) {
                int row = copy_row + kApart * i;
                cp_async16(ring + copy_slot * P::kStage + P::at(row, copy_chunk),
                           from + i * (kApart * a.depth), inside && first_m + row < a.m);
            }
        }
        cp_async_commit();
        copy_k += kStride;
        from += kStride;
        copy_slot = copy_slot + 1 == a.stages ? 0 : copy_slot + 1;
    };
    AdapterRun<kParts, kTransposed> now[kHalves][kTiles], next[kHalves][kTiles];
    auto load = [&](int64_t k, AdapterRun<kParts, kTransposed>(&run)[kHalves][kTiles]) {
#pragma unroll
        for (int half = 0; half < kHalves; ++half)
#pragma unroll
            for (int n = 0; n < kTiles; ++n)
                run[half][n].load(a, first_r + 8 * n + g, k + 32 * half + 8 * t);
    };
    for (int i = 0; i < a.stages - 1; ++i)
        copy();
    int64_t k = warp * kStep;
    load(k, now);
    if (a.v != nullptr && blockIdx.y == 0) // while the first of x is on its way
        make_v(a, blockIdx.x * kThreads + tid, gridDim.x * kThreads);
    int slot = 0;
    for (; k < a.depth; k += kStride) {
        wait_for_stage(a.stages);
        // Rows 16 i + g and 8 further, 8 elements from k + 32 half + 8 t on.
        uint4 x[kRowTiles][2][kHalves];
#pragma unroll
        for (int i = 0; i < 2 * kRowTiles; ++i)
#pragma unroll
            for (int half = 0; half < kHalves; ++half)
                x[i / 2][i % 2][half] =
                    *(const uint4*)(ring + slot * P::kStage + P::at(8 * i + g, 4 * half + t));
        slot = slot + 1 == a.stages ? 0 : slot + 1;
        load(k + kStride, next);
        copy(); // to the stage that all lanes have read a turn ago
        if constexpr (kDropout) {
#pragma unroll
            for (int i = 0; i < 2 * kHalves * kRowTiles; ++i) {
                int rows8 = i / kHalves, half = i % kHalves;
                uint4& v = x[rows8 / 2][rows8 % 2][half];
                int64_t c = k + 32 * half + 8 * t;
                uint64_t block = (uint64_t)((first_m + 8 * rows8 + g) * a.depth + c) >> 2;
                Philox4 low = philox(key, block), high = philox(key, block + 1);
                v.x = masked_pair<kDtype>(v.x, low.w[0], low.w[1], a.dropout);
                v.y = masked_pair<kDtype>(v.y, low.w[2], low.w[3], a.dropout);
                v.z = masked_pair<kDtype>(v.z, high.w[0], high.w[1], a.dropout);
                v.w = masked_pair<kDtype>(v.w, high.w[2], high.w[3], a.dropout);
            }
        }
#pragma unroll
        for (int n = 0; n < kTiles; ++n)
#pragma unroll
            for (int half = 0; half < kHalves; ++half) {
                uint32_t b[4][kParts];
#pragma unroll
                for (int i = 0; i < 4; ++i)
                    now[half][n].pair(i, b[i]);
                float sum[kRowTiles][4] = {};
#pragma unroll
                for (int p = kParts - 1; p >= 0; --p)
#pragma unroll
                    for (int i = 0; i < kRowTiles; ++i) {
                        const uint4 &upper = x[i][0][half], &lower = x[i][1][half];
                        const uint32_t first[4] = {upper.x, lower.x, upper.y, lower.y};
                        const uint32_t second[4] = {upper.z, lower.z, upper.w, lower.w};
                        mma_m16n8k16<kDtype>(sum[i], first, b[0][p], b[1][p], sum[i]);
                        mma_m16n8k16<kDtype>(sum[i], second, b[2][p], b[3][p], sum[i]);
                    }
#pragma unroll
                for (int i = 0; i < 4 * kRowTiles; ++i)
                    acc[i / 4][n][i % 4] += sum[i / 4][i % 4];
            }
#pragma unroll
        for (int i = 0; i < kHalves * kTiles; ++i)
            now[i / kTiles][i % kTiles] = next[i / kTiles][i % kTiles];
    }

    cp_async_wait<0>();
    __syncthreads(); // nobody reads a ring any more
    float* partial = (float*)memory;
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i)
#pragma unroll
        for (int n = 0; n < kTiles; ++n)
#pragma unroll
            for (int c = 0; c < 4; ++c)
                partial[(warp * P::kRows + 16 * i + g + 8 * (c / 2)) * P::kRanks + 8 * n + 2 * t +
                        c % 2] = acc[i][n][c];
    __syncthreads();
    for (int i = tid; i < P::kRows * P::kRanks; i += kThreads) {
        int64_t m = first_m + i / P::kRanks;
        int r = first_r + i % P::kRanks;
        if (m >= a.m || r >= a.rank)
            continue;
        float sum = 0.0f;
        for (int w = 0; w < kWarps; ++w)
            sum += partial[w * P::kRows * P::kRanks + i];
        sum *= a.scale;
        a.s[m * a.s_stride + r] = sum;
        if (a.u == nullptr)
            continue;
        uint16_t* u = a.u + m * a.columns;
        for (int c = r; c < a.columns; c += a.rank) {
            Column column(c, a, true);
            u[c] = column.used ? part_of(sum * a.u_scale, column.low) : (uint16_t)0;
        }
    }
}

template <int kDtype, int kParts, bool kTransposed, bool kDropout, int kTiles, int kRowTiles>
int shrink(ShrinkArgs a, int shared_limit, void* stream) {
    using P = ShrinkPlan<kTiles, kRowTiles>;
    dim3 grid((unsigned)ceil_div(a.m, P::kRows), (unsigned)ceil_div(a.rank, P::kRanks));
    a.stages = stages_for(kWarps * P::kStage, shared_limit);
    int bytes = a.stages * kWarps * P::kStage;
    return launch("shrink", shrink_kernel<kDtype, kParts, kTransposed, kDropout, kTiles, kRowTiles>,
                  grid, kThreads, bytes < P::kSums ? P::kSums : bytes, stream, a);
}

template <int kDtype, int kParts, bool kTransposed, bool kDropout>
int shrink(const ShrinkArgs& a, int shared_limit, void* stream) {
    if (a.rank > 16)
        return shrink<kDtype, kParts, kTransposed, kDropout, 4, 1>(a, shared_limit, stream);
    // Few rows are spread over more blocks; the order of the sums is the same.
    if (a.m > 2048)
        return shrink<kDtype, kParts, kTransposed, kDropout, 2, 2>(a, shared_limit, stream);
    return shrink<kDtype, kParts, kTransposed, kDropout, 2, 1>(a, shared_limit, stream);
}

template <int kDtype, int kParts>
int shrink(const ShrinkArgs& a, bool transposed, int shared_limit, void* stream) {
    if (a.dropout.seed != nullptr) // over x, whose adapter is not transposed
        return transposed ? kBadArgument
                          : shrink<kDtype, kParts, false, true>(a, shared_limit, stream);
    return transposed ? shrink<kDtype, kParts, true, false>(a, shared_limit, stream)
                      : shrink<kDtype, kParts, false, false>(a, shared_limit, stream);
}

} // namespace
} // namespace pk

// s [M, rank] = scale * dropout(x) a^T; x [M, depth], a [rank, depth] or transposed, of x's dtype
// or, for bf16 x, fp32; depth a multiple of 8, x and a on 16 bytes. u and v (both or none): see
// ShrinkArgs; `columns` holds two (bf16 `up`) or three times the rank, rounded up to 8. A null seed
// means no dropout; with one, a is not transposed. `shared_limit`: bytes a block may have.
extern "C" int pk_cuda_shrink(const void* x, int dtype, int64_t m, int64_t depth, const void* a,
                              int a_dtype, int rank, int transposed, float scale,
                              const int64_t* seed, uint32_t threshold, float keep_scale, float* s,
                              int64_t s_stride, void* u, void* v, const void* up, int up_dtype,
                              int across, int64_t outputs, int columns, float u_scale,
                              int shared_limit, void* stream) {
    bool halves = dtype == pk::kBF16 || dtype == pk::kF16;
    bool fits = halves && depth % 8 == 0 && pk::aligned16(x) && pk::aligned16(a) && rank >= 1 &&
                (a_dtype == dtype || (a_dtype == pk::kF32 && dtype == pk::kBF16));
    if (fits && m == 0)
        return pk::kOk;
    if (!fits || (u == nullptr) != (v == nullptr) || (across && outputs % 8 != 0) ||
        outputs * columns >= ((int64_t)1 << 31))
        return pk::kBadArgument;
    pk::ShrinkArgs p = {};
    p.x = x, p.a = a;
    p.m = m, p.depth = depth, p.rank = rank, p.scale = scale;
    p.dropout = {seed, threshold, keep_scale};
    p.s = s, p.s_stride = s_stride, p.u = (uint16_t*)u, p.v = (uint16_t*)v;
    p.up = up, p.up_dtype = up_dtype, p.across = across != 0, p.whole = up_dtype == pk::kBF16;
    p.u_scale = u_scale, p.outputs = outputs, p.columns = columns;
    if (dtype == pk::kF16)
        return pk::shrink<pk::kF16, 1>(p, transposed != 0, shared_limit, stream);
    return a_dtype == pk::kF32 ? pk::shrink<pk::kBF16, 3>(p, transposed != 0, shared_limit, stream)
                               : pk::shrink<pk::kBF16, 1>(p, transposed != 0, shared_limit, stream);
}
PK_LAUNCHER(shrink)
