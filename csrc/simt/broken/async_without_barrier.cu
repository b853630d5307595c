// Each thread waits for its own cp.async, then reads another's without a barrier.
#include "../../cuda/primitives.cuh"

namespace {

__global__ void kernel(const float* in, float* out, int n, int broken) {
    PK_SHARED(float4, s, 128);
    int t = (int)threadIdx.x;
    pk::cp_async16(&s[t], in + 4 * (t % 16), true);
    pk::cp_async_commit();
    pk::cp_async_wait<0>();
    if (!broken)
        __syncthreads();
    if (t < n)
        out[t] = s[127 - t].z;
}

} // namespace

extern "C" int run_case(const float* in, float* out, int n, int broken) {
    return pk::launch("async_without_barrier", kernel, 1, 128, 0, nullptr, in, out, n, broken);
}
