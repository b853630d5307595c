// Products of bf16 pairs in AMX tiles of 16 x 16: the same operands as simd_pairs.h. Other builds
// have kTiles false and never call these.
#pragma once

namespace pk::PK_ISA {
namespace {

#if defined(PK_SIMD_TILES)

constexpr bool kTiles = true;

// The intrinsics do not tell the compiler what memory they touch.
#define PK_TILE_FENCE() __asm__ volatile("" ::: "memory")

struct Tiles {
    // Sums in 0 to 3, rows of x in 4 and 5, of which `rows` count, pairs of weights in 6 and 7.
    PK_INLINE void configure(int rows) {
        struct alignas(64) {
            uint8_t palette = 1, start = 0, reserved[14] = {};
            uint16_t row_bytes[16] = {};
            uint8_t rows[16] = {};
        } config;
        for (int t = 0; t < 8; ++t) {
            config.row_bytes[t] = 64;
            config.rows[t] = (uint8_t)(t < 6 ? rows : 16);
        }
        PK_TILE_FENCE();
        _tile_loadconfig(&config);
        PK_TILE_FENCE();
    }
    PK_INLINE void release() { _tile_release(); }

    // sum [16 R, 32] += x [16 R, 16 steps] w [16 steps, 32], strides in elements.
    template <int R>
    PK_INLINE void multiply(const float* x, int64_t x_stride, const float* w, int64_t w_stride,
                            int64_t steps, float* sum, int64_t sum_stride) {
        const int64_t xs = 4 * x_stride, ws = 4 * w_stride, ss = 4 * sum_stride;
        PK_TILE_FENCE();
        _tile_loadd(0, sum, ss);
        _tile_loadd(1, sum + 16, ss);
        if (R == 2) {
            _tile_loadd(2, sum + 16 * sum_stride, ss);
            _tile_loadd(3, sum + 16 * sum_stride + 16, ss);
        }
        for (int64_t k = 0; k < steps; ++k, x += 16, w += 16 * w_stride) {
            _tile_loadd(4, x, xs);
            _tile_loadd(6, w, ws);
            _tile_loadd(7, w + 16, ws);
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 4, 7);
            if (R == 2) {
                _tile_loadd(5, x + 16 * x_stride, xs);
                _tile_dpbf16ps(2, 5, 6);
                _tile_dpbf16ps(3, 5, 7);
            }
        }
        _tile_stored(0, sum, ss);
        _tile_stored(1, sum + 16, ss);
        if (R == 2) {
            _tile_stored(2, sum + 16 * sum_stride, ss);
            _tile_stored(3, sum + 16 * sum_stride + 16, ss);
        }
        PK_TILE_FENCE();
    }
};

#else

constexpr bool kTiles = false;

struct Tiles {
    PK_INLINE void configure(int) {}
    PK_INLINE void release() {}
    template <int R>
    PK_INLINE void multiply(const float*, int64_t, const float*, int64_t, int64_t, float*,
                            int64_t) {}
};

#endif

} // namespace
} // namespace pk::PK_ISA
