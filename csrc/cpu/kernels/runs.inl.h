// Runs of contiguous elements: conversion, dropout, decoding of stored weights into fp32.
// No run reads or writes past its last element: tails go through a small buffer or one by one.

namespace pk::PK_ISA {
namespace {

constexpr int L = V::kLanes;

void load_run(const void* src, int dtype, int64_t n, float* dst) {
    int64_t i = 0;
    if (dtype == kF32) {
        __builtin_memcpy(dst, src, (size_t)n * sizeof(float));
        return;
    }
    const uint16_t* h = (const uint16_t*)src;
    if (dtype == kBF16) {
        for (; i + L <= n; i += L)
            V::store(dst + i, V::load_bf16(h + i));
    } else {
        for (; i + L <= n; i += L)
            V::store(dst + i, V::load_f16(h + i));
    }
    for (; i < n; ++i)
        dst[i] = load_as_float(src, dtype, i);
}

void store_run(const float* src, int64_t n, int dtype, void* dst) {
    if (dtype == kF32) {
        __builtin_memcpy(dst, src, (size_t)n * sizeof(float));
        return;
    }
    uint16_t* h = (uint16_t*)dst;
    int64_t i = 0;
    if (dtype == kBF16) {
        for (; i + L <= n; i += L)
            V::store_bf16(h + i, V::load(src + i));
    } else {
        for (; i + L <= n; i += L)
            V::store_f16(h + i, V::load(src + i));
    }
    for (; i < n; ++i)
        store_from_float(dst, dtype, i, src[i]);
}

void round_run(float* x, int64_t n, int dtype) {
    int64_t i = 0;
    if (dtype == kF32)
        return;
    if (dtype == kBF16) {
        for (; i + L <= n; i += L)
            V::store(x + i, V::round_bf16(V::load(x + i)));
    } else {
        for (; i + L <= n; i += L)
            V::store(x + i, V::round_f16(V::load(x + i)));
    }
    for (; i < n; ++i)
        x[i] = round_to(x[i], dtype);
}

void scale_run(float* x, int64_t n, float scale) {
    if (scale == 1.0f)
        return;
    int64_t i = 0;
    for (; i + L <= n; i += L)
        V::store(x + i, V::mul(V::load(x + i), V::set1(scale)));
    for (; i < n; ++i)
        x[i] *= scale;
}

void mul_run(float* x, const float* y, int64_t n) {
    int64_t i = 0;
    for (; i + L <= n; i += L)
        V::store(x + i, V::mul(V::load(x + i), V::load(y + i)));
    for (; i < n; ++i)
        x[i] *= y[i];
}

void add_run(float* x, const float* y, int64_t n) {
    int64_t i = 0;
    for (; i + L <= n; i += L)
        V::store(x + i, V::add(V::load(x + i), V::load(y + i)));
    for (; i < n; ++i)
        x[i] += y[i];
}

// Philox words of `groups` counters starting at `counter`, in element order. The inner loops over
// 16 counters are there for the compiler to vectorise.
void philox_words(uint64_t seed, uint64_t counter, int groups, uint32_t* words) {
    constexpr int kBatch = 16;
    for (int g = 0; g < groups; g += kBatch) {
        uint32_t c0[kBatch], c1[kBatch], c2[kBatch], c3[kBatch];
        for (int i = 0; i < kBatch; ++i) {
            uint64_t c = counter + (uint64_t)(g + i);
            c0[i] = (uint32_t)c;
            c1[i] = (uint32_t)(c >> 32);
            c2[i] = 0;
            c3[i] = 0;
        }
        uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
        for (int r = 0; r < 10; ++r) {
            for (int i = 0; i < kBatch; ++i) {
                uint64_t p0 = (uint64_t)0xD2511F53u * c0[i];
                uint64_t p1 = (uint64_t)0xCD9E8D57u * c2[i];
                c0[i] = (uint32_t)(p1 >> 32) ^ c1[i] ^ k0;
                c2[i] = (uint32_t)(p0 >> 32) ^ c3[i] ^ k1;
                c1[i] = (uint32_t)p1;
                c3[i] = (uint32_t)p0;
            }
            k0 += 0x9E3779B9u;
            k1 += 0xBB67AE85u;
        }
        for (int i = 0; i < kBatch; ++i) {
            uint32_t* w = words + 4 * (g + i);
            w[0] = c0[i];
            w[1] = c1[i];
            w[2] = c2[i];
            w[3] = c3[i];
        }
    }
}

// x[i] = kept ? round(x[i] * scale) : 0 for the elements `first` .. `first + n` of the tensor.
void dropout_run(float* x, int64_t n, const Dropout& d, int64_t first, int dtype) {
    first += d.first;
    constexpr int64_t kSpan = 256;
    uint32_t words[kSpan + 16 * 4 + 4];
    for (int64_t i = 0; i < n;) {
        int skip = (int)((first + i) & 3);
        int64_t len = min64(n - i, kSpan);
        uint64_t counter = (uint64_t)(first + i) / 4;
        philox_words(d.seed, counter, (int)ceil_div(skip + len, 4), words);
        float* y = x + i;
        scale_run(y, len, d.scale);
        round_run(y, len, dtype);
        int64_t j = 0;
        for (; j + L <= len; j += L)
            V::store(y + j, V::keep(V::load(y + j), words + skip + j, d.threshold));
        for (; j < len; ++j)
            y[j] = words[skip + j] >= d.threshold ? y[j] : 0.0f;
        i += len;
    }
}

float block_absmax(const Weight& w, int64_t block) {
    if (w.absmax != nullptr)
        return w.absmax[block];
    return nested_value(w.nested[block], w.nested_absmax[block / kNestedBlock], w.nested_offset);
}

// A NaN scale in one form: rounding by integer addition must not carry out of it.
float canonical(float scale) { return scale == scale ? scale : bits_float(0x7fc00000u); }

// `n` weights of one block from flattened index `flat` on.
void decode_in_block(const V::Lut& lut, const uint8_t* bytes, int64_t flat, int64_t n, float* out) {
    const uint8_t* p = bytes + (flat >> 1);
    int64_t i = 0;
    if ((flat & 1) && n > 0) {
        out[0] = V::lookup_one(lut, *p++ & 15);
        i = 1;
    }
    for (; i + V::kLookup <= n; i += V::kLookup, p += V::kLookup / 2)
        V::lookup(lut, p, out + i);
    for (; i < n; i += 2, ++p) {
        out[i] = V::lookup_one(lut, *p >> 4);
        if (i + 1 < n)
            out[i + 1] = V::lookup_one(lut, *p & 15);
    }
}

// Where decoded vectors go: take(group, i, v) gets vector i of a group of kWide weights.
struct ToLine {
    float* out;
    PK_SINK inline void take(int64_t group, int i, V::F v) {
        V::store(out + group * V::kWide + i * L, v);
    }
};

template <int kDtype, bool kOrdered, class Sink>
PK_SINK inline void decode_group(const V::Planes& planes, const uint8_t* p, int64_t group,
                                 Sink& sink) {
    auto to = [&](int i, V::F v) PK_SINK { sink.take(group, i, v); };
    if constexpr (kOrdered)
        V::wide<kDtype>(planes, p, to);
    else
        V::wide_unordered<kDtype>(planes, p, to);
}

// `groups` times kWide weights from flattened index `flat` on, a multiple of kWide; blocks are not
// smaller than kWide. The hot loop of everything that reads 4-bit weights.
template <int kDtype, bool kOrdered = true, class Sink>
void decode_groups(const Weight& w, int64_t flat, int64_t groups, Sink& sink) {
    const V::Codebook values = V::load_codebook(codebook(w.quant_type));
    const uint8_t* p = (const uint8_t*)w.p + flat / 2;
    int64_t per_block = ((int64_t)1 << w.block_shift) / V::kWide;
    int64_t block = flat >> w.block_shift;
    if (groups == 0)
        return;
    if (per_block == 1) {
        // The table of the next block is made before the current one is used: its long chain of
        // dependent steps would otherwise stall the look-ups.
        V::Planes planes = V::make_planes<kDtype>(values, canonical(block_absmax(w, block)));
        for (int64_t g = 0; g < groups; ++g, p += V::kWide / 2) {
            float scale = canonical(block_absmax(w, block + min64(g + 1, groups - 1)));
            V::Planes next = V::make_planes<kDtype>(values, scale);
            decode_group<kDtype, kOrdered>(planes, p, g, sink);
            planes = next;
        }
        return;
    }
    int64_t left = (block + 1) * per_block - flat / V::kWide; // groups in this block
    for (int64_t g = 0; g < groups; ++block, left = per_block) {
        V::Planes planes = V::make_planes<kDtype>(values, canonical(block_absmax(w, block)));
        for (int64_t end = min64(groups, g + left); g < end; ++g, p += V::kWide / 2)
            decode_group<kDtype, kOrdered>(planes, p, g, sink);
    }
}

// `n` weights from flattened index `flat` on, any parity, across any number of blocks.
template <int kDtype>
void decode_4bit_as(const Weight& w, int64_t flat, int64_t n, float* out) {
    if (flat % V::kWide == 0 && ((int64_t)1 << w.block_shift) >= V::kWide) {
        int64_t groups = n / V::kWide;
        ToLine line = {out};
        decode_groups<kDtype>(w, flat, groups, line);
        flat += groups * V::kWide;
        out += groups * V::kWide;
        n -= groups * V::kWide;
    }
    while (n > 0) {
        int64_t block = flat >> w.block_shift;
        int64_t len = min64(n, ((block + 1) << w.block_shift) - flat);
        V::Lut lut = V::make_lut(codebook(w.quant_type), canonical(block_absmax(w, block)), kDtype);
        decode_in_block(lut, (const uint8_t*)w.p, flat, len, out);
        flat += len;
        out += len;
        n -= len;
    }
}

void decode_4bit(const Weight& w, int64_t flat, int64_t n, float* out) {
    if (w.dtype == kBF16)
        decode_4bit_as<kBF16>(w, flat, n, out);
    else if (w.dtype == kF16)
        decode_4bit_as<kF16>(w, flat, n, out);
    else
        decode_4bit_as<kF32>(w, flat, n, out);
}

// (code * row absmax) * (1/127), each product rounded, then rounded to the dtype.
template <int kDtype>
void decode_int8_as(const int8_t* codes, float absmax, int64_t n, float* out) {
    int64_t i = 0;
    for (; i + L <= n; i += L) {
        V::F v = V::mul(V::load_i8(codes + i), V::set1(absmax));
        v = V::mul(v, V::set1(kInt8Step));
        if constexpr (kDtype == kBF16)
            v = V::round_bf16(v);
        if constexpr (kDtype == kF16)
            v = V::round_f16(v);
        V::store(out + i, v);
    }
    for (; i < n; ++i) {
        float v = (float)codes[i] * absmax;
        out[i] = round_to(v * kInt8Step, kDtype);
    }
}

void decode_int8(const Weight& w, int64_t row, int64_t col, int64_t n, float* out) {
    const int8_t* codes = (const int8_t*)w.p + row * w.cols + col;
    if (w.dtype == kBF16)
        decode_int8_as<kBF16>(codes, w.absmax[row], n, out);
    else if (w.dtype == kF16)
        decode_int8_as<kF16>(codes, w.absmax[row], n, out);
    else
        decode_int8_as<kF32>(codes, w.absmax[row], n, out);
}

// Asks for the bytes of a run that is needed soon. Inlined by force: GCC takes a function that only
// prefetches for one without effects, and drops the calls.
PK_INLINE void prefetch_run(const Weight& w, int64_t row, int64_t col, int64_t n) {
    int64_t first = (w.kind == kDense ? row * w.stride : row * w.cols) + col;
    int64_t bits = w.kind == k4Bit ? 4 : w.kind == kInt8 ? 8 : 8 * dtype_size(w.dtype);
    const char* p = (const char*)w.p + first * bits / 8;
    for (int64_t b = 0; b < n * bits / 8; b += 64)
        __builtin_prefetch(p + b, 0, 2);
    if (w.kind == k4Bit) {
        int64_t block = first >> w.block_shift;
        if (w.absmax != nullptr)
            __builtin_prefetch(w.absmax + block);
        else
            __builtin_prefetch(w.nested + block);
    }
}

// Adds the entries within [row, col .. col + n) of the stored matrix.
void add_entries(const Weight& w, int64_t row, int64_t col, int64_t n, float* out) {
    const Entries& e = w.entries;
    int64_t first = row * w.cols + col;
    int64_t low = e.start[row], high = e.start[row + 1], end = high;
    while (low < high) {
        int64_t middle = low + (high - low) / 2;
        if (e.index[middle] < first)
            low = middle + 1;
        else
            high = middle;
    }
    for (; low < end && e.index[low] < first + n; ++low)
        out[e.index[low] - first] += load_as_float(e.value, e.dtype, low);
}

// Elements [row, col .. col + n) of the stored matrix as fp32 values of the activation's dtype,
// plus the entries that stand there.
void decode_run(const Weight& w, int64_t row, int64_t col, int64_t n, float* out) {
    if (w.kind == k4Bit) {
        decode_4bit(w, row * w.cols + col, n, out);
    } else if (w.kind == kInt8) {
        decode_int8(w, row, col, n, out);
    } else {
        const char* p = (const char*)w.p + (row * w.stride + col) * dtype_size(w.dtype);
        load_run(p, w.dtype, n, out);
        if (w.dropout.on)
            dropout_run(out, n, w.dropout, row * w.dropout.cols + col, w.dtype);
    }
    if (w.entries.index != nullptr)
        add_entries(w, row, col, n, out);
}

// Whether stored rows are what decoding would give.
bool plain_floats(const Weight& w) {
    return w.kind == kDense && w.dtype == kF32 && !w.dropout.on && w.entries.index == nullptr;
}

// x[i] -= dropout(x)[i], elements as in dropout_run().
void subtract_dropout_run(float* x, int64_t n, const Dropout& d, int64_t first, int dtype) {
    constexpr int64_t kSpan = 256;
    float kept[kSpan];
    for (int64_t i = 0; i < n; i += kSpan) {
        int64_t len = min64(n - i, kSpan);
        __builtin_memcpy(kept, x + i, (size_t)len * sizeof(float));
        dropout_run(kept, len, d, first + i, dtype);
        for (int64_t j = 0; j < len; ++j)
            x[i + j] -= kept[j];
    }
}

// x(i, k0 .. k0 + n) as fp32; `index` renames positions of the depth.
void operand_run(const Operand& x, int64_t i, int64_t k0, int64_t n, const int64_t* index,
                 float* out) {
    if (x.col_stride == 1 && index == nullptr) {
        const char* p = (const char*)x.p + (i * x.row_stride + k0) * dtype_size(x.dtype);
        load_run(p, x.dtype, n, out);
    } else {
        for (int64_t k = 0; k < n; ++k) {
            int64_t at = index == nullptr ? k0 + k : index[k0 + k];
            out[k] = load_as_float(x.p, x.dtype, i * x.row_stride + at * x.col_stride);
        }
    }
    if (x.dropout.on && x.rest)
        subtract_dropout_run(out, n, x.dropout, i * x.dropout.cols + k0, x.dtype);
    else if (x.dropout.on)
        dropout_run(out, n, x.dropout, i * x.dropout.cols + k0, x.dtype);
    scale_run(out, n, x.scale);
    if (x.depth_scale != nullptr)
        mul_run(out, x.depth_scale + k0, n);
}

} // namespace
} // namespace pk::PK_ISA
