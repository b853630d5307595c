// y = x W^T for M <= 64 with 4-bit weights in their stored layout, on tensor cores.
//
// mma.m16n8k16 with W as the 16-row operand: D[n, m]. A product does not care in which order its
// depth is summed, so the order is chosen for the storage: within 32 weights of a row, lane t of a
// quad takes 8 neighbours, which are 4 bytes of W and 16 bytes of x. Each packed byte then is one A
// register (a pair of codes) by one look-up in a table that the lane has for itself ([byte][lane],
// 32 KB, no bank conflicts), and x needs no shuffling at all. The code products of one block are
// summed in a fresh accumulator, which one FMA multiplies by the block's fp32 scale.
//
// A block of 8 warps computes 128 outputs for all of M over a part of the depth; cp.async brings W
// and x two or three stages ahead, and the scales, which threads fetch and decode, as far. Parts of
// the depth end in a workspace and are added in order by a second kernel, so that results depend on
// N and K, not on M or on timing.
//
// Rounding: the codes are rounded to the 16-bit type, the scale is fp32, so a weight differs from
// the stored-and-rounded one by less than that one's own rounding.

#include "epilogue.cuh"
#include "scales.cuh"

namespace pk {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;
constexpr int kRows = 16 * kWarps;             // outputs of a block
constexpr int kDepth = 128;                    // weights of a row in one stage
constexpr int kWeightStride = kDepth / 2 + 16; // bytes; the padding keeps reads free of conflicts
constexpr int kXStride = kDepth * 2 + 64;
constexpr int kTableBytes = 256 * 32 * 4;
constexpr int kMapBytes = 256 * 4;

// kTiles: columns of x, in eights. kGroup: weights that surely share a scale, 32 or 64.
template <int kTiles, int kGroup>
struct Shape {
    static constexpr int kStages = kTiles <= 2 ? 4 : 3;
    static constexpr int kGroups = kDepth / kGroup;
    static constexpr int kWeightBytes = kRows * kWeightStride;
    static constexpr int kXBytes = 8 * kTiles * kXStride;
    static constexpr int kScaleBytes = kRows * kGroups * 4;
    static constexpr int kStageBytes = kWeightBytes + kXBytes + kScaleBytes;
    static constexpr int kSharedBytes = kTableBytes + kMapBytes + kStages * kStageBytes;
};

struct MmaArgs {
    const void* x; // [M, K]
    const uint8_t* packed;
    Scales scales;
    int quant_type;
    int block_shift;
    int64_t m, n, k;
    int64_t depth_per_part; // a multiple of kDepth
    float* workspace;       // [parts, M, N]; null: one part, straight to the output
    Epilogue epilogue;
};

// The pair of codes of byte i, as an A or B register; `lane4` is 4 * lane.
__device__ __forceinline__ uint32_t code_pair(SharedAddress table, uint32_t lane4, uint32_t w,
                                              int i) {
    uint32_t shifted = i == 0 ? w << 7 : w >> (8 * i - 7);
    return load_shared_word(table + ((shifted & 0x7f80u) | lane4));
}

template <int kDtype, int kTiles, int kGroup>
__global__ void __launch_bounds__(kThreads, kTiles == 8 ? 1 : 2) linear_4bit_mma_kernel(MmaArgs a) {
    using S = Shape<kTiles, kGroup>;
    PK_DYNAMIC_SHARED(memory);
    uint32_t* table = (uint32_t*)memory;
    float* map = (float*)(memory + kTableBytes);
    unsigned char* stages = memory + kTableBytes + kMapBytes;
    int tid = (int)threadIdx.x, lane = tid % 32, warp = tid / 32, g = lane / 4, t = lane % 4;
    int64_t first_n = blockIdx.x * (int64_t)kRows;
    int64_t begin = blockIdx.y * a.depth_per_part;
    int depth = (int)(min64(a.k, begin + a.depth_per_part) - begin);
    int count = (depth + kDepth - 1) / kDepth;
    bool nested = a.scales.nested_absmax != nullptr;

    const float* values = codebook(a.quant_type);
    for (int byte = warp; byte < 256; byte += kWarps)
        table[byte * 32 + lane] = pack2<kDtype>(values[byte >> 4], values[byte & 15]);
    if (nested)
        load_dynamic_map(map);
    float offset = nested ? *a.scales.nested_offset : 0.0f;
    __syncthreads();

    // What this thread copies into every stage, 16 bytes at a time: the same 32 weights of rows 64
    // apart (rows behind N repeat the last one), the same 8 elements of rows of x 16 apart (behind
    // M and behind the depth: zeros), and kScales scales.
    const uint8_t* weight_source[2];
    int weight_k = tid % 4 * 32, x_k = tid % 16 * 8, x_row = tid / 16;
#pragma unroll
    for (int j = 0; j < 2; ++j)
        weight_source[j] =
            a.packed + ((min64(first_n + tid / 4 + 64 * j, a.n - 1) * a.k + begin + weight_k) >> 1);
    const uint16_t* x_source = (const uint16_t*)a.x + x_row * a.k + begin + x_k;
    unsigned char* weight_target = stages + tid / 4 * kWeightStride + tid % 4 * 16;
    unsigned char* x_target = stages + S::kWeightBytes + x_row * kXStride + tid % 16 * 16;

    auto issue = [&](int i, int slot) {
        int to = slot * S::kStageBytes;
        bool inside = i * kDepth + weight_k < depth;
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            cp_async16(weight_target + to + 64 * j * kWeightStride, weight_source[j], inside);
            weight_source[j] += kDepth / 2;
        }
        inside = i * kDepth + x_k < depth;
        if (kTiles > 1 || tid < 128)
#pragma unroll
            for (int j = 0; j < (kTiles + 1) / 2; ++j)
                cp_async16(x_target + to + 16 * j * kXStride, x_source + 16 * j * a.k,
                           inside && x_row + 16 * j < a.m);
        x_source += kDepth;
    };

    constexpr int kScales = kRows * S::kGroups / kThreads;
    constexpr int kScaleRows = kThreads / S::kGroups; // rows from one scale to the thread's next
    int scale_k = tid % S::kGroups * kGroup;
    auto fetch_scales = [&](int i, float s[kScales]) {
        int k = i * kDepth + scale_k;
#pragma unroll
        for (int c = 0; c < kScales; ++c) {
            s[c] = 0.0f;
            int64_t n = min64(first_n + tid / S::kGroups + c * kScaleRows, a.n - 1);
            int64_t block = (n * a.k + begin + k) >> a.block_shift;
            if (k < depth)
                s[c] = nested ? scale_of<true>(a.scales, map, offset, block)
                              : scale_of<false>(a.scales, map, offset, block);
        }
    };
    auto store_scales = [&](int slot, const float s[kScales]) {
        float* to = (float*)(stages + slot * S::kStageBytes + S::kWeightBytes + S::kXBytes) + tid;
#pragma unroll
        for (int c = 0; c < kScales; ++c)
            to[c * kThreads] = s[c];
    };

    float scales[kScales];
#pragma unroll
    for (int i = 0; i < S::kStages - 1; ++i) {
        if (i < count) {
            issue(i, i);
            fetch_scales(i, scales);
            store_scales(i, scales);
        }
        cp_async_commit();
    }

    float acc[kTiles][4] = {};
    SharedAddress codes = shared_address(table);
    uint32_t lane4 = 4u * (uint32_t)lane;
    int weight_read = (16 * warp + g) * kWeightStride + 4 * t;
    int x_read = S::kWeightBytes + g * kXStride + 16 * t;
    int scale_read = S::kWeightBytes + S::kXBytes + (16 * warp + g) * S::kGroups * 4;
    int slot = 0, free_slot = S::kStages - 1;
    for (int i = 0; i < count; ++i) {
        cp_async_wait<S::kStages - 2>();
        __syncthreads(); // stage i is there for all, and stage i - 1 has been read by all
        int next = i + S::kStages - 1;
        if (next < count) {
            issue(next, free_slot);
            fetch_scales(next, scales);
        }
        cp_async_commit();

        const unsigned char* stage = stages + slot * S::kStageBytes;
#pragma unroll
        for (int group = 0; group < S::kGroups; ++group) {
            if (i * kDepth + group * kGroup >= depth)
                break;
            float part[kTiles][4];
#pragma unroll
            for (int half = 0; half < kGroup / 32; ++half) {
                int k = group * kGroup + 32 * half;
                const unsigned char* w = stage + weight_read + k / 2;
                uint32_t low = *(const uint32_t*)w;
                uint32_t high = *(const uint32_t*)(w + 8 * kWeightStride);
                uint32_t first[4] = {
                    code_pair(codes, lane4, low, 0), code_pair(codes, lane4, high, 0),
                    code_pair(codes, lane4, low, 1), code_pair(codes, lane4, high, 1)};
                uint32_t second[4] = {
                    code_pair(codes, lane4, low, 2), code_pair(codes, lane4, high, 2),
                    code_pair(codes, lane4, low, 3), code_pair(codes, lane4, high, 3)};
#pragma unroll
                for (int tile = 0; tile < kTiles; ++tile) {
                    uint4 x = *(const uint4*)(stage + x_read + tile * 8 * kXStride + 2 * k);
                    mma_m16n8k16<kDtype>(part[tile], first, x.x, x.y,
                                         half == 0 ? nullptr : part[tile]);
                    mma_m16n8k16<kDtype>(part[tile], second, x.z, x.w, part[tile]);
                }
            }
            const float* s = (const float*)(stage + scale_read) + group;
            float scale_low = s[0], scale_high = s[8 * S::kGroups];
#pragma unroll
            for (int tile = 0; tile < kTiles; ++tile)
#pragma unroll
                for (int c = 0; c < 4; ++c)
                    acc[tile][c] =
                        fmaf(part[tile][c], c < 2 ? scale_low : scale_high, acc[tile][c]);
        }
        if (next < count)
            store_scales(free_slot, scales);
        slot = slot + 1 == S::kStages ? 0 : slot + 1;
        free_slot = free_slot + 1 == S::kStages ? 0 : free_slot + 1;
    }

    // Through shared memory, so that neighbouring threads write neighbouring outputs.
    float* sums = (float*)stages; // [8 * kTiles][kRows]
    static_assert(8 * kTiles * kRows * 4 <= S::kStages * S::kStageBytes, "the sums fit");
    __syncthreads();
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile)
#pragma unroll
        for (int c = 0; c < 4; ++c)
            sums[(8 * tile + 2 * t + c % 2) * kRows + 16 * warp + g + 8 * (c / 2)] = acc[tile][c];
    __syncthreads();
    int64_t n = first_n + tid % kRows;
    if (n >= a.n)
        return;
    for (int m = tid / kRows; m < 8 * kTiles && m < a.m; m += kThreads / kRows) {
        float sum = sums[m * kRows + tid % kRows];
        if (a.workspace != nullptr)
            a.workspace[(blockIdx.y * a.m + m) * a.n + n] = sum;
        else
            finish(a.epilogue, sum, m, n, a.n);
    }
}

// Adds the parts of the depth in order.
__global__ void __launch_bounds__(kThreads)
    add_parts_kernel(const float* workspace, int parts, int64_t m, int64_t n, Epilogue epilogue) {
    for (int64_t i = blockIdx.x * (int64_t)kThreads + threadIdx.x; i < m * n;
         i += gridDim.x * (int64_t)kThreads) {
        float sum = 0.0f;
        for (int p = 0; p < parts; ++p)
            sum += workspace[p * m * n + i];
        finish(epilogue, sum, i / n, i % n, n);
    }
}

// Enough parts for two blocks on each of 132 multiprocessors, but at least four stages in each, so
// that filling the table stays a small share. A function of the shape alone.
int64_t depth_per_part(int64_t n, int64_t k) {
    int64_t stages = ceil_div(k, kDepth);
    int64_t parts = n > 0 ? 264 / ceil_div(n, kRows) : 1;
    int64_t most = stages / 4;
    parts = parts > most ? most : parts;
    parts = parts < 1 ? 1 : parts;
    return ceil_div(stages, parts) * kDepth;
}

int64_t part_count(int64_t n, int64_t k) { return ceil_div(k, depth_per_part(n, k)); }

template <int kDtype, int kTiles, int kGroup>
int run(const MmaArgs& a, void* stream) {
    dim3 grid((unsigned)ceil_div(a.n, kRows), (unsigned)part_count(a.n, a.k));
    return launch("linear_4bit_mma", linear_4bit_mma_kernel<kDtype, kTiles, kGroup>, grid, kThreads,
                  Shape<kTiles, kGroup>::kSharedBytes, stream, a);
}

template <int kDtype, int kGroup>
int run(const MmaArgs& a, void* stream) {
    if (a.m <= 8)
        return run<kDtype, 1, kGroup>(a, stream);
    if (a.m <= 16)
        return run<kDtype, 2, kGroup>(a, stream);
    if (a.m <= 32)
        return run<kDtype, 4, kGroup>(a, stream);
    return run<kDtype, 8, kGroup>(a, stream);
}

} // namespace
} // namespace pk

extern "C" {

// Bytes that pk_cuda_linear_4bit_mma needs for the parts of the depth.
int64_t pk_cuda_linear_4bit_workspace(int64_t m, int64_t n, int64_t k) {
    int64_t parts = pk::part_count(n, k);
    return parts == 1 ? 0 : parts * m * n * 4;
}

// bf16 or fp16; 1 <= M <= 64, K a positive multiple of 32 below 2^31, x and packed on 16-byte
// boundaries. A rank of 0 leaves the LoRA term out.
int pk_cuda_linear_4bit_mma(const void* x, int dtype, int64_t m, int64_t n, int64_t k,
                            const uint8_t* packed, const void* absmax, const float* nested_absmax,
                            const float* nested_offset, int quant_type, int block_shift,
                            const void* bias, const float* low, const void* up, int up_dtype,
                            int rank, float scaling, float* workspace, void* out, void* stream) {
    bool fits = (dtype == pk::kBF16 || dtype == pk::kF16) && m >= 1 && m <= 64 && k >= 32 &&
                k < ((int64_t)1 << 31) && k % 32 == 0 && (uintptr_t)x % 16 == 0 &&
                (uintptr_t)packed % 16 == 0;
    if (!fits || (workspace == nullptr && pk::part_count(n, k) > 1))
        return pk::kBadArgument;
    if (n == 0)
        return pk::kOk;
    pk::MmaArgs a = {};
    a.x = x;
    a.packed = packed;
    a.scales = {absmax, nested_absmax, nested_offset};
    a.quant_type = quant_type;
    a.block_shift = block_shift;
    a.m = m, a.n = n, a.k = k;
    a.depth_per_part = pk::depth_per_part(n, k);
    a.workspace = pk::part_count(n, k) > 1 ? workspace : nullptr;
    a.epilogue = {out, dtype, bias, rank > 0 ? low : nullptr, up, up_dtype, rank, scaling};
    bool wide = k % 64 == 0 && block_shift >= 6; // 64 neighbours surely share a scale
    int status =
        dtype == pk::kBF16
            ? (wide ? pk::run<pk::kBF16, 64>(a, stream) : pk::run<pk::kBF16, 32>(a, stream))
            : (wide ? pk::run<pk::kF16, 64>(a, stream) : pk::run<pk::kF16, 32>(a, stream));
    if (status != pk::kOk || a.workspace == nullptr)
        return status;
    unsigned blocks = (unsigned)pk::min64(pk::ceil_div(m * n, pk::kThreads), 1056);
    return pk::launch("add_parts", pk::add_parts_kernel, blocks, pk::kThreads, 0, stream, workspace,
                      (int)pk::part_count(n, k), m, n, a.epilogue);
}
PK_LAUNCHER(linear_4bit_mma)
}
