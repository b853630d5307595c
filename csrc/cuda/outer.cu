// g = scale * s^T dropout(x) over the rows of 16-bit activations: dA, and dB from dy. The mask is
// drawn again and x is read once: the floor is the bytes of x.
//
// A block takes 256 bytes of a row (128 for more ranks) and a part of the rows; where there are
// parts a second kernel adds them. Narrower blocks would need no parts, but pieces of 64 bytes took
// 29 us for 4096 x 4096 on an H100, where the bytes take 12.
//
// A lane takes four neighbours of a row, and rows pair up as the fragments of mma want them. fp32
// values of s are the sum of three bf16 (24 bits), so sums are as exact as fp32 ones.

#include "rank_passes.cuh"

namespace pk {
namespace {

constexpr int kWarps = 8;
constexpr int kUnit = 16; // rows of one product
constexpr int kTurn = kWarps * kUnit;
constexpr int kMultiprocessors = 132;

// Columns of x a block, whose warps share the rows: as many as the registers hold sums.
template <int kTiles>
constexpr int kColumns = kTiles <= 2 ? 128 : 64;

// How a pass is cut: 16 tiles ranks a block, parts of the rows.
struct OuterCut {
    int tiles, columns, rank_blocks;
    int parts, turns; // of a part, each of kTurn rows
};

OuterCut outer_cut(int64_t m, int64_t c, int rank) {
    OuterCut cut = {};
    cut.tiles = rank <= 16 ? 1 : rank <= 32 ? 2 : 4;
    cut.columns = cut.tiles == 1 ? kColumns<1> : cut.tiles == 2 ? kColumns<2> : kColumns<4>;
    cut.rank_blocks = (int)ceil_div(rank, 16 * cut.tiles);
    int64_t blocks = ceil_div(c > 0 ? c : 1, cut.columns) * cut.rank_blocks;
    int64_t turns = ceil_div(m, kTurn);
    int64_t most = blocks < kMultiprocessors ? kMultiprocessors / blocks : 1; // parts
    cut.turns = (int)ceil_div(turns, most);
    cut.parts = cut.turns > 0 ? (int)ceil_div(turns, cut.turns) : 1;
    return cut;
}

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
    OuterCut cut;
    int stages;     // of a warp's ring
    float* partial; // [parts, rank, C]; null: one part, straight to `out`
};

__device__ __forceinline__ void store_sum(const OuterArgs& a, int r, int64_t column, float sum) {
    int64_t at = a.transposed ? column * a.rank + r : r * a.c + column;
    store_from_float(a.out, a.out_dtype, at, sum * a.scale);
}

// A stage of a warp: [16 rows] x [the columns of x | 16 kTiles values of s].
template <int kTiles>
struct OuterPlan {
    static constexpr int kRanks = 16 * kTiles;
    static constexpr int kChunks = kColumns<kTiles> / 8; // of 16 bytes
    static constexpr int kXBytes = kUnit * kColumns<kTiles> * 2;
    static constexpr int kStage = kXBytes + kUnit * kRanks * 4;
    static constexpr int kSums = kWarps * 16 * kColumns<kTiles> * 4; // where the rings were
    // Chunks change places, so that 32 bytes of four even (or odd) rows fill 32 banks.
    static __device__ __forceinline__ int x_at(int row, int chunk) {
        return (row * kChunks + (chunk ^ (row >> 1 & 3) << 1)) * 16;
    }
    static __device__ __forceinline__ int s_at(int row, int rank) {
        if (kTiles == 1) { // rows of 64 bytes change places
            int placed = row ^ (row >> 1 & 1);
            return kXBytes + (placed * 16 + (rank ^ (row >> 2 & 1) << 3)) * 4;
        }
        return kXBytes + (row * kRanks + (rank ^ (row >> 1 & 3) << 3)) * 4;
    }
};

// 16 kTiles ranks, some columns and a part of the rows a block; its warps share the rows. kParts:
// bf16 parts of s.
template <int kDtype, int kParts, bool kDropout, int kTiles>
__global__ void __launch_bounds__(32 * kWarps, 1) outer_kernel(OuterArgs a) {
    using P = OuterPlan<kTiles>;
    constexpr int kPieces = kColumns<kTiles> / 32; // of 32 columns
    PK_DYNAMIC_SHARED(memory);
    int tid = (int)threadIdx.x, lane = tid % 32, warp = tid / 32, g = lane / 4, t = lane % 4;
    unsigned char* ring = memory + warp * a.stages * P::kStage;
    int64_t first_c = blockIdx.x * (int64_t)kColumns<kTiles>;
    int first_r = (int)blockIdx.y * P::kRanks;
    int64_t part_row = blockIdx.z * (int64_t)a.cut.turns * kTurn;
    uint64_t key = kDropout ? (uint64_t)*a.dropout.seed : 0;
    float acc[kTiles][kPieces][4][4] = {};

    // Blocks begin at different turns, or all of a part would ask for the same rows of s at once.
    int turns = (int)ceil_div(a.m - part_row, kTurn);
    turns = turns < a.cut.turns ? turns : a.cut.turns;
    int turn = (int)(blockIdx.x * 5 % (unsigned)(turns + !turns));
    auto first_row = [&](int of) { return part_row + (int64_t)of * kTurn + warp * kUnit; };
    auto after = [&](int of) { return of + 1 == turns ? 0 : of + 1; };

    int copy_turn = turn, copied = 0, copy_slot = 0;
    auto copy = [&]() {
        if (copied < turns) {
            int64_t m = first_row(copy_turn);
            unsigned char* stage = ring + copy_slot * P::kStage;
            int64_t c = first_c + 8 * (lane % P::kChunks);
            constexpr int kApart = 32 / P::kChunks; // rows
#pragma unroll
            for (int i = 0; i < kUnit / kApart; ++i) {
                int row = lane / P::kChunks + kApart * i;
                cp_async16(stage + P::x_at(row, lane % P::kChunks),
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
        // Parts of s: ranks g, g + 8 at the first two rows, then at the others.
        auto split = [&](int n, uint32_t (&left)[kParts][4]) {
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                int row = 2 * t + 8 * (j / 2), r = 16 * n + g + 8 * (j % 2);
                float low = *(const float*)(stage + P::s_at(row, r));
                float high = *(const float*)(stage + P::s_at(row + 1, r));
                uint32_t parts[kParts];
                if constexpr (kDtype == kBF16)
                    split_pair<kParts>(low, high, parts);
                else
                    parts[0] = pack2<kDtype>(low, high);
#pragma unroll
                for (int p = 0; p < kParts; ++p)
                    left[p][j] = parts[p];
            }
        };
        constexpr bool kKeep = kTiles <= 2; // all of them fit into registers
        uint32_t left[kKeep ? kTiles : 1][kParts][4];
        if constexpr (kKeep)
#pragma unroll
            for (int n = 0; n < kTiles; ++n)
                split(n, left[n]);
#pragma unroll
        for (int piece = 0; piece < kPieces; ++piece) {
            // Masks beside the most sums and parts: one piece after the other, or registers spill.
            if (kDropout && kParts == 3 && kTiles == 4)
                __syncwarp();
            // Rows 2 t, the next, and the two 8 further: four columns of each.
            uint2 x[4];
#pragma unroll
            for (int i = 0; i < 4; ++i)
                x[i] = *(const uint2*)(stage +
                                       P::x_at(2 * t + 8 * (i / 2) + i % 2, 4 * piece + g / 2) +
                                       g % 2 * 8);
            if constexpr (kDropout) {
                int64_t own_c = first_c + 32 * piece + 4 * g;
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    int64_t row = first_row(turn) + 2 * t + 8 * (i / 2) + i % 2;
                    Philox4 random = philox(key, (uint64_t)(row * a.c + own_c) >> 2);
                    x[i].x = masked_pair<kDtype>(x[i].x, random.w[0], random.w[1], a.dropout);
                    x[i].y = masked_pair<kDtype>(x[i].y, random.w[2], random.w[3], a.dropout);
                }
            }
            uint32_t b[4][2]; // tile j: columns 4 g + j
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
                auto& own = left[kKeep ? n : 0];
                if constexpr (!kKeep)
                    split(n, own);
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    float sum[4] = {};
#pragma unroll
                    for (int p = kParts - 1; p >= 0; --p)
                        mma_m16n8k16<kDtype>(sum, own[p], b[j][0], b[j][1], sum);
#pragma unroll
                    for (int c = 0; c < 4; ++c)
                        acc[n][piece][j][c] += sum[c];
                }
            }
        }
        turn = after(turn);
    }

    cp_async_wait<0>();
    float* partial = (float*)memory;
    constexpr int kAcross = kColumns<kTiles>;
    // Neighbours change places by row, so that eight rows of a store do not meet in a bank.
    auto sum_at = [&](int w, int r, int column) {
        return (w * 16 + r) * kAcross + (column ^ (r & 7));
    };
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
        __syncthreads(); // nobody reads a ring, or the tile before, any more
#pragma unroll
        for (int i = 0; i < 16 * kPieces; ++i) {
            int piece = i / 16, j = i / 4 % 4, c = i % 4;
            int column = 32 * piece + 4 * (2 * t + c % 2) + j;
            partial[sum_at(warp, g + 8 * (c / 2), column)] = acc[n][piece][j][c];
        }
        __syncthreads();
        bool straight = a.partial == nullptr;
        for (int i = tid; i < 16 * kAcross; i += 32 * kWarps) {
            bool down = straight && a.transposed; // neighbours in memory
            int r = first_r + 16 * n + (down ? i % 16 : i / kAcross);
            int column = down ? i / 16 : i % kAcross;
            if (r >= a.rank || first_c + column >= a.c)
                continue;
            float sum = 0.0f;
            for (int w = 0; w < kWarps; ++w)
                sum += partial[sum_at(w, (r - first_r) % 16, column)];
            if (straight)
                store_sum(a, r, first_c + column, sum);
            else
                a.partial[(blockIdx.z * (int64_t)a.rank + r) * a.c + first_c + column] = sum;
        }
    }
}

// Adds the parts in order: a block 32 ranks and 32 columns, turned around in shared memory.
__global__ void __launch_bounds__(256) add_outer_parts_kernel(OuterArgs a) {
    PK_SHARED(float, tile, 32 * 33);
    int64_t first_c = blockIdx.x * (int64_t)32;
    int first_r = (int)blockIdx.y * 32, fast = (int)threadIdx.x % 32, slow = (int)threadIdx.x / 32;
    for (int i = slow; i < 32; i += 8) {
        int r = first_r + i;
        float sum = 0.0f;
        if (r < a.rank && first_c + fast < a.c)
#pragma unroll 4
            for (int part = 0; part < a.cut.parts; ++part)
                sum += a.partial[(part * (int64_t)a.rank + r) * a.c + first_c + fast];
        tile[i * 33 + fast] = sum;
    }
    __syncthreads();
    for (int i = slow; i < 32; i += 8) {
        int r = a.transposed ? fast : i, column = a.transposed ? i : fast;
        if (first_r + r < a.rank && first_c + column < a.c)
            store_sum(a, first_r + r, first_c + column, tile[r * 33 + column]);
    }
}

template <int kDtype, int kParts, bool kDropout, int kTiles>
int outer(OuterArgs a, int shared_limit, void* stream) {
    using P = OuterPlan<kTiles>;
    const OuterCut& cut = a.cut;
    dim3 grid((unsigned)ceil_div(a.c, cut.columns), (unsigned)cut.rank_blocks, (unsigned)cut.parts);
    a.stages = stages_for(kWarps * P::kStage, shared_limit);
    int bytes = a.stages * kWarps * P::kStage;
    int status = launch("outer", outer_kernel<kDtype, kParts, kDropout, kTiles>, grid, 32 * kWarps,
                        bytes < P::kSums ? P::kSums : bytes, stream, a);
    if (status != kOk || a.partial == nullptr)
        return status;
    dim3 tiles((unsigned)ceil_div(a.c, 32), (unsigned)ceil_div(a.rank, 32));
    return launch("add_outer_parts", add_outer_parts_kernel, tiles, 256, 0, stream, a);
}

template <int kDtype, int kParts, bool kDropout>
int outer(const OuterArgs& a, int shared_limit, void* stream) {
    if (a.cut.tiles == 1)
        return outer<kDtype, kParts, kDropout, 1>(a, shared_limit, stream);
    if (a.cut.tiles == 2)
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

extern "C" {

// Bytes of workspace that pk_cuda_outer needs.
int64_t pk_cuda_outer_workspace(int64_t m, int64_t c, int64_t rank) {
    int parts = pk::outer_cut(m, c, (int)rank).parts;
    return parts > 1 ? parts * rank * c * 4 : 0;
}

// out = scale * s^T dropout(x), [rank, C] or transposed [C, rank], for x [M, C] bf16 or fp16 (there
// s is rounded to fp16, as eager torch does with fp16 adapters); C a multiple of 8, x on 16 bytes.
// `shared_limit`: bytes a block may have.
int pk_cuda_outer(const void* x, int dtype, int64_t m, int64_t c, const float* s, int64_t s_stride,
                  int rank, float scale, const int64_t* seed, uint32_t threshold, float keep_scale,
                  void* out, int out_dtype, int transposed, int shared_limit, float* workspace,
                  void* stream) {
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
    p.cut = pk::outer_cut(m, c, rank);
    p.partial = p.cut.parts > 1 ? workspace : nullptr;
    if (p.cut.parts > 1 && workspace == nullptr)
        return pk::kBadArgument;
    if (dtype == pk::kF16)
        return pk::outer<pk::kF16, 1>(p, shared_limit, stream);
    return out_dtype == pk::kF32 ? pk::outer<pk::kBF16, 3>(p, shared_limit, stream)
                                 : pk::outer<pk::kBF16, 2>(p, shared_limit, stream);
}
PK_LAUNCHER(outer)
}
