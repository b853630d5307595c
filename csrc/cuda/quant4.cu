// 4-bit codes to floats and back, and the double quantization of their statistics.

#include "scales.cuh"

namespace pk {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int64_t kMaxBlocks = 1056; // 8 blocks on each of 132 multiprocessors, then loop

// --- dequantize: fp32 code * fp32 absmax, rounded once ------------------------------------------
// Traffic: 1/2 byte read and 2 or 4 written an element. A thread takes words of 16 bytes of output;
// a code is looked up in a table that each lane has for itself ([code][lane], no bank conflicts).
// What the next tile needs is on its way while this one is computed, and the first tile's before
// the table is made.

template <int kDtype>
constexpr int kChunk = kDtype == kF32 ? 4 : 8; // elements of one 16-byte store
constexpr int kChunks = 4;                     // such stores of a thread in a tile
constexpr int kTableRow = 64;                  // floats; lanes fill half of them
template <int kDtype>
constexpr int kTile = kThreads * kChunk<kDtype> * kChunks; // multiple of a block's size

constexpr int kLeastBlock = 32; // weights that share a statistic, at least

// Stored values of a thread's share of a tile.
template <bool kNested>
struct Loaded {
    uint32_t words[kChunks];
    uint32_t codes[kNested ? kChunks : 1]; // of nested statistics
    float scales[kNested ? 1 : kChunks];   // or the absmax of those, one for the whole tile

    // `blocks`: of the chunks, counted from the tile's first block.
    template <int kDtype>
    __device__ __forceinline__ void load(const uint8_t* packed, const Scales& s, int block_shift,
                                         int64_t tile, int tid, const uint32_t (&blocks)[kChunks]) {
        static_assert(kTile<kDtype> / kLeastBlock <= kNestedBlock,
                      "a tile's blocks are in one block of the statistics");
        int64_t start = tile * kTile<kDtype>;
        int64_t first_block = start >> block_shift;
        Scales near = scales_from(s, first_block, kNested);
        const uint8_t* p = packed + (start >> 1) + tid * (kChunk<kDtype> / 2);
        if (kNested)
            scales[0] = *near.nested_absmax;
#pragma unroll
        for (int c = 0; c < kChunks; ++c) {
            const uint8_t* from = p + c * (kThreads * kChunk<kDtype> / 2);
            words[c] = kDtype == kF32 ? load_once<uint16_t>(from) : load_once<uint32_t>(from);
            if (kNested)
                codes[kNested ? c : 0] = ((const uint8_t*)near.absmax)[blocks[c]];
            else
                scales[kNested ? 0 : c] = ((const float*)near.absmax)[blocks[c]];
        }
    }
};

// The chunk's elements, rounded, to memory.
template <int kDtype>
__device__ __forceinline__ void store_chunk(void* out, SharedAddress table, uint32_t lane4,
                                            uint32_t w, float s) {
    float v[kChunk<kDtype>];
    uint32_t high = w >> 4 & 0x0f0f0f0fu, low = w & 0x0f0f0f0fu; // the high nibble comes first
#pragma unroll
    for (int i = 0; i < kChunk<kDtype>; ++i)
        v[i] = load_shared_float(table + row_offset(lane4, i % 2 == 0 ? high : low, i / 2)) * s;
    uint32_t r[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        constexpr int kHalf = kDtype == kF32 ? kBF16 : kDtype;
        if (kDtype == kF32)
            r[i] = float_bits(v[i]);
        else
            r[i] = pack2<kHalf>(v[2 * i % kChunk<kDtype>], v[(2 * i + 1) % kChunk<kDtype>]);
    }
    store_once(out, uint4{r[0], r[1], r[2], r[3]});
}

template <int kDtype, bool kNested>
__global__ void __launch_bounds__(kThreads, 4)
    dequantize_4bit_kernel(const uint8_t* packed, Scales scales, int quant_type, int block_shift,
                           int64_t numel, bool aligned, void* out) {
    PK_SHARED(float, values, 16 * kTableRow);
    PK_SHARED(float, map, 256);
    int tid = (int)threadIdx.x;
    uint32_t blocks[kChunks];
#pragma unroll
    for (int c = 0; c < kChunks; ++c)
        blocks[c] = (uint32_t)(c * kThreads + tid) * kChunk<kDtype> >> block_shift;
    int64_t tiles = aligned ? numel / kTile<kDtype> : 0, tile = blockIdx.x;
    Loaded<kNested> now, next;
    if (tile < tiles)
        now.template load<kDtype>(packed, scales, block_shift, tile, tid, blocks);
    float offset = kNested ? *scales.nested_offset : 0.0f;
    for (int i = tid; i < 16 * 32; i += kThreads)
        values[i / 32 * kTableRow + i % 32] = codebook(quant_type)[i / 32];
    if (kNested)
        load_dynamic_map(map);
    __syncthreads();

    SharedAddress table = shared_address(values);
    uint32_t lane4 = 4u * (uint32_t)(tid % 32);
    for (; tile < tiles; tile += gridDim.x) {
        if (tile + gridDim.x < tiles)
            next.template load<kDtype>(packed, scales, block_shift, tile + gridDim.x, tid, blocks);
        char* target =
            (char*)out + (tile * kTile<kDtype> + tid * kChunk<kDtype>)*dtype_size(kDtype);
#pragma unroll
        for (int c = 0; c < kChunks; ++c) {
            float s = now.scales[kNested ? 0 : c];
            if (kNested)
                s = nested_sum(map[now.codes[kNested ? c : 0]], s, offset);
            store_chunk<kDtype>(target + c * kThreads * 16, table, lane4, now.words[c], s);
        }
        now = next;
    }

    // What does not fill a tile, and everything where addresses are not aligned: byte by byte.
    int64_t rest = tiles * kTile<kDtype>;
    for (int64_t i = rest + 2 * (blockIdx.x * (int64_t)kThreads + tid); i < numel;
         i += 2 * (int64_t)kThreads * gridDim.x) {
        uint32_t byte = packed[i >> 1];
        float s = scale_of<kNested>(scales, map, offset, i >> block_shift);
        store_from_float(out, kDtype, i, values[(byte >> 4) * kTableRow] * s);
        if (i + 1 < numel)
            store_from_float(out, kDtype, i + 1, values[(byte & 15) * kTableRow] * s);
    }
}

template <int kDtype>
int dequantize_4bit(const uint8_t* packed, Scales scales, int quant_type, int block_shift,
                    int64_t numel, void* out, void* stream) {
    bool aligned = (uintptr_t)packed % 4 == 0 && (uintptr_t)out % 16 == 0;
    unsigned blocks = (unsigned)min64(ceil_div(numel, kTile<kDtype>), kMaxBlocks / 2);
    auto kernel = scales.nested_absmax ? dequantize_4bit_kernel<kDtype, true>
                                       : dequantize_4bit_kernel<kDtype, false>;
    return launch("dequantize_4bit", kernel, blocks, kThreads, 0, stream, packed, scales,
                  quant_type, block_shift, numel, aligned, out);
}

// --- quantize -----------------------------------------------------------------------------------
// A warp takes a block (several, if they are shorter than 256): 8 neighbouring elements a lane, the
// largest magnitude by shuffles, then the codes. Longer blocks are read a second time, from cache.

template <int kDtype>
__device__ __forceinline__ void load_eight(const void* x, int64_t i, int64_t numel, bool aligned,
                                           float v[8]) {
    if (aligned && i + 8 <= numel) {
        if (kDtype == kF32) {
            const float4* p = (const float4*)((const float*)x + i);
            float4 a = p[0], b = p[1];
            v[0] = a.x, v[1] = a.y, v[2] = a.z, v[3] = a.w;
            v[4] = b.x, v[5] = b.y, v[6] = b.z, v[7] = b.w;
        } else {
            uint4 a = *(const uint4*)((const uint16_t*)x + i);
            const uint32_t w[4] = {a.x, a.y, a.z, a.w};
            for (int j = 0; j < 8; ++j) {
                uint16_t h = (uint16_t)(w[j / 2] >> 16 * (j % 2));
                v[j] = kDtype == kBF16 ? bf16_to_float(h) : half_to_float(h);
            }
        }
        return;
    }
    for (int j = 0; j < 8; ++j)
        v[j] = i + j < numel ? load_as_float(x, kDtype, i + j) : 0.0f;
}

__device__ __forceinline__ uint32_t largest_magnitude(const float v[8], uint32_t bits) {
    for (int j = 0; j < 8; ++j) {
        uint32_t b = float_bits(v[j]) & 0x7fffffffu; // NaN is larger than Inf this way
        bits = b > bits ? b : bits;
    }
    return bits;
}

__device__ __forceinline__ uint32_t warp_max(uint32_t bits, int lanes) {
    for (int d = 1; d < lanes; d <<= 1) {
        uint32_t other = __shfl_xor_sync(0xffffffffu, bits, d);
        bits = other > bits ? other : bits;
    }
    return bits;
}

template <int kDtype>
__global__ void __launch_bounds__(kThreads)
    quantize_4bit_kernel(const void* x, int64_t numel, int quant_type, int block_shift,
                         bool aligned, uint8_t* packed, float* absmax,
                         unsigned long long* first_bad) {
    PK_SHARED(float, thresholds, 16);
    PK_SHARED(uint8_t, order, 8);
    int tid = (int)threadIdx.x, lane = tid % 32;
    if (tid < (quant_type == kNF4 ? 15 : 7))
        thresholds[tid] = quant_type == kNF4 ? kNF4Thresholds[tid] : kFP4Thresholds[tid % 7];
    if (tid < 8)
        order[tid] = kFP4Order[tid];
    __syncthreads();
    int64_t blocksize = (int64_t)1 << block_shift;
    int lanes = (int)min64(32, blocksize / 8);
    int64_t unit = blocksize < 256 ? 256 : blocksize;

    for (int64_t start = (blockIdx.x * (int64_t)kWarps + tid / 32) * unit; start < numel;
         start += gridDim.x * kWarps * unit) {
        float v[8];
        uint32_t bits = 0;
        for (int64_t i = start; i < start + unit; i += 256) {
            load_eight<kDtype>(x, i + lane * 8, numel, aligned, v);
            bits = largest_magnitude(v, bits);
        }
        float largest = bits_float(warp_max(bits, lanes));
        int64_t own = start + lane * 8, block = own >> block_shift;
        if (lane % lanes == 0 && own < numel) {
            absmax[block] = largest;
            if (!is_finite(largest))
                atomicMin(first_bad, (unsigned long long)block);
        }
        BlockScale scale = block_scale(largest);
        for (int64_t i = own; i < start + unit; i += 256) {
            if (unit > 256)
                load_eight<kDtype>(x, i, numel, aligned, v);
            uint32_t word = 0;
            for (int j = 0; j < 8; ++j) {
                float t = (v[j] * scale.lift) * scale.inverse;
                uint32_t code = i + j < numel ? code_4bit(thresholds, order, quant_type, t)
                                              : (uint32_t)zero_code(quant_type);
                word |= code << (8 * (j / 2) + (j % 2 == 0 ? 4 : 0));
            }
            if (aligned && i + 8 <= numel)
                *(uint32_t*)(packed + i / 2) = word;
            else
                for (int j = 0; j < 4 && i + 2 * j < numel; ++j)
                    packed[i / 2 + j] = (uint8_t)(word >> 8 * j);
        }
    }
}

template <int kDtype>
int quantize_4bit(const void* x, int64_t numel, int quant_type, int block_shift, uint8_t* packed,
                  float* absmax, unsigned long long* first_bad, void* stream) {
    bool aligned = (uintptr_t)x % 16 == 0 && (uintptr_t)packed % 4 == 0;
    int64_t unit = block_shift < 8 ? 256 : (int64_t)1 << block_shift;
    unsigned blocks = (unsigned)min64(ceil_div(numel, unit * kWarps), 4 * kMaxBlocks);
    return launch("quantize_4bit", quantize_4bit_kernel<kDtype>, blocks, kThreads, 0, stream, x,
                  numel, quant_type, block_shift, aligned, packed, absmax, first_bad);
}

// --- nested statistics --------------------------------------------------------------------------
// A warp takes 256 statistics; the mean, which is subtracted, comes from the caller.
__global__ void __launch_bounds__(kThreads)
    quantize_absmax_kernel(const float* absmax, int64_t numel, const float* offset, uint8_t* codes,
                           float* nested_absmax) {
    PK_SHARED(float, thresholds, 255);
    int tid = (int)threadIdx.x, lane = tid % 32;
    if (tid < 255)
        thresholds[tid] = kDynamicThresholds[tid];
    __syncthreads();
    for (int64_t block = blockIdx.x * (int64_t)kWarps + tid / 32; block * kNestedBlock < numel;
         block += gridDim.x * kWarps) {
        float v[8];
        for (int j = 0; j < 8; ++j) {
            int64_t i = block * kNestedBlock + 32 * j + lane;
            v[j] = i < numel ? absmax[i] - *offset : 0.0f;
        }
        float largest = bits_float(warp_max(largest_magnitude(v, 0), 32));
        if (lane == 0)
            nested_absmax[block] = largest;
        BlockScale scale = block_scale(largest);
        for (int j = 0; j < 8; ++j) {
            int64_t i = block * kNestedBlock + 32 * j + lane;
            if (i < numel)
                codes[i] = (uint8_t)passed<128>(thresholds, (v[j] * scale.lift) * scale.inverse);
        }
    }
}

__global__ void __launch_bounds__(kThreads)
    dequantize_absmax_kernel(Scales scales, int64_t numel, float* out) {
    PK_SHARED(float, map, 256);
    load_dynamic_map(map);
    __syncthreads();
    float offset = *scales.nested_offset;
    for (int64_t i = blockIdx.x * (int64_t)kThreads + threadIdx.x; i < numel;
         i += gridDim.x * (int64_t)kThreads)
        out[i] = scale_of<true>(scales, map, offset, i);
}

} // namespace
} // namespace pk

extern "C" {

int pk_cuda_dequantize_4bit(const uint8_t* packed, const void* absmax, const float* nested_absmax,
                            const float* nested_offset, int quant_type, int block_shift,
                            int64_t numel, int dtype, void* out, void* stream) {
    if (numel == 0)
        return pk::kOk;
    pk::Scales s = {absmax, nested_absmax, nested_offset};
    switch (dtype) {
    case pk::kF32:
        return pk::dequantize_4bit<pk::kF32>(packed, s, quant_type, block_shift, numel, out,
                                             stream);
    case pk::kBF16:
        return pk::dequantize_4bit<pk::kBF16>(packed, s, quant_type, block_shift, numel, out,
                                              stream);
    case pk::kF16:
        return pk::dequantize_4bit<pk::kF16>(packed, s, quant_type, block_shift, numel, out,
                                             stream);
    default:
        return pk::kBadArgument;
    }
}
PK_LAUNCHER(dequantize_4bit)

// *first_bad (device memory, set to all ones by the caller) becomes the first non-finite block.
int pk_cuda_quantize_4bit(const void* x, int dtype, int64_t numel, int quant_type, int block_shift,
                          uint8_t* packed, float* absmax, unsigned long long* first_bad,
                          void* stream) {
    if (numel == 0)
        return pk::kOk;
    switch (dtype) {
    case pk::kF32:
        return pk::quantize_4bit<pk::kF32>(x, numel, quant_type, block_shift, packed, absmax,
                                           first_bad, stream);
    case pk::kBF16:
        return pk::quantize_4bit<pk::kBF16>(x, numel, quant_type, block_shift, packed, absmax,
                                            first_bad, stream);
    case pk::kF16:
        return pk::quantize_4bit<pk::kF16>(x, numel, quant_type, block_shift, packed, absmax,
                                           first_bad, stream);
    default:
        return pk::kBadArgument;
    }
}
PK_LAUNCHER(quantize_4bit)

int pk_cuda_quantize_absmax(const float* absmax, int64_t numel, const float* offset, uint8_t* codes,
                            float* nested_absmax, void* stream) {
    if (numel == 0)
        return pk::kOk;
    int64_t blocks = pk::ceil_div(numel, pk::kNestedBlock * pk::kWarps);
    return pk::launch("quantize_absmax", pk::quantize_absmax_kernel,
                      (unsigned)pk::min64(blocks, pk::kMaxBlocks), pk::kThreads, 0, stream, absmax,
                      numel, offset, codes, nested_absmax);
}
PK_LAUNCHER(quantize_absmax)

int pk_cuda_dequantize_absmax(const uint8_t* codes, int64_t numel, const float* nested_absmax,
                              const float* nested_offset, float* out, void* stream) {
    if (numel == 0)
        return pk::kOk;
    int64_t blocks = pk::ceil_div(numel, pk::kThreads);
    pk::Scales s = {codes, nested_absmax, nested_offset};
    return pk::launch("dequantize_absmax", pk::dequantize_absmax_kernel,
                      (unsigned)pk::min64(blocks, pk::kMaxBlocks), pk::kThreads, 0, stream, s,
                      numel, out);
}
PK_LAUNCHER(dequantize_absmax)
}
