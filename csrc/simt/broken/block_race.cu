// Two blocks write the same element without an atomic.
#include "../../cuda/primitives.cuh"

namespace {

__global__ void kernel(const float* in, float* out, int n, int broken) {
    int block = broken ? (int)blockIdx.x / 2 : (int)blockIdx.x;
    int i = block * 32 + (int)threadIdx.x;
    if (i < n)
        out[i] = in[i];
}

} // namespace

extern "C" int run_case(const float* in, float* out, int n, int broken) {
    return pk::launch("block_race", kernel, 4, 32, 0, nullptr, in, out, n, broken);
}
