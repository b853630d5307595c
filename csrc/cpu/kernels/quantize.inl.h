// Quantization and whole-tensor dequantization.

namespace pk::PK_ISA {
namespace {

constexpr int64_t kMaxBlock = 4096;
constexpr float kSmallestNormal = 1.17549435e-38f;

uint32_t magnitude_bits(const float* x, int64_t n) {
    V::I acc = V::zero_bits();
    int64_t i = 0;
    for (; i + L <= n; i += L)
        acc = V::max_magnitude(acc, V::load(x + i));
    uint32_t best = V::reduce_max(acc);
    for (; i < n; ++i) {
        uint32_t bits = float_bits(x[i]) & 0x7fffffffu;
        best = bits > best ? bits : best;
    }
    return best;
}

void note_bad(int64_t* first_bad, int64_t index) {
    int64_t seen = __atomic_load_n(first_bad, __ATOMIC_RELAXED);
    while ((seen < 0 || index < seen) &&
           !__atomic_compare_exchange_n(first_bad, &seen, index, true, __ATOMIC_RELAXED,
                                        __ATOMIC_RELAXED)) {
    }
}

// Codes of one block: t = (x * lift) * inverse, nearest rung.
void code_block(const Ladder& ladder, const float* x, int64_t n, float lift, float inverse,
                uint8_t* codes) {
    int64_t i = 0;
    V::F l = V::set1(lift), r = V::set1(inverse);
    for (; i + L <= n; i += L)
        V::codes(ladder, V::mul(V::mul(V::load(x + i), l), r), codes + i);
    if (i < n) {
        float rest[V::kLanes] = {};
        uint8_t out[V::kLanes];
        __builtin_memcpy(rest, x + i, (size_t)(n - i) * sizeof(float));
        V::codes(ladder, V::mul(V::mul(V::load(rest), l), r), out);
        __builtin_memcpy(codes + i, out, (size_t)(n - i));
    }
}

struct Quantize4Task {
    Quantize4* q;
    Ladder ladder;
    int64_t blocks_per_chunk;
};

void quantize_4bit_block(const Quantize4Task& task, int64_t block) {
    Quantize4& q = *task.q;
    int64_t start = block << q.block_shift;
    int64_t n = min64((int64_t)1 << q.block_shift, q.numel - start);
    alignas(64) float buffer[kMaxBlock];
    alignas(64) uint8_t codes[kMaxBlock];
    const float* x = (const float*)q.x + start;
    if (q.dtype != kF32) {
        load_run((const uint16_t*)q.x + start, q.dtype, n, buffer);
        x = buffer;
    }
    float absmax = bits_float(magnitude_bits(x, n));
    q.absmax[block] = absmax;
    if (!is_finite(absmax))
        note_bad(&q.first_bad, block);
    uint8_t* packed = q.packed + start / 2;
    int zero = zero_code(q.quant_type);
    if (absmax == 0.0f) {
        __builtin_memset(packed, zero * 17, (size_t)((n + 1) / 2));
        return;
    }
    // The reciprocal of a denormal overflows: scale both by 2^64 first, which is exact.
    float lift = absmax < kSmallestNormal ? 18446744073709551616.0f : 1.0f;
    code_block(task.ladder, x, n, lift, 1.0f / (absmax * lift), codes);
    for (int64_t i = 0; i < n / 2; ++i)
        packed[i] = (uint8_t)(codes[2 * i] << 4 | codes[2 * i + 1]);
    if (n & 1)
        packed[n / 2] = (uint8_t)(codes[n - 1] << 4 | zero);
}

void quantize_4bit_body(void* context, Queue* queue) {
    Quantize4Task& task = *(Quantize4Task*)context;
    int64_t blocks = ceil_div(task.q->numel, (int64_t)1 << task.q->block_shift);
    for (int64_t chunk = next_chunk(queue); chunk >= 0; chunk = next_chunk(queue)) {
        int64_t end = min64(blocks, (chunk + 1) * task.blocks_per_chunk);
        for (int64_t b = chunk * task.blocks_per_chunk; b < end; ++b)
            quantize_4bit_block(task, b);
    }
}

int quantize_4bit(Quantize4& q) {
    q.first_bad = -1;
    if (q.numel == 0)
        return kOk;
    Quantize4Task task = {&q, make_ladder(q.quant_type), ((int64_t)65536 >> q.block_shift)};
    int64_t blocks = ceil_div(q.numel, (int64_t)1 << q.block_shift);
    int threads = worthwhile_threads(q.threads, (double)q.numel * 5e-4 / V::kSpeed);
    run_parallel(threads, ceil_div(blocks, task.blocks_per_chunk), quantize_4bit_body, &task);
    return kOk;
}

void quantize_absmax_body(void* context, Queue* queue) {
    const QuantizeAbsmax& q = *(const QuantizeAbsmax*)context;
    for (int64_t block = next_chunk(queue); block >= 0; block = next_chunk(queue)) {
        int64_t start = block * kNestedBlock;
        int64_t n = min64(kNestedBlock, q.numel - start);
        const float* x = q.x + start;
        float absmax = bits_float(magnitude_bits(x, n));
        q.nested_absmax[block] = absmax;
        float lift = absmax < kSmallestNormal ? 18446744073709551616.0f : 1.0f;
        float inverse = absmax == 0.0f ? 0.0f : 1.0f / (absmax * lift);
        for (int64_t i = 0; i < n; ++i)
            q.codes[start + i] = dynamic_code((x[i] * lift) * inverse);
    }
}

int quantize_absmax(const QuantizeAbsmax& q) {
    if (q.numel == 0)
        return kOk;
    int threads = worthwhile_threads(q.threads, (double)q.numel * 1e-2);
    run_parallel(threads, ceil_div(q.numel, kNestedBlock), quantize_absmax_body, (void*)&q);
    return kOk;
}

void quantize_8bit_body(void* context, Queue* queue) {
    Quantize8& q = *(Quantize8*)context;
    constexpr int64_t kSpan = 4096;
    alignas(64) float buffer[kSpan];
    for (int64_t row = next_chunk(queue); row >= 0; row = next_chunk(queue)) {
        const char* x = (const char*)q.x + row * q.cols * dtype_size(q.dtype);
        int8_t* codes = q.codes + row * q.cols;
        uint32_t bits = 0;
        for (int64_t k = 0; k < q.cols; k += kSpan) {
            int64_t n = min64(kSpan, q.cols - k);
            load_run(x + k * dtype_size(q.dtype), q.dtype, n, buffer);
            uint32_t b = magnitude_bits(buffer, n);
            bits = b > bits ? b : bits;
        }
        float absmax = bits_float(bits);
        q.scb[row] = absmax;
        if (!is_finite(absmax))
            note_bad(&q.first_bad, row);
        float lift = absmax < kSmallestNormal ? 18446744073709551616.0f : 1.0f;
        // Reciprocal, then 127, each rounded: what torch (and so bitsandbytes) makes of 127 /
        // absmax.
        float inverse = absmax == 0.0f ? 0.0f : 1.0f / (absmax * lift);
        float factor = inverse * 127.0f;
        for (int64_t k = 0; k < q.cols; k += kSpan) {
            int64_t n = min64(kSpan, q.cols - k);
            load_run(x + k * dtype_size(q.dtype), q.dtype, n, buffer);
            scale_run(buffer, n, lift);
            scale_run(buffer, n, factor);
            int64_t i = 0;
            for (; i + L <= n; i += L)
                V::store_i8(codes + k + i, V::load(buffer + i));
            if (i < n) {
                float rest[V::kLanes] = {};
                int8_t out[V::kLanes];
                __builtin_memcpy(rest, buffer + i, (size_t)(n - i) * sizeof(float));
                V::store_i8(out, V::load(rest));
                __builtin_memcpy(codes + k + i, out, (size_t)(n - i));
            }
        }
    }
}

int quantize_8bit(Quantize8& q) {
    q.first_bad = -1;
    if (q.rows == 0)
        return kOk;
    double numel = (double)q.rows * (double)q.cols;
    int threads = worthwhile_threads(q.threads, numel * 5e-4 / V::kSpeed);
    run_parallel(threads, q.rows, quantize_8bit_body, &q);
    return kOk;
}

// A chunk is a piece of a row, or several short rows. 4-bit tensors are one row of all elements
// here.
struct DequantizeTask {
    const Dequantize* d;
    int64_t pieces_per_row, rows_per_chunk; // one of them is 1
};

constexpr int64_t kDequantizePiece = 16384;

// Elements [row, start .. end) to their place.
void dequantize_run(const Dequantize& d, int64_t row, int64_t start, int64_t end) {
    const Weight& w = d.w;
    constexpr int64_t kSpan = 1024;
    alignas(64) float buffer[kSpan];
    for (int64_t k = start; k < end; k += kSpan) {
        int64_t n = min64(kSpan, end - k);
        char* out = (char*)d.out + (row * w.cols + k) * dtype_size(w.dtype);
        if (w.dtype == kF32) {
            decode_run(w, row, k, n, (float*)out);
            continue;
        }
        int64_t done = decode_bf16(w, row, k, n, (uint16_t*)out);
        if (done < n) {
            decode_run(w, row, k + done, n - done, buffer);
            store_run(buffer, n - done, w.dtype, out + 2 * done);
        }
    }
}

void dequantize_body(void* context, Queue* queue) {
    const DequantizeTask& task = *(const DequantizeTask*)context;
    const Weight& w = task.d->w;
    for (int64_t chunk = next_chunk(queue); chunk >= 0; chunk = next_chunk(queue)) {
        int64_t first = chunk / task.pieces_per_row * task.rows_per_chunk;
        int64_t start = chunk % task.pieces_per_row * kDequantizePiece;
        int64_t end = min64(w.cols, start + kDequantizePiece);
        for (int64_t row = first; row < min64(w.rows, first + task.rows_per_chunk); ++row)
            dequantize_run(*task.d, row, start, end);
    }
}

int dequantize(const Dequantize& d) {
    const Weight& w = d.w;
    if (w.rows == 0 || w.cols == 0)
        return kOk;
    int64_t rows = w.cols < kDequantizePiece ? kDequantizePiece / w.cols : 1;
    DequantizeTask task = {&d, ceil_div(w.cols, kDequantizePiece), rows};
    double numel = (double)w.rows * (double)w.cols;
    int threads = worthwhile_threads(d.threads, numel * 2e-4 / V::kSpeed);
    run_parallel(threads, ceil_div(w.rows, rows) * task.pieces_per_row, dequantize_body, &task);
    return kOk;
}

void apply_dropout_body(void* context, Queue* queue) {
    const ApplyDropout& a = *(const ApplyDropout*)context;
    constexpr int64_t kSpan = 1024;
    alignas(64) float buffer[kSpan];
    for (int64_t chunk = next_chunk(queue); chunk >= 0; chunk = next_chunk(queue)) {
        int64_t start = chunk * kDequantizePiece;
        int64_t end = min64(a.numel, start + kDequantizePiece);
        for (int64_t k = start; k < end; k += kSpan) {
            int64_t n = min64(kSpan, end - k);
            int64_t at = k * dtype_size(a.dtype);
            load_run((const char*)a.x + at, a.dtype, n, buffer);
            dropout_run(buffer, n, a.dropout, k, a.dtype);
            store_run(buffer, n, a.dtype, (char*)a.out + at);
        }
    }
}

int dropout(const ApplyDropout& a) {
    if (a.numel == 0)
        return kOk;
    int threads = worthwhile_threads(a.threads, (double)a.numel * 1e-3 / V::kSpeed);
    run_parallel(threads, ceil_div(a.numel, kDequantizePiece), apply_dropout_body, (void*)&a);
    return kOk;
}

} // namespace
} // namespace pk::PK_ISA
