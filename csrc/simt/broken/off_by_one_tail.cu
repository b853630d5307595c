// The guard of the last block lets one element too many through.
#include "../../cuda/primitives.cuh"

namespace {

__global__ void kernel(const float* in, float* out, int n, int broken) {
    int i = (int)(blockIdx.x * blockDim.x + threadIdx.x);
    if (broken ? i <= n : i < n)
        out[i] = 2.0f * in[i];
}

} // namespace

extern "C" int run_case(const float* in, float* out, int n, int broken) {
    return pk::launch("off_by_one_tail", kernel, (unsigned)pk::ceil_div(n, 32), 32, 0, nullptr, in,
                      out, n, broken);
}
