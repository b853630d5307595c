// Block statistics and codes of 4-bit weights, read in the kernel that needs them.
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

// Where the nested absmax of block `first` + i stands; `first` is what scales_from was given.
__device__ __forceinline__ uint32_t nested_group(uint32_t first, uint32_t i) {
    return ((first & (uint32_t)(kNestedBlock - 1)) + i) >> kNestedShift;
}

// Value of weight j of 8 packed codes: the high nibble of a byte comes first. `lane4` is 4 * lane;
// an entry of the table has 128 bytes, so a shift, one three-way logic operation and the load do
// it.
__device__ __forceinline__ float code_value(SharedAddress table, uint32_t lane4, uint32_t w,
                                            int j) {
    int position = 8 * (j / 2) + (j % 2 == 0 ? 4 : 0); // of the nibble
    uint32_t shifted = position < 7 ? w << (7 - position) : w >> (position - 7);
    return load_shared_float(table + ((shifted & 0x780u) | lane4));
}

} // namespace pk
