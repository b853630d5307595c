// s = scale * dropout(x) a^T over the columns of 16-bit activations: S of LoRA, and dS with a =
// B^T. The mask is drawn again and x is read once: the floor is the bytes of x. On the way the
// factors of a low-rank term are made for the product that takes them.
//
// A block takes a slice of the depth, whose part of the adapter it splits once into shared memory,
// and many rows; a second kernel adds the slices. Blocks that took few rows of the whole depth read
// the adapter as often as there are such blocks, all of them the same lines at the same time, and
// on an H100 took twice as long as the bytes of x: 27 us at 4096 x 4096, rank 16, and 88 at 64.
//
// A product does not care in which order its depth is summed, so a lane takes eight neighbours of a
// row, 16 bytes, and they are the fragment. fp32 operands are the sum of three bf16 (24 bits), so
// sums are as exact as fp32 ones. The slices follow from rank and depth, not from M: a row has the
// same sum in any batch.

#include "rank_passes.cuh"

namespace pk {
namespace {

constexpr int kGroup = 32; // rows that a warp takes together
constexpr int kStep = 64;  // of the depth, in a turn of a warp
constexpr int kStage = kGroup * kStep * 2;
constexpr int kMostWarps = 8;
constexpr int kMultiprocessors = 132;

// How a pass is cut. 8 tiles ranks and `slice` of the depth a block.
struct ShrinkCut {
    int tiles, slice, slices, rank_blocks;
    int warps, stages;      // of each warp's ring
    int groups, row_blocks; // groups of 32 rows a block
    int64_t stride;         // of a partial sum's rows, floats
};

inline int adapter_bytes(int tiles, int slice, int parts) { return 8 * tiles * slice * 2 * parts; }

ShrinkCut shrink_cut(int64_t m, int64_t depth, int rank, int parts, int shared_limit) {
    ShrinkCut c = {};
    // Wide adapters in one pass over x, if they leave room for rings.
    for (c.tiles = rank <= 16 ? 2 : rank <= 32 ? 4 : 8;; c.tiles /= 2) {
        c.slice = c.tiles == 8 ? 256 : 512;
        int room = shared_limit - adapter_bytes(c.tiles, c.slice, parts);
        c.warps = stages_for(kMostWarps * kStage, room) >= 3 ? kMostWarps : kMostWarps / 2;
        c.stages = stages_for(c.warps * kStage, room);
        if (c.stages >= 3 || c.tiles == 2)
            break;
    }
    c.slices = (int)ceil_div(depth > 0 ? depth : 1, c.slice);
    c.rank_blocks = (int)ceil_div(rank, 8 * c.tiles);
    c.stride = ceil_div(rank, 8) * 8;
    int64_t groups = ceil_div(m > 0 ? m : 1, kGroup), others = (int64_t)c.slices * c.rank_blocks;
    int64_t most = others < kMultiprocessors ? kMultiprocessors / others : 1; // row blocks
    c.groups = (int)ceil_div(groups, most);
    c.row_blocks = (int)ceil_div(groups, c.groups);
    return c;
}

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
    ShrinkCut cut;
    float* partial; // [slices, M, cut.stride]
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

// Eight neighbours on whole 16 bytes.
template <int kDtype>
__device__ __forceinline__ void load_eight(const void* p, int64_t i, float v[8]) {
    if constexpr (kDtype == kF32) {
        const float4* from = (const float4*)((const float*)p + i);
        float4 a = from[0], b = from[1];
        v[0] = a.x, v[1] = a.y, v[2] = a.z, v[3] = a.w;
        v[4] = b.x, v[5] = b.y, v[6] = b.z, v[7] = b.w;
    } else {
        uint4 a = *(const uint4*)((const uint16_t*)p + i);
        const uint32_t w[4] = {a.x, a.y, a.z, a.w};
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            uint16_t half = (uint16_t)(w[j / 2] >> 16 * (j % 2));
            v[j] = kDtype == kBF16 ? bf16_to_float(half) : half_to_float(half);
        }
    }
}

// Threads `thread`, `thread` + `step` .. make v, each an output's column (across: a piece of a
// row). Several loads are under way together.
template <int kUpDtype>
__device__ __forceinline__ void make_v_from(const ShrinkArgs& a, unsigned thread, unsigned step) {
    unsigned outputs = (unsigned)a.outputs, columns = (unsigned)a.columns;
    if (a.across) { // eight outputs of one column at a time
        unsigned pieces = outputs / 8;
        for (unsigned i = thread; i < pieces * columns; i += step) {
            unsigned c = i / pieces, o = i % pieces * 8;
            Column column((int)c, a, false);
            float v[8] = {};
            int64_t from = (int64_t)column.rank * a.outputs + o; // a multiple of 8
            if (column.used)
                load_eight<kUpDtype>(a.up, from, v);
            uint32_t w[4] = {};
#pragma unroll
            for (int j = 0; j < 8; ++j)
                w[j / 2] |= (uint32_t)part_of(v[j], column.low) << 16 * (j % 2);
            *(uint4*)(a.v + (int64_t)c * outputs + o) = uint4{w[0], w[1], w[2], w[3]};
        }
        return;
    }
    constexpr int kBatch = 4;
    unsigned count = outputs * columns;
    for (unsigned first = thread; first < count; first += kBatch * step) {
        float v[kBatch];
        bool low[kBatch];
#pragma unroll
        for (int j = 0; j < kBatch; ++j) {
            unsigned i = first + j * step, o = i / columns;
            Column column((int)(i - o * columns), a, false);
            int64_t from = (int64_t)o * a.rank + column.rank;
            v[j] = column.used && i < count ? load_as_float(a.up, kUpDtype, from) : 0.0f;
            low[j] = column.low;
        }
#pragma unroll
        for (int j = 0; j < kBatch; ++j)
            if (first + j * step < count)
                a.v[first + j * step] = part_of(v[j], low[j]);
    }
}

__device__ __forceinline__ void make_v(const ShrinkArgs& a, unsigned thread, unsigned step) {
    if (a.up_dtype == kF32)
        make_v_from<kF32>(a, thread, step);
    else if (a.up_dtype == kBF16)
        make_v_from<kBF16>(a, thread, step);
    else
        make_v_from<kF16>(a, thread, step);
}

// The parts of a block's ranks and slice of the depth in shared memory: [part][rank][depth], where
// chunks of eight change places so that neither the eight ranks of a read nor those of a write meet
// in a bank.
template <int kParts, int kRanks, int kSlice>
struct AdapterSlice {
    static __device__ __forceinline__ int at(int part, int rank, int k) {
        int exchanged = k / 8 ^ ((rank & 1) << 2 | (rank >> 1 & 3));
        return ((part * kRanks + rank) * kSlice + exchanged * 8 + k % 8) * 2;
    }

    // Elements (rank, depth), or transposed (depth, rank), from `first_r` and `first_k` on; zero
    // where there are none.
    template <bool kTransposed>
    static __device__ __forceinline__ void fill(unsigned char* memory, const ShrinkArgs& a,
                                                int first_r, int64_t first_k, int tid,
                                                int threads) {
        constexpr int kPairs = kRanks * kSlice / 2, kBatch = 8; // loads under way together
        static_assert(kPairs % (kBatch * 32 * kMostWarps) == 0, "batches are whole");
        auto rank_of = [](int i) { return kTransposed ? i % kRanks : i / (kSlice / 2); };
        auto k_of = [](int i) { return 2 * (kTransposed ? i / kRanks : i % (kSlice / 2)); };
        for (int first = tid; first < kPairs; first += kBatch * threads) {
            uint32_t low[kBatch], high[kBatch]; // as they are stored
#pragma unroll
            for (int j = 0; j < kBatch; ++j) {
                int64_t r = first_r + rank_of(first + j * threads);
                int64_t k = first_k + k_of(first + j * threads);
                bool inside = r < a.rank && k < a.depth; // the depth is even
                int64_t at = kTransposed ? k * a.rank + r : r * a.depth + k;
                int64_t next = kTransposed ? at + a.rank : at + 1;
                if constexpr (kParts > 1) {
                    const uint32_t* p = (const uint32_t*)a.a;
                    low[j] = inside ? p[at] : 0;
                    high[j] = inside ? p[next] : 0;
                } else {
                    const uint16_t* p = (const uint16_t*)a.a;
                    low[j] = inside ? p[at] : 0;
                    high[j] = inside ? p[next] : 0;
                }
            }
#pragma unroll
            for (int j = 0; j < kBatch; ++j) {
                uint32_t parts[kParts];
                if constexpr (kParts > 1)
                    split_pair<kParts>(bits_float(low[j]), bits_float(high[j]), parts);
                else
                    parts[0] = low[j] | high[j] << 16;
                int i = first + j * threads;
#pragma unroll
                for (int p = 0; p < kParts; ++p)
                    *(uint32_t*)(memory + at(p, rank_of(i), k_of(i))) = parts[p];
            }
        }
    }
};

// Of a stage of a ring: where a row's chunk of 16 bytes stands. Rows change halves, so that the
// eight lanes of a read meet eight banks' groups.
__device__ __forceinline__ int stage_at(int row, int chunk) {
    return (row * (kStep / 8) + (chunk ^ (row & 1) << 2)) * 16;
}

// 8 kTiles ranks, a slice of the depth and cut.groups x 32 rows a block; its warps share the rows,
// whose x comes through each warp's ring. Tensor cores cut off where they add, so 32 of the depth
// are summed on their own, small parts first, and added as fp32.
template <int kDtype, int kParts, bool kTransposed, bool kDropout, int kTiles>
__global__ void __launch_bounds__(32 * kMostWarps, 1) shrink_kernel(ShrinkArgs a) {
    constexpr int kRanks = 8 * kTiles, kSlice = kTiles == 8 ? 256 : 512;
    using Adapter = AdapterSlice<kParts, kRanks, kSlice>;
    PK_DYNAMIC_SHARED(memory);
    int tid = (int)threadIdx.x, lane = tid % 32, warp = tid / 32, g = lane / 4, t = lane % 4;
    int warps = a.cut.warps, stages = a.cut.stages;
    unsigned char* ring = memory + kParts * kRanks * kSlice * 2 + warp * stages * kStage;
    int first_group = (int)blockIdx.x * a.cut.groups;
    int64_t first_k = blockIdx.y * (int64_t)kSlice;
    int first_r = (int)blockIdx.z * kRanks;
    int64_t left = a.depth - first_k; // of the depth
    int turns = left < kSlice ? (int)ceil_div(left, kStep) : kSlice / kStep;
    int groups = (int)ceil_div(a.m, kGroup) - first_group; // of this block
    groups = groups < a.cut.groups ? groups : a.cut.groups;
    uint64_t key = kDropout ? (uint64_t)*a.dropout.seed : 0;

    // This lane copies chunk lane % 8 of every fourth row.
    int copy_row = lane / 8, copy_chunk = lane % 8, copy_slot = 0, copy_group = warp, copy_turn = 0;
    auto copy = [&]() {
        if (copy_group < groups) {
            int64_t m = (int64_t)(first_group + copy_group) * kGroup + copy_row;
            int64_t k = first_k + copy_turn * kStep + 8 * copy_chunk;
            const uint16_t* from = (const uint16_t*)a.x + m * a.depth + k;
#pragma unroll
            for (int i = 0; i < kGroup / 4; ++i)
                cp_async16(ring + copy_slot * kStage + stage_at(copy_row + 4 * i, copy_chunk),
                           from + i * (4 * a.depth), k < a.depth && m + 4 * i < a.m);
            if (++copy_turn == turns) {
                copy_turn = 0;
                copy_group += warps;
            }
        }
        cp_async_commit();
        copy_slot = copy_slot + 1 == stages ? 0 : copy_slot + 1;
    };
    for (int i = 0; i < stages - 1; ++i)
        copy();
    Adapter::template fill<kTransposed>(memory, a, first_r, first_k, tid, 32 * warps);
    if (a.v != nullptr && blockIdx.z == 0) // while the first of x is on its way
        make_v(a, (blockIdx.y * gridDim.x + blockIdx.x) * blockDim.x + tid,
               gridDim.y * gridDim.x * blockDim.x);
    __syncthreads();

    int slot = 0;
    for (int group = warp; group < groups; group += warps) {
        int64_t first_m = (int64_t)(first_group + group) * kGroup;
        float acc[2][kTiles][4] = {};
        for (int turn = 0; turn < turns; ++turn) {
            wait_for_stage(stages);
            const unsigned char* stage = ring + slot * kStage;
            slot = slot + 1 == stages ? 0 : slot + 1;
            copy();              // to the stage that all lanes have read a turn ago
#pragma unroll(kDropout ? 1 : 2) // masks take registers
            for (int half = 0; half < 2; ++half) {
                uint4 x[4]; // rows 8 i + g, 8 elements from k on
                int k = turn * kStep + 32 * half + 8 * t;
#pragma unroll
                for (int i = 0; i < 4; ++i)
                    x[i] = *(const uint4*)(stage + stage_at(8 * i + g, 4 * half + t));
                if constexpr (kDropout) {
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        int64_t at = (first_m + 8 * i + g) * a.depth + first_k + k;
                        Philox4 low = philox(key, (uint64_t)at >> 2);
                        Philox4 high = philox(key, ((uint64_t)at >> 2) + 1);
                        x[i].x = masked_pair<kDtype>(x[i].x, low.w[0], low.w[1], a.dropout);
                        x[i].y = masked_pair<kDtype>(x[i].y, low.w[2], low.w[3], a.dropout);
                        x[i].z = masked_pair<kDtype>(x[i].z, high.w[0], high.w[1], a.dropout);
                        x[i].w = masked_pair<kDtype>(x[i].w, high.w[2], high.w[3], a.dropout);
                    }
                }
#pragma unroll
                for (int n = 0; n < kTiles; ++n) {
                    float sum[2][4] = {};
#pragma unroll
                    for (int p = kParts - 1; p >= 0; --p) {
                        uint4 b = *(const uint4*)(memory + Adapter::at(p, 8 * n + g, k));
#pragma unroll
                        for (int i = 0; i < 2; ++i) {
                            const uint4 &upper = x[2 * i], &lower = x[2 * i + 1];
                            const uint32_t first[4] = {upper.x, lower.x, upper.y, lower.y};
                            const uint32_t second[4] = {upper.z, lower.z, upper.w, lower.w};
                            mma_m16n8k16<kDtype>(sum[i], first, b.x, b.y, sum[i]);
                            mma_m16n8k16<kDtype>(sum[i], second, b.z, b.w, sum[i]);
                        }
                    }
#pragma unroll
                    for (int i = 0; i < 8; ++i)
                        acc[i / 4][n][i % 4] += sum[i / 4][i % 4];
                }
            }
        }
        float* partial = a.partial + blockIdx.y * a.m * a.cut.stride + first_r + 2 * t;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            int64_t m = first_m + 8 * i + g;
            if (m < a.m)
#pragma unroll
                for (int n = 0; n < kTiles; ++n)
                    if (first_r + 8 * n < a.cut.stride)
                        *(float2*)(partial + m * a.cut.stride + 8 * n) =
                            float2{acc[i / 2][n][i % 2 * 2], acc[i / 2][n][i % 2 * 2 + 1]};
        }
    }
}

// Adds the slices in order; u from the sums.
__global__ void __launch_bounds__(256) add_slices_kernel(ShrinkArgs a) {
    int stride = (int)a.cut.stride;
    int64_t step = (int64_t)gridDim.x * 256;
    for (int64_t i = blockIdx.x * (int64_t)256 + threadIdx.x; i < a.m * stride; i += step) {
        int64_t m = i / stride;
        int r = (int)(i % stride);
        if (r >= a.rank)
            continue;
        float sum = 0.0f;
#pragma unroll 4
        for (int slice = 0; slice < a.cut.slices; ++slice)
            sum += a.partial[slice * a.m * stride + i];
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

template <int kDtype, int kParts, bool kTransposed, bool kDropout, int kTiles>
int shrink(const ShrinkArgs& a, void* stream) {
    const ShrinkCut& c = a.cut;
    dim3 grid((unsigned)c.row_blocks, (unsigned)c.slices, (unsigned)c.rank_blocks);
    int bytes = adapter_bytes(kTiles, c.slice, kParts) + c.stages * c.warps * kStage;
    int status = launch("shrink", shrink_kernel<kDtype, kParts, kTransposed, kDropout, kTiles>,
                        grid, 32 * c.warps, bytes, stream, a);
    if (status != kOk)
        return status;
    unsigned blocks = (unsigned)min64(ceil_div(a.m * c.stride, 256), 8 * kMultiprocessors);
    return launch("add_slices", add_slices_kernel, blocks, 256, 0, stream, a);
}

template <int kDtype, int kParts, bool kTransposed, bool kDropout>
int shrink(const ShrinkArgs& a, void* stream) {
    return a.cut.tiles == 2   ? shrink<kDtype, kParts, kTransposed, kDropout, 2>(a, stream)
           : a.cut.tiles == 4 ? shrink<kDtype, kParts, kTransposed, kDropout, 4>(a, stream)
                              : shrink<kDtype, kParts, kTransposed, kDropout, 8>(a, stream);
}

template <int kDtype, int kParts>
int shrink(const ShrinkArgs& a, bool transposed, void* stream) {
    if (a.dropout.seed != nullptr) // over x, whose adapter is not transposed
        return transposed ? kBadArgument : shrink<kDtype, kParts, false, true>(a, stream);
    return transposed ? shrink<kDtype, kParts, true, false>(a, stream)
                      : shrink<kDtype, kParts, false, false>(a, stream);
}

int parts_of(int dtype, int a_dtype) { return dtype == kBF16 && a_dtype == kF32 ? 3 : 1; }

} // namespace
} // namespace pk

extern "C" {

// Bytes of workspace that pk_cuda_shrink needs.
int64_t pk_cuda_shrink_workspace(int64_t m, int64_t depth, int64_t rank, int64_t dtype,
                                 int64_t a_dtype, int64_t shared_limit) {
    pk::ShrinkCut cut = pk::shrink_cut(m, depth, (int)rank, pk::parts_of((int)dtype, (int)a_dtype),
                                       (int)shared_limit);
    return cut.slices * m * cut.stride * 4;
}

// s [M, rank] = scale * dropout(x) a^T; x [M, depth], a [rank, depth] or transposed, of x's dtype
// or, for bf16 x, fp32; depth a multiple of 8, x on 16 bytes. u and v (both or none): see
// ShrinkArgs; `columns` holds two (bf16 `up`) or three times the rank, rounded up to 8. A null seed
// means no dropout; with one, a is not transposed. `shared_limit`: bytes a block may have.
int pk_cuda_shrink(const void* x, int dtype, int64_t m, int64_t depth, const void* a, int a_dtype,
                   int rank, int transposed, float scale, const int64_t* seed, uint32_t threshold,
                   float keep_scale, float* s, int64_t s_stride, void* u, void* v, const void* up,
                   int up_dtype, int across, int64_t outputs, int columns, float u_scale,
                   int shared_limit, float* workspace, void* stream) {
    bool halves = dtype == pk::kBF16 || dtype == pk::kF16;
    bool fits = halves && depth % 8 == 0 && pk::aligned16(x) && rank >= 1 &&
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
    p.cut = pk::shrink_cut(m, depth, rank, pk::parts_of(dtype, a_dtype), shared_limit);
    p.partial = workspace;
    if (p.cut.stages < 2 || (p.cut.slices > 0 && workspace == nullptr))
        return pk::kBadArgument;
    if (dtype == pk::kF16)
        return pk::shrink<pk::kF16, 1>(p, transposed != 0, stream);
    return a_dtype == pk::kF32 ? pk::shrink<pk::kBF16, 3>(p, transposed != 0, stream)
                               : pk::shrink<pk::kBF16, 1>(p, transposed != 0, stream);
}
PK_LAUNCHER(shrink)
}
