// What shrink.cu and outer.cu share: fp32 values as bf16 parts, dropout, and rings of stages that
// one warp fills and reads.
#pragma once

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

// --- rings
// ---------------------------------------------------------------------------------------- A warp's
// stages in shared memory, as many as the GPU has room for. A turn waits for its stage, reads it,
// and asks for the one that follows those under way: no warp waits for another.
constexpr int kMostStages = 6;

// How many stages of `bytes` a block has room for.
inline int stages_for(int bytes, int shared_limit) {
    int stages = shared_limit / bytes;
    return stages > kMostStages ? kMostStages : stages;
}

// Waits until the oldest of `stages - 1` copies has arrived.
__device__ __forceinline__ void wait_for_stage(int stages) {
    if (stages >= 6)
        cp_async_wait<4>();
    else if (stages == 5)
        cp_async_wait<3>();
    else if (stages == 4)
        cp_async_wait<2>();
    else if (stages == 3)
        cp_async_wait<1>();
    else
        cp_async_wait<0>();
    __syncwarp();
}

inline bool aligned16(const void* p) { return (uintptr_t)p % 16 == 0; }

} // namespace
} // namespace pk
