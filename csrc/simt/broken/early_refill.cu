// A pipeline refills a stage that other threads may still be reading.
#include "../../cuda/primitives.cuh"

namespace {

__global__ void kernel(const float* in, float* out, int n, int broken) {
    PK_SHARED(float4, stage, 64);
    int t = (int)threadIdx.x;
    float sum = 0.0f;
    for (int step = 0; step < 2; ++step) {
        pk::cp_async16(&stage[t], in + 4 * ((t + step) % 16), true);
        pk::cp_async_commit();
        pk::cp_async_wait<0>();
        __syncthreads();
        sum += stage[63 - t].x;
        if (!broken)
            __syncthreads();
    }
    if (t < n)
        out[t] = sum;
}

} // namespace

extern "C" int run_case(const float* in, float* out, int n, int broken) {
    return pk::launch("early_refill", kernel, 1, 64, 0, nullptr, in, out, n, broken);
}
