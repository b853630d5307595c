// Everything a kernel uses that is not C++: launches, shared memory, inline PTX. Built by the host
// compiler for the SIMT executor (PK_SIMT), the same names come from csrc/simt/device.h.
#pragma once

#include "launcher.cuh"

#if defined(PK_SIMT)

#include "../simt/device.h"

#else

#include <cuda_runtime.h>
#include <stdint.h>

#include "../common/convert.h"

#define PK_SHARED(type, name, count) __shared__ type name[count]
#define PK_DYNAMIC_SHARED(name) extern __shared__ __align__(128) unsigned char name[]

namespace pk {

// Statuses of the CUDA runtime are passed on above this number.
constexpr int kCudaStatus = 1000;

inline int device_error() {
    cudaError_t error = cudaGetLastError();
    return error == cudaSuccess ? 0 : kCudaStatus + (int)error;
}

template <class... P, class... A>
int launch(const char*, void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes,
           void* stream, A... args) {
    constexpr size_t kWithoutAsking = 48 * 1024;
    if (shared_bytes > kWithoutAsking) {
        cudaError_t error = cudaFuncSetAttribute(
            kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared_bytes);
        if (error != cudaSuccess) {
            (void)cudaGetLastError();
            return kCudaStatus + (int)error;
        }
    }
    kernel<<<grid, block, shared_bytes, (cudaStream_t)stream>>>(static_cast<P>(args)...);
    return device_error();
}

// Data that is read or written once passes the caches with the lowest priority.
template <class T>
__device__ __forceinline__ T load_once(const void* p) {
    return __ldcs((const T*)p);
}
template <class T>
__device__ __forceinline__ void store_once(void* p, T v) {
    __stcs((T*)p, v);
}

// Two floats rounded to nearest even, `low` in the lower half.
template <int kDtype>
__device__ __forceinline__ uint32_t pack2(float low, float high) {
    static_assert(kDtype == kBF16 || kDtype == kF16, "16-bit dtypes");
    uint32_t r;
    if (kDtype == kBF16)
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    else
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
}

// Within a unit or two in the last place, for arguments whose results are normal.
__device__ __forceinline__ float rsqrt_approximate(float x) {
    float r;
    asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
    return r;
}
__device__ __forceinline__ float reciprocal_approximate(float x) {
    float r;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
    return r;
}

// Byte i of the result is byte `selector >> 4 i & 7` of b:a (a holds bytes 0 to 3).
__device__ __forceinline__ uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t selector) {
    return __byte_perm(a, b, selector);
}

// Shared memory by 32-bit addresses: a table look-up is then a shift, a mask and a load. (Through
// pointers the compiler rewrites the mask into an index and pays one more instruction.)
using SharedAddress = uint32_t;

__device__ __forceinline__ SharedAddress shared_address(const void* p) {
    return (uint32_t)__cvta_generic_to_shared(p);
}
// Byte of an address within the block's shared memory.
__device__ __forceinline__ uint32_t shared_offset(const void* p) { return shared_address(p); }
// fp16 to fp32 in one instruction (convert.h does it in integers).
__device__ __forceinline__ float half_to_float(uint16_t h) {
    float r;
    asm("cvt.f32.f16 %0, %1;" : "=f"(r) : "h"(h));
    return r;
}
// Byte i of the result is the byte of (b, a) that nibble i of `select`, 0 to 7, picks.
__device__ __forceinline__ uint32_t byte_permute(uint32_t a, uint32_t b, uint32_t select) {
    uint32_t r;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(select));
    return r;
}
// 256 * (byte i of `word`) + low, for `low` below 256.
__device__ __forceinline__ uint32_t row_offset(uint32_t low, uint32_t word, int i) {
    return byte_permute(word, low, 0x7604u + 16u * (uint32_t)i);
}
// first + 256 * (byte i of `word`), for an address whose second byte is 0.
__device__ __forceinline__ SharedAddress shared_row(SharedAddress first, uint32_t word, int i) {
    return row_offset(first, word, i);
}
__device__ __forceinline__ uint32_t load_shared_word(SharedAddress a) {
    uint32_t r;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(r) : "r"(a));
    return r;
}
__device__ __forceinline__ float load_shared_float(SharedAddress a) {
    float r;
    asm volatile("ld.shared.f32 %0, [%1];" : "=f"(r) : "r"(a));
    return r;
}
__device__ __forceinline__ float2 load_shared_pair(SharedAddress a) {
    float2 r;
    asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(r.x), "=f"(r.y) : "r"(a));
    return r;
}

// 16 bytes to shared memory in the background; zeros where `fetch` is false.
__device__ __forceinline__ void cp_async16(void* shared, const void* global, bool fetch) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
                 "l"(global), "r"(fetch ? 16 : 0)
                 : "memory");
}
// The same of 4 bytes.
__device__ __forceinline__ void cp_async4(void* shared, const void* global, bool fetch) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(shared)),
                 "l"(global), "r"(fetch ? 4 : 0)
                 : "memory");
}
__device__ __forceinline__ void cp_async_commit() {
    asm volatile("cp.async.commit_group;" ::: "memory");
}
template <int kGroupsLeft>
__device__ __forceinline__ void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kGroupsLeft) : "memory");
}

__device__ __forceinline__ void ldmatrix_x4(uint32_t r[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}

// D = A B + C; `c` may be null: zeros. The layout of the fragments: csrc/simt/device.h.
template <int kDtype>
__device__ __forceinline__ void mma_m16n8k16(float d[4], const uint32_t a[4], uint32_t b0,
                                             uint32_t b1, const float* c) {
    float c0 = c ? c[0] : 0.0f, c1 = c ? c[1] : 0.0f, c2 = c ? c[2] : 0.0f, c3 = c ? c[3] : 0.0f;
    if (kDtype == kBF16)
        asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, "
            "{%4, %5, %6, %7}, {%8, %9}, {%10, %11, %12, %13};"
            : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(c0), "f"(c1),
              "f"(c2), "f"(c3));
    else
        asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, "
            "{%4, %5, %6, %7}, {%8, %9}, {%10, %11, %12, %13};"
            : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(c0), "f"(c1),
              "f"(c2), "f"(c3));
}

} // namespace pk

#endif
