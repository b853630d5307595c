// Two registers of the A fragment of mma.m16n8k16 are exchanged.
#include "../../cuda/primitives.cuh"

namespace {

__global__ void kernel(const float* in, float* out, int n, int broken) {
    PK_SHARED(uint16_t, a, 256);
    PK_SHARED(uint16_t, b, 128);
    int t = (int)threadIdx.x, g = t / 4, c = 2 * (t % 4);
    for (int i = t; i < 256; i += 32)
        a[i] = pk::float_to_bf16(in[i % n]);
    for (int i = t; i < 128; i += 32) // [column][k]
        b[i] = pk::float_to_bf16(in[(7 * i) % n]);
    __syncwarp();
    auto pair = [](const uint16_t* p) { return (uint32_t)p[0] | (uint32_t)p[1] << 16; };
    uint32_t r[4] = {pair(a + 16 * g + c), pair(a + 16 * (g + 8) + c), pair(a + 16 * g + c + 8),
                     pair(a + 16 * (g + 8) + c + 8)};
    uint32_t swapped[4] = {r[0], r[2], r[1], r[3]};
    float d[4];
    pk::mma_m16n8k16<pk::kBF16>(d, broken ? swapped : r, pair(b + 16 * g + c),
                                pair(b + 16 * g + c + 8), nullptr);
    float sum = 0.0f; // against the product as everyone writes it
    for (int k = 0; k < 16; ++k)
        sum += pk::bf16_to_float(a[16 * (g + 8) + k]) * pk::bf16_to_float(b[16 * (c + 1) + k]);
    out[t] = d[3] - sum;
}

} // namespace

extern "C" int run_case(const float* in, float* out, int n, int broken) {
    return pk::launch("wrong_fragment", kernel, 1, 32, 0, nullptr, in, out, n, broken);
}
