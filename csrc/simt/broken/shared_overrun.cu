// One thread writes behind the end of a shared array.
#include "../../cuda/primitives.cuh"

namespace {

__global__ void kernel(const float* in, float* out, int n, int broken) {
    PK_SHARED(float, s, 128);
    PK_SHARED(float, other, 128);
    int t = (int)threadIdx.x;
    s[broken ? t + 1 : t] = 1.0f;
    other[t] = 2.0f;
    __syncthreads();
    if (t < n)
        out[t] = in[t] + s[127 - t + broken] + other[127 - t];
}

} // namespace

extern "C" int run_case(const float* in, float* out, int n, int broken) {
    return pk::launch("shared_overrun", kernel, 1, 128, 0, nullptr, in, out, n, broken);
}
