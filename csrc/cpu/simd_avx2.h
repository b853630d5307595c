// Eight lanes: AVX2 with FMA and F16C.
#pragma once

#include <immintrin.h>

namespace pk::PK_ISA {
namespace {

struct V {
    using F = __m256;
    using I = __m256i;
    static constexpr int kLanes = 8;
    static constexpr int kTileVecs = 2; // 6 x 16: 12 accumulators, 2 weights, 1 broadcast
    static constexpr int kTileRows = 6;
    static constexpr int kRowGroup = 3;
    static constexpr int kLookup = 8;
    static constexpr int kWide = 64; // weights that one wide() decodes
    static constexpr double kSpeed = 1.0;

    PK_INLINE F zero() { return _mm256_setzero_ps(); }
    PK_INLINE F set1(float x) { return _mm256_set1_ps(x); }
    PK_INLINE F load(const float* p) { return _mm256_loadu_ps(p); }
    PK_INLINE void store(float* p, F x) { _mm256_storeu_ps(p, x); }
    PK_INLINE F add(F a, F b) { return _mm256_add_ps(a, b); }
    PK_INLINE F sub(F a, F b) { return _mm256_sub_ps(a, b); }
    PK_INLINE F mul(F a, F b) { return _mm256_mul_ps(a, b); }
    PK_INLINE F div(F a, F b) { return _mm256_div_ps(a, b); }
    PK_INLINE F sqrt(F a) { return _mm256_sqrt_ps(a); }
    PK_INLINE F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
    // Of two values with a NaN, max() and min() give the second.
    PK_INLINE F max(F a, F b) { return _mm256_max_ps(a, b); }
    PK_INLINE F min(F a, F b) { return _mm256_min_ps(a, b); }
    // 2^n where t = 12582912 + n and -127 <= n <= 127; zero for n = -127.
    PK_INLINE F pow2(F t) {
        I n = _mm256_add_epi32(_mm256_castps_si256(t), _mm256_set1_epi32(127));
        return _mm256_castsi256_ps(_mm256_slli_epi32(n, 23));
    }
    PK_INLINE float reduce_add(F x) {
        __m128 s = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
        s = _mm_add_ps(s, _mm_movehl_ps(s, s));
        s = _mm_add_ss(s, _mm_movehdup_ps(s));
        return _mm_cvtss_f32(s);
    }

    PK_INLINE F load_bf16(const uint16_t* p) {
        I wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p));
        return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
    }
    PK_INLINE F load_f16(const uint16_t* p) {
        return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
    }
    // bf16 in the upper half of each lane, garbage in the lower.
    PK_INLINE I bf16_bits(F x) {
        I u = _mm256_castps_si256(x);
        I lsb = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
        I rounded = _mm256_add_epi32(u, _mm256_add_epi32(lsb, _mm256_set1_epi32(0x7fff)));
        I quiet = _mm256_or_si256(u, _mm256_set1_epi32(0x400000));
        F nan = _mm256_cmp_ps(x, x, _CMP_UNORD_Q);
        return _mm256_blendv_epi8(rounded, quiet, _mm256_castps_si256(nan));
    }
    PK_INLINE void store_bf16(uint16_t* p, F x) {
        I h = _mm256_srli_epi32(bf16_bits(x), 16);
        __m128i packed =
            _mm_packus_epi32(_mm256_castsi256_si128(h), _mm256_extracti128_si256(h, 1));
        _mm_storeu_si128((__m128i*)p, packed);
    }
    PK_INLINE void store_f16(uint16_t* p, F x) {
        _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
    }
    PK_INLINE F round_bf16(F x) {
        return _mm256_castsi256_ps(
            _mm256_and_si256(bf16_bits(x), _mm256_set1_epi32((int)0xffff0000)));
    }
    PK_INLINE F round_f16(F x) {
        return _mm256_cvtph_ps(_mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
    }
    PK_INLINE F load_i8(const int8_t* p) {
        return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
    }
    PK_INLINE void store_i8(int8_t* p, F x) {
        F magnitude = _mm256_andnot_ps(_mm256_set1_ps(-0.0f), x);
        F sane = _mm256_cmp_ps(magnitude, _mm256_set1_ps(4194304.0f), _CMP_LT_OQ);
        I v = _mm256_cvtps_epi32(_mm256_and_ps(x, sane));
        I pick = _mm256_setr_epi8(0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, 0, 4,
                                  8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1);
        I bytes = _mm256_shuffle_epi8(v, pick);
        __m128i both =
            _mm_unpacklo_epi32(_mm256_castsi256_si128(bytes), _mm256_extracti128_si256(bytes, 1));
        _mm_storel_epi64((__m128i*)p, both);
    }

    PK_INLINE I zero_bits() { return _mm256_setzero_si256(); }
    PK_INLINE I max_magnitude(I acc, F x) {
        I bits = _mm256_and_si256(_mm256_castps_si256(x), _mm256_set1_epi32(0x7fffffff));
        return _mm256_max_epi32(acc, bits);
    }
    PK_INLINE uint32_t reduce_max(I x) {
        __m128i m = _mm_max_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
        m = _mm_max_epi32(m, _mm_shuffle_epi32(m, 0x4e));
        m = _mm_max_epi32(m, _mm_shuffle_epi32(m, 0xb1));
        return (uint32_t)_mm_cvtsi128_si32(m);
    }

    PK_INLINE F keep(F x, const uint32_t* words, uint32_t threshold) {
        I w = _mm256_loadu_si256((const __m256i*)words);
        I t = _mm256_set1_epi32((int)threshold);
        I kept = _mm256_cmpeq_epi32(_mm256_max_epu32(w, t), w);
        return _mm256_and_ps(x, _mm256_castsi256_ps(kept));
    }

    struct Lut {
        F low, high;
    };
    PK_INLINE Lut make_lut(const float* values, float scale, int dtype) {
        F s = set1(scale);
        Lut lut = {mul(load(values), s), mul(load(values + 8), s)};
        if (dtype == kBF16)
            lut = {round_bf16(lut.low), round_bf16(lut.high)};
        else if (dtype == kF16)
            lut = {round_f16(lut.low), round_f16(lut.high)};
        return lut;
    }
    // The upper half of each pair of nibbles comes first.
    PK_INLINE void lookup(const Lut& lut, const uint8_t* p, float* out) {
        int32_t word;
        __builtin_memcpy(&word, p, 4);
        I code = _mm256_srlv_epi32(_mm256_set1_epi32(word),
                                   _mm256_setr_epi32(4, 0, 12, 8, 20, 16, 28, 24));
        F low = _mm256_permutevar8x32_ps(lut.low, code);
        F high = _mm256_permutevar8x32_ps(lut.high, code);
        F bit3 = _mm256_castsi256_ps(_mm256_slli_epi32(code, 28));
        store(out, _mm256_blendv_ps(low, high, bit3));
    }
    PK_INLINE float lookup_one(const Lut& lut, int code) {
        alignas(32) float value[16];
        _mm256_store_ps(value, lut.low);
        _mm256_store_ps(value + 8, lut.high);
        return value[code];
    }

    // The same table as bytes: plane b holds byte b of the 16 fp32 values, in both halves. Byte
    // look-ups decode 32 weights each. Values of bf16 need planes 2 and 3, of fp16 1 to 3.
    struct Planes {
        I plane[4];
    };
    // Values 0-3, 8-11 and 4-7, 12-15: the order in which unpacking by lanes restores 0-15.
    struct Codebook {
        F a, b;
    };
    PK_INLINE Codebook load_codebook(const float* values) {
        F v0 = load(values), v1 = load(values + 8);
        return {_mm256_permute2f128_ps(v0, v1, 0x20), _mm256_permute2f128_ps(v0, v1, 0x31)};
    }
    // Without care for NaN: the scale is canonical where it is one.
    PK_INLINE I round_bits_bf16(F x) {
        I u = _mm256_castps_si256(x);
        I lsb = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
        return _mm256_add_epi32(_mm256_add_epi32(u, _mm256_set1_epi32(0x7fff)), lsb);
    }
    template <int kDtype>
    PK_INLINE Planes make_planes(const Codebook& values, float scale) {
        F s = set1(scale);
        F a = mul(values.a, s), b = mul(values.b, s);
        I x, y;
        if constexpr (kDtype == kBF16) {
            x = round_bits_bf16(a);
            y = round_bits_bf16(b);
        } else {
            x = _mm256_castps_si256(kDtype == kF16 ? round_f16(a) : a);
            y = _mm256_castps_si256(kDtype == kF16 ? round_f16(b) : b);
        }
        I by_byte = _mm256_broadcastsi128_si256(
            _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
        x = _mm256_shuffle_epi8(x, by_byte);
        y = _mm256_shuffle_epi8(y, by_byte);
        Planes p;
        I high = _mm256_unpackhi_epi32(x, y);
        p.plane[2] = _mm256_permute4x64_epi64(high, 0x88);
        p.plane[3] = _mm256_permute4x64_epi64(high, 0xdd);
        if constexpr (kDtype != kBF16) {
            I low = _mm256_unpacklo_epi32(x, y);
            p.plane[0] = _mm256_permute4x64_epi64(low, 0x88);
            p.plane[1] = _mm256_permute4x64_epi64(low, 0xdd);
        }
        return p;
    }
    // 16 words of a look-up, as fp32 values: `low` and `high` hold bytes 0-1 and 2-3 of each.
    template <int kDtype>
    PK_INLINE void words(const Planes& p, I code, I* low, I* high) {
        I b2 = _mm256_shuffle_epi8(p.plane[2], code);
        I b3 = _mm256_shuffle_epi8(p.plane[3], code);
        high[0] = _mm256_unpacklo_epi8(b2, b3);
        high[1] = _mm256_unpackhi_epi8(b2, b3);
        low[0] = low[1] = _mm256_setzero_si256();
        if constexpr (kDtype != kBF16) {
            I b0 = kDtype == kF32 ? _mm256_shuffle_epi8(p.plane[0], code) : low[0];
            I b1 = _mm256_shuffle_epi8(p.plane[1], code);
            low[0] = _mm256_unpacklo_epi8(b0, b1);
            low[1] = _mm256_unpackhi_epi8(b0, b1);
        }
    }
    // 64 weights from 32 bytes, in order; sink(i, v) takes vector i of them.
    template <int kDtype, class Sink>
    PK_INLINE void wide(const Planes& p, const uint8_t* bytes, Sink&& sink) {
        I raw = _mm256_loadu_si256((const __m256i*)bytes);
        // Even 16-bit words to the lower half, odd ones to the upper: so the unpacking below, which
        // works within halves, ends in order.
        I pairs = _mm256_broadcastsi128_si256(
            _mm_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15));
        raw = _mm256_permute4x64_epi64(_mm256_shuffle_epi8(raw, pairs), 0xd8);
        I nibble = _mm256_set1_epi8(15);
        I first = _mm256_and_si256(_mm256_srli_epi16(raw, 4), nibble);
        I second = _mm256_and_si256(raw, nibble);
        I code[2] = {_mm256_unpacklo_epi8(first, second), _mm256_unpackhi_epi8(first, second)};
#pragma GCC unroll 2
        for (int i = 0; i < 2; ++i) {
            I low[2], high[2];
            words<kDtype>(p, code[i], low, high);
#pragma GCC unroll 2
            for (int h = 0; h < 2; ++h) {
                I a = _mm256_unpacklo_epi16(low[h], high[h]);
                I b = _mm256_unpackhi_epi16(low[h], high[h]);
                sink(4 * i + 2 * h, _mm256_castsi256_ps(a));
                sink(4 * i + 2 * h + 1, _mm256_castsi256_ps(b));
            }
        }
    }
    // The same weights with fewer shuffles, in the order that unordered() tells. Enough for a sum
    // over all of them, with the other factor put into that order once.
    template <int kDtype, class Sink>
    PK_INLINE void wide_unordered(const Planes& p, const uint8_t* bytes, Sink&& sink) {
        I raw = _mm256_loadu_si256((const __m256i*)bytes);
        I nibble = _mm256_set1_epi8(15);
#pragma GCC unroll 2
        for (int i = 0; i < 2; ++i) {
            I code = _mm256_and_si256(i == 0 ? _mm256_srli_epi16(raw, 4) : raw, nibble);
            I low[2], high[2];
            words<kDtype>(p, code, low, high);
#pragma GCC unroll 2
            for (int h = 0; h < 2; ++h) {
                I a, b;
                if constexpr (kDtype == kBF16) { // shifts and masks leave the shuffle units free
                    a = _mm256_slli_epi32(high[h], 16);
                    b = _mm256_and_si256(high[h], _mm256_set1_epi32((int)0xffff0000));
                } else {
                    a = _mm256_unpacklo_epi16(low[h], high[h]);
                    b = _mm256_unpackhi_epi16(low[h], high[h]);
                }
                sink(4 * i + 2 * h, _mm256_castsi256_ps(a));
                sink(4 * i + 2 * h + 1, _mm256_castsi256_ps(b));
            }
        }
    }
    // Which of the 64 weights lane `lane` of vector `v` of wide_unordered() is.
    PK_INLINE int unordered(int dtype, int v, int lane) {
        int half = lane / 4 * 16 + v / 2 % 2 * 8, l = lane % 4;
        int byte = half + (dtype == kBF16 ? 2 * l + v % 2 : v % 2 * 4 + l);
        return 2 * byte + v / 4;
    }

    PK_INLINE void codes(const Ladder& ladder, F t, uint8_t* out) {
        F u = ladder.magnitude ? _mm256_andnot_ps(_mm256_set1_ps(-0.0f), t) : t;
        I rung = _mm256_setzero_si256();
        for (int l = 0; l < ladder.levels; ++l) {
            F threshold = _mm256_permutevar8x32_ps(_mm256_load_ps(ladder.level[l]), rung);
            I above = _mm256_castps_si256(_mm256_cmp_ps(u, threshold, _CMP_GT_OQ));
            rung = _mm256_sub_epi32(_mm256_add_epi32(rung, rung), above);
        }
        if (ladder.magnitude) {
            I code =
                _mm256_permutevar8x32_epi32(_mm256_load_si256((const __m256i*)ladder.code), rung);
            I negative = _mm256_castps_si256(_mm256_cmp_ps(t, zero(), _CMP_LT_OQ));
            rung = _mm256_or_si256(code, _mm256_and_si256(negative, _mm256_set1_epi32(8)));
        }
        __m128i words =
            _mm_packus_epi32(_mm256_castsi256_si128(rung), _mm256_extracti128_si256(rung, 1));
        _mm_storel_epi64((__m128i*)out, _mm_packus_epi16(words, words));
    }

    // Entries of a table of 256, by one code a lane. Loads and insertions: a gather takes half as
    // long again, on other processors more.
    PK_INLINE __m128 pick_four(const float* table, uint32_t code) {
        __m128 x = _mm_load_ss(table + (code & 255));
        x = _mm_insert_ps(x, _mm_load_ss(table + ((code >> 8) & 255)), 0x10);
        x = _mm_insert_ps(x, _mm_load_ss(table + ((code >> 16) & 255)), 0x20);
        return _mm_insert_ps(x, _mm_load_ss(table + (code >> 24)), 0x30);
    }
    PK_INLINE F pick(const float* table, const uint8_t* code) {
        uint64_t word;
        __builtin_memcpy(&word, code, 8);
        return _mm256_set_m128(pick_four(table, (uint32_t)(word >> 32)),
                               pick_four(table, (uint32_t)word));
    }

    // Codes of the dynamic maps of kCodes values x * inverse; see CodeSegments. Bits are set where
    // a value is too near to a threshold to tell.
    static constexpr int kCodes = 32;
    static constexpr int kValues = 0;
    template <bool>
    PK_INLINE void dynamic_values(const uint8_t*, F, F*) {}
    template <bool kSigned>
    PK_INLINE uint64_t dynamic_codes(const CodeSegments& s, const float* x, float inverse,
                                     uint8_t* out) {
        const I next = _mm256_castps_si256(_mm256_load_ps(s.next));
        const I last = _mm256_load_si256((const __m256i*)s.last);
        const F slope = _mm256_load_ps(s.slope), offset = _mm256_load_ps(s.offset);
        const I fraction = _mm256_set1_epi32(kSegmentDoubt);
        uint64_t doubt = 0;
        I code[4];
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
            F t = mul(load(x + 8 * i), set1(inverse));
            I a = _mm256_castps_si256(t); // magnitudes compare as integers do
            if (kSigned)
                a = _mm256_and_si256(a, _mm256_set1_epi32(0x7fffffff));
            I upper =
                _mm256_subs_epu16(_mm256_srli_epi32(a, 16), _mm256_set1_epi32(kSegmentLogStart));
            I d = _mm256_mulhi_epu16(upper, _mm256_set1_epi32(kSegmentLogScale));
            I above = _mm256_cmpgt_epi32(a, _mm256_permutevar8x32_epi32(next, d));
            d = _mm256_sub_epi32(d, above);
            F sum = fma(_mm256_castsi256_ps(a), _mm256_permutevar8x32_ps(slope, d),
                        _mm256_permutevar8x32_ps(offset, d));
            I bits = _mm256_castps_si256(sum);
            I unsure = _mm256_cmpeq_epi32(_mm256_and_si256(bits, fraction), zero_bits());
            doubt |= (uint64_t)(uint32_t)_mm256_movemask_ps(_mm256_castsi256_ps(unsure)) << 8 * i;
            I k = _mm256_srli_epi32(bits, kSegmentShift);
            k = _mm256_min_epi32(k, _mm256_permutevar8x32_epi32(last, d));
            k = _mm256_sub_epi32(k, _mm256_set1_epi32(kSegmentZero));
            code[i] = kSigned ? _mm256_sign_epi32(k, _mm256_castps_si256(t)) : k;
        }
        I low = _mm256_packs_epi32(code[0], code[1]), high = _mm256_packs_epi32(code[2], code[3]);
        if (kSigned) { // there is a code for 1, but none for -1: the packing saturates
            low = _mm256_add_epi16(low, _mm256_set1_epi16(127));
            high = _mm256_add_epi16(high, _mm256_set1_epi16(127));
        }
        I bytes = _mm256_permutevar8x32_epi32(_mm256_packus_epi16(low, high),
                                              _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
        _mm256_storeu_si256((__m256i*)out, bytes);
        return doubt;
    }

    PK_INLINE void transpose(const float* src, int64_t src_stride, float* dst, int64_t dst_stride) {
        F r[8], s[8];
        for (int i = 0; i < 8; ++i)
            r[i] = load(src + i * src_stride);
        for (int i = 0; i < 4; ++i) {
            s[2 * i] = _mm256_unpacklo_ps(r[2 * i], r[2 * i + 1]);
            s[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i], r[2 * i + 1]);
        }
        for (int i = 0; i < 2; ++i) {
            const F* q = s + 4 * i;
            r[4 * i] = _mm256_shuffle_ps(q[0], q[2], 0x44);
            r[4 * i + 1] = _mm256_shuffle_ps(q[0], q[2], 0xee);
            r[4 * i + 2] = _mm256_shuffle_ps(q[1], q[3], 0x44);
            r[4 * i + 3] = _mm256_shuffle_ps(q[1], q[3], 0xee);
        }
        for (int i = 0; i < 4; ++i) {
            store(dst + i * dst_stride, _mm256_permute2f128_ps(r[i], r[i + 4], 0x20));
            store(dst + (i + 4) * dst_stride, _mm256_permute2f128_ps(r[i], r[i + 4], 0x31));
        }
    }
};

} // namespace
} // namespace pk::PK_ISA
