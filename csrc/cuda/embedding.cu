// Embeddings with a trained prompt in front: one pass that looks up, and the prompt's gradient.

#include "../common/convert.h"
#include "primitives.cuh"

namespace pk {
namespace {

constexpr int kThreads = 256;
constexpr int kVector = 8; // neighbouring elements a thread copies

struct EmbeddingArgs {
    const int64_t* ids; // [B, L]
    const void* table;  // [V, H]
    const void* prompt; // [P, H], or [B, P, H]
    int prompt_dtype;
    int64_t prompt_step; // from one batch row's prompt to the next one's; 0 where they share it
    int64_t batch, length, rows, width, vocabulary;
    bool aligned; // rows of table and out are vectors of kVector elements of 2 bytes
    void* out;    // [B, P + L, H]
};

// A block takes rows of `out`: position blockIdx.x of batch rows blockIdx.y, blockIdx.y +
// gridDim.y, and so on. An id out of range leaves NaN: a kernel cannot raise.
template <int kDtype>
__global__ void __launch_bounds__(kThreads) prompt_embedding_kernel(EmbeddingArgs a) {
    int64_t at = blockIdx.x;
#pragma unroll 1
    for (int64_t b = blockIdx.y; b < a.batch; b += gridDim.y) {
        int64_t start = (b * (a.rows + a.length) + at) * a.width;
        bool prompt = at < a.rows;
        int64_t id = prompt ? 0 : a.ids[b * a.length + at - a.rows];
        bool known = prompt || (id >= 0 && id < a.vocabulary);
        int64_t from = prompt ? b * a.prompt_step + at * a.width : id * a.width;
        if (kDtype != kF32 && a.aligned && !prompt && known) {
            const uint16_t* source = (const uint16_t*)a.table + from;
            uint16_t* target = (uint16_t*)a.out + start;
#pragma unroll 1
            for (int64_t i = threadIdx.x * (int64_t)kVector; i < a.width; i += kThreads * kVector)
                *(uint4*)(target + i) = *(const uint4*)(source + i);
            continue;
        }
        const void* source = prompt ? a.prompt : a.table;
        int dtype = prompt ? a.prompt_dtype : kDtype;
#pragma unroll 1
        for (int64_t i = threadIdx.x; i < a.width; i += kThreads) {
            float v = bits_float(0x7fc00000u);
            if (known)
                v = load_as_float(source, dtype, from + i);
            store_from_float(a.out, kDtype, start + i, v);
        }
    }
}

// out[p, h] = dy[0, p, h] + dy[1, p, h] + ..., in this order.
template <int kDtype>
__global__ void __launch_bounds__(kThreads)
    prompt_gradient_kernel(const void* dy, int64_t batch, int64_t step, int64_t count, float* out) {
    int64_t i = blockIdx.x * (int64_t)kThreads + threadIdx.x;
    if (i >= count)
        return;
    float sum = 0.0f;
    for (int64_t b = 0; b < batch; ++b)
        sum += load_as_float(dy, kDtype, b * step + i);
    out[i] = sum;
}

} // namespace
} // namespace pk

extern "C" {

int pk_cuda_prompt_embedding(const int64_t* ids, const void* table, int dtype, const void* prompt,
                             int prompt_dtype, int64_t prompt_step, int64_t batch, int64_t length,
                             int64_t rows, int64_t width, int64_t vocabulary, void* out,
                             void* stream) {
    if (batch * (rows + length) * width == 0)
        return pk::kOk;
    bool aligned =
        width % pk::kVector == 0 && (uintptr_t)table % 16 == 0 && (uintptr_t)out % 16 == 0;
    pk::EmbeddingArgs a = {ids,    table, prompt, prompt_dtype, prompt_step, batch,
                           length, rows,  width,  vocabulary,   aligned,     out};
    auto kernel = dtype == pk::kF32    ? pk::prompt_embedding_kernel<pk::kF32>
                  : dtype == pk::kBF16 ? pk::prompt_embedding_kernel<pk::kBF16>
                                       : pk::prompt_embedding_kernel<pk::kF16>;
    dim3 grid((unsigned)(rows + length), (unsigned)pk::min64(batch, 1 << 15));
    return pk::launch("prompt_embedding", kernel, grid, pk::kThreads, 0, stream, a);
}
PK_LAUNCHER(prompt_embedding)

// The first `count` elements of each of `batch` stretches of `step` elements, added up.
int pk_cuda_prompt_gradient(const void* dy, int dtype, int64_t batch, int64_t step, int64_t count,
                            float* out, void* stream) {
    if (count == 0)
        return pk::kOk;
    auto kernel = dtype == pk::kF32    ? pk::prompt_gradient_kernel<pk::kF32>
                  : dtype == pk::kBF16 ? pk::prompt_gradient_kernel<pk::kBF16>
                                       : pk::prompt_gradient_kernel<pk::kF16>;
    unsigned blocks = (unsigned)pk::ceil_div(count, pk::kThreads);
    return pk::launch("prompt_gradient", kernel, blocks, pk::kThreads, 0, stream, dy, batch, step,
                      count, out);
}
PK_LAUNCHER(prompt_gradient)
}
