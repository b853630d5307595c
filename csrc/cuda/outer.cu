// g = scale * s^T dropout(x) over the rows of 16-bit activations: dA, and dB from dy. The mask is
// drawn again, x is read once, and nothing but g is written: the floor is the bytes of x.
//
// A lane takes four neighbours of a row, and rows pair up as the fragments of mma want them. fp32
// values of s are the sum of three bf16 (24 bits), so sums are as exact as fp32 ones.

#include "rank_passes.cuh"

namespace pk {
namespace {

// More ranks need more registers and shared memory, and leave fewer warps.
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
    bool whole; // s can be copied 16 bytes at a time
    int stages; // of a warp's ring
};

// A stage of a warp: [16 rows] x [32 columns of x | 16 kTiles values of s].
template <int kTiles>
struct OuterPlan {
    static constexpr int kWarps = kOuterWarps<kTiles>;
    static constexpr int kTurn = kWarps * kUnit; // rows
    static constexpr int kRanks = 16 * kTiles;
    static constexpr int kXBytes = kUnit * kColumns * 2;
    static constexpr int kStage = kXBytes + kUnit * kRanks * 4;
    static constexpr int kSums = kWarps * 16 * kColumns * 4; // where the rings were
    // Rows of 64 bytes change places, so that four even (or odd) rows fill 32 banks.
    static __device__ __forceinline__ int row_at(int row) { return row ^ (row >> 1 & 1); }
    static __device__ __forceinline__ int x_at(int row, int chunk) {
        return row_at(row) * 64 + (chunk ^ (row >> 2 & 1) << 1) * 16;
    }
    static __device__ __forceinline__ int s_at(int row, int rank) {
        if (kTiles == 1)
            return kXBytes + (row_at(row) * 16 + (rank ^ (row >> 2 & 1) << 3)) * 4;
        return kXBytes + (row * kRanks + (rank ^ (row >> 1 & 3) << 3)) * 4;
    }
};

// 16 kTiles ranks and 32 columns a block; its warps share the rows. kParts: bf16 parts of s.
template <int kDtype, int kParts, bool kDropout, int kTiles>
__global__ void __launch_bounds__(32 * kOuterWarps<kTiles>, 1) outer_kernel(OuterArgs a) {
    using P = OuterPlan<kTiles>;
    PK_DYNAMIC_SHARED(memory);
    int tid = (int)threadIdx.x, lane = tid % 32, warp = tid / 32, g = lane / 4, t = lane % 4;
    unsigned char* ring = memory + warp * a.stages * P::kStage;
    int64_t first_c = blockIdx.x * (int64_t)kColumns;
    int first_r = (int)blockIdx.y * P::kRanks;
    int64_t own_c = first_c + 4 * g;
    uint64_t key = kDropout ? (uint64_t)*a.dropout.seed : 0;
    float acc[kTiles][4][4] = {};

    // Blocks begin at different turns, or all of them would ask for the same rows of s at once.
    int turns = (int)ceil_div(a.m, P::kTurn);
    int turn = (int)(blockIdx.x * 5 % (unsigned)(turns + !turns));
    auto first_row = [&](int of) { return (int64_t)of * P::kTurn + warp * kUnit; };
    auto after = [&](int of) { return of + 1 == turns ? 0 : of + 1; };

    int copy_turn = turn, copied = 0, copy_slot = 0;
    auto copy = [&]() {
        if (copied < turns) {
            int64_t m = first_row(copy_turn);
            unsigned char* stage = ring + copy_slot * P::kStage;
            int64_t c = first_c + 8 * (lane % 4);
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                int row = lane / 4 + 8 * i;
                cp_async16(stage + P::x_at(row, lane % 4),
                           (const uint16_t*)a.x + (m + row) * a.c + c, m + row < a.m && c < a.c);
            }
            if (a.whole) {
#pragma unroll
                for (int i = 0; i < 2 * kTiles; ++i) {
                    int at = 4 * (lane + 32 * i), row = at / P::kRanks, r = at % P::kRanks;
                    cp_async16(stage + P::s_at(row, r), a.s + (m + row) * a.s_stride + first_r + r,
                               m + row < a.m && first_r + r < a.rank);
                }
            } else {
#pragma unroll 2
                for (int i = 0; i < 8 * kTiles; ++i) { // unrolled whole it would cost registers
                    int at = lane + 32 * i, row = at / P::kRanks, r = at % P::kRanks;
                    cp_async4(stage + P::s_at(row, r), a.s + (m + row) * a.s_stride + first_r + r,
                              m + row < a.m && first_r + r < a.rank);
                }
            }
        }
        cp_async_commit();
        ++copied;
        copy_turn = after(copy_turn);
        copy_slot = copy_slot + 1 == a.stages ? 0 : copy_slot + 1;
    };
    for (int i = 0; i < a.stages - 1; ++i)
        copy();
    int slot = 0;
    for (int done = 0; done < turns; ++done) {
        wait_for_stage(a.stages);
        const unsigned char* stage = ring + slot * P::kStage;
        slot = slot + 1 == a.stages ? 0 : slot + 1;
        copy(); // to the stage that all lanes have read a turn ago
        // Rows 2 t, the next, and the two 8 further: four columns of each.
        uint2 x[4];
#pragma unroll
        for (int i = 0; i < 4; ++i)
            x[i] = *(const uint2*)(stage + P::x_at(2 * t + 8 * (i / 2) + i % 2, g / 2) + g % 2 * 8);
        if constexpr (kDropout) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                int64_t row = first_row(turn) + 2 * t + 8 * (i / 2) + i % 2;
                Philox4 random = philox(key, (uint64_t)(row * a.c + own_c) >> 2);
                x[i].x = masked_pair<kDtype>(x[i].x, random.w[0], random.w[1], a.dropout);
                x[i].y = masked_pair<kDtype>(x[i].y, random.w[2], random.w[3], a.dropout);
            }
        }
        turn = after(turn);
        uint32_t b[4][2]; // tile j: column 4 g + j
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const uint2 &low = x[2 * half], &high = x[2 * half + 1];
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
                int row = 2 * t + 8 * (j / 2), r = 16 * n + g + 8 * (j % 2);
                float low = *(const float*)(stage + P::s_at(row, r));
                float high = *(const float*)(stage + P::s_at(row + 1, r));
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
                    const uint32_t left[4] = {parts[0][p], parts[1][p], parts[2][p], parts[3][p]};
                    mma_m16n8k16<kDtype>(sum, left, b[j][0], b[j][1], sum);
                }
#pragma unroll
                for (int c = 0; c < 4; ++c)
                    acc[n][j][c] += sum[c];
            }
        }
    }

    cp_async_wait<0>();
    float* partial = (float*)memory;
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
        __syncthreads(); // nobody reads a ring, or the tile before, any more
#pragma unroll
        for (int j = 0; j < 4; ++j)
#pragma unroll
            for (int c = 0; c < 4; ++c)
                partial[(warp * 16 + g + 8 * (c / 2)) * kColumns + 4 * (2 * t + c % 2) + j] =
                    acc[n][j][c];
        __syncthreads();
        for (int i = tid; i < 16 * kColumns; i += 32 * P::kWarps) {
            int r = first_r + 16 * n + (a.transposed ? i % 16 : i / kColumns);
            int column = a.transposed ? i / 16 : i % kColumns;
            if (r >= a.rank || first_c + column >= a.c)
                continue;
            float sum = 0.0f;
            for (int w = 0; w < P::kWarps; ++w)
                sum += partial[(w * 16 + (r - first_r) % 16) * kColumns + column];
            int64_t at =
                a.transposed ? (first_c + column) * a.rank + r : r * a.c + first_c + column;
            store_from_float(a.out, a.out_dtype, at, sum * a.scale);
        }
    }
}

template <int kDtype, int kParts, bool kDropout, int kTiles>
int outer(OuterArgs a, int shared_limit, void* stream) {
    using P = OuterPlan<kTiles>;
    dim3 grid((unsigned)ceil_div(a.c, kColumns), (unsigned)ceil_div(a.rank, P::kRanks));
    a.stages = stages_for(P::kWarps * P::kStage, shared_limit);
    int bytes = a.stages * P::kWarps * P::kStage;
    return launch("outer", outer_kernel<kDtype, kParts, kDropout, kTiles>, grid, 32 * P::kWarps,
                  bytes < P::kSums ? P::kSums : bytes, stream, a);
}

template <int kDtype, int kParts, bool kDropout>
int outer(const OuterArgs& a, int shared_limit, void* stream) {
    if (a.rank <= 16)
        return outer<kDtype, kParts, kDropout, 1>(a, shared_limit, stream);
    if (a.rank <= 32)
        return outer<kDtype, kParts, kDropout, 2>(a, shared_limit, stream);
    return outer<kDtype, kParts, kDropout, 4>(a, shared_limit, stream);
}

template <int kDtype, int kParts>
int outer(const OuterArgs& a, int shared_limit, void* stream) {
    return a.dropout.seed != nullptr ? outer<kDtype, kParts, true>(a, shared_limit, stream)
                                     : outer<kDtype, kParts, false>(a, shared_limit, stream);
}

} // namespace
} // namespace pk

// out = scale * s^T dropout(x), [rank, C] or transposed [C, rank], for x [M, C] bf16 or fp16 (there
// s is rounded to fp16, as eager torch does with fp16 adapters); C a multiple of 8, x on 16 bytes.
// `shared_limit`: bytes a block may have.
extern "C" int pk_cuda_outer(const void* x, int dtype, int64_t m, int64_t c, const float* s,
                             int64_t s_stride, int rank, float scale, const int64_t* seed,
                             uint32_t threshold, float keep_scale, void* out, int out_dtype,
                             int transposed, int shared_limit, void* stream) {
    bool halves = dtype == pk::kBF16 || dtype == pk::kF16;
    if (!halves || c % 8 != 0 || !pk::aligned16(x) || rank < 1)
        return pk::kBadArgument;
    if (c == 0)
        return pk::kOk;
    pk::OuterArgs p = {};
    p.x = x, p.s = s, p.s_stride = s_stride;
    p.m = m, p.c = c, p.rank = rank, p.scale = scale;
    p.dropout = {seed, threshold, keep_scale};
    p.whole = rank % 4 == 0 && s_stride % 4 == 0 && pk::aligned16(s);
    p.out = out, p.out_dtype = out_dtype, p.transposed = transposed != 0;
    if (dtype == pk::kF16)
        return pk::outer<pk::kF16, 1>(p, shared_limit, stream);
    return out_dtype == pk::kF32 ? pk::outer<pk::kBF16, 3>(p, shared_limit, stream)
                                 : pk::outer<pk::kBF16, 2>(p, shared_limit, stream);
}
PK_LAUNCHER(outer)
