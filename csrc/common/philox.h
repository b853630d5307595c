// Philox-4x32-10 (Salmon et al. 2011), the source of every dropout mask.
//
// Element i of a flattened tensor is kept iff word i % 4 of the block with counter i / 4 reaches
// the threshold floor(p * 2^32); the key is the seed. The same on every backend, bit for bit.
#pragma once

#include "base.h"

namespace pk {

struct Philox4 {
    uint32_t w[4];
};

PK_HD void philox_round(uint32_t c[4], uint32_t k0, uint32_t k1) {
    uint64_t p0 = (uint64_t)0xD2511F53u * c[0];
    uint64_t p1 = (uint64_t)0xCD9E8D57u * c[2];
    uint32_t c1 = c[1], c3 = c[3];
    c[0] = (uint32_t)(p1 >> 32) ^ c1 ^ k0;
    c[1] = (uint32_t)p1;
    c[2] = (uint32_t)(p0 >> 32) ^ c3 ^ k1;
    c[3] = (uint32_t)p0;
}

PK_HD Philox4 philox(uint64_t seed, uint64_t counter) {
    Philox4 r = {{(uint32_t)counter, (uint32_t)(counter >> 32), 0u, 0u}};
    uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
    for (int i = 0; i < 10; ++i) {
        philox_round(r.w, k0, k1);
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    return r;
}

} // namespace pk
