// A partial sum is added to shared memory that nobody has set to zero.
#include "../../cuda/primitives.cuh"

namespace {

__global__ void kernel(const float* in, float* out, int n, int broken) {
    PK_SHARED(float, sums, 128);
    int t = (int)threadIdx.x;
    if (!broken || t >= 4)
        sums[t] = 0.0f;
    __syncthreads();
    sums[t] += t < n ? in[t] : 0.0f;
    __syncthreads();
    if (t < n)
        out[t] = sums[127 - t];
}

} // namespace

extern "C" int run_case(const float* in, float* out, int n, int broken) {
    return pk::launch("uninitialised_shared", kernel, 1, 128, 0, nullptr, in, out, n, broken);
}
