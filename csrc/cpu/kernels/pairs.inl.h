// Runs of bf16 pairs (simd_pairs.h) for the inner products of bf16 activations with weights whose
// decoded values are bf16: half the look-ups, stores and multiplications of fp32 vectors.
//
// Buffers are arrays of float whose elements are pairs: n numbers take ceil(n / 2) of them.

namespace pk::PK_ISA {
namespace {

// Whether a segment's products may be of pairs: both factors must be bf16 numbers exactly. Told by
// dtypes alone, never by sizes, so that all rows of a batch go the same way.
bool in_pairs(const Segment& segment) {
    const Operand& x = segment.x;
    const Weight& w = segment.w;
    return kPairs && x.dtype == kBF16 && x.scale == 1.0f && x.depth_scale == nullptr &&
           !(x.dropout.on && x.rest) && w.dtype == kBF16 && w.entries.index == nullptr;
}

int64_t elements_of(int64_t numbers, bool pairs) { return pairs ? ceil_div(numbers, 2) : numbers; }

// n numbers that are bf16 already; up to whole vectors of `x` are read.
void pack_run(const float* x, int64_t n, float* out) {
    int64_t i = 0;
    for (; i + 2 * L <= n; i += 2 * L)
        V::store(out + i / 2, Pairs::pack(x + i));
    for (; i < n; i += 2) {
        uint32_t high = i + 1 < n ? float_bits(x[i + 1]) & 0xffff0000u : 0u;
        out[i / 2] = bits_float(high | float_bits(x[i]) >> 16);
    }
}

void copy_run(const void* p, int64_t n, float* out) {
    __builtin_memcpy(out, p, (size_t)n * 2);
    if (n % 2 != 0)
        ((uint16_t*)out)[n] = 0;
}

// Whether whole groups of 64 weights from flattened index `flat` on can be looked up.
bool in_whole_groups(const Weight& w, int64_t flat) {
    return w.kind == k4Bit && flat % 64 == 0 && w.block_shift >= 6;
}

constexpr int64_t kAheadBytes = 1024; // across page ends, where the processor stops prefetching

// sink(g, v) takes the two vectors of group g of a row.
template <class Sink>
PK_SINK inline void decode_row_groups(const Weight& w, int64_t flat, int64_t groups, Sink&& sink) {
    const float* values = codebook(w.quant_type);
    const uint8_t* p = (const uint8_t*)w.p + flat / 2;
    for (int64_t g = 0; g < groups; ++g, p += 32) {
        V::F v[2];
        __builtin_prefetch(p + kAheadBytes, 0, 3);
        float scale = block_absmax(w, (flat + 64 * g) >> w.block_shift);
        Pairs::along_row(Pairs::table(values, scale), p, v);
        sink(g, v);
    }
}

// Whether no weight with this absmax is a denormal, an infinity or NaN: what conversions to bf16 in
// hardware round as ours do.
bool rounds_plainly(float absmax) {
    constexpr uint32_t kLeast = (127u - 118u) << 23; // 2^-118: times the least code still normal
    uint32_t magnitude = float_bits(absmax) & 0x7fffffffu;
    return magnitude == 0 || magnitude - kLeast < 0x7f800000u - kLeast;
}

const int8_t* int8_codes(const Weight& w, int64_t row, int64_t col) {
    return (const int8_t*)w.p + row * w.cols + col;
}

// Quantized weights [row, col .. col + n) as bf16; how many of them, from the beginning.
int64_t decode_bf16(const Weight& w, int64_t row, int64_t col, int64_t n, uint16_t* out) {
    if (!kPairs || w.dtype != kBF16 || w.entries.index != nullptr)
        return 0;
    int64_t done = 0, flat = row * w.cols + col;
    if (w.kind == kInt8 && rounds_plainly(w.absmax[row])) {
        const int8_t* codes = int8_codes(w, row, col);
        V::F absmax = V::set1(w.absmax[row]);
        for (; done + 2 * L <= n; done += 2 * L) {
            __builtin_prefetch(codes + done + kAheadBytes, 0, 3);
            V::store((float*)(out + done), Pairs::int8_along_row(codes + done, absmax));
        }
    } else if (in_whole_groups(w, flat)) {
        const float* values = codebook(w.quant_type);
        const uint8_t* p = (const uint8_t*)w.p + flat / 2;
        for (; done + 64 <= n; done += 64) {
            V::F v[2];
            __builtin_prefetch(p + done / 2 + kAheadBytes, 0, 3);
            float scale = block_absmax(w, (flat + done) >> w.block_shift);
            if (!rounds_plainly(scale))
                break;
            Pairs::along_row(Pairs::table(values, scale), p + done / 2, v);
            V::store((float*)(out + done), v[0]);
            V::store((float*)(out + done + 32), v[1]);
        }
    }
    return done;
}

// w[row, col .. col + n); `line` is scratch for n floats.
void decode_pairs(const Weight& w, int64_t row, int64_t col, int64_t n, float* line, float* out) {
    if (w.kind == kDense && !w.dropout.on) {
        copy_run((const uint16_t*)w.p + row * w.stride + col, n, out);
        return;
    }
    int64_t flat = row * w.cols + col;
    if (in_whole_groups(w, flat)) {
        int64_t groups = n / 64;
        decode_row_groups(w, flat, groups, [&](int64_t g, const V::F v[2]) PK_SINK {
            V::store(out + 32 * g, v[0]);
            V::store(out + 32 * g + L, v[1]);
        });
        col += 64 * groups;
        n -= 64 * groups;
        out += 32 * groups;
    } else if (w.kind == kInt8) {
        int64_t done = decode_bf16(w, row, col, n, (uint16_t*)out);
        col += done;
        n -= done;
        out += done / 2;
    }
    if (n > 0) {
        decode_run(w, row, col, n, line);
        pack_run(line, n, out);
    }
}

// x(i, k0 .. k0 + n); `line` is scratch for n floats.
void operand_pairs(const Operand& x, int64_t i, int64_t k0, int64_t n, const int64_t* index,
                   float* line, float* out) {
    if (x.col_stride == 1 && index == nullptr && !x.dropout.on) {
        copy_run((const uint16_t*)x.p + i * x.row_stride + k0, n, out);
        return;
    }
    operand_run(x, i, k0, n, index, line);
    pack_run(line, n, out);
}

// Rows `low` and `high` of w, columns col .. col + n, paired; a negative `high` is a row of zeros.
// sink(j, v) takes columns j .. j + L. n is a multiple of 64 where these are whole groups, else
// `lines` is scratch for two lines of n floats, rounded up to whole vectors and so given to sink.
template <class Sink>
PK_SINK inline void decode_pair_of_rows(const Weight& w, int64_t low, int64_t high, int64_t col,
                                        int64_t n, float* lines, int64_t stride, Sink&& sink) {
    int64_t a = low * w.cols + col, b = (high < 0 ? low : high) * w.cols + col;
    if (n % 64 == 0 && in_whole_groups(w, a) && in_whole_groups(w, b)) {
        const float* values = codebook(w.quant_type);
        const uint8_t *p = (const uint8_t*)w.p + a / 2, *q = (const uint8_t*)w.p + b / 2;
        for (int64_t g = 0; g < n; g += 64, p += 32, q += 32) {
            float first = block_absmax(w, (a + g) >> w.block_shift);
            float second = high < 0 ? 0.0f : block_absmax(w, (b + g) >> w.block_shift);
            V::F v[4];
            Pairs::across_rows(Pairs::table(values, first, second), p, q, v);
#pragma GCC unroll 4
            for (int i = 0; i < 4; ++i)
                sink(g + i * L, v[i]);
        }
        return;
    }
    if (w.kind == kInt8 && n % L == 0 && rounds_plainly(w.absmax[low]) &&
        (high < 0 || rounds_plainly(w.absmax[high]))) {
        const int8_t* p = int8_codes(w, low, col);
        const int8_t* q = high < 0 ? p : int8_codes(w, high, col);
        V::F first = V::set1(w.absmax[low]), second = V::set1(high < 0 ? 0.0f : w.absmax[high]);
        for (int64_t j = 0; j < n; j += L)
            sink(j, Pairs::int8_across_rows(p + j, q + j, first, second));
        return;
    }
    int64_t whole = ceil_div(n, L) * L;
    decode_run(w, low, col, n, lines);
    if (high >= 0)
        decode_run(w, high, col, n, lines + stride);
    for (int64_t j = n; j < whole; ++j)
        lines[j] = lines[stride + j] = 0.0f;
    if (high < 0)
        __builtin_memset(lines + stride, 0, (size_t)n * sizeof(float));
    for (int64_t j = 0; j < whole; j += L)
        sink(j, Pairs::pack(lines + j, lines + stride + j));
}

} // namespace
} // namespace pk::PK_ISA
