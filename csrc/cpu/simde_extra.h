// AVX-512 intrinsics that SIMDe 0.7.4 does not emulate, in plain C by their documented meaning.
#pragma once

namespace pk_simde {

template <class To, class From>
static inline To as(const From& from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    __builtin_memcpy(&to, &from, sizeof(to));
    return to;
}

struct F16 {
    float at[16];
};
struct I16 {
    int32_t at[16];
};
struct H16 {
    uint16_t at[16];
};
struct H32 {
    uint16_t at[32];
};
struct B16 {
    int8_t at[16];
};
struct F8 {
    float at[8];
};

static inline __m512 cvtepi32_ps(__m512i x) {
    I16 i = as<I16>(x);
    F16 f;
    for (int l = 0; l < 16; ++l)
        f.at[l] = (float)i.at[l];
    return as<__m512>(f);
}

static inline __m512i cvtps_epi32(__m512 x) { // nearest even; in range here
    F16 f = as<F16>(x);
    I16 i;
    for (int l = 0; l < 16; ++l)
        i.at[l] = (int32_t)(pk::float_bits(f.at[l] + 12582912.0f) - 0x4b400000u);
    return as<__m512i>(i);
}

static inline __m256i cvtepi32_epi16(__m512i x) {
    I16 i = as<I16>(x);
    H16 h;
    for (int l = 0; l < 16; ++l)
        h.at[l] = (uint16_t)i.at[l];
    return as<__m256i>(h);
}

static inline __m128i cvtepi32_epi8(__m512i x) {
    I16 i = as<I16>(x);
    B16 b;
    for (int l = 0; l < 16; ++l)
        b.at[l] = (int8_t)i.at[l];
    return as<__m128i>(b);
}

static inline __m512i cvtepi8_epi32(__m128i x) {
    B16 b = as<B16>(x);
    I16 i;
    for (int l = 0; l < 16; ++l)
        i.at[l] = b.at[l];
    return as<__m512i>(i);
}

static inline __m512i cvtepu16_epi32(__m256i x) {
    H16 h = as<H16>(x);
    I16 i;
    for (int l = 0; l < 16; ++l)
        i.at[l] = h.at[l];
    return as<__m512i>(i);
}

static inline __m512 cvtph_ps(__m256i x) {
    H16 h = as<H16>(x);
    F16 f;
    for (int l = 0; l < 16; ++l)
        f.at[l] = pk::f16_to_float(h.at[l]);
    return as<__m512>(f);
}

static inline __m256i cvtps_ph(__m512 x) {
    F16 f = as<F16>(x);
    H16 h;
    for (int l = 0; l < 16; ++l)
        h.at[l] = pk::float_to_f16(f.at[l]);
    return as<__m256i>(h);
}

static inline __m256 extractf32x8_ps(__m512 x, int half) {
    F16 f = as<F16>(x);
    F8 r;
    for (int l = 0; l < 8; ++l)
        r.at[l] = f.at[8 * half + l];
    return as<__m256>(r);
}

static inline __m512 shuffle_f32x4(__m512 a, __m512 b, int imm) {
    F16 x = as<F16>(a), y = as<F16>(b), r;
    for (int part = 0; part < 4; ++part) {
        const F16& from = part < 2 ? x : y;
        int pick = imm >> (2 * part) & 3;
        for (int l = 0; l < 4; ++l)
            r.at[4 * part + l] = from.at[4 * pick + l];
    }
    return as<__m512>(r);
}

static inline __m512i mulhi_epu16(__m512i a, __m512i b) {
    H32 x = as<H32>(a), y = as<H32>(b), r;
    for (int l = 0; l < 32; ++l)
        r.at[l] = (uint16_t)((uint32_t)x.at[l] * y.at[l] >> 16);
    return as<__m512i>(r);
}

static inline __mmask16 testn_epi32_mask(__m512i a, __m512i b) {
    I16 x = as<I16>(a), y = as<I16>(b);
    unsigned mask = 0;
    for (int l = 0; l < 16; ++l)
        mask |= (unsigned)((x.at[l] & y.at[l]) == 0) << l;
    return (__mmask16)mask;
}

} // namespace pk_simde

#undef _mm512_cvtepi32_ps
#define _mm512_cvtepi32_ps(x) pk_simde::cvtepi32_ps(x)
#undef _mm512_cvtps_epi32
#define _mm512_cvtps_epi32(x) pk_simde::cvtps_epi32(x)
#undef _mm512_cvtepi32_epi16
#define _mm512_cvtepi32_epi16(x) pk_simde::cvtepi32_epi16(x)
#undef _mm512_cvtepi32_epi8
#define _mm512_cvtepi32_epi8(x) pk_simde::cvtepi32_epi8(x)
#undef _mm512_cvtepi8_epi32
#define _mm512_cvtepi8_epi32(x) pk_simde::cvtepi8_epi32(x)
#undef _mm512_cvtepu16_epi32
#define _mm512_cvtepu16_epi32(x) pk_simde::cvtepu16_epi32(x)
#undef _mm512_cvtph_ps
#define _mm512_cvtph_ps(x) pk_simde::cvtph_ps(x)
#undef _mm512_cvtps_ph
#define _mm512_cvtps_ph(x, rounding) pk_simde::cvtps_ph(x)
#undef _mm512_extractf32x8_ps
#define _mm512_extractf32x8_ps(x, half) pk_simde::extractf32x8_ps(x, half)
#undef _mm512_shuffle_f32x4
#define _mm512_shuffle_f32x4(a, b, imm) pk_simde::shuffle_f32x4(a, b, imm)
#undef _mm512_mulhi_epu16
#define _mm512_mulhi_epu16(a, b) pk_simde::mulhi_epu16(a, b)
#undef _mm512_testn_epi32_mask
#define _mm512_testn_epi32_mask(a, b) pk_simde::testn_epi32_mask(a, b)
