// y = x W^T for M <= 16 with 4-bit weights in their stored layout: the weights stream past x once.
//
// mma.m16n8k16 with 16 outputs as the rows, and the depth ordered for the storage: within 64
// weights of a row lane t of a quad takes 16 neighbours, 8 bytes of W and 32 of x, so that each
// packed byte is one A register by one look-up in a table that the lane has for itself. The table
// has 256 bytes for each byte of W and starts where the lower 16 bits of an address are 0: one
// permutation of bytes makes the address. The code products of a block are summed in a fresh
// accumulator, which one FMA multiplies by the block's fp32 scale.
//
// A block takes 16 outputs and all of the depth, 128 at a time for each warp, and adds the warps'
// sums in order: nothing is left for a second kernel. Blocks are persistent; each warp keeps the
// weights of its next turns on their way (cp.async into its own ring), across tiles and from before
// the table is made, and fetches x and its share of the statistics a turn ahead. Results depend on
// K and on whether M is above 8, on nothing else.

#include "epilogue.cuh"
#include "scales.cuh"

namespace pk {
namespace {

constexpr int kRows = 16;   // outputs of a tile
constexpr int kDepth = 128; // of a row, in one turn of a warp
constexpr int kTurnBytes = kRows * kDepth / 2;
constexpr int kTableRow = 256;               // bytes for each byte of W; the lanes' words fill half
constexpr int kTableBytes = 256 * kTableRow; // from a multiple of this on
constexpr int kMapBytes = 256 * 4;

// kTiles: rows of x, in eights. Twice the rows take twice the registers, and leave half the warps.
template <int kTiles>
struct Few {
    static constexpr int kWarps = kTiles == 1 ? 16 : 8;
    static constexpr int kThreads = 32 * kWarps;
    static constexpr int kStages = kTiles == 1 ? 4 : 8;
    static constexpr int kSums = kWarps * kRows * 8 * kTiles;        // of a tile
    static constexpr int kRingBytes = kWarps * kStages * kTurnBytes; // behind the table
    static_assert(kMapBytes + 2 * kSums * 4 + 1024 <= kTableBytes, "map and sums stand before it");
    static constexpr int kSharedBytes = 2 * kTableBytes + kRingBytes;
};

struct CodeValues {
    float v[16];
};

struct FewArgs {
    const void* x; // [M, K]
    const uint8_t* packed;
    Scales scales;
    CodeValues codes; // in the kernel's parameters: nearer than memory when it begins
    int block_shift;  // 6 or more
    int64_t m, n, k;
    Epilogue epilogue;
};

// A statistic as it is stored: of one row and one block of 64, a different one in each lane of a
// quad.
struct RawScale {
    float plain; // or the nested absmax
    uint32_t code;
};

template <int kDtype, int kTiles, bool kNested>
__global__ void __launch_bounds__(Few<kTiles>::kThreads, 1) linear_4bit_few_kernel(FewArgs a) {
    using F = Few<kTiles>;
    PK_DYNAMIC_SHARED(memory);
    float* map = (float*)memory;
    float* sums = (float*)(memory + kMapBytes);
    unsigned char* table = memory + (kTableBytes - shared_offset(memory) % kTableBytes);
    int tid = (int)threadIdx.x, lane = tid % 32, warp = tid / 32, g = lane / 4, t = lane % 4;
    unsigned char* ring = table + kTableBytes + warp * F::kStages * kTurnBytes;
    constexpr int kStride = F::kWarps * kDepth; // from a warp's turn to its next
    int k_size = (int)a.k, own_k = warp * kDepth;
    int64_t tiles = ceil_div(a.n, kRows), grid = gridDim.x;

    // Copies run ahead: this lane's chunks of rows lane / 4 and 8 further, exchanged in the ring
    // against bank conflicts.
    int chunk = lane % 4, to = g * 64 + ((chunk ^ (g >> 1 & 3)) << 4);
    int copy_k = own_k + 32 * chunk, copy_slot = 0;
    int64_t copy_tile = blockIdx.x;
    const uint8_t* from[2];
    auto aim = [&]() {
#pragma unroll
        for (int i = 0; i < 2; ++i)
            from[i] =
                a.packed + ((min64(copy_tile * kRows + g + 8 * i, a.n - 1) * a.k + copy_k) >> 1);
    };
    auto copy = [&]() {
        if (copy_tile < tiles) {
            bool inside = copy_k < k_size;
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                cp_async16(ring + copy_slot + to + 512 * i, from[i], inside);
                from[i] += kStride / 2;
            }
            copy_k += kStride;
            if (copy_k - 32 * chunk >= k_size) {
                copy_k = own_k + 32 * chunk;
                copy_tile += grid;
                aim();
            }
        }
        cp_async_commit();
        copy_slot = (copy_slot + kTurnBytes) % (F::kStages * kTurnBytes);
    };
    // x and the statistics one turn ahead.
    uint4 x[kTiles][2][2], next_x[kTiles][2][2];
    const uint16_t* x_row[kTiles];
    bool x_inside[kTiles];
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
        x_inside[i] = 8 * i + g < a.m;
        x_row[i] = (const uint16_t*)a.x + (8 * i + g) * a.k + 16 * t;
    }
    auto load_x = [&](int k, uint4 v[kTiles][2][2]) {
#pragma unroll
        for (int block = 0; block < 2; ++block)
#pragma unroll
            for (int i = 0; i < kTiles; ++i) {
                const uint4* p = (const uint4*)(x_row[i] + k + 64 * block);
                bool inside = x_inside[i] && k + 64 * block < k_size;
                v[i][block][0] = inside ? p[0] : uint4{0, 0, 0, 0};
                v[i][block][1] = inside ? p[1] : uint4{0, 0, 0, 0};
            }
    };
    // Lane t of a quad fetches the statistic of row g + 8 (t / 2), block t % 2 of a turn.
    int64_t row_start = 0; // of that row, in the tile that statistics are fetched for
    auto start_row = [&](int64_t tile) {
        row_start = min64(tile * kRows + g + 8 * (t / 2), a.n - 1) * a.k + 64 * (t % 2);
    };
    auto load_scale = [&](int64_t tile, int k) {
        RawScale raw = {};
        if (tile < tiles && k + 64 * (t % 2) < k_size) {
            int64_t block = (row_start + k) >> a.block_shift;
            if (kNested) {
                raw.code = ((const uint8_t*)a.scales.absmax)[block];
                raw.plain = a.scales.nested_absmax[block >> kNestedShift];
            } else {
                raw.plain = ((const float*)a.scales.absmax)[block];
            }
        }
        return raw;
    };

    aim();
    if (own_k >= k_size) // nothing of the depth is this warp's
        copy_tile = tiles;
#pragma unroll
    for (int i = 0; i < F::kStages - 1; ++i)
        copy();
    load_x(own_k, x);
    start_row(blockIdx.x);
    RawScale now = load_scale(blockIdx.x, own_k);
    float offset = kNested ? *a.scales.nested_offset : 0.0f;
    for (int i = tid; i < 256 * 8; i += F::kThreads) { // 16 bytes of a byte's 128
        uint32_t v = pack2<kDtype>(a.codes.v[i / 8 >> 4], a.codes.v[i / 8 & 15]);
        *(uint4*)(table + i / 8 * kTableRow + i % 8 * 16) = uint4{v, v, v, v};
    }
    if (kNested)
        load_dynamic_map(map);
    __syncthreads();

    SharedAddress codes = shared_address(table) + 4u * (uint32_t)lane; // this lane's
    int slot = 0, half = 0;
    for (int64_t tile = blockIdx.x; tile < tiles; tile += grid) {
        float acc[kTiles][4] = {};
        for (int k = own_k; k < k_size; k += kStride) {
            bool last = k + kStride >= k_size;
            int next_k = last ? own_k : k + kStride;
            load_x(next_k, next_x);
            if (last)
                start_row(tile + grid);
            RawScale later = load_scale(last ? tile + grid : tile, next_k);
            copy();
            cp_async_wait<F::kStages - 1>();
            __syncwarp();
            float scale = kNested ? nested_sum(map[now.code], now.plain, offset) : now.plain;
            const unsigned char* w = ring + slot;
            slot = (slot + kTurnBytes) % (F::kStages * kTurnBytes);
#pragma unroll
            for (int block = 0; block < 2; ++block) {
                // 8 bytes of rows g and g + 8: 16 weights each
                int at = g * 64 + (((2 * block + t / 2) ^ (g >> 1 & 3)) << 4) + t % 2 * 8;
                uint2 upper = *(const uint2*)(w + at), lower = *(const uint2*)(w + 512 + at);
                float part[kTiles][4];
#pragma unroll
                for (int word = 0; word < 2; ++word) {
                    uint32_t u = word == 0 ? upper.x : upper.y, l = word == 0 ? lower.x : lower.y;
                    const uint32_t first[4] = {load_shared_word(shared_row(codes, u, 0)),
                                               load_shared_word(shared_row(codes, l, 0)),
                                               load_shared_word(shared_row(codes, u, 1)),
                                               load_shared_word(shared_row(codes, l, 1))};
                    const uint32_t second[4] = {load_shared_word(shared_row(codes, u, 2)),
                                                load_shared_word(shared_row(codes, l, 2)),
                                                load_shared_word(shared_row(codes, u, 3)),
                                                load_shared_word(shared_row(codes, l, 3))};
#pragma unroll
                    for (int i = 0; i < kTiles; ++i) {
                        const uint4& v = x[i][block][word];
                        mma_m16n8k16<kDtype>(part[i], first, v.x, v.y,
                                             word == 0 ? nullptr : part[i]);
                        mma_m16n8k16<kDtype>(part[i], second, v.z, v.w, part[i]);
                    }
                }
                float s[2];
#pragma unroll
                for (int i = 0; i < 2; ++i)
                    s[i] = __shfl_sync(0xffffffffu, scale, (lane & 28) + 2 * i + block);
#pragma unroll
                for (int i = 0; i < kTiles; ++i)
#pragma unroll
                    for (int c = 0; c < 4; ++c)
                        acc[i][c] = fmaf(part[i][c], s[c / 2], acc[i][c]);
            }
            __syncwarp(); // all lanes have read this stage before it is filled again
            now = later;
#pragma unroll
            for (int i = 0; i < 4 * kTiles; ++i)
                x[i / 4][i / 2 % 2][i % 2] = next_x[i / 4][i / 2 % 2][i % 2];
        }

        // The warps' sums in order; two halves of the sums take turns, so one barrier is enough.
        float* own_sums = sums + half * F::kSums;
        half ^= 1;
#pragma unroll
        for (int i = 0; i < kTiles; ++i)
#pragma unroll
            for (int c = 0; c < 4; ++c)
                own_sums[((warp * kTiles + i) * 8 + 2 * t + c % 2) * kRows + g + 8 * (c / 2)] =
                    acc[i][c];
        __syncthreads();
        if (tid < kRows * 8 * kTiles) {
            int64_t n = tile * kRows + tid % kRows, m = tid / kRows;
            float sum = 0.0f;
#pragma unroll
            for (int w = 0; w < F::kWarps; ++w)
                sum += own_sums[(w * kTiles * 8 + tid / kRows) * kRows + tid % kRows];
            if (m < a.m && n < a.n)
                finish(a.epilogue, sum, m, n, a.n);
        }
    }
    cp_async_wait<0>();
}

constexpr CodeValues values_of(const float (&values)[16]) {
    CodeValues c = {};
    for (int i = 0; i < 16; ++i)
        c.v[i] = values[i];
    return c;
}

template <int kDtype, int kTiles>
int run(const FewArgs& a, void* stream) {
    using F = Few<kTiles>;
    auto kernel = a.scales.nested_absmax != nullptr ? linear_4bit_few_kernel<kDtype, kTiles, true>
                                                    : linear_4bit_few_kernel<kDtype, kTiles, false>;
    constexpr int64_t kMultiprocessors = 132;
    unsigned blocks = (unsigned)min64(ceil_div(a.n, kRows), kMultiprocessors);
    return launch("linear_4bit_few", kernel, blocks, F::kThreads, F::kSharedBytes, stream, a);
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
    static constexpr pk::CodeValues kNF4 = pk::values_of(pk::kNF4Values);
    static constexpr pk::CodeValues kFP4 = pk::values_of(pk::kFP4Values);
    a.codes = quant_type == pk::kNF4 ? kNF4 : kFP4;
    a.block_shift = block_shift;
    a.m = m, a.n = n, a.k = k;
    a.epilogue = {out, dtype, bias, rank > 0 ? low : nullptr, up, up_dtype, rank, scaling};
    if (dtype == pk::kBF16)
        return m > 8 ? pk::run<pk::kBF16, 2>(a, stream) : pk::run<pk::kBF16, 1>(a, stream);
    return m > 8 ? pk::run<pk::kF16, 2>(a, stream) : pk::run<pk::kF16, 1>(a, stream);
}
PK_LAUNCHER(linear_4bit_few)
