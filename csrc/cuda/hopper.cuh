// Hopper (sm_90a): bulk tensor copies, transaction barriers, products of a warpgroup. Built by the
// host compiler for the SIMT executor the same names come from csrc/simt/hopper.h.
//
// A tile of a tensor map arrives in shared memory as rows of 32, 64 or 128 bytes whose 16-byte
// chunks are exchanged: chunk c of the row at byte r of the tile stands at chunk c ^ x, x being the
// bits of r from the seventh on, 1, 2 or 3 of them. The tile starts on 1024 bytes.
#pragma once

#include "primitives.cuh"

#if defined(PK_SIMT)

#include "../simt/hopper.h"
#define PK_HOPPER 1

#else

#include <cuda.h>

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define PK_HOPPER 1 // kernels keep their bodies for it: other targets know none of this
#endif

namespace pk {

using TensorMap = CUtensorMap;

// The map of a matrix [rows, cols] with rows `pitch` bytes apart, for boxes [box_rows, box_bytes]
// (32, 64 or 128 bytes); what lies outside the matrix arrives as zeros. Base and pitch are
// multiples of 16 bytes.
inline int make_tensor_map(TensorMap* map, const void* base, int element_bytes, int64_t rows,
                           int64_t cols, int64_t pitch, int box_rows, int box_bytes) {
    using Encode =
        CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                     const cuuint64_t*, const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave,
                     CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);
    static const Encode encode = [] {
        void* found = nullptr;
        cudaDriverEntryPointQueryResult result;
        cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found,
                                                             12000, cudaEnableDefault, &result);
        return error == cudaSuccess && result == cudaDriverEntryPointSuccess ? (Encode)found
                                                                             : nullptr;
    }();
    if (encode == nullptr)
        return kCudaStatus + (int)cudaErrorCallRequiresNewerDriver;
    const cuuint64_t size[2] = {(cuuint64_t)cols, (cuuint64_t)rows};
    const cuuint64_t stride[1] = {(cuuint64_t)pitch};
    const cuuint32_t box[2] = {(cuuint32_t)(box_bytes / element_bytes), (cuuint32_t)box_rows};
    const cuuint32_t step[2] = {1, 1};
    CUresult error = encode(
        map, element_bytes == 1 ? CU_TENSOR_MAP_DATA_TYPE_UINT8 : CU_TENSOR_MAP_DATA_TYPE_UINT16, 2,
        const_cast<void*>(base), size, stride, box, step, CU_TENSOR_MAP_INTERLEAVE_NONE,
        box_bytes == 128  ? CU_TENSOR_MAP_SWIZZLE_128B
        : box_bytes == 64 ? CU_TENSOR_MAP_SWIZZLE_64B
                          : CU_TENSOR_MAP_SWIZZLE_32B,
        CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    return error == CUDA_SUCCESS ? kOk : kCudaStatus + (int)cudaErrorInvalidValue;
}

// --- transaction barriers -----------------------------------------------------------------------
// A phase ends when `count` threads have arrived and all bytes that were expected have come.
__device__ __forceinline__ void barrier_init(uint64_t* barrier, int count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
                 "r"(count)
                 : "memory");
}
// Makes initialised barriers known to the copy engine; a __syncthreads follows.
__device__ __forceinline__ void barrier_init_done() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ __forceinline__ void barrier_arrive(uint64_t* barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier))
                 : "memory");
}
__device__ __forceinline__ void barrier_arrive_expect(uint64_t* barrier, int bytes) {
    asm volatile(
        "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
        "r"(bytes)
        : "memory");
}
// Waits until the phase of this parity has ended; a fresh barrier counts as past parity 1.
__device__ __forceinline__ void barrier_wait(uint64_t* barrier, uint32_t parity) {
    uint32_t done;
    do {
        asm volatile("{\n.reg .pred p;\n"
                     "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
                     "selp.u32 %0, 1, 0, p;\n}"
                     : "=r"(done)
                     : "r"(shared_address(barrier)), "r"(parity)
                     : "memory");
    } while (done == 0);
}

// --- bulk tensor copies
// --------------------------------------------------------------------------- The box whose first
// element is (row, col), to shared memory; its bytes count on `barrier`.
__device__ __forceinline__ void copy_box(void* shared, const TensorMap* map, int64_t row,
                                         int64_t col, uint64_t* barrier) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
                 "[%0], [%1, {%2, %3}], [%4];" ::"r"(shared_address(shared)),
                 "l"(map), "r"((int)col), "r"((int)row), "r"(shared_address(barrier))
                 : "memory");
}
__device__ __forceinline__ void prefetch_map(const TensorMap* map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}
// Between this thread's stores to shared memory and products or copies that read them.
__device__ __forceinline__ void fence_async() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// --- products of a warpgroup: D [64, 128] (+)= A [64, 16] B [16, 128], operands in shared memory
// -- An operand of 128-byte rows. Along the depth (kAcross false) a row is one of A's or of B^T's
// and holds 64 of the depth; across it (kAcross true) a row is one of the depth and holds 64
// columns, the next 64 of which lie `next` bytes further.
template <bool kAcross>
__device__ __forceinline__ uint64_t operand_at(const void* tile, int next) {
    constexpr uint64_t kEightRows = 8 * 128;
    uint64_t leading = kAcross ? (uint64_t)next >> 4 : 1;
    return ((uint64_t)(shared_address(tile) & 0x3ffff) >> 4) | leading << 16 |
           (kEightRows >> 4) << 32 | (uint64_t)1 << 62;
}
__device__ __forceinline__ void product_begin() {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void product_commit() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int kGroupsLeft>
__device__ __forceinline__ void product_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kGroupsLeft) : "memory");
}
// Keeps the compiler from moving accumulators across the waits.
__device__ __forceinline__ void product_touch(float (&d)[64]) {
#pragma unroll
    for (int i = 0; i < 64; ++i)
        asm volatile("" : "+f"(d[i])::"memory");
}

#define PK_WGMMA(types, across)                                                                    \
    asm volatile(                                                                                  \
        "{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"                                               \
        "wgmma.mma_async.sync.aligned.m64n128k16.f32." types " {"                                  \
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                   \
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "         \
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "         \
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"           \
        "}, %64, %65, p, 1, 1, 0, " across ";\n}"                                                  \
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]),      \
          "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]),  \
          "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]),            \
          "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]),            \
          "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]),            \
          "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]),            \
          "+f"(d[38]), "+f"(d[39]), "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43]),            \
          "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]), "+f"(d[48]), "+f"(d[49]),            \
          "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]),            \
          "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]),            \
          "+f"(d[62]), "+f"(d[63])                                                                 \
        : "l"(a), "l"(b), "r"((int)add))

// D += A B, or D = A B where `add` is false. Row 16 w + g + 8 h of D, column 8 j + 2 t + i, is
// element 4 j + 2 h + i of lane 4 g + t of the warpgroup's warp w.
template <int kDtype, bool kAcross>
__device__ __forceinline__ void product(float (&d)[64], uint64_t a, uint64_t b, bool add) {
    if (kDtype == kBF16 && kAcross)
        PK_WGMMA("bf16.bf16", "1");
    else if (kDtype == kBF16)
        PK_WGMMA("bf16.bf16", "0");
    else if (kAcross)
        PK_WGMMA("f16.f16", "1");
    else
        PK_WGMMA("f16.f16", "0");
}
#undef PK_WGMMA

// Registers move from warpgroups that copy to those that multiply.
template <int kRegisters>
__device__ __forceinline__ void more_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void fewer_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

} // namespace pk

#endif
