// Sixteen lanes: AVX-512 F, BW, DQ, VL.
#pragma once

#if defined(PK_SIMDE)
// Test builds only: the same body on emulated intrinsics, for machines without AVX-512.
#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>
#include "simde_extra.h"
#else
#include <immintrin.h>
#endif

namespace pk::PK_ISA {
namespace {

struct V {
    using F = __m512;
    using I = __m512i;
    static constexpr int kLanes = 16;
    static constexpr int kTileVecs =
        2; // 12 x 32: 24 accumulators, 2 weights, broadcasts from memory
    static constexpr int kTileRows = 12;
    static constexpr int kRowGroup = 4;
    static constexpr int kLookup = 16;
    static constexpr int kWide = 64; // weights that one wide() decodes
    static constexpr double kSpeed = 1.5;

    PK_INLINE F zero() { return _mm512_setzero_ps(); }
    PK_INLINE F set1(float x) { return _mm512_set1_ps(x); }
    PK_INLINE F load(const float* p) { return _mm512_loadu_ps(p); }
    PK_INLINE void store(float* p, F x) { _mm512_storeu_ps(p, x); }
    PK_INLINE F add(F a, F b) { return _mm512_add_ps(a, b); }
    PK_INLINE F sub(F a, F b) { return _mm512_sub_ps(a, b); }
    PK_INLINE F mul(F a, F b) { return _mm512_mul_ps(a, b); }
    PK_INLINE F div(F a, F b) { return _mm512_div_ps(a, b); }
    PK_INLINE F sqrt(F a) { return _mm512_sqrt_ps(a); }
    PK_INLINE F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
    PK_INLINE F max(F a, F b) { return _mm512_max_ps(a, b); }
    PK_INLINE F min(F a, F b) { return _mm512_min_ps(a, b); }
    PK_INLINE F pow2(F t) {
        I n = _mm512_add_epi32(_mm512_castps_si512(t), _mm512_set1_epi32(127));
        return _mm512_castsi512_ps(_mm512_slli_epi32(n, 23));
    }
    PK_INLINE float reduce_add(F x) {
        __m256 h = _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1));
        __m128 s = _mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
        s = _mm_add_ps(s, _mm_movehl_ps(s, s));
        s = _mm_add_ss(s, _mm_movehdup_ps(s));
        return _mm_cvtss_f32(s);
    }

    PK_INLINE F load_bf16(const uint16_t* p) {
        I wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
        return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
    }
    PK_INLINE F load_f16(const uint16_t* p) {
        return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
    }
    PK_INLINE I bf16_bits(F x) {
        I u = _mm512_castps_si512(x);
        I lsb = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
        I rounded = _mm512_add_epi32(u, _mm512_add_epi32(lsb, _mm512_set1_epi32(0x7fff)));
        I quiet = _mm512_or_si512(u, _mm512_set1_epi32(0x400000));
        return _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), quiet);
    }
    PK_INLINE void store_bf16(uint16_t* p, F x) {
        I h = _mm512_srli_epi32(bf16_bits(x), 16);
        _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(h));
    }
    PK_INLINE void store_f16(uint16_t* p, F x) {
        _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
    }
    PK_INLINE F round_bf16(F x) {
        I mask = _mm512_set1_epi32((int)0xffff0000);
        return _mm512_castsi512_ps(_mm512_and_si512(bf16_bits(x), mask));
    }
    PK_INLINE F round_f16(F x) {
        return _mm512_cvtph_ps(_mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
    }
    PK_INLINE F load_i8(const int8_t* p) {
        return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
    }
    PK_INLINE void store_i8(int8_t* p, F x) {
        F magnitude = _mm512_abs_ps(x);
        __mmask16 sane = _mm512_cmp_ps_mask(magnitude, set1(4194304.0f), _CMP_LT_OQ);
        I v = _mm512_cvtps_epi32(_mm512_mask_mov_ps(zero(), sane, x));
        _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8(v));
    }

    PK_INLINE I zero_bits() { return _mm512_setzero_si512(); }
    PK_INLINE I max_magnitude(I acc, F x) {
        I bits = _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(0x7fffffff));
        return _mm512_max_epi32(acc, bits);
    }
    PK_INLINE uint32_t reduce_max(I x) {
        __m256i h = _mm256_max_epi32(_mm512_castsi512_si256(x), _mm512_extracti64x4_epi64(x, 1));
        __m128i m = _mm_max_epi32(_mm256_castsi256_si128(h), _mm256_extracti128_si256(h, 1));
        m = _mm_max_epi32(m, _mm_shuffle_epi32(m, 0x4e));
        m = _mm_max_epi32(m, _mm_shuffle_epi32(m, 0xb1));
        return (uint32_t)_mm_cvtsi128_si32(m);
    }

    PK_INLINE F keep(F x, const uint32_t* words, uint32_t threshold) {
        I w = _mm512_loadu_si512(words);
        I t = _mm512_set1_epi32((int)threshold);
        __mmask16 kept = _mm512_cmpeq_epi32_mask(_mm512_max_epu32(w, t), w);
        return _mm512_mask_mov_ps(zero(), kept, x);
    }

    struct Lut {
        F value;
    };
    PK_INLINE Lut make_lut(const float* values, float scale, int dtype) {
        F v = mul(load(values), set1(scale));
        if (dtype == kBF16)
            v = round_bf16(v);
        else if (dtype == kF16)
            v = round_f16(v);
        return {v};
    }
    PK_INLINE void lookup(const Lut& lut, const uint8_t* p, float* out) {
        I bytes = _mm512_castsi128_si512(_mm_loadl_epi64((const __m128i*)p));
        I words = _mm512_permutexvar_epi32(
            _mm512_set_epi32(1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0), bytes);
        I code = _mm512_srlv_epi32(
            words, _mm512_set_epi32(24, 28, 16, 20, 8, 12, 0, 4, 24, 28, 16, 20, 8, 12, 0, 4));
        store(out, _mm512_permutexvar_ps(code, lut.value));
    }
    using Planes = Lut;
    using Codebook = const float*;
    PK_INLINE Codebook load_codebook(const float* values) { return values; }
    template <int kDtype>
    PK_INLINE Planes make_planes(Codebook values, float scale) {
        return make_lut(values, scale, kDtype);
    }
    // 64 weights from 32 bytes, in order; sink(i, v) takes vector i of them.
    template <int kDtype, class Sink>
    PK_INLINE void wide(const Planes& p, const uint8_t* bytes, Sink&& sink) {
        I shifts = _mm512_set_epi32(24, 28, 16, 20, 8, 12, 0, 4, 24, 28, 16, 20, 8, 12, 0, 4);
        I all = _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i*)bytes));
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
            int a = 2 * i, b = 2 * i + 1;
            I words = _mm512_permutexvar_epi32(
                _mm512_set_epi32(b, b, b, b, b, b, b, b, a, a, a, a, a, a, a, a), all);
            sink(i, _mm512_permutexvar_ps(_mm512_srlv_epi32(words, shifts), p.value));
        }
    }
    template <int kDtype, class Sink>
    PK_INLINE void wide_unordered(const Planes& p, const uint8_t* bytes, Sink&& sink) {
        wide<kDtype>(p, bytes, sink);
    }
    PK_INLINE int unordered(int, int v, int lane) { return v * kLanes + lane; }
    PK_INLINE float lookup_one(const Lut& lut, int code) {
        alignas(64) float value[16];
        _mm512_store_ps(value, lut.value);
        return value[code];
    }

    PK_INLINE void codes(const Ladder& ladder, F t, uint8_t* out) {
        F u = ladder.magnitude ? _mm512_abs_ps(t) : t;
        I one = _mm512_set1_epi32(1);
        I rung = _mm512_setzero_si512();
        for (int l = 0; l < ladder.levels; ++l) {
            F threshold = _mm512_permutexvar_ps(rung, _mm512_load_ps(ladder.level[l]));
            __mmask16 above = _mm512_cmp_ps_mask(u, threshold, _CMP_GT_OQ);
            rung = _mm512_add_epi32(rung, rung);
            rung = _mm512_mask_add_epi32(rung, above, rung, one);
        }
        if (ladder.magnitude) {
            I code = _mm512_permutexvar_epi32(rung, _mm512_load_si512(ladder.code));
            __mmask16 negative = _mm512_cmp_ps_mask(t, zero(), _CMP_LT_OQ);
            rung = _mm512_mask_or_epi32(code, negative, code, _mm512_set1_epi32(8));
        }
        _mm_storeu_si128((__m128i*)out, _mm512_cvtepi32_epi8(rung));
    }

    // As in simd_avx2.h.
    PK_INLINE __m128 pick_four(const float* table, const uint8_t* code) {
        uint32_t word;
        __builtin_memcpy(&word, code, 4);
        __m128 x = _mm_load_ss(table + (word & 255));
        x = _mm_insert_ps(x, _mm_load_ss(table + ((word >> 8) & 255)), 0x10);
        x = _mm_insert_ps(x, _mm_load_ss(table + ((word >> 16) & 255)), 0x20);
        return _mm_insert_ps(x, _mm_load_ss(table + (word >> 24)), 0x30);
    }
    PK_INLINE F pick(const float* table, const uint8_t* code) {
        F x = _mm512_castps128_ps512(pick_four(table, code));
        x = _mm512_insertf32x4(x, pick_four(table, code + 4), 1);
        x = _mm512_insertf32x4(x, pick_four(table, code + 8), 2);
        return _mm512_insertf32x4(x, pick_four(table, code + 12), 3);
    }
    static constexpr int kCodes = 32;
    PK_INLINE F eight(const float* p) { return _mm512_castps256_ps512(_mm256_load_ps(p)); }
    template <bool kSigned>
    PK_INLINE bool dynamic_codes(const CodeSegments& s, const float* x, float inverse,
                                 uint8_t* out) {
        const F start = eight(s.start), slope = eight(s.slope);
        const F offset = eight(s.offset), last = eight(s.last);
        const F magic = set1(kSegmentMagic);
        F doubt = zero();
#pragma GCC unroll 2
        for (int i = 0; i < 2; ++i) {
            F t = mul(load(x + 16 * i), set1(inverse));
            F a = kSigned ? _mm512_abs_ps(t) : t;
            F rough = _mm512_max_ps(a, set1(kSegmentSmallest));
            rough = fma(_mm512_cvtepi32_ps(_mm512_castps_si512(rough)), set1(kSegmentLogScale),
                        set1(kSegmentLogOffset));
            I d = _mm512_castps_si512(rough); // the permutations look at its low bits only
            __mmask16 below = _mm512_cmp_ps_mask(a, _mm512_permutexvar_ps(d, start), _CMP_LE_OQ);
            d = _mm512_mask_sub_epi32(d, below, d, _mm512_set1_epi32(1));
            F y = fma(a, _mm512_permutexvar_ps(d, slope), _mm512_permutexvar_ps(d, offset));
            y = _mm512_min_ps(y, _mm512_permutexvar_ps(d, last));
            F r = add(y, magic);
            doubt = _mm512_max_ps(doubt, _mm512_abs_ps(_mm512_sub_ps(y, _mm512_sub_ps(r, magic))));
            I k = _mm512_sub_epi32(_mm512_castps_si512(r), _mm512_castps_si512(magic));
            if (kSigned) { // there is a code for 1, but none for -1
                __mmask16 negative = _mm512_cmp_ps_mask(t, zero(), _CMP_LT_OQ);
                k = _mm512_mask_sub_epi32(k, negative, zero_bits(), k);
                k = _mm512_add_epi32(k, _mm512_set1_epi32(127));
                k = _mm512_max_epi32(k, zero_bits());
            }
            _mm_storeu_si128((__m128i*)(out + 16 * i), _mm512_cvtepi32_epi8(k));
        }
        return _mm512_cmp_ps_mask(doubt, set1(0.5f - kSegmentDoubt), _CMP_GT_OQ) == 0;
    }

    PK_INLINE void transpose(const float* src, int64_t src_stride, float* dst, int64_t dst_stride) {
        F r[16], s[16];
        for (int i = 0; i < 16; ++i)
            r[i] = load(src + i * src_stride);
        for (int i = 0; i < 8; ++i) {
            s[2 * i] = _mm512_unpacklo_ps(r[2 * i], r[2 * i + 1]);
            s[2 * i + 1] = _mm512_unpackhi_ps(r[2 * i], r[2 * i + 1]);
        }
        for (int i = 0; i < 4; ++i) { // r[4i + j]: column j of each 128-bit part, rows 4i .. 4i+3
            const F* q = s + 4 * i;
            r[4 * i] = _mm512_shuffle_ps(q[0], q[2], 0x44);
            r[4 * i + 1] = _mm512_shuffle_ps(q[0], q[2], 0xee);
            r[4 * i + 2] = _mm512_shuffle_ps(q[1], q[3], 0x44);
            r[4 * i + 3] = _mm512_shuffle_ps(q[1], q[3], 0xee);
        }
        for (int j = 0; j < 4; ++j) {
            F a = _mm512_shuffle_f32x4(r[j], r[4 + j], 0x88);
            F b = _mm512_shuffle_f32x4(r[j], r[4 + j], 0xdd);
            F c = _mm512_shuffle_f32x4(r[8 + j], r[12 + j], 0x88);
            F d = _mm512_shuffle_f32x4(r[8 + j], r[12 + j], 0xdd);
            store(dst + j * dst_stride, _mm512_shuffle_f32x4(a, c, 0x88));
            store(dst + (8 + j) * dst_stride, _mm512_shuffle_f32x4(a, c, 0xdd));
            store(dst + (4 + j) * dst_stride, _mm512_shuffle_f32x4(b, d, 0x88));
            store(dst + (12 + j) * dst_stride, _mm512_shuffle_f32x4(b, d, 0xdd));
        }
    }
};

} // namespace
} // namespace pk::PK_ISA
