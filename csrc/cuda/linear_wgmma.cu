// out = x W^T, or dy W, for many rows on Hopper: weights in 4 or 8 bits are decoded inside the
// product, dense ones are copied; a low-rank term u v^T joins the same sum as its first steps.
//
// A block keeps [64, 128 or 256 rows of x] x [128 outputs] in the registers of one or two
// warpgroups and goes through the depth in steps of 64 with a ring of stages in shared memory. For
// 4 and 8 bits two to four more warpgroups take turns, a step each: they turn the stored weights,
// for which one thread has asked the copy engine steps ago, into the 16-bit tile
// (decode_tile.cuh). Of those that multiply one thread asks for x, as soon as a stage is free. For
// dense weights one more warp asks for both tiles. (With x and stored weights asked for together by
// those who decode, an H100 waited for them half of the time: 1.39 us a step of 256 rows, where the
// product takes 0.6; now 0.95.)
//
// Blocks are persistent and walk the tiles in bands of rows, so that blocks at work together share
// weights and rows in L2.
//
// Depth too long for too few tiles is cut into parts; the parts end in a workspace and are added in
// order by a second kernel. Everything about the order of sums follows from (M, N, K) alone.

#include "wgmma_write.cuh"

namespace pk {
namespace {

// --- the warp that asks for dense tiles -------------------------------------------------------
template <class P, int kRows, bool kAcross>
__device__ __forceinline__ void copy_stages(const Args& a, Barriers* barriers,
                                            unsigned char* stages) {
    Ring<P::kStages> ring;
    for (Steps at(a, kRows); at.left(); at.advance(a, kRows, 1)) {
        barrier_wait(&barriers->empty[ring.slot], ring.parity ^ 1);
        copy_step<P, kDense, kAcross>(a, &barriers->full[ring.slot], stages + ring.slot * P::kStage,
                                      at);
        ring.advance();
    }
}

// --- the warpgroups that decode ---------------------------------------------------------------
// A statistic as it is stored, on its way.
struct RawScale {
    float plain; // or the nested absmax
    uint32_t code;
};

// Warpgroup `turn` takes every second (third, fourth) step. Its thread t makes bytes 128 t .. 128 t
// + 127 of the tile: the 64 weights of output t at this step of the depth, or (kAcross) 64 outputs,
// the first or the second half, of row t % 64 of the depth.
template <class P, int kFormat, int kRows, bool kAcross, int kDtype, bool kNested>
__device__ __forceinline__ void decode_stages(const Args& a, Barriers* barriers,
                                              unsigned char* stages, const float* map, int turn,
                                              int t) {
    float codes[16];
    const float* values = codebook(a.quant_type);
#pragma unroll
    for (int i = 0; i < 16; ++i)
        codes[i] = kFormat == kFourBit ? values[i] : 0.0f;
    float offset = kNested ? *a.scales.nested_offset : 0.0f;
    // Where this thread's run stands in the stored tile, whose chunks are exchanged as it arrived.
    constexpr int kRunBytes = kFormat == kFourBit ? 32 : 64;
    constexpr int kRowBytes = kAcross ? 2 * kRunBytes : kRunBytes;
    int row = kAcross ? t % 64 : t;
    int first_chunk = kAcross ? t / 64 * (kRunBytes / 16) : 0;
    int exchange = row * kRowBytes >> 7 & (kRowBytes / 16 - 1);
    unsigned char* tiles = stages + P::kStages * P::kStage + turn * P::kAhead * P::kStoredTile;
    const unsigned char* source = tiles + row * kRowBytes;
    unsigned char* target = stages + P::kXTile + t * 128;
    uint64_t* stored = barriers->stored + turn * P::kAhead;
    uint64_t* taken = barriers->taken + turn * P::kAhead;

    auto fetch = [&](const Steps& at) {
        RawScale raw = {0.0f, 0};
        int k = (at.step - a.rank_steps) * kStep;
        int r = kAcross ? k + row : at.tile.n + row;
        int c = kAcross ? at.tile.n + t / 64 * 64 : k;
        if (at.left() && k >= 0 && r < a.stored_rows && c < a.stored_cols) {
            int64_t block =
                kFormat == kInt8 ? r : (r * (int64_t)a.stored_cols + c) >> a.block_shift;
            if (kNested) {
                raw.code = ((const uint8_t*)a.scales.absmax)[block];
                raw.plain = a.scales.nested_absmax[block >> kNestedShift];
            } else {
                raw.plain = ((const float*)a.scales.absmax)[block];
            }
        }
        return raw;
    };

    // Where this warpgroup decodes, and what it asks for, kAhead of its own steps before.
    Steps at(a, kRows), asked(a, kRows);
    Ring<P::kStages> ring;
    if (at.left()) {
        at.advance(a, kRows, turn);
        asked.advance(a, kRows, turn);
        ring.advance(turn);
    }
    uint32_t parity = 0; // of the ring of stored tiles, where `at` is
    // Stored weights, by thread 0, and a statistic. Place `i` has been taken.
    auto ask = [&](int i, uint32_t parity) {
        RawScale raw = fetch(asked);
        if (asked.left()) {
            if (t == 0) {
                barrier_wait(&taken[i], parity ^ 1);
                copy_stored<P, kFormat, kAcross>(a, &stored[i], tiles + i * P::kStoredTile, asked);
            }
            asked.advance(a, kRows, P::kTurns);
        }
        return raw;
    };
    StoredRun<kFormat == kFourBit> run;
    auto load = [&](int i, uint32_t parity) {
        if (!at.left())
            return;
        barrier_wait(&stored[i], parity);
        if (at.step >= a.rank_steps) // else the copy engine brings v
            run.load(source + i * P::kStoredTile, first_chunk, exchange);
        __syncwarp();
        if (t % 32 == 0)
            barrier_arrive(&taken[i]);
    };
    RawScale raw[P::kAhead];
#pragma unroll
    for (int i = 0; i < P::kAhead; ++i)
        raw[i] = ask(i, 0);
    __syncwarp();
    load(0, 0);
    while (at.left()) {
#pragma unroll
        for (int i = 0; i < P::kAhead; ++i) {
            if (!at.left())
                break;
            int slot = ring.slot;
            bool decodes = at.step >= a.rank_steps;
            float scale =
                kNested ? nested_sum(map[raw[i].code], raw[i].plain, offset) : raw[i].plain;
            // Long before the fence, which waits for whatever is under way.
            raw[i] = ask(i, parity ^ 1);
            barrier_wait(&barriers->empty[slot], ring.parity ^ 1);
            if (decodes)
                run.template decode<kDtype>(codes, scale, target + slot * P::kStage, t & 7);
            // While the stores are on their way: the next run.
            ring.advance(P::kTurns);
            at.advance(a, kRows, P::kTurns);
            bool around = i == P::kAhead - 1;
            parity ^= around;
            load(around ? 0 : i + 1, parity);
            if (decodes)
                fence_async();
            __syncwarp();
            if (t % 32 == 0)
                barrier_arrive(&barriers->full[slot]);
        }
    }
}

// --- the warpgroups that multiply -------------------------------------------------------------
template <int kValue>
struct Type {
    static constexpr int value = kValue;
};

template <class P, int kFormat, int kRows, bool kAcross, int kDtype>
__device__ __forceinline__ void multiply_stages(const Args& a, Barriers* barriers,
                                                unsigned char* stages, int tid) {
    constexpr int kSubs = P::kSubs;
    int group = tid / 128, warp = tid / 32 % 4, lane = tid % 32;
    Ring<P::kStages> ring;
    Steps copied(a, kRows);
    // Whoever frees a stage asks for what comes into it: nobody could be sooner.
    auto copy_into = [&](int slot) { // by thread 0
        copy_step<P, kFormat, kAcross>(a, &barriers->full[slot], stages + slot * P::kStage, copied);
        copied.advance(a, kRows, 1);
    };
    if (P::kDecodes && tid == 0)
        for (int slot = 0; slot < P::kStages && copied.left(); ++slot)
            copy_into(slot);
    __syncwarp();
    auto freed = [&](int slot, uint32_t parity) {
        __syncwarp();
        if (lane == 0)
            barrier_arrive(&barriers->empty[slot]);
        if (P::kDecodes && tid == 0 && copied.left()) {
            barrier_wait(&barriers->empty[slot], parity);
            copy_into(slot);
        }
        __syncwarp();
    };
    int tiles = a.tiles_m * a.tiles_n * a.parts;
    for (int index = (int)blockIdx.x; index < tiles; index += (int)gridDim.x) {
        Tile tile = tile_at(a, index, kRows);
        float acc[kSubs][64];
        Ring<P::kStages> read; // by the products under way before these
        auto one_step = [&](auto type, bool first) {
            constexpr int kType = decltype(type)::value;
            barrier_wait(&barriers->full[ring.slot], ring.parity);
            const unsigned char* x = stages + ring.slot * P::kStage;
            const unsigned char* w = x + P::kXTile;
#pragma unroll
            for (int s = 0; s < kSubs; ++s)
                product_touch(acc[s]);
            product_begin();
#pragma unroll
            for (int k = 0; k < kStep / 16; ++k) {
                auto right =
                    operand_at<kAcross>(w + (kAcross ? 16 * 128 : 32) * k, kWeightTile / 2);
#pragma unroll
                for (int s = 0; s < kSubs; ++s)
                    product<kType, kAcross>(
                        acc[s], operand_at<false>(x + (kSubs * group + s) * 64 * 128 + 32 * k, 0),
                        right, !first || k > 0);
            }
            product_commit();
            product_wait<1>();
            if (!first)
                freed(read.slot, read.parity);
            read = ring;
            ring.advance();
        };
        int step = tile.begin;
        if constexpr (kDtype != kBF16) // the low-rank term is bf16 whatever x is
            for (; step < a.rank_steps && step < tile.end; ++step)
                one_step(Type<kBF16>{}, step == tile.begin);
        for (; step < tile.end; ++step)
            one_step(Type<kDtype>{}, step == tile.begin);
        product_wait<0>();
#pragma unroll
        for (int s = 0; s < kSubs; ++s)
            product_touch(acc[s]);
        freed(read.slot, read.parity);
#pragma unroll
        for (int s = 0; s < kSubs; ++s)
            write_rows<kDtype>(a, tile, tile.m + (kSubs * group + s) * 64 + 16 * warp, acc[s],
                               lane);
    }
}

template <int kFormat, bool kNested, bool kAcross, int kDtype, int kRows>
__global__ void __launch_bounds__(Plan<kFormat, kRows>::kThreads, 1)
    linear_wgmma_kernel(const __grid_constant__ Args a) {
#if defined(PK_HOPPER)
    using P = Plan<kFormat, kRows>;
    PK_DYNAMIC_SHARED(memory);
    unsigned char* aligned = memory + (1024 - shared_offset(memory) % 1024) % 1024;
    Barriers* barriers = (Barriers*)aligned;
    float* map = (float*)(aligned + 1024);
    unsigned char* stages = aligned + P::kHead;
    static_assert(sizeof(Barriers) <= 1024, "the head holds them");
    int tid = (int)threadIdx.x;
    if (tid == 0) {
        for (int i = 0; i < P::kStages; ++i) {
            barrier_init(&barriers->full[i], 1 + (P::kDecodes ? 4 : 0)); // decoding warps
            barrier_init(&barriers->empty[i], P::kMultiply / 32);
        }
        for (int i = 0; i < P::kTurns * P::kAhead; ++i) {
            barrier_init(&barriers->stored[i], 1);
            barrier_init(&barriers->taken[i], 4); // the warps of a warpgroup
        }
        barrier_init_done();
    }
    if (kNested)
        load_dynamic_map(map);
    __syncthreads();

    if (tid < P::kMultiply) {
        if constexpr (P::kDecodes)
            more_registers<P::kMultiplyRegisters>();
        multiply_stages<P, kFormat, kRows, kAcross, kDtype>(a, barriers, stages, tid);
    } else if constexpr (P::kDecodes) {
        fewer_registers<P::kDecodeRegisters>();
        decode_stages<P, kFormat, kRows, kAcross, kDtype, kNested>(
            a, barriers, stages, map, (tid - P::kMultiply) / 128, tid % 128);
    } else if (tid == P::kMultiply) {
        copy_stages<P, kRows, kAcross>(a, barriers, stages);
    }
#endif
}

// --- how a product is cut ---------------------------------------------------------------------
struct Cut {
    int rows; // of a tile: 64, 128 or 256
    int parts;
};

// The cheapest cut by a model in clocks: what a step of a tile takes on an H100, decoding included
// (measured with one tile a block, 64 to 256 rows), a tile another 2500 to fill the ring and to
// write, and parts a second launch and 4 bytes written and read for each output at 20 bytes a clock
// and multiprocessor.
double step_clocks(int rows, int format) {
    return format == kDense     ? 5.7 * rows
           : format == kFourBit ? 830.0 + 3.3 * rows
                                : 880.0 + 3.5 * rows;
}

Cut cut_of(int64_t m, int64_t outputs, int64_t depth, int format) {
    Cut best = {64, 1};
    double least = 1e300;
    int64_t steps = ceil_div(depth, kStep), columns = ceil_div(outputs, kOutputs);
    for (int rows = 64; rows <= 256; rows *= 2) {
        if (rows > 64 && m <= rows / 2)
            break;
        int64_t tiles = ceil_div(m, rows) * columns;
        double clocks = step_clocks(rows, format);
        for (int parts = 1; parts <= 16 && steps / parts >= 4; parts *= 2) {
            double waves = (double)ceil_div(tiles * parts, kMultiprocessors);
            double cost = waves * ((double)ceil_div(steps, parts) * clocks + 2500.0);
            if (parts > 1)
                cost += 4000.0 + (double)(m * outputs * 8 * parts) / (20.0 * kMultiprocessors);
            if (cost < least) {
                least = cost;
                best = {rows, parts};
            }
        }
    }
    return best;
}

template <int kFormat, bool kNested, bool kAcross, int kDtype>
int run(const Args& a, int rows, void* stream) {
    unsigned tiles = (unsigned)(a.tiles_m * a.tiles_n * a.parts);
    unsigned blocks = tiles < (unsigned)kMultiprocessors ? tiles : (unsigned)kMultiprocessors;
    if (rows == 64)
        return launch("linear_wgmma", linear_wgmma_kernel<kFormat, kNested, kAcross, kDtype, 64>,
                      blocks, Plan<kFormat, 64>::kThreads, Plan<kFormat, 64>::kSharedBytes, stream,
                      a);
    if (rows == 128)
        return launch("linear_wgmma", linear_wgmma_kernel<kFormat, kNested, kAcross, kDtype, 128>,
                      blocks, Plan<kFormat, 128>::kThreads, Plan<kFormat, 128>::kSharedBytes,
                      stream, a);
    return launch("linear_wgmma", linear_wgmma_kernel<kFormat, kNested, kAcross, kDtype, 256>,
                  blocks, Plan<kFormat, 256>::kThreads, Plan<kFormat, 256>::kSharedBytes, stream,
                  a);
}

template <int kFormat, bool kNested>
int run(const Args& a, int rows, bool across, int dtype, void* stream) {
    if (dtype == kBF16)
        return across ? run<kFormat, kNested, true, kBF16>(a, rows, stream)
                      : run<kFormat, kNested, false, kBF16>(a, rows, stream);
    return across ? run<kFormat, kNested, true, kF16>(a, rows, stream)
                  : run<kFormat, kNested, false, kF16>(a, rows, stream);
}

} // namespace
} // namespace pk

extern "C" {

// How pk_cuda_linear_wgmma is cut best: 1000 * rows of a tile + parts of the depth. Parts need a
// workspace of parts * m * outputs floats.
int64_t pk_cuda_linear_wgmma_cut(int64_t m, int64_t outputs, int64_t depth, int64_t format) {
    pk::Cut cut = pk::cut_of(m, outputs, depth, (int)format);
    return 1000 * cut.rows + cut.parts;
}

// out [M, outputs] (+)= x [M, depth] W^T (+ u v^T) (+ bias); `across`: x W, so depth counts the
// rows of W [stored_rows, stored_cols]. bf16 or fp16; format 0 dense, 1 four bits (blocks of 64 or
// more), 2 int8. u [M, rank] and v [outputs, rank] (across: [rank, outputs]) are bf16. Rows of
// everything are multiples of 16 bytes, depth of 64 for 4 bits, addresses of 16 bytes.
int pk_cuda_linear_wgmma(const void* x, int dtype, int64_t m, int64_t stored_rows,
                         int64_t stored_cols, int across, int format, const void* weight,
                         const void* absmax, const float* nested_absmax, const float* nested_offset,
                         int quant_type, int block_shift, const void* bias, const void* u,
                         const void* v, int rank, int rows, int parts, float* workspace,
                         int accumulate, void* out, void* stream) {
    int64_t outputs = across ? stored_cols : stored_rows,
            depth = across ? stored_rows : stored_cols;
    constexpr int64_t kMost = ((int64_t)1 << 31) - 512; // tiles may reach over the end
    bool fits = (dtype == pk::kBF16 || dtype == pk::kF16) && m >= 1 && outputs >= 1 && depth >= 1 &&
                outputs % 8 == 0 && depth % 8 == 0 && rank % 8 == 0 && (uintptr_t)out % 16 == 0 &&
                m < kMost && outputs < kMost && depth < kMost;
    if (format == pk::kFourBit)
        fits = fits && stored_cols % 64 == 0 && block_shift >= 6;
    if (format == pk::kInt8)
        fits = fits && stored_cols % 16 == 0;
    fits = fits && (rows == 64 || rows == 128 || rows == 256) && parts >= 1;
    if (!fits || (parts > 1 && workspace == nullptr))
        return pk::kBadArgument;
    pk::Args a = {};
    constexpr int kRow = 128;
    int status = pk::make_tensor_map(&a.x, x, 2, m, depth, 2 * depth, rows, kRow);
    int box_rows = across ? pk::kStep : pk::kOutputs;
    int element = format == pk::kDense ? 2 : 1;
    int64_t columns = format == pk::kFourBit ? stored_cols / 2 : stored_cols;
    int run_bytes = format == pk::kDense ? kRow : format == pk::kFourBit ? 32 : 64;
    int box_bytes = across && format != pk::kDense ? 2 * run_bytes : run_bytes;
    if (status == pk::kOk)
        status = pk::make_tensor_map(&a.weight, weight, element, stored_rows, columns,
                                     columns * element, box_rows, box_bytes);
    if (status == pk::kOk && rank > 0)
        status = pk::make_tensor_map(&a.u, u, 2, m, rank, 2 * rank, rows, kRow);
    if (status == pk::kOk && rank > 0)
        status = across
                     ? pk::make_tensor_map(&a.v, v, 2, rank, outputs, 2 * outputs, pk::kStep, kRow)
                     : pk::make_tensor_map(&a.v, v, 2, outputs, rank, 2 * rank, pk::kOutputs, kRow);
    if (status != pk::kOk)
        return status;
    a.scales = {absmax, nested_absmax, nested_offset};
    a.quant_type = quant_type;
    a.block_shift = block_shift;
    a.m = (int)m, a.outputs = (int)outputs;
    a.stored_rows = (int)stored_rows, a.stored_cols = (int)stored_cols;
    a.rank_steps = (int)pk::ceil_div(rank, pk::kStep);
    a.steps = a.rank_steps + (int)pk::ceil_div(depth, pk::kStep);
    a.steps_per_part = (int)pk::ceil_div(a.steps, parts);
    a.parts = (int)pk::ceil_div(a.steps, a.steps_per_part);
    a.tiles_m = (int)pk::ceil_div(m, rows);
    a.tiles_n = (int)pk::ceil_div(outputs, pk::kOutputs);
    a.workspace = a.parts > 1 ? workspace : nullptr;
    a.bias = bias;
    a.out = out;
    a.accumulate = accumulate != 0;
    if (format == pk::kDense)
        status = pk::run<pk::kDense, false>(a, rows, across, dtype, stream);
    else if (format == pk::kInt8)
        status = pk::run<pk::kInt8, false>(a, rows, across, dtype, stream);
    else if (nested_absmax != nullptr)
        status = pk::run<pk::kFourBit, true>(a, rows, across, dtype, stream);
    else
        status = pk::run<pk::kFourBit, false>(a, rows, across, dtype, stream);
    if (status != pk::kOk || a.workspace == nullptr)
        return status;
    dim3 blocks((unsigned)pk::ceil_div(outputs, 1024), (unsigned)pk::min64(m, 4096));
    auto kernel = dtype == pk::kBF16 ? pk::add_wgmma_parts_kernel<pk::kBF16>
                                     : pk::add_wgmma_parts_kernel<pk::kF16>;
    return pk::launch("add_wgmma_parts", kernel, blocks, 256, 0, stream, workspace, a.parts, m,
                      outputs, bias, accumulate != 0, out);
}
PK_LAUNCHER(linear_wgmma)
}
