// Element-wise maths of the block formats, for kernels that work element by element.
#pragma once

#include "codebooks.h"
#include "convert.h"

namespace pk {

// How a block is scaled to [-1, 1]: t = (x * lift) * inverse. The reciprocal of a denormal would
// overflow, so there both x and absmax are first scaled by 2^64, which is exact.
struct BlockScale {
    float lift, inverse;
};

PK_HD BlockScale block_scale(float absmax) {
    BlockScale s;
    s.lift = absmax < 1.17549435e-38f ? 18446744073709551616.0f : 1.0f;
    s.inverse = absmax == 0.0f ? 0.0f : 1.0f / (absmax * s.lift);
    return s;
}

// Code of t; `thresholds` and (FP4) `order` are the tables of codebooks.h, wherever they lie.
PK_HD uint32_t code_4bit(const float* thresholds, const uint8_t* order, int quant_type, float t) {
    if (quant_type == kNF4)
        return (uint32_t)passed<8>(thresholds, t);
    float magnitude = t < 0.0f ? -t : t;
    return order[passed<4>(thresholds, magnitude)] | (t < 0.0f ? 8u : 0u);
}

} // namespace pk
