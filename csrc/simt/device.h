// What a .cu file sees instead of the CUDA headers when the host compiler builds it (PK_SIMT):
// the language of CUDA, and csrc/cuda/primitives.cuh's inline PTX by its documented behaviour.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#include <tuple>

#include "../common/convert.h"
#include "executor.h"
#include "memory.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

struct alignas(8) uint2 {
    uint32_t x, y;
};
struct alignas(16) uint4 {
    uint32_t x, y, z, w;
};
struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};

#define threadIdx (simt::thread_index())
#define blockIdx (simt::block_index())
#define blockDim (simt::block_size())
#define gridDim (simt::grid_size())

// One array per declaration and block.
#define PK_SHARED(type, name, count)                                                               \
    static const char name##_key = 0;                                                              \
    type* name = (type*)simt::shared_array(&name##_key, sizeof(type) * (count), alignof(type))
#define PK_DYNAMIC_SHARED(name) unsigned char* name = (unsigned char*)simt::dynamic_shared()

#define PK_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncthreads(PK_SITE) { simt::barrier({file, line}); }
inline void __syncwarp(uint32_t mask = 0xffffffffu, PK_SITE) {
    simt::warp_barrier(mask, {file, line});
}

namespace simt {

template <class T>
struct Exchange {
    T value, result;
    int source;
};

template <class T>
void apply_exchange(void* payloads[kWarp]) {
    for (int i = 0; i < kWarp; ++i) {
        if (payloads[i] == nullptr)
            continue;
        Exchange<T>& own = *(Exchange<T>*)payloads[i];
        // Reading a lane that does not take part is undefined: show it as a poisoned value.
        void* source = payloads[own.source & (kWarp - 1)];
        if (source != nullptr)
            own.result = ((Exchange<T>*)source)->value;
        else
            memset((void*)&own.result, 0xff, sizeof(T));
    }
}

template <class T>
T exchange(const char* what, uint32_t mask, T value, int source, Site site) {
    Exchange<T> e = {value, value, source};
    collective(what, &apply_exchange<T>, &e, mask, site);
    return e.result;
}

struct Vote {
    bool own;
    uint32_t ballot;
};

inline void apply_vote(void* payloads[kWarp]) {
    uint32_t ballot = 0;
    for (int i = 0; i < kWarp; ++i)
        if (payloads[i] != nullptr && ((Vote*)payloads[i])->own)
            ballot |= 1u << i;
    for (int i = 0; i < kWarp; ++i)
        if (payloads[i] != nullptr)
            ((Vote*)payloads[i])->ballot = ballot;
}

inline uint32_t vote(const char* what, uint32_t mask, bool own, Site site) {
    Vote v = {own, 0};
    collective(what, apply_vote, &v, mask, site);
    return v.ballot;
}

// Segments of `width` lanes: the source is taken within the segment of the asking lane.
inline int in_segment(int source, int width) {
    return (lane() & ~(width - 1)) | (source & (width - 1));
}

} // namespace simt

template <class T>
T __shfl_sync(uint32_t mask, T value, int source, int width = 32, PK_SITE) {
    return simt::exchange("__shfl_sync", mask, value, simt::in_segment(source, width),
                          {file, line});
}
template <class T>
T __shfl_xor_sync(uint32_t mask, T value, int bits, int width = 32, PK_SITE) {
    return simt::exchange("__shfl_xor_sync", mask, value,
                          simt::in_segment((simt::lane() & (width - 1)) ^ bits, width),
                          {file, line});
}
template <class T>
T __shfl_down_sync(uint32_t mask, T value, int delta, int width = 32, PK_SITE) {
    int own = simt::lane() & (width - 1);
    int source = own + delta < width ? own + delta : own;
    return simt::exchange("__shfl_down_sync", mask, value, simt::in_segment(source, width),
                          {file, line});
}
template <class T>
T __shfl_up_sync(uint32_t mask, T value, int delta, int width = 32, PK_SITE) {
    int own = simt::lane() & (width - 1);
    int source = own - delta >= 0 ? own - delta : own;
    return simt::exchange("__shfl_up_sync", mask, value, simt::in_segment(source, width),
                          {file, line});
}
inline uint32_t __ballot_sync(uint32_t mask, bool own, PK_SITE) {
    return simt::vote("__ballot_sync", mask, own, {file, line});
}
inline bool __any_sync(uint32_t mask, bool own, PK_SITE) {
    return simt::vote("__any_sync", mask, own, {file, line}) != 0;
}
inline bool __all_sync(uint32_t mask, bool own, PK_SITE) {
    return simt::vote("__all_sync", mask, own, {file, line}) == mask;
}

inline uint32_t __reduce_max_sync(uint32_t mask, uint32_t value, PK_SITE) {
    for (int d = 16; d > 0; d >>= 1) { // for masks of whole warps
        uint32_t other =
            simt::exchange("__reduce_max_sync", mask, value, simt::lane() ^ d, {file, line});
        value = other > value ? other : value;
    }
    return value;
}

// Threads run one at a time, so a checked read-modify-write is atomic.
template <class T>
T pk_simt_atomic(T* p, T (*change)(T, T), T operand) {
    simt::check_access(p, sizeof(T), simt::Access::kAtomic, true);
    T old;
    simt::raw_copy(&old, p, sizeof(T));
    T changed = change(old, operand);
    simt::raw_copy(p, &changed, sizeof(T));
    return old;
}
template <class T>
T atomicAdd(T* p, T v) {
    return pk_simt_atomic<T>(p, [](T a, T b) { return (T)(a + b); }, v);
}
template <class T>
T atomicMin(T* p, T v) {
    return pk_simt_atomic<T>(p, [](T a, T b) { return a < b ? a : b; }, v);
}
template <class T>
T atomicMax(T* p, T v) {
    return pk_simt_atomic<T>(p, [](T a, T b) { return a > b ? a : b; }, v);
}

namespace pk {

template <class... P, class... A>
int launch(const char* name, void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes,
           void* /*stream*/, A... args) {
    struct Call {
        void (*kernel)(P...);
        std::tuple<P...> args;
    } call = {kernel, std::tuple<P...>(static_cast<P>(args)...)};
    auto entry = [](void* p) {
        Call& c = *(Call*)p;
        std::apply(c.kernel, c.args);
    };
    return simt::run_grid(name, entry, &call, sizeof call, grid, block, shared_bytes);
}

inline int device_error() { return 0; }

// Streaming 16-, 8- and 4-byte accesses.
template <class T>
T load_once(const void* p) {
    simt::check_access(p, sizeof(T), simt::Access::kRead, true);
    T v;
    simt::raw_copy(&v, p, sizeof(T));
    return v;
}
template <class T>
void store_once(void* p, T v) {
    simt::check_access(p, sizeof(T), simt::Access::kWrite, true);
    simt::raw_copy(p, &v, sizeof(T));
}

inline float half_to_float(uint16_t h) { return f16_to_float(h); }

// The hardware's are off by a unit in the last place at most.
inline float rsqrt_approximate(float x) { return (float)(1.0 / sqrt((double)x)); }
inline float reciprocal_approximate(float x) { return 1.0f / x; }

inline uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t selector) {
    uint64_t both = (uint64_t)b << 32 | a;
    uint32_t r = 0;
    for (int i = 0; i < 4; ++i)
        r |= (uint32_t)(both >> 8 * (selector >> 4 * i & 7u) & 0xffu) << 8 * i;
    return r;
}

using SharedAddress = uintptr_t;

inline uint32_t byte_permute(uint32_t a, uint32_t b, uint32_t select) {
    uint64_t bytes = (uint64_t)b << 32 | a;
    uint32_t r = 0;
    for (int i = 0; i < 4; ++i) {
        uint32_t pick = select >> 4 * i & 15;
        if (pick > 7)
            simt::fail("byte_permute: nibble %d of the selector is %u", i, pick);
        r |= (uint32_t)(bytes >> 8 * pick & 0xff) << 8 * i;
    }
    return r;
}
inline uint32_t shared_offset(const void* p) {
    return (uint32_t)((const char*)p - simt::shared_base());
}
inline SharedAddress shared_address(const void* p) { return (uintptr_t)p; }
inline uint32_t row_offset(uint32_t low, uint32_t word, int i) {
    if (low > 255)
        simt::fail("row_offset: %u, expected less than 256", low);
    return low + ((word >> 8 * i & 255) << 8);
}
inline SharedAddress shared_row(SharedAddress first, uint32_t word, int i) {
    if (shared_offset((const void*)first) >> 8 & 255)
        simt::fail("shared_row: the second byte of the address is not 0");
    return first + ((word >> 8 * i & 255) << 8);
}
inline uint32_t load_shared_word(SharedAddress a) { return load_once<uint32_t>((const void*)a); }
inline float load_shared_float(SharedAddress a) { return load_once<float>((const void*)a); }
inline float2 load_shared_pair(SharedAddress a) { return load_once<float2>((const void*)a); }

template <int kDtype>
uint32_t pack2(float low, float high) {
    static_assert(kDtype == kBF16 || kDtype == kF16, "16-bit dtypes");
    uint32_t l = kDtype == kBF16 ? float_to_bf16(low) : float_to_f16(low);
    uint32_t h = kDtype == kBF16 ? float_to_bf16(high) : float_to_f16(high);
    return l | h << 16;
}

inline void cp_async16(void* shared, const void* global, bool fetch, PK_SITE) {
    simt::copy_async(shared, global, 16, fetch ? 16 : 0, {file, line});
}
inline void cp_async4(void* shared, const void* global, bool fetch, PK_SITE) {
    simt::copy_async(shared, global, 4, fetch ? 4 : 0, {file, line});
}
inline void cp_async_commit() { simt::commit_async(); }
template <int kGroupsLeft>
void cp_async_wait(PK_SITE) {
    simt::wait_async(kGroupsLeft, {file, line});
}

// ldmatrix.x4: four 8 x 8 matrices of 16-bit elements. Lane 8 i + r holds the address of row r of
// matrix i (16 bytes); register i of lane l receives elements 2 (l % 4), 2 (l % 4) + 1 of row l
// / 4.
struct LoadMatrix {
    const void* row;
    uint32_t r[4];
};

inline void apply_ldmatrix(void* payloads[simt::kWarp]) {
    for (int lane = 0; lane < simt::kWarp; ++lane)
        for (int i = 0; i < 4; ++i) {
            const LoadMatrix& owner = *(LoadMatrix*)payloads[8 * i + lane / 4];
            memcpy(&((LoadMatrix*)payloads[lane])->r[i], (const char*)owner.row + 4 * (lane % 4),
                   4);
        }
}

inline void ldmatrix_x4(uint32_t r[4], const void* row, PK_SITE) {
    simt::check_access(row, 16, simt::Access::kRead, true);
    LoadMatrix m = {row, {}};
    simt::collective("ldmatrix", apply_ldmatrix, &m, 0xffffffffu, {file, line});
    for (int i = 0; i < 4; ++i)
        r[i] = m.r[i];
}

// mma.sync.m16n8k16: D [16, 8] = A [16, 16] B [16, 8] + C. With g = lane / 4 and t = lane % 4,
//   A register i: row g + 8 (i % 2), columns 2 t + 8 (i / 2) and the next (low half first)
//   B register i: rows 2 t + 8 i and the next, column g
//   C, D register i: row g + 8 (i / 2), column 2 t + i % 2
struct Mma {
    uint32_t a[4], b[2];
    float c[4], d[4];
};

template <int kDtype>
void apply_mma(void* payloads[simt::kWarp]) {
    float a[16][16], b[16][8];
    for (int lane = 0; lane < simt::kWarp; ++lane) {
        const Mma& m = *(Mma*)payloads[lane];
        int g = lane / 4, t = lane % 4;
        for (int half = 0; half < 2; ++half) {
            for (int i = 0; i < 4; ++i) {
                uint16_t h = (uint16_t)(m.a[i] >> 16 * half);
                a[g + 8 * (i % 2)][2 * t + 8 * (i / 2) + half] =
                    kDtype == kBF16 ? bf16_to_float(h) : f16_to_float(h);
            }
            for (int i = 0; i < 2; ++i) {
                uint16_t h = (uint16_t)(m.b[i] >> 16 * half);
                b[2 * t + 8 * i + half][g] = kDtype == kBF16 ? bf16_to_float(h) : f16_to_float(h);
            }
        }
    }
    for (int lane = 0; lane < simt::kWarp; ++lane) {
        Mma& m = *(Mma*)payloads[lane];
        for (int i = 0; i < 4; ++i) {
            int row = lane / 4 + 8 * (i / 2), column = 2 * (lane % 4) + i % 2;
            float sum = m.c[i];
            for (int k = 0; k < 16; ++k)
                sum += a[row][k] * b[k][column];
            m.d[i] = sum;
        }
    }
}

// `c` may be null: zeros.
template <int kDtype>
void mma_m16n8k16(float d[4], const uint32_t a[4], uint32_t b0, uint32_t b1, const float* c,
                  PK_SITE) {
    Mma m = {{a[0], a[1], a[2], a[3]}, {b0, b1}, {}, {}};
    for (int i = 0; i < 4; ++i)
        m.c[i] = c == nullptr ? 0.0f : c[i];
    simt::collective("mma", apply_mma<kDtype>, &m, 0xffffffffu, {file, line});
    for (int i = 0; i < 4; ++i)
        d[i] = m.d[i];
}

} // namespace pk

#undef PK_SITE
