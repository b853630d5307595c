// Threads count into one shared word without an atomic.
#include "../../cuda/primitives.cuh"

namespace {

__global__ void kernel(const float* in, float* out, int n, int broken) {
    PK_SHARED(int, counter, 1);
    int t = (int)threadIdx.x;
    if (t == 0)
        *counter = 0;
    __syncthreads();
    if (broken)
        *counter += in[t] > 0.0f;
    else
        atomicAdd(counter, in[t] > 0.0f ? 1 : 0);
    __syncthreads();
    if (t < n)
        out[t] = (float)*counter;
}

} // namespace

extern "C" int run_case(const float* in, float* out, int n, int broken) {
    return pk::launch("plain_counter", kernel, 1, 64, 0, nullptr, in, out, n, broken);
}
