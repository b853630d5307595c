// What every kernel file needs: integer types, dtype and status codes, the host/device marker.
#pragma once

#include <stddef.h>
#include <stdint.h>

// Functions in csrc/common are compiled once per instruction set. `static` keeps each copy inside
// its own object file: a weak copy could be replaced at link time by one built for another CPU.
#if defined(__CUDACC__)
#define PK_HD static __host__ __device__ inline
#define PK_TABLE static __device__ constexpr
#pragma nv_diag_suppress 20091 // tables are device memory; the host side of PK_HD never reads them
#else
#define PK_HD [[maybe_unused]] static inline
#define PK_TABLE constexpr
#endif

namespace pk {

enum Dtype : int { kF32 = 0, kBF16 = 1, kF16 = 2 };

enum Status : int {
    kOk = 0,
    kNoMemory = 1,
    kBadArgument = 2,
    kNonFinite = 3, // the payload of the call tells where
};

PK_HD const char* status_text(int status) {
    switch (status) {
    case kOk:
        return "ok";
    case kNoMemory:
        return "out of memory for scratch space";
    case kBadArgument:
        return "bad argument";
    case kNonFinite:
        return "non-finite input";
    default:
        return "unknown status";
    }
}

PK_HD int64_t dtype_size(int dtype) { return dtype == kF32 ? 4 : 2; }

PK_HD int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }

PK_HD int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }

PK_HD int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

} // namespace pk
