// Kernels that use the executor's hardware operations against plain loops: the executor is right
// about what it executes, not only strict.
#include "../cuda/primitives.cuh"

namespace {

// out [16, 8] = A [16, 16] B [8, 16]^T in bf16 through ldmatrix and mma, integers in `in`.
__global__ void matrix_kernel(const float* in, float* out) {
    PK_SHARED(uint4, storage, 48);
    uint16_t* a = (uint16_t*)storage; // [16][16]
    uint16_t* b = a + 256;            // [8][16]
    int t = (int)threadIdx.x;
    for (int i = t; i < 384; i += 32)
        a[i] = pk::float_to_bf16(in[i]);
    __syncwarp();
    uint32_t r[4], s[4];
    pk::ldmatrix_x4(r, a + 16 * (t % 16) + 8 * (t / 16));
    pk::ldmatrix_x4(s, b + 16 * (t % 8) + 8 * (t / 8 % 2));
    float d[4], c[4] = {1.0f, 1.0f, 1.0f, 1.0f};
    pk::mma_m16n8k16<pk::kBF16>(d, r, s[0], s[1], c);
    for (int i = 0; i < 4; ++i)
        out[8 * (t / 4 + 8 * (i / 2)) + 2 * (t % 4) + i % 2] = d[i];
}

__global__ void warp_kernel(const float* in, float* out) {
    int t = (int)threadIdx.x;
    float v = in[t];
    out[t] = __shfl_xor_sync(0xffffffffu, v, 5);
    out[t + 32] = __shfl_down_sync(0xffffffffu, v, 3, 8);
    out[t + 64] = __shfl_up_sync(0xffffffffu, v, 2, 16);
    out[t + 96] = __shfl_sync(0xffffffffu, v, 7, 8);
    out[t + 128] = (float)(__ballot_sync(0xffffffffu, t % 3 == 0) >> t & 1u);
    out[t + 160] = __any_sync(0xffffffffu, t == 9) && !__all_sync(0xffffffffu, t == 9);
}

__global__ void atomic_kernel(int* sum, int* smallest) {
    atomicAdd(sum, (int)(threadIdx.x + blockIdx.x * blockDim.x));
    atomicMin(smallest, 100 - (int)threadIdx.x);
}

} // namespace

extern "C" {

int run_matrix(const float* in, float* out) {
    return pk::launch("matrix", matrix_kernel, 1, 32, 0, nullptr, in, out);
}
int run_warp(const float* in, float* out) {
    return pk::launch("warp", warp_kernel, 1, 32, 0, nullptr, in, out);
}
int run_atomic(int* sum, int* smallest) {
    return pk::launch("atomic", atomic_kernel, 3, 64, 0, nullptr, sum, smallest);
}
}
