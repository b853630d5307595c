// What the kernels of the optimizers share.
#pragma once

#include "../common/optimizer_call.h"
#include "primitives.cuh"

namespace pk {

constexpr int64_t kChunk = 8 * kStateBlock; // elements; peftkern/ops/optimizer/table.py knows it
constexpr uint32_t kWarp = 0xffffffffu;

constexpr int kRandomBF16 = 3; // bf16, rounded at random

template <int kDtype>
struct Four; // elements as they lie in memory
template <>
struct Four<kF32> {
    using Word = uint4;
};
template <>
struct Four<kBF16> {
    using Word = uint2;
};
template <>
struct Four<kF16> {
    using Word = uint2;
};
template <>
struct Four<kRandomBF16> {
    using Word = uint2;
};

__device__ __forceinline__ void widen(const uint4& w, float v[4], int) {
    v[0] = bits_float(w.x);
    v[1] = bits_float(w.y);
    v[2] = bits_float(w.z);
    v[3] = bits_float(w.w);
}
__device__ __forceinline__ void widen(const uint2& w, float v[4], int dtype) {
    bool half = dtype == kF16;
    v[0] = half ? half_to_float((uint16_t)w.x) : bits_float(w.x << 16);
    v[1] = half ? half_to_float((uint16_t)(w.x >> 16)) : bits_float(w.x & 0xffff0000u);
    v[2] = half ? half_to_float((uint16_t)w.y) : bits_float(w.y << 16);
    v[3] = half ? half_to_float((uint16_t)(w.y >> 16)) : bits_float(w.y & 0xffff0000u);
}

} // namespace pk
