// Picks the vector wrapper of the instruction set that this file is compiled for. Each wrapper is
// a struct `V` of static inline operations; kernel bodies use nothing else.
#pragma once

#include "../common/codebooks.h"
#include "../common/convert.h"
#include "../common/optimizer.h"

#if defined(__GNUC__)
#define PK_INLINE [[maybe_unused]] static inline __attribute__((always_inline))
#else
#define PK_INLINE [[maybe_unused]] static inline
#endif

// For members and lambdas in hot loops.
#define PK_SINK __attribute__((always_inline))

namespace pk {

// The thresholds of a 4-bit format, laid out for a binary search: entry i of level l is compared
// by those values whose first l comparisons gave the bits of i.
struct Ladder {
    int levels;
    alignas(64) float level[4][16];
    alignas(64) int32_t code[16]; // of each rung
    bool magnitude;               // search |t|, bit 3 of the code is the sign
};

PK_HD Ladder make_ladder(int quant_type) {
    Ladder ladder = {};
    const float* t = quant_type == kNF4 ? kNF4Thresholds : kFP4Thresholds;
    ladder.levels = quant_type == kNF4 ? 4 : 3;
    ladder.magnitude = quant_type == kFP4;
    for (int l = 0; l < ladder.levels; ++l) {
        int step = 1 << (ladder.levels - l);
        for (int i = 0; i < (1 << l); ++i)
            ladder.level[l][i] = t[i * step + step / 2 - 1];
    }
    for (int i = 0; i < 16; ++i)
        ladder.code[i] = quant_type == kNF4 ? i : kFP4Order[i & 7];
    return ladder;
}

} // namespace pk

#if defined(PK_SIMD_AVX512)
#include "simd_avx512.h"
#elif defined(PK_SIMD_AVX2)
#include "simd_avx2.h"
#else
#include "simd_scalar.h"
#endif
#include "simd_pairs.h"
#include "simd_tiles.h"
