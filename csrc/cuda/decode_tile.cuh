// Runs of 64 stored weights to 16-bit values in the row layout of a product's operand. One thread,
// one run, one statistic: the 16 values code * absmax are rounded once and then looked up by byte
// permutations, so a weight costs 2.6 instructions and is the one that dequantizing would give.
#pragma once

#include "hopper.cuh"
#include "scales.cuh"

namespace pk {

constexpr int kRun = 64;

// Four byte look-ups: byte i of the result is the byte of `table` (16 bytes) that the low three
// bits of nibble i of `select` and bit 2 of nibble i of `upper` pick; see decode_run.
__device__ __forceinline__ uint32_t look_up4(const uint32_t table[4], uint32_t select,
                                             uint32_t upper) {
    return byte_permute(byte_permute(table[0], table[1], select),
                        byte_permute(table[2], table[3], select), upper);
}

// The rounded values of all codes for one statistic, split into their low and high bytes.
template <int kDtype>
struct ScaledCodes {
    uint32_t low[4], high[4];

    __device__ __forceinline__ ScaledCodes(const float codes[16], float scale) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            uint32_t a = pack2<kDtype>(codes[4 * i] * scale, codes[4 * i + 1] * scale);
            uint32_t b = pack2<kDtype>(codes[4 * i + 2] * scale, codes[4 * i + 3] * scale);
            low[i] = byte_permute(a, b, 0x6420);
            high[i] = byte_permute(a, b, 0x7531);
        }
    }

    // The 8 weights of 4 packed bytes, in the order of the row: high nibbles come first.
    __device__ __forceinline__ uint4 decode(uint32_t packed) const {
        uint32_t select = packed & 0x77777777u;
        uint32_t upper = (packed >> 1 & 0x44444444u) | 0x32103210u;
        uint32_t l0 = look_up4(low, select, upper), h0 = look_up4(high, select, upper);
        uint32_t l1 = look_up4(low, select >> 16, upper >> 16);
        uint32_t h1 = look_up4(high, select >> 16, upper >> 16);
        return {byte_permute(l0, h0, 0x4051), byte_permute(l0, h0, 0x6273),
                byte_permute(l1, h1, 0x4051), byte_permute(l1, h1, 0x6273)};
    }
};

// Four INT8 codes times their row's statistic, rounded as dequantizing does.
template <int kDtype>
__device__ __forceinline__ uint2 decode_int8x4(uint32_t codes, float scb) {
    float v[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        // A byte in the mantissa of 2^23: exact, and cheaper than a conversion.
        uint32_t bits = byte_permute(codes ^ 0x80808080u, 0x4b000000u, 0x7440 + (uint32_t)i);
        v[i] = ((bits_float(bits) - 8388736.0f) * scb) * kInt8Step;
    }
    return {pack2<kDtype>(v[0], v[1]), pack2<kDtype>(v[2], v[3])};
}

// A run as it is stored: 32 bytes of 4-bit codes, 64 of INT8.
template <bool kFourBits>
struct StoredRun {
    uint4 chunks[kFourBits ? 2 : 4];

    // Its first 16-byte chunk in `source` is `first`, chunks are exchanged by `exchange`.
    __device__ __forceinline__ void load(const unsigned char* source, int first, int exchange) {
#pragma unroll
        for (int c = 0; c < (kFourBits ? 2 : 4); ++c)
            chunks[c] = *(const uint4*)(source + (((first + c) ^ exchange) << 4));
    }

    // To 128 bytes at `target`, whose chunks are exchanged by `turn`.
    template <int kDtype>
    __device__ __forceinline__ void decode(const float codes[16], float scale,
                                           unsigned char* target, int turn) const {
        auto store = [&](int c, uint4 v) { *(uint4*)(target + ((c ^ turn) << 4)) = v; };
        if constexpr (kFourBits) {
            ScaledCodes<kDtype> table(codes, scale);
#pragma unroll
            for (int c = 0; c < 2; ++c) {
                store(4 * c, table.decode(chunks[c].x));
                store(4 * c + 1, table.decode(chunks[c].y));
                store(4 * c + 2, table.decode(chunks[c].z));
                store(4 * c + 3, table.decode(chunks[c].w));
            }
        } else {
#pragma unroll
            for (int c = 0; c < 4; ++c) {
                const uint4& q = chunks[c];
                uint2 v0 = decode_int8x4<kDtype>(q.x, scale),
                      v1 = decode_int8x4<kDtype>(q.y, scale);
                uint2 v2 = decode_int8x4<kDtype>(q.z, scale),
                      v3 = decode_int8x4<kDtype>(q.w, scale);
                store(2 * c, uint4{v0.x, v0.y, v1.x, v1.y});
                store(2 * c + 1, uint4{v2.x, v2.y, v3.x, v3.y});
            }
        }
    }
};

} // namespace pk
