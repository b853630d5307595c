// Lanes of one warp exchange through shared memory without __syncwarp.
#include "../../cuda/primitives.cuh"

namespace {

__global__ void kernel(const float* in, float* out, int /*n*/, int broken) {
    PK_SHARED(float, s, 32);
    int t = (int)threadIdx.x;
    s[t] = in[t];
    if (!broken)
        __syncwarp();
    out[t] = s[t ^ 1];
}

} // namespace

extern "C" int run_case(const float* in, float* out, int n, int broken) {
    return pk::launch("missing_warp_barrier", kernel, 1, 32, 0, nullptr, in, out, n, broken);
}
