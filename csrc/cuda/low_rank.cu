// s = dropout(x) A^T in fp32 for few rows: the shrinking half of LoRA. The growing half is a term
// of the matmul's epilogue.

#include "../common/philox.h"
#include "epilogue.cuh"

namespace pk {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / 32;
constexpr int kRows = 4;  // of x in a block
constexpr int kRanks = 8; // rows of A in a block
constexpr int kRun = 4;   // neighbouring elements a thread takes

struct LowRankArgs {
    const void* x; // [M, K]
    const void* a; // [rank, K]
    int a_dtype;
    int64_t m, k;
    int rank;
    const int64_t* seed; // null: no dropout
    uint32_t threshold;
    float scale; // 1 / (1 - p)
    float* out;  // [M, rank]
};

template <int kDtype>
__global__ void __launch_bounds__(kThreads) low_rank_kernel(LowRankArgs p) {
    PK_SHARED(float, partial, kWarps * kRows * kRanks);
    int tid = (int)threadIdx.x, lane = tid % 32, warp = tid / 32;
    int64_t first_m = blockIdx.x * (int64_t)kRows;
    int first_r = (int)blockIdx.y * kRanks;
    uint64_t key = p.seed != nullptr ? (uint64_t)*p.seed : 0;
    float acc[kRows][kRanks] = {};
    for (int64_t start = (int64_t)tid * kRun; start < p.k; start += kThreads * kRun)
        for (int64_t k = start; k < start + kRun && k < p.k; ++k) {
            float a[kRanks];
#pragma unroll
            for (int r = 0; r < kRanks; ++r)
                a[r] = first_r + r < p.rank ? load_as_float(p.a, p.a_dtype, (first_r + r) * p.k + k)
                                            : 0.0f;
#pragma unroll
            for (int m = 0; m < kRows; ++m) {
                if (first_m + m >= p.m)
                    break;
                int64_t i = (first_m + m) * p.k + k;
                float x = load_as_float(p.x, kDtype, i);
                if (p.seed != nullptr) {
                    Philox4 random = philox(key, (uint64_t)i >> 2);
                    uint32_t low = (i & 1) != 0 ? random.w[1] : random.w[0];
                    uint32_t high = (i & 1) != 0 ? random.w[3] : random.w[2];
                    uint32_t word = (i & 2) != 0 ? high : low;
                    x = word >= p.threshold ? round_to(x * p.scale, kDtype) : 0.0f;
                }
#pragma unroll
                for (int r = 0; r < kRanks; ++r)
                    acc[m][r] = fmaf(x, a[r], acc[m][r]);
            }
        }
#pragma unroll
    for (int i = 0; i < kRows * kRanks; ++i) {
        float v = acc[i / kRanks][i % kRanks];
        for (int d = 16; d > 0; d >>= 1)
            v += __shfl_xor_sync(0xffffffffu, v, d);
        if (lane == 0)
            partial[warp * kRows * kRanks + i] = v;
    }
    __syncthreads();
    int64_t m = first_m + tid / kRanks;
    int r = first_r + tid % kRanks;
    if (tid < kRows * kRanks && m < p.m && r < p.rank) {
        float sum = 0.0f;
        for (int w = 0; w < kWarps; ++w)
            sum += partial[w * kRows * kRanks + tid];
        p.out[m * p.rank + r] = sum;
    }
}

} // namespace
} // namespace pk

// A null seed means no dropout.
extern "C" int pk_cuda_low_rank(const void* x, int dtype, int64_t m, int64_t k, const void* a,
                                int a_dtype, int rank, const int64_t* seed, uint32_t threshold,
                                float scale, float* out, void* stream) {
    if (m == 0 || rank == 0)
        return pk::kOk;
    pk::LowRankArgs p = {x, a, a_dtype, m, k, rank, seed, threshold, scale, out};
    auto kernel = dtype == pk::kF32    ? pk::low_rank_kernel<pk::kF32>
                  : dtype == pk::kBF16 ? pk::low_rank_kernel<pk::kBF16>
                                       : pk::low_rank_kernel<pk::kF16>;
    dim3 grid((unsigned)pk::ceil_div(m, pk::kRows), (unsigned)pk::ceil_div(rank, pk::kRanks));
    return pk::launch("low_rank", kernel, grid, pk::kThreads, 0, stream, p);
}
PK_LAUNCHER(low_rank)
