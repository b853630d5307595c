// The passes over activations that contract with a thin matrix, for 16-bit activations:
//   shrink  s = scale * x̂ a^T         over the columns of x (S, and dS with a = B^T)
//   outer   g = scale * s^T x̂         over the rows of x    (dA, and dB from dy)
// with x̂ = dropout(x), its mask drawn again. Both read x once, in registers, and nothing but the
// result is written: the floor is the bytes of x.
//
// A product does not care in which order its depth is summed, so a lane takes eight neighbours of a
// row, 16 bytes, and they are the fragment: nothing is shuffled on the way from memory to mma.
// fp32 operands are the sum of three bf16 (24 bits), so sums are as exact as fp32 ones.

#include "../common/philox.h"
#include "epilogue.cuh"

namespace pk {
namespace {

// --- fp32 as bf16 parts -------------------------------------------------------------------------
// Each pair (low, high) of values as `kParts` pairs of bf16 whose sum they are.
template <int kParts>
__device__ __forceinline__ void split_pair(float low, float high, uint32_t parts[kParts]) {
#pragma unroll
    for (int p = 0; p < kParts; ++p) {
        parts[p] = pack2<kBF16>(low, high);
        float l = low - bits_float(parts[p] << 16), h = high - bits_float(parts[p] & 0xffff0000u);
        low = l == l ? l : 0.0f; // Inf - Inf: the first part says it all
        high = h == h ? h : 0.0f;
    }
}

// --- dropout ------------------------------------------------------------------------------------
struct Dropout {
    const int64_t* seed; // null: none
    uint32_t threshold;
    float scale; // 1 / (1 - p)
};

// A pair of 16-bit values under the mask words, rounded as dropout rounds.
template <int kDtype>
__device__ __forceinline__ uint32_t masked_pair(uint32_t pair, uint32_t low_word,
                                                uint32_t high_word, const Dropout& d) {
    float low = kDtype == kBF16 ? bits_float(pair << 16) : half_to_float((uint16_t)pair);
    float high =
        kDtype == kBF16 ? bits_float(pair & 0xffff0000u) : half_to_float((uint16_t)(pair >> 16));
    return pack2<kDtype>(low_word >= d.threshold ? low * d.scale : 0.0f,
                         high_word >= d.threshold ? high * d.scale : 0.0f);
}

// --- shrink -------------------------------------------------------------------------------------
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

// kRowTiles x 16 rows and 8 kTiles ranks a block; its warps share the depth. What a warp needs for
// its next turn is on its way while it computes. Tensor cores cut off where they add, so 32 of the
// depth are summed on their own, small parts first, and added as fp32.
template <int kDtype, int kParts, bool kTransposed, bool kDropout, int kTiles, int kRowTiles>
__global__ void __launch_bounds__(kThreads, 1) shrink_kernel(ShrinkArgs a) {
    constexpr int kRows = 16 * kRowTiles, kRanks = 8 * kTiles;
    constexpr int kHalves = kTiles == 2 ? 2 : 1; // 32 of the depth each, in a turn of a warp
    constexpr int kStep = 32 * kHalves;
    PK_SHARED(float, partial, kWarps * kRows * kRanks);
    int tid = (int)threadIdx.x, lane = tid % 32, warp = tid / 32, g = lane / 4, t = lane % 4;
    int64_t first_m = blockIdx.x * (int64_t)kRows;
    int first_r = (int)blockIdx.y * kRanks;
    uint64_t key = kDropout ? (uint64_t)*a.dropout.seed : 0;
    float acc[kRowTiles][kTiles][4] = {};

    // Rows first_m + 16 i + g and 8 further, 8 elements from k + 32 half + 8 t on.
    struct Turn {
        uint4 x[kRowTiles][2][kHalves];
        AdapterRun<kParts, kTransposed> a[kHalves][kTiles];
    };
    const uint16_t* rows = (const uint16_t*)a.x + (first_m + g) * a.depth + 8 * t;
    auto load = [&](int64_t k, Turn& turn) {
#pragma unroll
        for (int half = 0; half < kHalves; ++half) {
            int64_t c = k + 32 * half;
            bool inside = c + 8 * t < a.depth;
#pragma unroll
            for (int i = 0; i < 2 * kRowTiles; ++i) {
                uint4 v = {0, 0, 0, 0};
                if (inside && first_m + 8 * i + g < a.m)
                    v = load_once<uint4>(rows + 8 * i * a.depth + c);
                turn.x[i / 2][i % 2][half] = v;
            }
#pragma unroll
            for (int n = 0; n < kTiles; ++n)
                turn.a[half][n].load(a, first_r + 8 * n + g, c + 8 * t);
        }
    };
    Turn now, next;
    int64_t k = warp * kStep;
    load(k, now);
    if (a.v != nullptr && blockIdx.y == 0) // while the first of x is on its way
        make_v(a, blockIdx.x * kThreads + tid, gridDim.x * kThreads);
    for (; k < a.depth; k += kWarps * kStep) {
        load(k + kWarps * kStep, next);
        if constexpr (kDropout) {
#pragma unroll
            for (int i = 0; i < 2 * kHalves * kRowTiles; ++i) {
                int rows8 = i / kHalves, half = i % kHalves;
                uint4& v = now.x[rows8 / 2][rows8 % 2][half];
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
                    now.a[half][n].pair(i, b[i]);
                float sum[kRowTiles][4] = {};
#pragma unroll
                for (int p = kParts - 1; p >= 0; --p)
#pragma unroll
                    for (int i = 0; i < kRowTiles; ++i) {
                        const uint4 &upper = now.x[i][0][half], &lower = now.x[i][1][half];
                        const uint32_t first[4] = {upper.x, lower.x, upper.y, lower.y};
                        const uint32_t second[4] = {upper.z, lower.z, upper.w, lower.w};
                        mma_m16n8k16<kDtype>(sum[i], first, b[0][p], b[1][p], sum[i]);
                        mma_m16n8k16<kDtype>(sum[i], second, b[2][p], b[3][p], sum[i]);
                    }
#pragma unroll
                for (int i = 0; i < 4 * kRowTiles; ++i)
                    acc[i / 4][n][i % 4] += sum[i / 4][i % 4];
            }
        now = next;
    }

#pragma unroll
    for (int i = 0; i < kRowTiles; ++i)
#pragma unroll
        for (int n = 0; n < kTiles; ++n)
#pragma unroll
            for (int c = 0; c < 4; ++c)
                partial[(warp * kRows + 16 * i + g + 8 * (c / 2)) * kRanks + 8 * n + 2 * t +
                        c % 2] = acc[i][n][c];
    __syncthreads();
    for (int i = tid; i < kRows * kRanks; i += kThreads) {
        int64_t m = first_m + i / kRanks;
        int r = first_r + i % kRanks;
        if (m >= a.m || r >= a.rank)
            continue;
        float sum = 0.0f;
        for (int w = 0; w < kWarps; ++w)
            sum += partial[w * kRows * kRanks + i];
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

// --- outer --------------------------------------------------------------------------------------
// More ranks need more registers, and leave fewer warps.
template <int kTiles>
constexpr int kOuterWarps = kTiles == 1 ? 16 : 8;
constexpr int kColumns = 32; // of x a block; its warps share the rows
constexpr int kUnit = 16;    // rows of one product

struct OuterArgs {
    const void* x;  // [M, C]
    const float* s; // [M, rank], rows `s_stride` apart
    int64_t s_stride;
    int64_t m, c;
    int rank;
    float scale;
    Dropout dropout;
    void* out; // [rank, C], or transposed: [C, rank]
    int out_dtype;
    bool transposed;
};

// kTiles x 16 ranks a block. kParts: bf16 parts of s.
template <int kDtype, int kParts, bool kDropout, int kTiles>
__global__ void __launch_bounds__(32 * kOuterWarps<kTiles>, 1) outer_kernel(OuterArgs a) {
    constexpr int kShare = kOuterWarps<kTiles>;
    PK_SHARED(float, partial, kShare * 16 * kColumns);
    int tid = (int)threadIdx.x, lane = tid % 32, warp = tid / 32, g = lane / 4, t = lane % 4;
    int64_t first_c = blockIdx.x * (int64_t)kColumns;
    int first_r = (int)blockIdx.y * 16 * kTiles;
    int64_t own_c = first_c + 4 * g;
    uint64_t key = kDropout ? (uint64_t)*a.dropout.seed : 0;
    float acc[kTiles][4][4] = {};

    // Rows m + 2 t, the next, and the two 8 further: four columns of each, and s at ranks g, g + 8.
    struct Unit {
        uint2 x[4];
        float s[kTiles][4][2];
    };
    constexpr int kAhead = kTiles == 4 ? 1 : 2;
    constexpr int kTurn = kShare * kUnit * kAhead;
    auto load = [&](int64_t m, Unit& unit) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            int64_t row = m + 2 * t + 8 * (i / 2) + i % 2;
            unit.x[i] = uint2{0, 0};
            if (row < a.m && own_c < a.c)
                unit.x[i] = load_once<uint2>((const uint16_t*)a.x + row * a.c + own_c);
#pragma unroll
            for (int n = 0; n < kTiles; ++n)
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                    int r = first_r + 16 * n + g + 8 * h;
                    unit.s[n][i][h] = row < a.m && r < a.rank ? a.s[row * a.s_stride + r] : 0.0f;
                }
        }
    };
    Unit now[kAhead], next[kAhead];
    // Blocks begin at different turns, or all of them would ask for the same rows of s at once.
    int turns = (int)ceil_div(a.m, kTurn),
        turn = (int)(blockIdx.x * 5 % (unsigned)(turns + !turns));
    int64_t m = (int64_t)turn * kTurn + warp * kUnit * kAhead;
#pragma unroll
    for (int i = 0; i < kAhead; ++i)
        load(m + i * kUnit, now[i]);
    for (int done = 0; done < turns; ++done) {
        turn = turn + 1 == turns ? 0 : turn + 1;
        int64_t next_m = (int64_t)turn * kTurn + warp * kUnit * kAhead;
        if (done + 1 < turns)
#pragma unroll
            for (int i = 0; i < kAhead; ++i)
                load(next_m + i * kUnit, next[i]);
#pragma unroll
        for (int i = 0; i < kAhead; ++i) {
            Unit& unit = now[i];
            if constexpr (kDropout) {
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    int64_t row = m + i * kUnit + 2 * t + 8 * (j / 2) + j % 2;
                    Philox4 random = philox(key, (uint64_t)(row * a.c + own_c) >> 2);
                    unit.x[j].x =
                        masked_pair<kDtype>(unit.x[j].x, random.w[0], random.w[1], a.dropout);
                    unit.x[j].y =
                        masked_pair<kDtype>(unit.x[j].y, random.w[2], random.w[3], a.dropout);
                }
            }
            uint32_t b[4][2]; // tile j: column 4 g + j
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const uint2 &low = unit.x[2 * half], &high = unit.x[2 * half + 1];
                b[0][half] = byte_permute(low.x, high.x, 0x5410);
                b[1][half] = byte_permute(low.x, high.x, 0x7632);
                b[2][half] = byte_permute(low.y, high.y, 0x5410);
                b[3][half] = byte_permute(low.y, high.y, 0x7632);
            }
#pragma unroll
            for (int n = 0; n < kTiles; ++n) {
                uint32_t parts[4][kParts]; // ranks g, g + 8 at the first two rows, then the others
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    float low = unit.s[n][2 * (j / 2)][j % 2];
                    float high = unit.s[n][2 * (j / 2) + 1][j % 2];
                    if constexpr (kDtype == kBF16)
                        split_pair<kParts>(low, high, parts[j]);
                    else
                        parts[j][0] = pack2<kDtype>(low, high);
                }
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    float sum[4] = {};
#pragma unroll
                    for (int p = kParts - 1; p >= 0; --p) {
                        const uint32_t left[4] = {parts[0][p], parts[1][p], parts[2][p],
                                                  parts[3][p]};
                        mma_m16n8k16<kDtype>(sum, left, b[j][0], b[j][1], sum);
                    }
#pragma unroll
                    for (int c = 0; c < 4; ++c)
                        acc[n][j][c] += sum[c];
                }
            }
        }
#pragma unroll
        for (int i = 0; i < kAhead; ++i)
            now[i] = next[i];
        m = next_m;
    }

#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
        if (n > 0)
            __syncthreads();
#pragma unroll
        for (int j = 0; j < 4; ++j)
#pragma unroll
            for (int c = 0; c < 4; ++c)
                partial[(warp * 16 + g + 8 * (c / 2)) * kColumns + 4 * (2 * t + c % 2) + j] =
                    acc[n][j][c];
        __syncthreads();
        for (int i = tid; i < 16 * kColumns; i += 32 * kShare) {
            int r = first_r + 16 * n + (a.transposed ? i % 16 : i / kColumns);
            int column = a.transposed ? i / 16 : i % kColumns;
            if (r >= a.rank || first_c + column >= a.c)
                continue;
            float sum = 0.0f;
            for (int w = 0; w < kShare; ++w)
                sum += partial[(w * 16 + (r - first_r) % 16) * kColumns + column];
            int64_t at =
                a.transposed ? (first_c + column) * a.rank + r : r * a.c + first_c + column;
            store_from_float(a.out, a.out_dtype, at, sum * a.scale);
        }
    }
}

template <int kDtype, int kParts, bool kTransposed, bool kDropout>
int shrink(const ShrinkArgs& a, void* stream) {
    // Few rows are spread over more blocks; the order of the sums is the same.
    bool wide = a.rank > 16, two = !wide && !kDropout && a.m > 2048;
    dim3 grid((unsigned)ceil_div(a.m, two ? 32 : 16), (unsigned)ceil_div(a.rank, wide ? 32 : 16));
    auto kernel = wide  ? shrink_kernel<kDtype, kParts, kTransposed, kDropout, 4, 1>
                  : two ? shrink_kernel<kDtype, kParts, kTransposed, false, 2, 2>
                        : shrink_kernel<kDtype, kParts, kTransposed, kDropout, 2, 1>;
    return launch("shrink", kernel, grid, kThreads, 0, stream, a);
}

template <int kDtype, int kParts>
int shrink(const ShrinkArgs& a, bool transposed, void* stream) {
    if (a.dropout.seed != nullptr) // over x, whose adapter is not transposed
        return transposed ? kBadArgument : shrink<kDtype, kParts, false, true>(a, stream);
    return transposed ? shrink<kDtype, kParts, true, false>(a, stream)
                      : shrink<kDtype, kParts, false, false>(a, stream);
}

template <int kDtype, int kParts, bool kDropout>
int outer(const OuterArgs& a, void* stream) {
    int tiles = a.rank <= 16 ? 1 : a.rank <= 32 ? 2 : 4;
    dim3 grid((unsigned)ceil_div(a.c, kColumns), (unsigned)ceil_div(a.rank, 16 * tiles));
    auto kernel = tiles == 1   ? outer_kernel<kDtype, kParts, kDropout, 1>
                  : tiles == 2 ? outer_kernel<kDtype, kParts, kDropout, 2>
                               : outer_kernel<kDtype, kParts, kDropout, 4>;
    return launch("outer", kernel, grid, tiles == 1 ? 512 : 256, 0, stream, a);
}

template <int kDtype, int kParts>
int outer(const OuterArgs& a, void* stream) {
    return a.dropout.seed != nullptr ? outer<kDtype, kParts, true>(a, stream)
                                     : outer<kDtype, kParts, false>(a, stream);
}

bool aligned16(const void* p) { return (uintptr_t)p % 16 == 0; }

} // namespace
} // namespace pk

extern "C" {

// s [M, rank] = scale * dropout(x) a^T; x [M, depth], a [rank, depth] or transposed, of x's dtype
// or, for bf16 x, fp32; depth a multiple of 8, x and a on 16 bytes. u and v (both or none): see
// ShrinkArgs; `columns` holds two (bf16 `up`) or three times the rank, rounded up to 8. A null seed
// means no dropout; with one, a is not transposed.
int pk_cuda_shrink(const void* x, int dtype, int64_t m, int64_t depth, const void* a, int a_dtype,
                   int rank, int transposed, float scale, const int64_t* seed, uint32_t threshold,
                   float keep_scale, float* s, int64_t s_stride, void* u, void* v, const void* up,
                   int up_dtype, int across, int64_t outputs, int columns, float u_scale,
                   void* stream) {
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
        return pk::shrink<pk::kF16, 1>(p, transposed != 0, stream);
    return a_dtype == pk::kF32 ? pk::shrink<pk::kBF16, 3>(p, transposed != 0, stream)
                               : pk::shrink<pk::kBF16, 1>(p, transposed != 0, stream);
}
PK_LAUNCHER(shrink)

// out = scale * s^T dropout(x), [rank, C] or transposed [C, rank], for x [M, C] bf16 or fp16 (there
// s is rounded to fp16, as eager torch does with fp16 adapters); C a multiple of 8, x on 16 bytes.
int pk_cuda_outer(const void* x, int dtype, int64_t m, int64_t c, const float* s, int64_t s_stride,
                  int rank, float scale, const int64_t* seed, uint32_t threshold, float keep_scale,
                  void* out, int out_dtype, int transposed, void* stream) {
    bool halves = dtype == pk::kBF16 || dtype == pk::kF16;
    if (!halves || c % 8 != 0 || !pk::aligned16(x) || rank < 1)
        return pk::kBadArgument;
    if (c == 0)
        return pk::kOk;
    pk::OuterArgs p = {};
    p.x = x, p.s = s, p.s_stride = s_stride;
    p.m = m, p.c = c, p.rank = rank, p.scale = scale;
    p.dropout = {seed, threshold, keep_scale};
    p.out = out, p.out_dtype = out_dtype, p.transposed = transposed != 0;
    if (dtype == pk::kF16)
        return pk::outer<pk::kF16, 1>(p, stream);
    return out_dtype == pk::kF32 ? pk::outer<pk::kBF16, 3>(p, stream)
                                 : pk::outer<pk::kBF16, 2>(p, stream);
}
PK_LAUNCHER(outer)
}
