// Counter-based dropout: the mask is regenerated from (seed, element index), never stored.

#include "../common/convert.h"
#include "../common/philox.h"
#include "primitives.cuh"

namespace pk {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMaxBlocks = 1056;

// A thread takes the four elements of one Philox block. The seed stays on the device.
template <int kDtype>
__global__ void __launch_bounds__(kThreads)
    philox_dropout_kernel(const void* x, int64_t numel, const int64_t* seed, uint32_t threshold,
                          float scale, bool aligned, void* out) {
    uint64_t key = (uint64_t)*seed;
    for (int64_t q = blockIdx.x * (int64_t)kThreads + threadIdx.x; 4 * q < numel;
         q += gridDim.x * (int64_t)kThreads) {
        Philox4 random = philox(key, (uint64_t)q);
        int64_t i = 4 * q;
        if (!aligned || i + 4 > numel) {
            for (int j = 0; j < 4 && i + j < numel; ++j) {
                float v = load_as_float(x, kDtype, i + j) * scale;
                store_from_float(out, kDtype, i + j, random.w[j] >= threshold ? v : 0.0f);
            }
        } else if (kDtype == kF32) {
            float4 v = load_once<float4>((const float*)x + i);
            store_once((float*)out + i, float4{random.w[0] >= threshold ? v.x * scale : 0.0f,
                                               random.w[1] >= threshold ? v.y * scale : 0.0f,
                                               random.w[2] >= threshold ? v.z * scale : 0.0f,
                                               random.w[3] >= threshold ? v.w * scale : 0.0f});
        } else {
            constexpr int kHalf = kDtype == kF32 ? kBF16 : kDtype;
            uint2 w = load_once<uint2>((const uint16_t*)x + i);
            float v[4];
            for (int j = 0; j < 4; ++j) {
                uint16_t h = (uint16_t)((j < 2 ? w.x : w.y) >> 16 * (j % 2));
                v[j] = (kHalf == kBF16 ? bf16_to_float(h) : half_to_float(h)) * scale;
                v[j] = random.w[j] >= threshold ? v[j] : 0.0f;
            }
            store_once((uint16_t*)out + i,
                       uint2{pack2<kHalf>(v[0], v[1]), pack2<kHalf>(v[2], v[3])});
        }
    }
}

} // namespace
} // namespace pk

extern "C" int pk_cuda_philox_dropout(const void* x, int dtype, int64_t numel, const int64_t* seed,
                                      uint32_t threshold, float scale, void* out, void* stream) {
    if (numel == 0)
        return pk::kOk;
    bool aligned = (uintptr_t)x % 16 == 0 && (uintptr_t)out % 16 == 0;
    int64_t blocks = pk::ceil_div(numel, 4 * pk::kThreads);
    auto kernel = dtype == pk::kF32    ? pk::philox_dropout_kernel<pk::kF32>
                  : dtype == pk::kBF16 ? pk::philox_dropout_kernel<pk::kBF16>
                                       : pk::philox_dropout_kernel<pk::kF16>;
    return pk::launch("philox_dropout", kernel, (unsigned)pk::min64(blocks, pk::kMaxBlocks),
                      pk::kThreads, 0, stream, x, numel, seed, threshold, scale, aligned, out);
}
PK_LAUNCHER(philox_dropout)
