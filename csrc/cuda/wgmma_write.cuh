// What becomes of linear_wgmma.cu's sums: rows of the output, or parts that a second kernel adds.
#pragma once

#include "epilogue.cuh"
#include "wgmma_steps.cuh"

namespace pk {
namespace {

// The four lanes of a quad hold two neighbours each of the octets 0..3; afterwards lane t of the
// quad holds octet t as a whole.
__device__ __forceinline__ void gather_octets(uint32_t pairs[4], int t) {
    uint32_t mine[4];
#pragma unroll
    for (int d = 0; d < 4; ++d) {
        // To the lane d away goes its octet, from there comes a pair of ours.
        int other = t ^ d;
        uint32_t send = other == 0   ? pairs[0]
                        : other == 1 ? pairs[1]
                        : other == 2 ? pairs[2]
                                     : pairs[3];
        mine[d] = __shfl_xor_sync(0xffffffffu, send, d);
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) {
        int from = t ^ j; // pair j came from lane j, in the exchange over the distance t ^ j
        pairs[j] = from == 0 ? mine[0] : from == 1 ? mine[1] : from == 2 ? mine[2] : mine[3];
    }
}

// Writes 16 rows, from `first` on, x 128 outputs of one warp: row first + g + 8 h, output 8 j + 2 t
// + i is element 4 j + 2 h + i.
template <int kDtype>
__device__ __forceinline__ void write_rows(const Args& a, const Tile& tile, int first,
                                           float (&acc)[64], int lane) {
    int g = lane / 4, t = lane % 4;
    int left = a.outputs - tile.n; // outputs that there are
    if (a.workspace != nullptr) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            int m = first + g + 8 * h;
            if (m >= a.m)
                continue;
            float* p = a.workspace + (tile.part * (int64_t)a.m + m) * a.outputs + tile.n + 2 * t;
#pragma unroll
            for (int j = 0; j < 16; ++j)
                if (8 * j < left)
                    *(float2*)(p + 8 * j) = float2{acc[4 * j + 2 * h], acc[4 * j + 2 * h + 1]};
        }
        return;
    }
    if (a.accumulate) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            int m = first + g + 8 * h;
            if (m >= a.m)
                continue;
            const uint16_t* p = (const uint16_t*)a.out + m * (int64_t)a.outputs + tile.n + 2 * t;
#pragma unroll
            for (int j = 0; j < 16; ++j)
                if (8 * j < left) {
                    acc[4 * j + 2 * h] += load_as_float(p, kDtype, 8 * j);
                    acc[4 * j + 2 * h + 1] += load_as_float(p, kDtype, 8 * j + 1);
                }
        }
        __syncwarp(); // other lanes write what this one has read
    }
    if (a.bias != nullptr) {
        const uint16_t* p = (const uint16_t*)a.bias + tile.n + 2 * t;
#pragma unroll
        for (int j = 0; j < 16; ++j)
            if (8 * j < left) {
                float low = load_as_float(p, kDtype, 8 * j);
                float high = load_as_float(p, kDtype, 8 * j + 1);
                acc[4 * j] += low, acc[4 * j + 2] += low;
                acc[4 * j + 1] += high, acc[4 * j + 3] += high;
            }
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        int m = first + g + 8 * h;
        uint16_t* p = (uint16_t*)a.out + m * (int64_t)a.outputs + tile.n + 8 * t;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            uint32_t octet[4];
#pragma unroll
            for (int i = 0; i < 4; ++i)
                octet[i] =
                    pack2<kDtype>(acc[16 * j + 4 * i + 2 * h], acc[16 * j + 4 * i + 2 * h + 1]);
            gather_octets(octet, t);
            if (m < a.m && 32 * j + 8 * t < left)
                *(uint4*)(p + 32 * j) = uint4{octet[0], octet[1], octet[2], octet[3]};
        }
    }
}

// Adds the parts of the depth in order: four outputs a thread, of every gridDim.y-th row.
template <int kDtype>
__global__ void __launch_bounds__(256)
    add_wgmma_parts_kernel(const float* workspace, int parts, int64_t m, int64_t n,
                           const void* bias, bool accumulate, void* out) {
    int64_t column = 4 * (blockIdx.x * (int64_t)256 + threadIdx.x); // n is a multiple of 8
    if (column >= n)
        return;
    float start[4] = {};
    if (bias != nullptr)
        for (int j = 0; j < 4; ++j)
            start[j] = load_as_float(bias, kDtype, column + j);
    for (int64_t row = blockIdx.y; row < m; row += gridDim.y) {
        int64_t i = row * n + column;
        float4 sum = *(const float4*)(workspace + i);
        for (int p = 1; p < parts; ++p) {
            float4 v = *(const float4*)(workspace + p * m * n + i);
            sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
        }
        sum.x += start[0], sum.y += start[1], sum.z += start[2], sum.w += start[3];
        if (accumulate) {
            sum.x += load_as_float(out, kDtype, i);
            sum.y += load_as_float(out, kDtype, i + 1);
            sum.z += load_as_float(out, kDtype, i + 2);
            sum.w += load_as_float(out, kDtype, i + 3);
        }
        *(uint2*)((uint16_t*)out + i) =
            uint2{pack2<kDtype>(sum.x, sum.y), pack2<kDtype>(sum.z, sum.w)};
    }
}

} // namespace
} // namespace pk
