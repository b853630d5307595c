// Gated activations: h = act(gate) up, and from dh the gradients of both together with h.

namespace pk::PK_ISA {
namespace {

constexpr int64_t kGatedRun = 512; // elements in fp32 at a time, all in the first-level cache
constexpr int64_t kGatedChunk = 8 * kGatedRun;

void gated_forward_run(const Gated& g, int64_t byte, int64_t n) {
    float a[kGatedRun], up[kGatedRun];
    load_run((const char*)g.gate + byte, g.dtype, n, a);
    load_run((const char*)g.up + byte, g.dtype, n, up);
    activation_run(g.activation, a, nullptr, n);
    mul_run(a, up, n);
    store_run(a, n, g.dtype, (char*)g.h + byte);
}

void gated_backward_run(const Gated& g, int64_t byte, int64_t n) {
    float a[kGatedRun], up[kGatedRun], dh[kGatedRun], dgate[kGatedRun];
    load_run((const char*)g.gate + byte, g.dtype, n, a);
    load_run((const char*)g.up + byte, g.dtype, n, up);
    load_run((const char*)g.dh + byte, g.dtype, n, dh);
    __builtin_memcpy(dgate, dh, (size_t)n * sizeof(float));
    mul_run(dgate, up, n);
    activation_run(g.activation, a, dgate, n);
    mul_run(dh, a, n);
    mul_run(up, a, n);
    store_run(dgate, n, g.dtype, (char*)g.dgate + byte);
    store_run(dh, n, g.dtype, (char*)g.dup + byte);
    store_run(up, n, g.dtype, (char*)g.h + byte);
}

void gated_body(void* context, Queue* queue) {
    const Gated& g = *(const Gated*)context;
    for (int64_t chunk = next_chunk(queue); chunk >= 0; chunk = next_chunk(queue)) {
        int64_t end = min64(g.numel, (chunk + 1) * kGatedChunk);
        for (int64_t i = chunk * kGatedChunk; i < end; i += kGatedRun) {
            int64_t n = min64(kGatedRun, end - i);
            if (g.dh == nullptr)
                gated_forward_run(g, i * dtype_size(g.dtype), n);
            else
                gated_backward_run(g, i * dtype_size(g.dtype), n);
        }
    }
}

int gated(const Gated& g) {
    int threads = worthwhile_threads(g.threads, (double)g.numel * 2e-3 / V::kSpeed);
    run_parallel(threads, ceil_div(g.numel, kGatedChunk), gated_body, (void*)&g);
    return kOk;
}

} // namespace
} // namespace pk::PK_ISA
