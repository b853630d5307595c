// Dot products of 8-bit integers, exact in 32 bits. A step takes kBytes codes of a weight row and
// of a row of x; x is in [-127, 127], codes are any int8.
#pragma once

namespace pk::PK_ISA {
namespace {

#if defined(__AVX512VNNI__) && defined(PK_SIMD_AVX512) && !defined(PK_SIMDE)

// vpdpbusd multiplies unsigned by signed bytes: codes go in raised by 128, which adds kOffset times
// the sum of x to every product.
struct Ints {
    static constexpr int kBytes = 64;
    static constexpr int kCodeRows = 4; // rows of codes by rows of x that a tile holds
    static constexpr int kRows = 4;
    static constexpr int kOffset = 128;
    using Sums = __m512i;
    using Bytes = __m512i;

    PK_INLINE Sums zero() { return _mm512_setzero_si512(); }
    PK_INLINE Bytes codes(const int8_t* p) {
        return _mm512_xor_si512(_mm512_loadu_si512(p), _mm512_set1_epi8((char)0x80));
    }
    PK_INLINE Bytes codes(const int8_t* p, int64_t n) {
        return _mm512_xor_si512(_mm512_maskz_loadu_epi8(((__mmask64)1 << n) - 1, p),
                                _mm512_set1_epi8((char)0x80));
    }
    // As assembly: GCC copies the sums before and after the intrinsic, two moves a product.
    PK_INLINE Sums dot(Bytes codes, const int8_t* x, Sums sums) {
        __m512i rows = _mm512_loadu_si512(x);
        __asm__("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(codes), "v"(rows));
        return sums;
    }
    PK_INLINE int32_t total(Sums sums) { return _mm512_reduce_add_epi32(sums); }
};

#elif defined(__AVX2__) && (defined(PK_SIMD_AVX2) || defined(PK_SIMD_AVX512))

// |code| times x with the code's sign: pairs of products, at most 2 * 128 * 127, fit 16 bits.
struct Ints {
    static constexpr int kBytes = 32;
    static constexpr int kCodeRows = 2;
    static constexpr int kRows = 4;
    static constexpr int kOffset = 0;
    using Sums = __m256;
    using Bytes = __m256i;

    PK_INLINE Sums zero() { return _mm256_setzero_ps(); }
    PK_INLINE Bytes codes(const int8_t* p) { return _mm256_loadu_si256((const __m256i*)p); }
    PK_INLINE Bytes codes(const int8_t* p, int64_t n) {
        alignas(32) int8_t tail[kBytes] = {};
        __builtin_memcpy(tail, p, (size_t)n);
        return codes(tail);
    }
    PK_INLINE Sums dot(Bytes codes, const int8_t* x, Sums sums) {
        __m256i rows = _mm256_loadu_si256((const __m256i*)x);
        __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(codes), _mm256_sign_epi8(rows, codes));
        __m256i fours = _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
        return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(sums), fours));
    }
    PK_INLINE int32_t total(Sums sums) {
        __m256i all = _mm256_castps_si256(sums);
        __m128i s = _mm_add_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1));
        s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4e));
        return _mm_cvtsi128_si32(_mm_add_epi32(s, _mm_shuffle_epi32(s, 0xb1)));
    }
};

#else

struct Ints {
    static constexpr int kBytes = 16;
    static constexpr int kCodeRows = 1;
    static constexpr int kRows = 1;
    static constexpr int kOffset = 0;
    struct Sums {
        int32_t value;
    };
    struct Bytes {
        int8_t value[kBytes];
    };

    PK_INLINE Sums zero() { return {0}; }
    PK_INLINE Bytes codes(const int8_t* p) { return codes(p, kBytes); }
    PK_INLINE Bytes codes(const int8_t* p, int64_t n) {
        Bytes b = {};
        __builtin_memcpy(b.value, p, (size_t)n);
        return b;
    }
    PK_INLINE Sums dot(Bytes codes, const int8_t* x, Sums sums) {
        for (int i = 0; i < kBytes; ++i)
            sums.value += (int32_t)codes.value[i] * x[i];
        return sums;
    }
    PK_INLINE int32_t total(Sums sums) { return sums.value; }
};

#endif

} // namespace
} // namespace pk::PK_ISA
