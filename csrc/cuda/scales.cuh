// Block statistics of 4-bit weights, plain or nested, read in the kernel that needs them.
#pragma once

#include "../common/block_codec.h"
#include "primitives.cuh"

namespace pk {

constexpr int kNestedShift = 8;
static_assert(kNestedBlock == 1 << kNestedShift, "one division becomes a shift");

struct Scales {
    const void* absmax;         // fp32, or uint8 codes of the dynamic map when nested
    const float* nested_absmax; // null: not nested
    const float* nested_offset;
};

// Copies the dynamic map to shared memory; the caller puts a barrier behind it.
__device__ __forceinline__ void load_dynamic_map(float* map) {
    for (int i = (int)threadIdx.x; i < 256; i += (int)blockDim.x)
        map[i] = kDynamicValues[i];
}

template <bool kNested>
__device__ __forceinline__ float scale_of(const Scales& s, const float* map, float offset,
                                          int64_t block) {
    if (!kNested)
        return ((const float*)s.absmax)[block];
    float value = map[((const uint8_t*)s.absmax)[block]];
    return nested_sum(value, s.nested_absmax[block >> kNestedShift], offset);
}

// The statistics from `block` on, for offsets of 32 bits.
__device__ __forceinline__ Scales scales_from(const Scales& s, int64_t block, bool nested) {
    Scales r = s;
    r.absmax = (const char*)s.absmax + block * (nested ? 1 : 4);
    r.nested_absmax = s.nested_absmax + (block >> kNestedShift);
    return r;
}

// `first` is the block that scales_from was given.
template <bool kNested>
__device__ __forceinline__ float near_scale(const Scales& s, const float* map, float offset,
                                            uint32_t first, uint32_t i) {
    if (!kNested)
        return ((const float*)s.absmax)[i];
    uint32_t group = ((first & (uint32_t)(kNestedBlock - 1)) + i) >> kNestedShift;
    return nested_sum(map[((const uint8_t*)s.absmax)[i]], s.nested_absmax[group], offset);
}

} // namespace pk
