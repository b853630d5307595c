// One lane: plain C++, every machine.
#pragma once

#include <math.h>

namespace pk::PK_ISA {
namespace {

struct V {
    using F = float;
    using I = int32_t;
    static constexpr int kLanes = 1;
    static constexpr int kTileVecs = 4; // output columns of a register tile, in vectors
    static constexpr int kTileRows = 4;
    static constexpr int kRowGroup = 2;     // rows of x that share a pass over decoded weights
    static constexpr int kLookup = 2;       // weights that one lookup() decodes
    static constexpr int kWide = 2;         // weights that one wide() decodes
    static constexpr double kSpeed = 0.125; // against AVX2, for the decision to use threads

    PK_INLINE F zero() { return 0.0f; }
    PK_INLINE F set1(float x) { return x; }
    PK_INLINE F load(const float* p) { return *p; }
    PK_INLINE void store(float* p, F x) { *p = x; }
    PK_INLINE F add(F a, F b) { return a + b; }
    PK_INLINE F sub(F a, F b) { return a - b; }
    PK_INLINE F mul(F a, F b) { return a * b; }
    PK_INLINE F div(F a, F b) { return a / b; }
    PK_INLINE F sqrt(F a) { return __builtin_sqrtf(a); }
    PK_INLINE F fma(F a, F b, F c) { return a * b + c; }
    // Of two values with a NaN, max() and min() give the second.
    PK_INLINE F max(F a, F b) { return a > b ? a : b; }
    PK_INLINE F min(F a, F b) { return a < b ? a : b; }
    // 2^n where t = 12582912 + n and -127 <= n <= 127; zero for n = -127.
    PK_INLINE F pow2(F t) { return bits_float((float_bits(t) + 127u) << 23); }
    PK_INLINE float reduce_add(F x) { return x; }

    PK_INLINE F load_bf16(const uint16_t* p) { return bf16_to_float(*p); }
    PK_INLINE F load_f16(const uint16_t* p) { return f16_to_float(*p); }
    PK_INLINE void store_bf16(uint16_t* p, F x) { *p = float_to_bf16(x); }
    PK_INLINE void store_f16(uint16_t* p, F x) { *p = float_to_f16(x); }
    PK_INLINE F round_bf16(F x) { return round_to(x, kBF16); }
    PK_INLINE F round_f16(F x) { return round_to(x, kF16); }
    PK_INLINE F load_i8(const int8_t* p) { return (float)*p; }
    PK_INLINE void store_i8(int8_t* p, F x) {
        // Nearest even for |x| < 2^22; anything else (a row with NaN or Inf) becomes 0.
        if (!(x > -4194304.0f && x < 4194304.0f))
            x = 0.0f;
        *p = (int8_t)(int32_t)(float_bits(x + 12582912.0f) - 0x4b400000u);
    }

    // Bits of |x|: as integers they order like the magnitudes, with NaN above Inf.
    PK_INLINE I zero_bits() { return 0; }
    PK_INLINE I max_magnitude(I acc, F x) {
        int32_t bits = (int32_t)(float_bits(x) & 0x7fffffffu);
        return bits > acc ? bits : acc;
    }
    PK_INLINE uint32_t reduce_max(I x) { return (uint32_t)x; }

    // Element j of x where word j >= threshold, else 0.
    PK_INLINE F keep(F x, const uint32_t* words, uint32_t threshold) {
        return *words >= threshold ? x : 0.0f;
    }

    struct Lut {
        float value[16];
    };
    PK_INLINE Lut make_lut(const float* values, float scale, int dtype) {
        Lut lut;
        for (int i = 0; i < 16; ++i)
            lut.value[i] = round_to(values[i] * scale, dtype);
        return lut;
    }
    PK_INLINE void lookup(const Lut& lut, const uint8_t* p, float* out) {
        out[0] = lut.value[*p >> 4];
        out[1] = lut.value[*p & 15];
    }
    using Planes = Lut;
    using Codebook = const float*;
    PK_INLINE Codebook load_codebook(const float* values) { return values; }
    template <int kDtype>
    PK_INLINE Planes make_planes(Codebook values, float scale) {
        return make_lut(values, scale, kDtype);
    }
    template <int kDtype, class Sink>
    PK_INLINE void wide(const Planes& lut, const uint8_t* p, Sink&& sink) {
        sink(0, lut.value[*p >> 4]);
        sink(1, lut.value[*p & 15]);
    }
    template <int kDtype, class Sink>
    PK_INLINE void wide_unordered(const Planes& p, const uint8_t* bytes, Sink&& sink) {
        wide<kDtype>(p, bytes, sink);
    }
    PK_INLINE int unordered(int, int v, int lane) { return v * kLanes + lane; }
    PK_INLINE float lookup_one(const Lut& lut, int code) { return lut.value[code]; }

    PK_INLINE void codes(const Ladder& ladder, F t, uint8_t* out) {
        float u = ladder.magnitude ? bits_float(float_bits(t) & 0x7fffffffu) : t;
        int rung = 0;
        for (int l = 0; l < ladder.levels; ++l)
            rung = 2 * rung + (u > ladder.level[l][rung] ? 1 : 0);
        int code = ladder.code[rung];
        if (ladder.magnitude && t < 0.0f)
            code |= 8;
        *out = (uint8_t)code;
    }

    // Entries of a table of 256, by one code a lane.
    PK_INLINE F pick(const float* table, const uint8_t* code) { return table[*code]; }

    // One value at a time, the look-up is the quicker way: dynamic_codes() is never asked.
    static constexpr int kCodes = 0;
    static constexpr int kValues = 0;
    template <bool>
    PK_INLINE void dynamic_values(const uint8_t*, F, F*) {}
    template <bool kSigned>
    PK_INLINE uint64_t dynamic_codes(const CodeSegments&, const float*, float, uint8_t*) {
        return 0;
    }

    // dst[k * dst_stride + r] = src[r * src_stride + k] for r, k < kLanes
    PK_INLINE void transpose(const float* src, int64_t, float* dst, int64_t) { *dst = *src; }
};

} // namespace
} // namespace pk::PK_ISA
