// Products of bf16 pairs: AVX-512 BF16 with VBMI. A vector holds 16 pairs, the element of the lower
// depth in the lower half of each lane; a register of them is passed as a V::F.
//
// vdpbf16ps rounds each of its two additions to nearest even and takes denormals as zero, whatever
// MXCSR says. Other builds have kPairs false and never call these.
#pragma once

namespace pk::PK_ISA {
namespace {

#if defined(PK_SIMD_PAIRS)

constexpr bool kPairs = true;

struct Pairs {
    using I = __m512i;
    using Table = __m512i; // 32 words

    PK_INLINE V::F dot(V::F a, V::F b, V::F acc) {
        return _mm512_dpbf16_ps(acc, (__m512bh)_mm512_castps_si512(a),
                                (__m512bh)_mm512_castps_si512(b));
    }
    PK_INLINE __m256i scaled(const float* values, float scale) {
        return (__m256i)_mm512_cvtneps_pbh(_mm512_mul_ps(V::load(values), V::set1(scale)));
    }
    // The 16 values of a block in bf16, twice, so that bit 4 of a look-up does not matter.
    PK_INLINE Table table(const float* values, float scale) {
        return _mm512_broadcast_i64x4(scaled(values, scale));
    }
    // Of two blocks, by bit 4.
    PK_INLINE Table table(const float* values, float low, float high) {
        return _mm512_inserti64x4(_mm512_castsi256_si512(scaled(values, low)), scaled(values, high),
                                  1);
    }
    // 64 weights of a row from 32 bytes, in order. Two bytes to a quadword, whose nibbles a
    // multishift puts into the lower bits of its four words; what lies above them is not looked at.
    PK_INLINE void along_row(const Table& t, const uint8_t* bytes, V::F out[2]) {
        const I nibbles = _mm512_set1_epi64(0x0008000c00000004);
#pragma GCC unroll 2
        for (int i = 0; i < 2; ++i) {
            I b = _mm512_cvtepu16_epi64(_mm_loadu_si128((const __m128i*)(bytes + 16 * i)));
            I code = _mm512_multishift_epi64_epi8(nibbles, b);
            out[i] = _mm512_castsi512_ps(_mm512_permutexvar_epi16(code, t));
        }
    }
    // 64 weights of each of two rows, paired.
    PK_INLINE void across_rows(const Table& t, const uint8_t* low, const uint8_t* high,
                               V::F out[4]) {
        const I nibbles = _mm512_set1_epi32(0x000f000f), second = _mm512_set1_epi32(0x00100000);
        const I shift = _mm512_set_epi32(0, 4, 0, 4, 0, 4, 0, 4, 0, 4, 0, 4, 0, 4, 0, 4);
#pragma GCC unroll 2
        for (int i = 0; i < 2; ++i) {
            I a = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)(low + 16 * i)));
            I b = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)(high + 16 * i)));
            I both = _mm512_or_si512(a, _mm512_slli_epi32(b, 16));
#pragma GCC unroll 2
            for (int h = 0; h < 2; ++h) {
                I pick = _mm512_add_epi32(
                    _mm512_set_epi32(7, 7, 6, 6, 5, 5, 4, 4, 3, 3, 2, 2, 1, 1, 0, 0),
                    _mm512_set1_epi32(8 * h));
                I code = _mm512_srlv_epi32(_mm512_permutexvar_epi32(pick, both), shift);
                code = _mm512_ternarylogic_epi32(code, nibbles, second, 0xea); // (code & n) | s
                out[2 * i + h] = _mm512_castsi512_ps(_mm512_permutexvar_epi16(code, t));
            }
        }
    }
    PK_INLINE V::F int8(const int8_t* codes, V::F absmax) {
        return V::mul(V::mul(V::load_i8(codes), absmax), V::set1(kInt8Step));
    }
    // 32 INT8 weights of a row, in order.
    PK_INLINE V::F int8_along_row(const int8_t* codes, V::F absmax) {
        return _mm512_castsi512_ps(
            (I)_mm512_cvtne2ps_pbh(int8(codes + 16, absmax), int8(codes, absmax)));
    }
    // 16 INT8 weights of each of two rows, paired.
    PK_INLINE V::F int8_across_rows(const int8_t* low, const int8_t* high, V::F absmax_low,
                                    V::F absmax_high) {
        const I zip = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8,
                                       23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
        I both = (I)_mm512_cvtne2ps_pbh(int8(high, absmax_high), int8(low, absmax_low));
        return _mm512_castsi512_ps(_mm512_permutexvar_epi16(zip, both));
    }
    // 32 fp32 numbers that are bf16 already, in order.
    PK_INLINE V::F pack(const float* x) {
        const I upper = _mm512_add_epi16(
            _mm512_mullo_epi16(_mm512_set1_epi16(2),
                               _mm512_set_epi16(31, 30, 29, 28, 27, 26, 25, 24, 23, 22, 21, 20, 19,
                                                18, 17, 16, 15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5,
                                                4, 3, 2, 1, 0)),
            _mm512_set1_epi16(1));
        return _mm512_castsi512_ps(_mm512_permutex2var_epi16(_mm512_castps_si512(V::load(x)), upper,
                                                             _mm512_castps_si512(V::load(x + 16))));
    }
    // The same of 16 numbers of each of two rows.
    PK_INLINE V::F pack(const float* low, const float* high) {
        I a = _mm512_srli_epi32(_mm512_castps_si512(V::load(low)), 16);
        I b = _mm512_and_si512(_mm512_castps_si512(V::load(high)),
                               _mm512_set1_epi32((int)0xffff0000));
        return _mm512_castsi512_ps(_mm512_or_si512(a, b));
    }
};

#else

constexpr bool kPairs = false;

struct Pairs {
    using Table = int;
    PK_INLINE V::F dot(V::F, V::F, V::F acc) { return acc; }
    PK_INLINE Table table(const float*, float, float = 0.0f) { return 0; }
    PK_INLINE void along_row(Table, const uint8_t*, V::F*) {}
    PK_INLINE void across_rows(Table, const uint8_t*, const uint8_t*, V::F*) {}
    PK_INLINE V::F int8_along_row(const int8_t*, V::F absmax) { return absmax; }
    PK_INLINE V::F int8_across_rows(const int8_t*, const int8_t*, V::F absmax, V::F) {
        return absmax;
    }
    PK_INLINE V::F pack(const float* x, const float* = nullptr) { return V::load(x); }
};

#endif

} // namespace
} // namespace pk::PK_ISA
