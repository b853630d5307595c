// Data of cp.async is read before it was waited for.
#include "../../cuda/primitives.cuh"

namespace {

__global__ void kernel(const float* in, float* out, int /*n*/, int broken) {
    PK_SHARED(float4, s, 64);
    int t = (int)threadIdx.x;
    pk::cp_async16(&s[t], in + 4 * (t % 8), true);
    pk::cp_async_commit();
    pk::cp_async16(&s[t + 32], in, false);
    pk::cp_async_commit();
    if (broken)
        pk::cp_async_wait<2>();
    else
        pk::cp_async_wait<0>();
    out[t] = s[t].y;
}

} // namespace

extern "C" int run_case(const float* in, float* out, int n, int broken) {
    return pk::launch("early_async_read", kernel, 1, 32, 0, nullptr, in, out, n, broken);
}
