// How linear_wgmma.cu plans a block: the ring of stages in shared memory, the walk over tiles and
// steps, and the copies that fill a stage.
#pragma once

#include "decode_tile.cuh"

namespace pk {
namespace {

enum Format : int { kDense = 0, kFourBit = 1, kInt8 = 2 };

constexpr int kStep = 64;     // of the depth: 128 bytes of 16-bit values
constexpr int kOutputs = 128; // of a tile
constexpr int kWeightTile = kOutputs * kStep * 2;
constexpr int kHalfTile = kWeightTile / 2;
constexpr int kMostTurns = 4; // warpgroups that decode
constexpr int kMaxStages = 8;
constexpr int kMostAhead = 2;
constexpr int kSharedLimit = 227 * 1024;
constexpr int kMultiprocessors = 132;

// kRows: rows of x of a tile.
template <int kFormat, int kRows>
struct Plan {
    static constexpr bool kDecodes = kFormat != kDense;
    static constexpr int kMultiply = kRows == 64 ? 128 : 256; // threads
    static constexpr int kSubs = kRows == 256 ? 2 : 1;        // products of 64 rows of a warpgroup
    // Warpgroups that decode, a step each in turns: as many as leave registers for the sums.
    static constexpr int kTurns = !kDecodes ? 0 : kRows == 256 ? 2 : kRows == 128 ? 3 : 4;
    static constexpr int kThreads = kMultiply + (kDecodes ? 128 * kTurns : 32);
    static constexpr int kXTile = kRows * kStep * 2;
    static constexpr int kStoredTile = kFormat == kFourBit ? kWeightTile / 4
                                       : kFormat == kInt8  ? kWeightTile / 2
                                                           : 0;
    // Of its own steps a decoding warpgroup asks for stored weights and statistics so many before
    // it decodes them. Stored tiles have a ring of their own, so that they are on their way before
    // the stage that they are decoded into is free.
    static constexpr int kAhead = kFormat == kInt8 && kRows == 128 ? 1 : kMostAhead;
    static constexpr int kStage = kXTile + kWeightTile;
    static constexpr int kHead = kFormat == kFourBit ? 2048 : 1024; // barriers, the dynamic map
    // Tiles start on 1024 bytes, the window in which chunks change places.
    static constexpr int kRoom = kSharedLimit - kHead - 1024;
    static constexpr int kFit = (kRoom - kTurns * kAhead * kStoredTile) / kStage;
    // A stage belongs to one decoding warpgroup: waits tell odd phases from even ones, no more.
    static constexpr int kWhole = kDecodes ? kTurns : 1;
    static constexpr int kStages = (kFit > kMaxStages ? kMaxStages : kFit) / kWhole * kWhole;
    static constexpr int kSharedBytes =
        1024 + kHead + kStages * kStage + kTurns * kAhead * kStoredTile;
    // Registers of a thread: what a launch gives to all alike moves to those that multiply.
    static constexpr int kRegisters = 65536 / kThreads / 8 * 8;
    static constexpr int kMultiplyRegisters = kRows == 256 ? 176 : kRows == 128 ? 120 : 128;
    static constexpr int kDecodeRegisters = kRows == 64 ? 88 : 80;
    static_assert(!kDecodes || kMultiply * kMultiplyRegisters + 128 * kTurns * kDecodeRegisters <=
                                   kThreads * kRegisters,
                  "a warpgroup that asks for more than the others gave back waits for ever");
};

struct Args {
    TensorMap x, weight, u, v;
    Scales scales; // of a 4-bit weight; kInt8: absmax is the row absmax
    int quant_type;
    int block_shift;
    int m, outputs; // of the product
    int stored_rows, stored_cols;
    int rank_steps; // steps of the low-rank term, before those of the depth
    int steps;      // both together
    int parts, steps_per_part;
    int tiles_m, tiles_n;
    float* workspace; // [parts, M, outputs]; null: one part, straight to the output
    const void* bias;
    void* out;
    bool accumulate; // add to what `out` holds
};

struct Tile {
    int m, n;             // first row of x and output
    int part, begin, end; // steps
};

constexpr int kBand = 8; // rows of tiles

__device__ __forceinline__ Tile tile_at(const Args& a, int index, int rows) {
    Tile t;
    int tiles = a.tiles_m * a.tiles_n;
    t.part = index / tiles;
    int i = index % tiles;
    int first = i / (kBand * a.tiles_n) * kBand;
    int band = a.tiles_m - first < kBand ? a.tiles_m - first : kBand;
    i -= first * a.tiles_n;
    t.m = (first + i % band) * rows;
    t.n = i / band * kOutputs;
    t.begin = t.part * a.steps_per_part;
    int end = t.begin + a.steps_per_part;
    t.end = end < a.steps ? end : a.steps;
    return t;
}

// Position in the ring of stages.
template <int kStages>
struct Ring {
    int slot = 0;
    uint32_t parity = 0;
    __device__ __forceinline__ void advance(int by = 1) {
        slot += by;
        if (slot >= kStages) {
            slot -= kStages;
            parity ^= 1;
        }
    }
};

// A block's steps, tile after tile.
struct Steps {
    Tile tile;
    int step, index, count;

    __device__ __forceinline__ Steps(const Args& a, int rows) {
        index = (int)blockIdx.x;
        count = a.tiles_m * a.tiles_n * a.parts;
        if (index < count) {
            tile = tile_at(a, index, rows);
            step = tile.begin;
        }
    }
    __device__ __forceinline__ bool left() const { return index < count; }
    __device__ __forceinline__ void advance(const Args& a, int rows, int by) {
        step += by;
        while (step >= tile.end) {
            int over = step - tile.end;
            index += (int)gridDim.x;
            if (index >= count)
                return;
            tile = tile_at(a, index, rows);
            step = tile.begin + over;
        }
    }
};

// full: everything of a stage is there; empty: the products have read it; stored: a stored tile has
// come; taken: the warps have read it.
struct Barriers {
    uint64_t full[kMaxStages], empty[kMaxStages];
    uint64_t stored[kMostTurns * kMostAhead], taken[kMostTurns * kMostAhead];
};

// Asks for what a step copies into its stage, which is free: x, and weights that need no decoding
// (dense, or the factors of the low-rank term). One thread.
template <class P, int kFormat, bool kAcross>
__device__ __forceinline__ void copy_step(const Args& a, uint64_t* full, unsigned char* stage,
                                          const Steps& at) {
    unsigned char* w = stage + P::kXTile;
    bool low_rank = at.step < a.rank_steps;
    int k = (low_rank ? at.step : at.step - a.rank_steps) * kStep, n = at.tile.n;
    bool copies_weight = low_rank || kFormat == kDense;
    barrier_arrive_expect(full, P::kXTile + (copies_weight ? kWeightTile : 0));
    copy_box(stage, low_rank ? &a.u : &a.x, at.tile.m, k, full);
    if (copies_weight) {
        const TensorMap* map = low_rank ? &a.v : &a.weight;
        if (kAcross) { // two boxes of 64 outputs
            copy_box(w, map, k, n, full);
            copy_box(w + kHalfTile, map, k, n + 64, full);
        } else {
            copy_box(w, map, n, k, full);
        }
    }
}

// Asks for the stored weights of a step, into a place whose last tile has been taken. One thread.
template <class P, int kFormat, bool kAcross>
__device__ __forceinline__ void copy_stored(const Args& a, uint64_t* stored, unsigned char* to,
                                            const Steps& at) {
    if (at.step < a.rank_steps) { // nothing to decode, but the phases go on
        barrier_arrive(stored);
        return;
    }
    barrier_arrive_expect(stored, P::kStoredTile);
    int k = (at.step - a.rank_steps) * kStep, row = kAcross ? k : at.tile.n;
    int col = kAcross ? at.tile.n : k;
    copy_box(to, &a.weight, row, kFormat == kFourBit ? col / 2 : col, stored);
}

} // namespace
} // namespace pk
