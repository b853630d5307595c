// Lanes wait for the whole warp in two different operations.
#include "../../cuda/primitives.cuh"

namespace {

__global__ void kernel(const float* in, float* out, int /*n*/, int broken) {
    float v = in[threadIdx.x];
    if (broken && threadIdx.x >= 16)
        v = (float)__ballot_sync(0xffffffffu, v > 0.0f);
    else
        v = __shfl_xor_sync(0xffffffffu, v, 1);
    out[threadIdx.x] = v;
}

} // namespace

extern "C" int run_case(const float* in, float* out, int n, int broken) {
    return pk::launch("divergent_shuffle", kernel, 1, 32, 0, nullptr, in, out, n, broken);
}
