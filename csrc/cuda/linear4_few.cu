// y = x W^T for M <= 16 with 4-bit weights in their stored layout: the weights stream past x once.
//
// mma.m16n8k16 with 16 outputs as the rows, and the depth ordered for the storage: within 64
// weights of a row lane t of a quad takes 16 neighbours, 8 bytes of W and 32 of x, so that each
// packed byte is one A register by one look-up in a table that the lane has for itself. The code
// products of a block are summed in a fresh accumulator, which one FMA multiplies by the block's
// fp32 scale.
//
// A block of 16 warps takes 16 outputs and all of the depth, 128 at a time for each warp, and adds
// the warps' sums in order: nothing is left for a second kernel. Blocks are persistent; each warp
// keeps the weights of its next three turns on their way (cp.async into its own ring), across
// tiles, from before the table is made. Results depend on K, not on M, N or timing.

#include "epilogue.cuh"
#include "scales.cuh"

namespace pk {
namespace {

constexpr int kWarps = 16;
constexpr int kThreads = 32 * kWarps;
constexpr int kRows = 16;   // outputs of a tile
constexpr int kDepth = 128; // of a row, in one turn of a warp
constexpr int kStages = 4;
constexpr int kTurnBytes = kRows * kDepth / 2;
constexpr int kTableBytes = 256 * 32 * 4;
constexpr int kMapBytes = 256 * 4;

template <int kTiles>
constexpr int kSumBytes = 2 * kWarps * kRows * 8 * kTiles * 4; // of this tile and the last one
template <int kTiles>
constexpr int kSharedBytes =
    kTableBytes + kMapBytes + kWarps * kStages * kTurnBytes + kSumBytes<kTiles>;

struct FewArgs {
    const void* x; // [M, K]
    const uint8_t* packed;
    Scales scales;
    int quant_type;
    int block_shift; // 6 or more
    int64_t m, n, k;
    Epilogue epilogue;
};

// The pair of codes of byte i, as an A register; `lane4` is 4 * lane.
__device__ __forceinline__ uint32_t code_pair(SharedAddress table, uint32_t lane4, uint32_t w,
                                              int i) {
    uint32_t shifted = i == 0 ? w << 7 : w >> (8 * i - 7);
    return load_shared_word(table + ((shifted & 0x7f80u) | lane4));
}

// kTiles: rows of x, in eights.
template <int kDtype, int kTiles, bool kNested>
__global__ void __launch_bounds__(kThreads, 1) linear_4bit_few_kernel(FewArgs a) {
    PK_DYNAMIC_SHARED(memory);
    uint32_t* table = (uint32_t*)memory;
    float* map = (float*)(memory + kTableBytes);
    int tid = (int)threadIdx.x, lane = tid % 32, warp = tid / 32, g = lane / 4, t = lane % 4;
    unsigned char* ring = memory + kTableBytes + kMapBytes + warp * kStages * kTurnBytes;
    float* sums = (float*)(memory + kTableBytes + kMapBytes + kWarps * kStages * kTurnBytes);
    int turns = (int)ceil_div(a.k, kDepth * kWarps); // of a warp in one tile
    int tiles = (int)ceil_div(a.n, kRows);
    int own = tiles > (int)blockIdx.x ? (tiles - 1 - (int)blockIdx.x) / (int)gridDim.x + 1 : 0;
    int total = own * turns;
    auto tile_of = [&](int turn) { return blockIdx.x + (int64_t)(turn / turns) * gridDim.x; };
    auto depth_of = [&](int turn) { return (int64_t)(turn % turns * kWarps + warp) * kDepth; };

    // A turn's weights: 16 rows of 64 bytes, whose 16-byte chunks are exchanged against conflicts.
    auto issue = [&](int turn) {
        unsigned char* to = ring + turn % kStages * kTurnBytes;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            int row = lane / 4 + 8 * i, chunk = lane % 4;
            int64_t n = min64(tile_of(turn) * kRows + row, a.n - 1);
            int64_t k = depth_of(turn) + 32 * chunk;
            cp_async16(to + row * 64 + ((chunk ^ (row >> 1 & 3)) << 4),
                       a.packed + ((n * a.k + k) >> 1), turn < total && k < a.k);
        }
        cp_async_commit();
    };
    // Statistics of rows g and g + 8, blocks 0 and 1 of the turn, as they are stored.
    struct Raw {
        float plain[2][2];
        uint32_t code[2][2];
    };
    auto fetch = [&](int turn) {
        Raw raw = {};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            int64_t n = min64(tile_of(turn) * kRows + g + 8 * (i / 2), a.n - 1);
            int64_t k = depth_of(turn) + 64 * (i % 2);
            if (turn < total && k < a.k) {
                int64_t block = (n * a.k + k) >> a.block_shift;
                if (kNested) {
                    raw.code[i / 2][i % 2] = ((const uint8_t*)a.scales.absmax)[block];
                    raw.plain[i / 2][i % 2] = a.scales.nested_absmax[block >> kNestedShift];
                } else {
                    raw.plain[i / 2][i % 2] = ((const float*)a.scales.absmax)[block];
                }
            }
        }
        return raw;
    };

#pragma unroll
    for (int i = 0; i < kStages - 1; ++i)
        issue(i);
    Raw now = fetch(0);
    float offset = kNested ? *a.scales.nested_offset : 0.0f;
    const float* values = codebook(a.quant_type);
    for (int i = tid; i < 256 * 8; i += kThreads) { // 16 bytes of a byte's 128
        uint32_t v = pack2<kDtype>(values[i / 8 >> 4], values[i / 8 & 15]);
        ((uint4*)table)[i] = uint4{v, v, v, v};
    }
    if (kNested)
        load_dynamic_map(map);
    __syncthreads();

    SharedAddress codes = shared_address(table);
    uint32_t lane4 = 4u * (uint32_t)lane;
    float acc[kTiles][4] = {};
    for (int turn = 0; turn < total; ++turn) {
        int64_t depth = depth_of(turn);
        uint4 x[kTiles][2][2];
#pragma unroll
        for (int i = 0; i < kTiles; ++i)
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                int64_t m = 8 * i + g, k = depth + 64 * (j / 2) + 16 * t + 8 * (j % 2);
                x[i][j / 2][j % 2] = uint4{0, 0, 0, 0};
                if (m < a.m && k < a.k)
                    x[i][j / 2][j % 2] = *(const uint4*)((const uint16_t*)a.x + m * a.k + k);
            }
        issue(turn + kStages - 1);
        Raw next = fetch(turn + 1);
        cp_async_wait<kStages - 1>();
        __syncwarp();
        const unsigned char* from = ring + turn % kStages * kTurnBytes;
#pragma unroll
        for (int block = 0; block < 2; ++block) {
            // 8 bytes of rows g and g + 8: 16 weights each
            int chunk = ((2 * block + t / 2) ^ (g >> 1 & 3)) << 4;
            uint2 upper = *(const uint2*)(from + g * 64 + chunk + t % 2 * 8);
            uint2 lower = *(const uint2*)(from + (g + 8) * 64 + chunk + t % 2 * 8);
            float part[kTiles][4];
#pragma unroll
            for (int word = 0; word < 2; ++word) {
                uint32_t u = word == 0 ? upper.x : upper.y, l = word == 0 ? lower.x : lower.y;
                const uint32_t first[4] = {
                    code_pair(codes, lane4, u, 0), code_pair(codes, lane4, l, 0),
                    code_pair(codes, lane4, u, 1), code_pair(codes, lane4, l, 1)};
                const uint32_t second[4] = {
                    code_pair(codes, lane4, u, 2), code_pair(codes, lane4, l, 2),
                    code_pair(codes, lane4, u, 3), code_pair(codes, lane4, l, 3)};
#pragma unroll
                for (int i = 0; i < kTiles; ++i) {
                    const uint4& v = x[i][block][word];
                    mma_m16n8k16<kDtype>(part[i], first, v.x, v.y, word == 0 ? nullptr : part[i]);
                    mma_m16n8k16<kDtype>(part[i], second, v.z, v.w, part[i]);
                }
            }
            float s[2];
#pragma unroll
            for (int i = 0; i < 2; ++i)
                s[i] = kNested ? nested_sum(map[now.code[i][block]], now.plain[i][block], offset)
                               : now.plain[i][block];
#pragma unroll
            for (int i = 0; i < kTiles; ++i)
#pragma unroll
                for (int c = 0; c < 4; ++c)
                    acc[i][c] = fmaf(part[i][c], s[c / 2], acc[i][c]);
        }
        now = next;
        __syncwarp(); // all lanes have read this stage before it is filled again
        if (turn % turns != turns - 1)
            continue;

        // The tile is complete: the warps' sums in order.
        float* to = sums + turn / turns % 2 * (kWarps * kRows * 8 * kTiles);
#pragma unroll
        for (int i = 0; i < kTiles; ++i)
#pragma unroll
            for (int c = 0; c < 4; ++c) {
                to[((warp * kTiles + i) * 8 + 2 * t + c % 2) * kRows + g + 8 * (c / 2)] = acc[i][c];
                acc[i][c] = 0.0f;
            }
        __syncthreads();
        if (tid < kRows * 8 * kTiles) {
            int64_t n = tile_of(turn) * kRows + tid % kRows, m = tid / kRows;
            float sum = 0.0f;
#pragma unroll
            for (int w = 0; w < kWarps; ++w)
                sum += to[(w * kTiles * 8 + tid / kRows) * kRows + tid % kRows];
            if (m < a.m && n < a.n)
                finish(a.epilogue, sum, m, n, a.n);
        }
    }
    cp_async_wait<0>();
}

template <int kDtype>
int run(const FewArgs& a, void* stream) {
    bool nested = a.scales.nested_absmax != nullptr, two = a.m > 8;
    auto kernel = two ? (nested ? linear_4bit_few_kernel<kDtype, 2, true>
                                : linear_4bit_few_kernel<kDtype, 2, false>)
                      : (nested ? linear_4bit_few_kernel<kDtype, 1, true>
                                : linear_4bit_few_kernel<kDtype, 1, false>);
    constexpr int64_t kMultiprocessors = 132;
    unsigned blocks = (unsigned)min64(ceil_div(a.n, kRows), kMultiprocessors);
    return launch("linear_4bit_few", kernel, blocks, kThreads,
                  two ? kSharedBytes<2> : kSharedBytes<1>, stream, a);
}

} // namespace
} // namespace pk

// bf16 or fp16; 1 <= M <= 16, K a positive multiple of 64 below 2^31, blocks of 64 or more, x and
// packed on 16-byte boundaries. A rank of 0 leaves the LoRA term out.
extern "C" int pk_cuda_linear_4bit_few(const void* x, int dtype, int64_t m, int64_t n, int64_t k,
                                       const uint8_t* packed, const void* absmax,
                                       const float* nested_absmax, const float* nested_offset,
                                       int quant_type, int block_shift, const void* bias,
                                       const float* low, const void* up, int up_dtype, int rank,
                                       float scaling, void* out, void* stream) {
    bool fits = (dtype == pk::kBF16 || dtype == pk::kF16) && m >= 1 && m <= 16 && k >= 64 &&
                k < ((int64_t)1 << 31) && n < ((int64_t)1 << 31) && k % 64 == 0 &&
                block_shift >= 6 && (uintptr_t)x % 16 == 0 && (uintptr_t)packed % 16 == 0;
    if (!fits)
        return pk::kBadArgument;
    if (n == 0)
        return pk::kOk;
    pk::FewArgs a = {};
    a.x = x;
    a.packed = packed;
    a.scales = {absmax, nested_absmax, nested_offset};
    a.quant_type = quant_type;
    a.block_shift = block_shift;
    a.m = m, a.n = n, a.k = k;
    a.epilogue = {out, dtype, bias, rank > 0 ? low : nullptr, up, up_dtype, rank, scaling};
    return dtype == pk::kBF16 ? pk::run<pk::kBF16>(a, stream) : pk::run<pk::kF16>(a, stream);
}
