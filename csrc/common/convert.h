// bf16 and fp16 against fp32: round to nearest even, NaN stays NaN, denormals are kept.
#pragma once

#include "base.h"

namespace pk {

PK_HD uint32_t float_bits(float x) {
    union {
        float f;
        uint32_t u;
    } v;
    v.f = x;
    return v.u;
}

PK_HD float bits_float(uint32_t u) {
    union {
        float f;
        uint32_t u;
    } v;
    v.u = u;
    return v.f;
}

PK_HD bool is_finite(float x) { return (float_bits(x) & 0x7f800000u) != 0x7f800000u; }

PK_HD float bf16_to_float(uint16_t h) { return bits_float((uint32_t)h << 16); }

PK_HD uint16_t float_to_bf16(float x) {
    uint32_t u = float_bits(x);
    if ((u & 0x7fffffffu) > 0x7f800000u)
        return (uint16_t)((u >> 16) | 0x40u); // quiet the NaN, keep its sign
    return (uint16_t)((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}

PK_HD float f16_to_float(uint16_t h) {
    uint32_t sign = (uint32_t)(h & 0x8000u) << 16;
    uint32_t mag = h & 0x7fffu;
    if (mag >= 0x7c00u) { // Inf, NaN (made quiet, as the hardware conversion does)
        uint32_t quiet = mag > 0x7c00u ? 0x400000u : 0u;
        return bits_float(sign | 0x7f800000u | ((mag & 0x3ffu) << 13) | quiet);
    }
    if (mag >= 0x400u)
        return bits_float(sign | ((mag << 13) + 0x38000000u));
    float value = (float)mag * 5.9604644775390625e-08f; // denormal: mag * 2^-24, exact
    return bits_float(sign | float_bits(value));
}

PK_HD uint16_t float_to_f16(float x) {
    uint32_t u = float_bits(x);
    uint16_t sign = (uint16_t)((u >> 16) & 0x8000u);
    u &= 0x7fffffffu;
    if (u > 0x7f800000u)
        return (uint16_t)(sign | 0x7e00u | ((u >> 13) & 0x3ffu));
    if (u >= 0x477ff000u) // from 65520 on everything rounds to Inf
        return (uint16_t)(sign | 0x7c00u);
    if (u < 0x38800000u) { // denormal result: let the adder round at 2^-24
        float shifted = bits_float(u) + 0.5f;
        return (uint16_t)(sign | (float_bits(shifted) - 0x3f000000u));
    }
    u += 0xfffu + ((u >> 13) & 1u);
    return (uint16_t)(sign | ((u - 0x38000000u) >> 13));
}

PK_HD float load_as_float(const void* p, int dtype, int64_t i) {
    if (dtype == kF32)
        return ((const float*)p)[i];
    uint16_t h = ((const uint16_t*)p)[i];
    return dtype == kBF16 ? bf16_to_float(h) : f16_to_float(h);
}

PK_HD void store_from_float(void* p, int dtype, int64_t i, float x) {
    if (dtype == kF32)
        ((float*)p)[i] = x;
    else
        ((uint16_t*)p)[i] = dtype == kBF16 ? float_to_bf16(x) : float_to_f16(x);
}

PK_HD float round_to(float x, int dtype) {
    if (dtype == kF32)
        return x;
    return dtype == kBF16 ? bf16_to_float(float_to_bf16(x)) : f16_to_float(float_to_f16(x));
}

} // namespace pk
