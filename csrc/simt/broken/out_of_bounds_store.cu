// A store far outside the output.
#include "../../cuda/primitives.cuh"

namespace {

__global__ void kernel(const float* in, float* out, int n, int broken) {
    int t = (int)threadIdx.x;
    out[broken && t == 7 ? t + 100 * n : t] = in[t];
}

} // namespace

extern "C" int run_case(const float* in, float* out, int n, int broken) {
    return pk::launch("out_of_bounds_store", kernel, 1, 32, 0, nullptr, in, out, n, broken);
}
