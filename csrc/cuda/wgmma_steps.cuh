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
constexpr int kTurns = 2; // warpgroups that decode
constexpr int kMaxStages = 8;
constexpr int kSharedLimit = 227 * 1024;
constexpr int kMultiprocessors = 132;

// kRows: rows of x of a tile.
template <int kFormat, int kRows>
struct Plan {
    static constexpr bool kDecodes = kFormat != kDense;
    static constexpr int kMultiply = kRows == 64 ? 128 : 256; // threads
    static constexpr int kSubs = kRows == 256 ? 2 : 1;        // products of 64 rows of a warpgroup
    static constexpr int kThreads = kMultiply + (kDecodes ? 128 * kTurns : 32);
    static constexpr int kXTile = kRows * kStep * 2;
    static constexpr int kStoredTile = kFormat == kFourBit ? kWeightTile / 4
                                       : kFormat == kInt8  ? kWeightTile / 2
                                                           : 0;
    static constexpr int kStage = kXTile + kWeightTile + kStoredTile;
    static constexpr int kHead = kFormat == kFourBit ? 2048 : 1024; // barriers, the dynamic map
    // Tiles start on 1024 bytes, the window in which chunks change places.
    static constexpr int kFit = (kSharedLimit - kHead - 1024) / kStage;
    // A stage belongs to one decoding warpgroup: waits tell odd phases from even ones, no more.
    static constexpr int kStages = (kFit > kMaxStages ? kMaxStages : kFit) / kTurns * kTurns;
    static constexpr int kSharedBytes = 1024 + kHead + kStages * kStage;
    // How many of its own steps a decoding warpgroup copies ahead: one stage is being decoded, and
    // one multiplied.
    static constexpr int kAhead = (kStages - 2) / kTurns;
    static_assert(kAhead >= 1, "the next step's copy is under way when this one is decoded");
    // 128 accumulators a thread do not fit into an equal share of the registers.
    static constexpr bool kMoveRegisters = kDecodes && kRows == 256;
};

// Registers of a thread that multiplies or decodes, where they move: what the launch gives to 512
// threads, 128 each.
constexpr int kMultiplyRegisters = 168, kDecodeRegisters = 88;
static_assert(kMultiplyRegisters + kDecodeRegisters <= 2 * 128,
              "a warpgroup that asks for more than the others gave back waits for ever");

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

struct Barriers {
    uint64_t full[kMaxStages], empty[kMaxStages], stored[kMaxStages];
};

// Asks for the tiles of one step, once their stage is free. One thread.
template <class P, int kFormat, bool kAcross>
__device__ __forceinline__ void copy_step(const Args& a, Barriers* barriers, unsigned char* stages,
                                          const Steps& at, int slot, uint32_t parity) {
    unsigned char* x = stages + slot * P::kStage;
    unsigned char* w = x + P::kXTile;
    uint64_t* full = &barriers->full[slot];
    barrier_wait(&barriers->empty[slot], parity ^ 1);
    bool low_rank = at.step < a.rank_steps;
    int k = (low_rank ? at.step : at.step - a.rank_steps) * kStep, n = at.tile.n;
    bool copies_weight = low_rank || kFormat == kDense;
    barrier_arrive_expect(full, P::kXTile + (copies_weight ? kWeightTile : 0));
    copy_box(x, low_rank ? &a.u : &a.x, at.tile.m, k, full);
    if (copies_weight) {
        const TensorMap* map = low_rank ? &a.v : &a.weight;
        if (kAcross) { // two boxes of 64 outputs
            copy_box(w, map, k, n, full);
            copy_box(w + kHalfTile, map, k, n + 64, full);
        } else {
            copy_box(w, map, n, k, full);
        }
        if (P::kDecodes) // nothing to decode, but the phases go together
            barrier_arrive(&barriers->stored[slot]);
    } else {
        uint64_t* stored = &barriers->stored[slot];
        barrier_arrive_expect(stored, P::kStoredTile);
        int row = kAcross ? k : n, col = kAcross ? n : k;
        copy_box(w + kWeightTile, &a.weight, row, kFormat == kFourBit ? col / 2 : col, stored);
    }
}

} // namespace
} // namespace pk
