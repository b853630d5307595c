// A 16-byte load from an address that is only a multiple of four.
#include "../../cuda/primitives.cuh"

namespace {

__global__ void kernel(const float* in, float* out, int /*n*/, int broken) {
    int t = (int)threadIdx.x;
    out[t] = pk::load_once<float4>(in + 4 * t + broken).x;
}

} // namespace

extern "C" int run_case(const float* in, float* out, int n, int broken) {
    return pk::launch("misaligned_vector", kernel, 1, 8, 0, nullptr, in, out, n, broken);
}
