// y = x W^T for few rows of x, any shape and activation dtype: the GEMV path, W in 4 or 8 bits.
//
// A block takes kRows outputs; its warps share the depth in steps of 1024 (a lane takes 32
// neighbouring weights of each output, so x is loaded and widened once for kRows uses, and a scale
// is fetched once). 4-bit codes are looked up in a table that each lane has for itself:
// [code][lane], no bank conflicts. Sums are fp32, in an order that depends on the depth alone.

#include "epilogue.cuh"
#include "scales.cuh"

namespace pk {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / 32;
constexpr int kRows = 4;
constexpr int kVector = 32;         // weights of one output that a lane takes at a time
constexpr int kStep = 32 * kVector; // and its warp

enum Format : int { kPlain4 = 0, kNested4 = 1, kRowInt8 = 2 };

struct RowsArgs {
    const void* x; // [M, K]
    const void* weight;
    Scales scales; // kRowInt8: absmax is the row absmax [N]
    int quant_type;
    int block_shift;
    int64_t m, n, k;
    bool aligned; // rows of x and W can be read in vectors of 32 elements
    Epilogue epilogue;
};

__device__ __forceinline__ uint32_t word_of(const uint4& v, int i) {
    return i == 0 ? v.x : (i == 1 ? v.y : (i == 2 ? v.z : v.w));
}

template <int kDtype>
__device__ __forceinline__ void load_activations(const void* x, int64_t i, float v[8]) {
    if (kDtype == kF32) {
        const float4* p = (const float4*)((const float*)x + i);
        float4 a = p[0], b = p[1];
        v[0] = a.x, v[1] = a.y, v[2] = a.z, v[3] = a.w;
        v[4] = b.x, v[5] = b.y, v[6] = b.z, v[7] = b.w;
        return;
    }
    uint4 a = *(const uint4*)((const uint16_t*)x + i);
    const uint32_t w[4] = {a.x, a.y, a.z, a.w};
#pragma unroll
    for (int j = 0; j < 8; ++j) {
        uint16_t h = (uint16_t)(w[j / 2] >> 16 * (j % 2));
        v[j] = kDtype == kBF16 ? bf16_to_float(h) : half_to_float(h);
    }
}

template <int kDtype, int kFormat, int kM>
__device__ __forceinline__ void one_by_one(const RowsArgs& a, SharedAddress table, const float* map,
                                           float offset, int64_t first_m, int64_t first_n,
                                           float acc[kM][kRows]) {
    for (int64_t k = threadIdx.x; k < a.k; k += kThreads)
        for (int r = 0; r < kRows && first_n + r < a.n; ++r) {
            int64_t i = (first_n + r) * a.k + k;
            float w;
            if (kFormat == kRowInt8) {
                w = (float)((const int8_t*)a.weight)[i];
            } else {
                uint32_t byte = ((const uint8_t*)a.weight)[i >> 1];
                w = code_value(table, 4 * (threadIdx.x % 32), byte, (int)(i & 1)) *
                    scale_of<kFormat == kNested4>(a.scales, map, offset, i >> a.block_shift);
            }
            for (int m = 0; m < kM && first_m + m < a.m; ++m)
                acc[m][r] = fmaf(load_as_float(a.x, kDtype, (first_m + m) * a.k + k), w, acc[m][r]);
        }
}

template <int kDtype, int kFormat, int kM>
__global__ void __launch_bounds__(kThreads, 4) linear_rows_kernel(RowsArgs a) {
    constexpr bool kNested = kFormat == kNested4;
    PK_SHARED(float, values, 16 * 32);
    PK_SHARED(float, map, 256);
    PK_SHARED(float, partial, kWarps * kM * kRows);
    int tid = (int)threadIdx.x, lane = tid % 32, warp = tid / 32;
    if (kFormat != kRowInt8)
        for (int i = tid; i < 16 * 32; i += kThreads)
            values[i] = codebook(a.quant_type)[i / 32];
    if (kNested)
        load_dynamic_map(map);
    __syncthreads();
    float offset = kNested ? *a.scales.nested_offset : 0.0f;
    SharedAddress table = shared_address(values);
    uint32_t lane4 = 4u * (uint32_t)lane;
    int64_t first_n = blockIdx.x * (int64_t)kRows, first_m = blockIdx.y * (int64_t)kM;
    float acc[kM][kRows] = {};

    int64_t vectors = a.aligned ? a.k : 0;
    int64_t row[kRows]; // first weight of each output
#pragma unroll
    for (int r = 0; r < kRows; ++r)
        row[r] = min64(first_n + r, a.n - 1) * a.k;
    for (int64_t k = warp * kStep + lane * kVector; k < vectors; k += kWarps * kStep) {
        uint4 w[kRows][kFormat == kRowInt8 ? 2 : 1];
        float scale[kRows], part[kM][kRows] = {};
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
            int64_t i = row[r] + k;
            scale[r] = 1.0f;
            if (kFormat == kRowInt8) {
                w[r][0] = load_once<uint4>((const int8_t*)a.weight + i);
                w[r][kFormat == kRowInt8] = load_once<uint4>((const int8_t*)a.weight + i + 16);
            } else {
                w[r][0] = load_once<uint4>((const uint8_t*)a.weight + (i >> 1));
                scale[r] = scale_of<kNested>(a.scales, map, offset, i >> a.block_shift);
            }
        }
#pragma unroll
        for (int eight = 0; eight < kVector / 8; ++eight) {
            float x[kM][8];
#pragma unroll
            for (int m = 0; m < kM; ++m)
                load_activations<kDtype>(a.x, min64(first_m + m, a.m - 1) * a.k + k + 8 * eight,
                                         x[m]);
#pragma unroll
            for (int r = 0; r < kRows; ++r)
#pragma unroll
                for (int j = 0; j < 8; ++j) {
                    float v;
                    if (kFormat == kRowInt8) {
                        uint32_t word = word_of(w[r][eight / 2 % (kFormat == kRowInt8 ? 2 : 1)],
                                                2 * (eight % 2) + j / 4);
                        v = (float)(int8_t)(word >> 8 * (j % 4));
                    } else {
                        v = code_value(table, lane4, word_of(w[r][0], eight), j);
                    }
#pragma unroll
                    for (int m = 0; m < kM; ++m)
                        part[m][r] = fmaf(x[m][j], v, part[m][r]);
                }
        }
#pragma unroll
        for (int m = 0; m < kM; ++m)
#pragma unroll
            for (int r = 0; r < kRows; ++r)
                acc[m][r] = fmaf(part[m][r], scale[r], acc[m][r]);
    }
    if (!a.aligned)
        one_by_one<kDtype, kFormat, kM>(a, table, map, offset, first_m, first_n, acc);

#pragma unroll
    for (int i = 0; i < kM * kRows; ++i) {
        float v = acc[i / kRows][i % kRows];
        for (int d = 16; d > 0; d >>= 1)
            v += __shfl_xor_sync(0xffffffffu, v, d);
        if (lane == 0)
            partial[warp * kM * kRows + i] = v;
    }
    __syncthreads();
    int64_t m = first_m + tid / kRows, n = first_n + tid % kRows;
    if (tid < kM * kRows && m < a.m && n < a.n) {
        float sum = 0.0f;
        for (int w = 0; w < kWarps; ++w)
            sum += partial[w * kM * kRows + tid];
        if (kFormat == kRowInt8)
            sum *= ((const float*)a.scales.absmax)[n] * kInt8Step;
        finish(a.epilogue, sum, m, n, a.n);
    }
}

template <int kDtype, int kFormat>
int run(const RowsArgs& a, void* stream) {
    int per_block = a.m == 1 ? 1 : 4;
    auto kernel =
        a.m == 1 ? linear_rows_kernel<kDtype, kFormat, 1> : linear_rows_kernel<kDtype, kFormat, 4>;
    dim3 grid((unsigned)ceil_div(a.n, kRows), (unsigned)ceil_div(a.m, per_block));
    return launch("linear_rows", kernel, grid, kThreads, 0, stream, a);
}

template <int kFormat>
int run(const RowsArgs& a, void* stream) {
    switch (a.epilogue.dtype) {
    case kF32:
        return run<kF32, kFormat>(a, stream);
    case kBF16:
        return run<kBF16, kFormat>(a, stream);
    case kF16:
        return run<kF16, kFormat>(a, stream);
    default:
        return kBadArgument;
    }
}

} // namespace
} // namespace pk

extern "C" {

// A rank of 0 leaves the LoRA term out.
int pk_cuda_linear_rows_4bit(const void* x, int dtype, int64_t m, int64_t n, int64_t k,
                             const uint8_t* packed, const void* absmax, const float* nested_absmax,
                             const float* nested_offset, int quant_type, int block_shift,
                             const void* bias, const float* low, const void* up, int up_dtype,
                             int rank, float scaling, void* out, void* stream) {
    if (m == 0 || n == 0)
        return pk::kOk;
    pk::RowsArgs a = {};
    a.x = x;
    a.weight = packed;
    a.scales = {absmax, nested_absmax, nested_offset};
    a.quant_type = quant_type;
    a.block_shift = block_shift;
    a.m = m, a.n = n, a.k = k;
    a.aligned = k % 32 == 0 && (uintptr_t)x % 16 == 0 && (uintptr_t)packed % 16 == 0;
    a.epilogue = {out, dtype, bias, rank > 0 ? low : nullptr, up, up_dtype, rank, scaling};
    return nested_absmax != nullptr ? pk::run<pk::kNested4>(a, stream)
                                    : pk::run<pk::kPlain4>(a, stream);
}
PK_LAUNCHER(linear_rows_4bit)

int pk_cuda_linear_rows_8bit(const void* x, int dtype, int64_t m, int64_t n, int64_t k,
                             const int8_t* codes, const float* scb, const void* bias,
                             const float* low, const void* up, int up_dtype, int rank,
                             float scaling, void* out, void* stream) {
    if (m == 0 || n == 0)
        return pk::kOk;
    pk::RowsArgs a = {};
    a.x = x;
    a.weight = codes;
    a.scales.absmax = scb;
    a.m = m, a.n = n, a.k = k;
    a.aligned = k % 32 == 0 && (uintptr_t)x % 16 == 0 && (uintptr_t)codes % 16 == 0;
    a.epilogue = {out, dtype, bias, rank > 0 ? low : nullptr, up, up_dtype, rank, scaling};
    return pk::run<pk::kRowInt8>(a, stream);
}
PK_LAUNCHER(linear_rows_8bit)
}
