// A barrier inside a branch that only some threads of the block take.
#include "../../cuda/primitives.cuh"

namespace {

__global__ void kernel(const float* in, float* out, int n, int broken) {
    PK_SHARED(float, s, 128);
    int t = (int)threadIdx.x;
    s[t] = 1.0f;
    if (t < 64 || !broken)
        __syncthreads();
    if (t < n)
        out[t] = in[t] + s[t];
}

} // namespace

extern "C" int run_case(const float* in, float* out, int n, int broken) {
    return pk::launch("divergent_barrier", kernel, 1, 128, 0, nullptr, in, out, n, broken);
}
