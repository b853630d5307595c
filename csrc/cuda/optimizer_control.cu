// Around the optimizers' pass: addresses and settings to the device, what each parameter's update
// needs, counts of steps and skips, and the norm of the gradients. Nothing waits for the host.

#include <math.h>

#include "optimizer.cuh"

extern "C" int pk_cuda_optimizer_step(const void* call, void* stream); // optimizer.cu

namespace pk {
namespace {

// Numbers that travel as arguments of a launch: no host memory has to outlive it, and a graph that
// captures it keeps them.
struct Words {
    static constexpr int kCount = 480;
    int64_t word[kCount];
};

__global__ void __launch_bounds__(256) optimizer_words_kernel(int64_t* to, int count, Words w) {
    for (int i = (int)threadIdx.x; i < count; i += 256)
        to[i] = w.word[i];
}

__global__ void __launch_bounds__(64) optimizer_prepare_kernel(StepCall c) {
    int64_t row = (int64_t)blockIdx.x * 64 + threadIdx.x;
    if (row < c.rows)
        prepare_row(c, row);
}

// Counts steps, and skips if there were any.
__global__ void __launch_bounds__(512) optimizer_finish_kernel(StepCall c) {
    PK_SHARED(unsigned long long, sum, 1);
    int tid = (int)threadIdx.x;
    if (tid == 0)
        *sum = 0;
    __syncthreads();
    unsigned long long own = 0;
    for (int64_t row = tid; row < c.rows; row += 512) {
        own += (unsigned long long)c.skipped[row];
        finish_row(c, row);
    }
    if (own != 0)
        atomicAdd(sum, own);
    __syncthreads();
    if (*sum == 0)
        return;
    for (int64_t i = tid; i < c.slots; i += 512)
        c.last[i] = 0;
    __syncthreads();
    for (int64_t row = tid; row < c.rows; row += 512)
        c.last[c.parameters[row].slot] = c.skipped[row];
    if (tid == 0) {
        c.totals[0] += 1;
        c.totals[1] += (int64_t)*sum;
        *c.flag = c.totals[1]; // in host memory
    }
}

// --- the norm of the gradients ------------------------------------------------------------------

template <int kDtype>
__device__ __forceinline__ double squares_of(const char* p, int end, int lane) {
    using Word = typename Four<kDtype>::Word;
    double sum = 0.0;
    for (int at = 4 * lane; at < end; at += 128) {
        float v[4];
        widen(load_once<Word>(p + at * (kDtype == kF32 ? 4 : 2)), v, kDtype);
#pragma unroll
        for (int j = 0; j < 4; ++j)
            sum = fma((double)v[j], (double)v[j], sum); // squares are exact in fp64
    }
    return sum;
}

__device__ __forceinline__ double warp_sum(double v) {
#pragma unroll
    for (int d = 16; d > 0; d >>= 1)
        v += __shfl_xor_sync(kWarp, v, d);
    return v;
}

// The sum of squares of each chunk, in an order that only the chunk's length decides.
__global__ void __launch_bounds__(256)
    optimizer_squares_kernel(const StateSegment* segments, const int32_t* owners, int64_t chunks,
                             const int64_t* grads, double* sums) {
    int lane = (int)threadIdx.x % 32;
    int64_t warps = (int64_t)gridDim.x * 8;
    for (int64_t chunk = (int64_t)blockIdx.x * 8 + threadIdx.x / 32; chunk < chunks;
         chunk += warps) {
        const StateSegment& s = segments[owners[chunk]];
        int64_t from = (chunk - s.chunk) * kChunk;
        const char* p = (const char*)grads[s.row] + (s.start + from) * dtype_size(s.grad_dtype);
        int n = (int)min64(kChunk, s.numel - from), end = n / 128 * 128;
        double sum = 0.0;
        if ((uintptr_t)p % 16 == 0) {
            sum = s.grad_dtype == kF32    ? squares_of<kF32>(p, end, lane)
                  : s.grad_dtype == kBF16 ? squares_of<kBF16>(p, end, lane)
                                          : squares_of<kF16>(p, end, lane);
        } else {
            for (int i = 4 * lane; i < end; i += 128)
                for (int j = 0; j < 4; ++j) {
                    double v = (double)load_as_float(p, s.grad_dtype, i + j);
                    sum = fma(v, v, sum);
                }
        }
        for (int i = end + lane; i < n; i += 32) {
            double v = (double)load_as_float(p, s.grad_dtype, i);
            sum = fma(v, v, sum);
        }
        sum = warp_sum(sum);
        if (lane == 0)
            sums[chunk] = sum;
    }
}

__global__ void __launch_bounds__(1024)
    optimizer_root_kernel(const double* sums, int64_t chunks, float* norm) {
    PK_SHARED(double, warp_sums, 32);
    int tid = (int)threadIdx.x;
    double sum = 0.0;
    for (int64_t i = tid; i < chunks; i += 1024)
        sum += sums[i];
    sum = warp_sum(sum);
    if (tid % 32 == 0)
        warp_sums[tid / 32] = sum;
    __syncthreads();
    if (tid >= 32)
        return;
    sum = warp_sum(warp_sums[tid]);
    if (tid == 0)
        *norm = (float)sqrt(sum);
}

int upload(int64_t* to, const int64_t* words, int64_t count, void* stream) {
    for (int64_t at = 0; at < count; at += Words::kCount) {
        Words w;
        int n = (int)min64(Words::kCount, count - at);
        for (int i = 0; i < n; ++i)
            w.word[i] = words[at + i];
        int status =
            launch("optimizer_words", optimizer_words_kernel, 1, 256, 0, stream, to + at, n, w);
        if (status != kOk)
            return status;
    }
    return kOk;
}

} // namespace
} // namespace pk

extern "C" {

// What is new on the host, to the device.
int pk_cuda_optimizer_upload(const void* call, void* stream) {
    const pk::StepCall& c = *(const pk::StepCall*)call;
    int status = pk::kOk;
    if (c.new_grads != nullptr)
        status = pk::upload(c.grads, c.new_grads, c.rows, stream);
    if (status == pk::kOk && c.new_groups != nullptr)
        status = pk::upload((int64_t*)c.groups, c.new_groups, c.group_words, stream);
    return status;
}
PK_LAUNCHER(optimizer_upload)

int pk_cuda_optimizer_norm(const void* call, void* stream) {
    const pk::StepCall& c = *(const pk::StepCall*)call;
    if (c.chunks > 0) {
        unsigned grid = (unsigned)pk::min64(pk::ceil_div(c.chunks, 8), 4 * (int64_t)c.blocks);
        int status = pk::launch("optimizer_squares", pk::optimizer_squares_kernel, grid, 256, 0,
                                stream, c.segments, c.owners, c.chunks, c.grads, c.sums);
        if (status != pk::kOk)
            return status;
    }
    return pk::launch("optimizer_root", pk::optimizer_root_kernel, 1, 1024, 0, stream, c.sums,
                      c.chunks, c.norm);
}
PK_LAUNCHER(optimizer_norm)

int pk_cuda_optimizer_prepare(const void* call, void* stream) {
    const pk::StepCall& c = *(const pk::StepCall*)call;
    if (c.rows == 0)
        return pk::kOk;
    return pk::launch("optimizer_prepare", pk::optimizer_prepare_kernel,
                      (unsigned)pk::ceil_div(c.rows, 64), 64, 0, stream, c);
}
PK_LAUNCHER(optimizer_prepare)

int pk_cuda_optimizer_finish(const void* call, void* stream) {
    const pk::StepCall& c = *(const pk::StepCall*)call;
    if (c.rows == 0)
        return pk::kOk;
    return pk::launch("optimizer_finish", pk::optimizer_finish_kernel, 1, 512, 0, stream, c);
}
PK_LAUNCHER(optimizer_finish)

// All of them, as a step needs them.
int pk_cuda_optimizer_run(const void* call, void* stream) {
    const pk::StepCall& c = *(const pk::StepCall*)call;
    int status = pk_cuda_optimizer_upload(call, stream);
    if (status == pk::kOk && c.clip == 2)
        status = pk_cuda_optimizer_norm(call, stream);
    if (status == pk::kOk)
        status = pk_cuda_optimizer_prepare(call, stream);
    if (status == pk::kOk)
        status = pk_cuda_optimizer_step(call, stream);
    if (status == pk::kOk)
        status = pk_cuda_optimizer_finish(call, stream);
    return status;
}
PK_LAUNCHER(optimizer_run)
}
