#include "crc32c.h"

#include <string.h>

namespace pk {
namespace {

constexpr uint32_t kPolynomial = 0x82f63b78u; // reflected

// t[k][b]: what byte b leaves in the register after k more bytes of zeros.
struct ByteTables {
    uint32_t t[8][256];
};

constexpr ByteTables make_byte_tables() {
    ByteTables tables = {};
    for (uint32_t b = 0; b < 256; ++b) {
        uint32_t r = b;
        for (int bit = 0; bit < 8; ++bit)
            r = (r >> 1) ^ (r & 1 ? kPolynomial : 0);
        tables.t[0][b] = r;
    }
    for (int k = 1; k < 8; ++k)
        for (int b = 0; b < 256; ++b) {
            uint32_t r = tables.t[k - 1][b];
            tables.t[k][b] = (r >> 8) ^ tables.t[0][r & 255];
        }
    return tables;
}

constexpr ByteTables kBytes = make_byte_tables();

uint32_t tables_raw(uint32_t r, const uint8_t* p, size_t size) {
    for (; size >= 8; p += 8, size -= 8) {
        uint64_t word = 0;
        memcpy(&word, p, 8); // x86-64 and AArch64 are little-endian, as the tables assume
        word ^= r;
        r = 0;
        for (int k = 0; k < 8; ++k)
            r ^= kBytes.t[7 - k][(word >> (8 * k)) & 255];
    }
    for (; size > 0; ++p, --size)
        r = (r >> 8) ^ kBytes.t[0][(r ^ *p) & 255];
    return r;
}

#if defined(__x86_64__)

// The instruction takes three cycles and a new one starts each cycle: three stretches of the data
// run side by side, and the registers of the first two are then moved on past what follows them.
constexpr size_t kStretch = 2048;

// The register after kStretch bytes of zeros, by the bytes of the register before.
struct ShiftTables {
    uint32_t t[4][256];
};

constexpr uint32_t times(const uint32_t* matrix, uint32_t vector) {
    uint32_t r = 0;
    for (int i = 0; i < 32; ++i)
        if ((vector >> i) & 1)
            r ^= matrix[i];
    return r;
}

constexpr ShiftTables make_shift_tables() {
    uint32_t matrix[32] = {kPolynomial}; // one bit of zeros
    for (int i = 1; i < 32; ++i)
        matrix[i] = 1u << (i - 1);
    for (size_t bits = 1; bits < 8 * kStretch; bits *= 2) {
        uint32_t square[32] = {};
        for (int i = 0; i < 32; ++i)
            square[i] = times(matrix, matrix[i]);
        for (int i = 0; i < 32; ++i)
            matrix[i] = square[i];
    }
    ShiftTables tables = {};
    for (int k = 0; k < 4; ++k)
        for (uint32_t b = 0; b < 256; ++b)
            tables.t[k][b] = times(matrix, b << (8 * k));
    return tables;
}

constexpr ShiftTables kShift = make_shift_tables();

uint32_t shift(uint32_t r) {
    return kShift.t[0][r & 255] ^ kShift.t[1][(r >> 8) & 255] ^ kShift.t[2][(r >> 16) & 255] ^
           kShift.t[3][r >> 24];
}

__attribute__((target("sse4.2"))) uint32_t hardware_raw(uint32_t start, const uint8_t* p,
                                                        size_t size) {
    uint64_t r = start, word = 0;
    for (; size >= 3 * kStretch; p += 3 * kStretch, size -= 3 * kStretch) {
        uint64_t second = 0, third = 0, b = 0, c = 0;
        for (size_t i = 0; i < kStretch; i += 8) {
            memcpy(&word, p + i, 8);
            memcpy(&b, p + kStretch + i, 8);
            memcpy(&c, p + 2 * kStretch + i, 8);
            r = __builtin_ia32_crc32di(r, word);
            second = __builtin_ia32_crc32di(second, b);
            third = __builtin_ia32_crc32di(third, c);
        }
        r = shift((uint32_t)r) ^ second;
        r = shift((uint32_t)r) ^ third;
    }
    for (; size >= 8; p += 8, size -= 8) {
        memcpy(&word, p, 8);
        r = __builtin_ia32_crc32di(r, word);
    }
    for (; size > 0; ++p, --size)
        r = __builtin_ia32_crc32qi((uint32_t)r, *p);
    return (uint32_t)r;
}

#endif

} // namespace

uint32_t crc32c_tables(uint32_t crc, const void* data, size_t size) {
    return ~tables_raw(~crc, (const uint8_t*)data, size);
}

uint32_t crc32c(uint32_t crc, const void* data, size_t size) {
#if defined(__x86_64__)
    static const bool hardware = __builtin_cpu_supports("sse4.2");
    if (hardware)
        return ~hardware_raw(~crc, (const uint8_t*)data, size);
#endif
    return crc32c_tables(crc, data, size);
}

} // namespace pk
