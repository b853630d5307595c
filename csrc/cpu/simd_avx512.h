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
    static constexpr int kCodes = 64;
    PK_INLINE F eight(const float* p) { return _mm512_castps256_ps512(_mm256_load_ps(p)); }
    PK_INLINE I eight(const int32_t* p) {
        return _mm512_castsi256_si512(_mm256_load_si256((const __m256i*)p));
    }
    template <bool kSigned>
    PK_INLINE uint64_t dynamic_codes(const CodeSegments& s, const float* x, float inverse,
                                     uint8_t* out) {
        const I next = _mm512_castps_si512(eight(s.next)), last = eight(s.last);
        const F slope = eight(s.slope), offset = eight(s.offset);
        const I one = _mm512_set1_epi32(1), fraction = _mm512_set1_epi32(kSegmentDoubt);
        uint64_t doubt = 0;
        I code[4];
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
            F t = mul(load(x + 16 * i), set1(inverse));
            I a = _mm512_castps_si512(t); // magnitudes compare as integers do
            if (kSigned)
                a = _mm512_and_si512(a, _mm512_set1_epi32(0x7fffffff));
            I upper =
                _mm512_subs_epu16(_mm512_srli_epi32(a, 16), _mm512_set1_epi32(kSegmentLogStart));
            I d = _mm512_mulhi_epu16(upper, _mm512_set1_epi32(kSegmentLogScale));
            __mmask16 above = _mm512_cmpgt_epi32_mask(a, _mm512_permutexvar_epi32(d, next));
            d = _mm512_mask_add_epi32(d, above, d, one);
            I sum = _mm512_castps_si512(fma(_mm512_castsi512_ps(a), _mm512_permutexvar_ps(d, slope),
                                            _mm512_permutexvar_ps(d, offset)));
            doubt |= (uint64_t)_mm512_testn_epi32_mask(sum, fraction) << 16 * i;
            I k = _mm512_srli_epi32(sum, kSegmentShift);
            k = _mm512_min_epi32(k, _mm512_permutexvar_epi32(d, last));
            if (kSigned) { // there is a code for 1, but none for -1: one less, it saturates
                __mmask16 negative = _mm512_movepi32_mask(_mm512_castps_si512(t));
                I positive = _mm512_sub_epi32(k, _mm512_set1_epi32(kSegmentZero + 1));
                k = _mm512_mask_sub_epi32(positive, negative, _mm512_set1_epi32(kSegmentZero - 1),
                                          k);
            }
            code[i] = k;
        }
        static_assert(kSegmentZero % 256 == 0, "the code is the lowest byte");
        if (!kSigned) {
            for (int i = 0; i < 4; ++i)
                _mm_storeu_si128((__m128i*)(out + 16 * i), _mm512_cvtepi32_epi8(code[i]));
            return doubt;
        }
        I low = _mm512_packs_epi32(code[0], code[1]), high = _mm512_packs_epi32(code[2], code[3]);
        I bytes = _mm512_xor_si512(_mm512_packs_epi16(low, high), _mm512_set1_epi8((char)0x80));
        _mm512_storeu_si512(out, _mm512_permutexvar_epi32(quarters(), bytes));
        return doubt;
    }
    // Every fourth group of four bytes in turn; what joining and parting bytes within quarters of a
    // register need to leave them in order.
    PK_INLINE I quarters() {
        return _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    }

#if defined(__AVX512VBMI__)
    // Values of the dynamic maps times `scale`, of kValues codes: byte by byte of the floats.
    static constexpr int kValues = 64;
    PK_INLINE I plane(const uint8_t* p, int i) { return _mm512_load_si512(p + 64 * i); }
    template <bool kSigned>
    PK_INLINE void dynamic_values(const uint8_t* code, F scale, F out[4]) {
        I c = _mm512_permutexvar_epi32(quarters(), _mm512_loadu_si512(code));
        I b[4];
        if (kSigned) {
            I k = _mm512_sub_epi8(c, _mm512_set1_epi8(127));
            __mmask64 negative = _mm512_cmplt_epu8_mask(c, _mm512_set1_epi8(127));
            __mmask64 one = _mm512_cmpeq_epi8_mask(c, _mm512_set1_epi8((char)255));
            k = _mm512_abs_epi8(k);
            for (int i = 0; i < 4; ++i)
                b[i] = _mm512_permutex2var_epi8(plane(kBytePlanes.magnitude[i], 0), k,
                                                plane(kBytePlanes.magnitude[i], 1));
            b[2] = _mm512_mask_mov_epi8(b[2], one, _mm512_set1_epi8((char)0x80));
            b[3] = _mm512_mask_mov_epi8(b[3], one, _mm512_set1_epi8(0x3f));
            b[3] = _mm512_mask_add_epi8(b[3], negative, b[3], _mm512_set1_epi8((char)0x80));
        } else {
            __mmask64 upper = _mm512_movepi8_mask(c);
            for (int i = 0; i < 4; ++i) {
                const uint8_t* p = kBytePlanes.unsigned_value[i];
                b[i] = _mm512_mask_blend_epi8(
                    upper, _mm512_permutex2var_epi8(plane(p, 0), c, plane(p, 1)),
                    _mm512_permutex2var_epi8(plane(p, 2), c, plane(p, 3)));
            }
        }
        I low0 = _mm512_unpacklo_epi8(b[0], b[1]), high0 = _mm512_unpackhi_epi8(b[0], b[1]);
        I low1 = _mm512_unpacklo_epi8(b[2], b[3]), high1 = _mm512_unpackhi_epi8(b[2], b[3]);
        out[0] = mul(_mm512_castsi512_ps(_mm512_unpacklo_epi16(low0, low1)), scale);
        out[1] = mul(_mm512_castsi512_ps(_mm512_unpackhi_epi16(low0, low1)), scale);
        out[2] = mul(_mm512_castsi512_ps(_mm512_unpacklo_epi16(high0, high1)), scale);
        out[3] = mul(_mm512_castsi512_ps(_mm512_unpackhi_epi16(high0, high1)), scale);
    }
#else
    static constexpr int kValues = 0;
    template <bool>
    PK_INLINE void dynamic_values(const uint8_t*, F, F*) {}
#endif

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
