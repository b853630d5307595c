// What the kernels of the optimizers share: the table of what they work on, and how a call is laid
// out in host memory.
#pragma once

#include "../common/optimizer.h"
#include "primitives.cuh"

namespace pk {

constexpr int64_t kChunk = 8 * kStateBlock; // elements; peftkern/ops/optimizer/cuda.py knows it
constexpr uint32_t kWarp = 0xffffffffu;

// A run of elements of one parameter; a row of int64 in the table.
struct Segment {
    char* param;  // of the whole parameter; the gradient's address is in StepArgs::grads
    char* state1; // relative to StepArgs::state
    char* state2;
    char* absmax1; // null: fp32 state
    char* absmax2;
    int64_t start; // first element, in the parameter
    int64_t numel; // of the run
    int64_t chunk; // the first of this run
    int64_t row;   // of the parameter in grads, hyper, rounding and skipped
    int32_t param_dtype;
    int32_t grad_dtype;
};

struct Group {
    Settings settings;
    int64_t seed; // of random rounding
};

struct Parameter {
    int64_t group;
    int64_t number; // among the optimizer's parameters
    int64_t blocks;
    int64_t slot; // where its step is counted
};

// Everything of a call, as peftkern/ops/optimizer/cuda.py lays it out.
struct Call {
    const int64_t* new_grads;  // in host memory, or null: the device has the addresses
    const int64_t* new_groups; // in host memory, or null
    int64_t group_words;
    int64_t rows;
    int64_t slots;
    int64_t* grads; // [rows], on the device as all that follows
    Group* groups;
    const Parameter* parameters;
    int64_t* steps; // [slots], done so far
    Update* hyper;
    int64_t* rounding;
    int64_t* skipped;
    int64_t* last;
    int64_t* totals;
    int64_t* flag;
    const Segment* segments;
    const int32_t* owners;
    int64_t chunks;
    int64_t state;
    double* sums; // [chunks], of the norm
    float* norm;
    double limit;
    int32_t rule;
    int32_t coded;
    int32_t blocks; // of threads, at most
    int32_t clip;   // whether the step looks at the norm
};

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
