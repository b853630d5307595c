// Threads read what others wrote to shared memory; the barrier is left out.
#include "../../cuda/primitives.cuh"

namespace {

__global__ void kernel(const float* in, float* out, int n, int broken) {
    PK_SHARED(float, s, 128);
    int t = (int)threadIdx.x;
    s[t] = t < n ? in[t] : 0.0f;
    if (!broken)
        __syncthreads();
    if (t < n)
        out[t] = s[n - 1 - t];
}

} // namespace

extern "C" int run_case(const float* in, float* out, int n, int broken) {
    return pk::launch("missing_barrier", kernel, 1, 128, 0, nullptr, in, out, n, broken);
}
