// Row-wise INT8 codes to floats and back.

#include "../common/block_codec.h"
#include "primitives.cuh"

namespace pk {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMaxBlocks = 1056; // 8 blocks on each of 132 multiprocessors, then loop
constexpr int kSegment = 2048;       // elements of a row that a block takes at a time

// (code * row absmax) * (1/127), each product rounded, then one rounding to the output.
template <int kDtype>
__global__ void __launch_bounds__(kThreads)
    dequantize_8bit_kernel(const int8_t* codes, const float* scb, int64_t rows, int64_t cols,
                           bool aligned, void* out) {
    int64_t segments = ceil_div(cols, kSegment);
    for (int64_t item = blockIdx.x; item < rows * segments; item += gridDim.x) {
        int64_t row = item / segments;
        int64_t first = (item - row * segments) * kSegment;
        int n = (int)min64(kSegment, cols - first);
        float scale = scb[row];
        int64_t start = row * cols + first;
        int own = (int)threadIdx.x * 8;
        if (aligned && own + 8 <= n) {
            uint2 w = load_once<uint2>(codes + start + own);
            float v[8];
#pragma unroll
            for (int j = 0; j < 8; ++j)
                v[j] = ((float)(int8_t)((j < 4 ? w.x : w.y) >> 8 * (j % 4)) * scale) * kInt8Step;
            if (kDtype == kF32) {
                float* p = (float*)out + start + own;
                store_once(p, float4{v[0], v[1], v[2], v[3]});
                store_once(p + 4, float4{v[4], v[5], v[6], v[7]});
            } else {
                constexpr int kHalf = kDtype == kF32 ? kBF16 : kDtype;
                store_once((uint16_t*)out + start + own,
                           uint4{pack2<kHalf>(v[0], v[1]), pack2<kHalf>(v[2], v[3]),
                                 pack2<kHalf>(v[4], v[5]), pack2<kHalf>(v[6], v[7])});
            }
            continue;
        }
        for (int i = own; i < own + 8 && i < n; ++i)
            store_from_float(out, kDtype, start + i, ((float)codes[start + i] * scale) * kInt8Step);
    }
}

// A block takes a row: the largest magnitude, then the codes from a second, cached, reading.
template <int kDtype>
__global__ void __launch_bounds__(kThreads)
    quantize_8bit_kernel(const void* x, int64_t rows, int64_t cols, int8_t* codes, float* scb,
                         unsigned long long* first_bad) {
    PK_SHARED(uint32_t, warp_bits, kThreads / 32);
    int tid = (int)threadIdx.x;
    for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
        uint32_t bits = 0;
        for (int64_t i = tid; i < cols; i += kThreads) {
            uint32_t b = float_bits(load_as_float(x, kDtype, row * cols + i)) & 0x7fffffffu;
            bits = b > bits ? b : bits;
        }
        for (int d = 16; d > 0; d >>= 1) {
            uint32_t other = __shfl_xor_sync(0xffffffffu, bits, d);
            bits = other > bits ? other : bits;
        }
        if (tid % 32 == 0)
            warp_bits[tid / 32] = bits;
        __syncthreads();
        for (int i = 0; i < kThreads / 32; ++i)
            bits = warp_bits[i] > bits ? warp_bits[i] : bits;
        __syncthreads(); // the next row writes warp_bits again
        float absmax = bits_float(bits);
        if (tid == 0) {
            scb[row] = absmax;
            if (!is_finite(absmax))
                atomicMin(first_bad, (unsigned long long)row);
        }
        BlockScale scale = block_scale(absmax);
        float factor = scale.inverse * 127.0f; // two roundings, as torch's 127 / absmax
        for (int64_t i = tid; i < cols; i += kThreads) {
            float v = (load_as_float(x, kDtype, row * cols + i) * scale.lift) * factor;
            v = v != v ? 0.0f : v;
            v = v > 127.0f ? 127.0f : (v < -127.0f ? -127.0f : v);
            codes[row * cols + i] = (int8_t)rintf(v);
        }
    }
}

} // namespace
} // namespace pk

extern "C" {

int pk_cuda_dequantize_8bit(const int8_t* codes, const float* scb, int64_t rows, int64_t cols,
                            int dtype, void* out, void* stream) {
    if (rows == 0 || cols == 0)
        return pk::kOk;
    bool aligned = (uintptr_t)codes % 8 == 0 && (uintptr_t)out % 16 == 0 && cols % 8 == 0;
    unsigned blocks = (unsigned)pk::min64(rows * pk::ceil_div(cols, pk::kSegment), pk::kMaxBlocks);
    auto kernel = dtype == pk::kF32    ? pk::dequantize_8bit_kernel<pk::kF32>
                  : dtype == pk::kBF16 ? pk::dequantize_8bit_kernel<pk::kBF16>
                                       : pk::dequantize_8bit_kernel<pk::kF16>;
    return pk::launch("dequantize_8bit", kernel, blocks, pk::kThreads, 0, stream, codes, scb, rows,
                      cols, aligned, out);
}
PK_LAUNCHER(dequantize_8bit)

// *first_bad (device memory, set to all ones by the caller) becomes the first non-finite row.
int pk_cuda_quantize_8bit(const void* x, int dtype, int64_t rows, int64_t cols, int8_t* codes,
                          float* scb, unsigned long long* first_bad, void* stream) {
    if (rows == 0)
        return pk::kOk;
    unsigned blocks = (unsigned)pk::min64(rows, 8 * pk::kMaxBlocks);
    auto kernel = dtype == pk::kF32    ? pk::quantize_8bit_kernel<pk::kF32>
                  : dtype == pk::kBF16 ? pk::quantize_8bit_kernel<pk::kBF16>
                                       : pk::quantize_8bit_kernel<pk::kF16>;
    return pk::launch("quantize_8bit", kernel, blocks, pk::kThreads, 0, stream, x, rows, cols,
                      codes, scb, first_bad);
}
PK_LAUNCHER(quantize_8bit)
}
