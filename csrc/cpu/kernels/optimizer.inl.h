// One pass over parameters, gradients and optimizer state, block by block of 256 elements.

namespace pk::PK_ISA {
namespace {

// Table look-ups stay scalar: AVX2 gathers are slower than loads, and loop overhead would show.
#if defined(__GNUC__) && !defined(__clang__)
#define PK_UNROLL_8 _Pragma("GCC unroll 8")
#else
#define PK_UNROLL_8
#endif

// Whether every square is finite; what the reference calls a usable gradient.
bool usable_block(const float* g) {
    typename V::I acc = V::zero_bits();
    for (int64_t i = 0; i < kStateBlock; i += L)
        acc = V::max_magnitude(acc, V::load(g + i));
    float largest = bits_float(V::reduce_max(acc)); // NaN counts as larger than Inf
    return is_finite(largest * largest);
}

template <bool kSigned>
void decode_block(const uint8_t* code, float absmax, int64_t n, float* __restrict out) {
    const float* values = kSigned ? kDynamicValues : kUnsignedValues;
    int64_t i = 0;
    if constexpr (V::kValues != 0)
        for (; i + V::kValues <= n; i += V::kValues) {
            typename V::F part[V::kValues / L];
            V::template dynamic_values<kSigned>(code + i, V::set1(absmax), part);
            for (int j = 0; j < V::kValues / L; ++j)
                V::store(out + i + j * L, part[j]);
        }
    for (; i + L <= n; i += L)
        V::store(out + i, V::mul(V::pick(values, code + i), V::set1(absmax)));
    for (; i < n; ++i)
        out[i] = values[code[i]] * absmax;
}

// Codes of (x * lift) * inverse, one by one.
template <bool kSigned>
void encode_values(const float* x, int64_t n, float lift, float inverse, uint8_t* __restrict code) {
    const CodeBins& bins = kSigned ? kSignedBins : kUnsignedBins;
    alignas(64) float t[kStateBlock];
    alignas(64) int32_t bin[kStateBlock];
    alignas(64) uint32_t entry[kStateBlock];
    for (int64_t i = 0; i < n; ++i)
        t[i] = (x[i] * lift) * inverse;
    for (int64_t i = 0; i < n; ++i)
        bin[i] = code_bin(t[i]);
    PK_UNROLL_8
    for (int64_t i = 0; i < n; ++i)
        entry[i] = bins.entry[bin[i]];
    for (int64_t i = 0; i < n; ++i)
        code[i] = entry_code(entry[i], t[i]);
}

// Codes of x * inverse; n is a multiple of V::kCodes.
template <bool kSigned>
void encode_part(const float* x, float inverse, int64_t n, uint8_t* code) {
    const CodeSegments& segments = kSigned ? kSignedSegments : kUnsignedSegments;
    const CodeBins& bins = kSigned ? kSignedBins : kUnsignedBins;
    for (int64_t i = 0; i < n; i += V::kCodes) {
        uint64_t doubt = V::template dynamic_codes<kSigned>(segments, x + i, inverse, code + i);
        for (; doubt != 0; doubt &= doubt - 1) {
            int64_t at = i + __builtin_ctzll(doubt);
            float t = x[at] * inverse;
            code[at] = entry_code(bins.entry[code_bin(t)], t);
        }
    }
}

// The codes are of x / absmax. Denormal blocks are lifted by 2^64 (exact).
template <bool kSigned>
void encode_block(const float* x, int64_t n, float absmax, uint8_t* __restrict code) {
    float lift = absmax < kSmallestNormal ? 18446744073709551616.0f : 1.0f;
    float inverse = absmax == 0.0f ? 0.0f : 1.0f / (absmax * lift);
    int64_t done = 0;
    if constexpr (V::kCodes != 0) {
        if (lift == 1.0f) {
            done = n / V::kCodes * V::kCodes;
            encode_part<kSigned>(x, inverse, done, code);
        }
    }
    if (done < n)
        encode_values<kSigned>(x + done, n - done, lift, inverse, code + done);
}

void store_rounding(const float* p, int64_t n, const int64_t* rounding, int64_t at, void* out) {
    uint16_t* h = (uint16_t*)out;
    uint64_t first = (uint64_t)(rounding[3] + at);
    for (int64_t i = 0; i < n;) {
        uint64_t index = first + (uint64_t)i;
        Philox4 r = rounding_words((uint64_t)rounding[0], (uint32_t)rounding[1],
                                   (uint32_t)rounding[2], index >> 2);
        for (uint64_t j = index & 3; j < 4 && i < n; ++j, ++i)
            h[i] = float_to_bf16_random(p[i], r.w[j]);
    }
}

template <int R>
void update_run(const Update u, const float* __restrict g, float* __restrict p, float* __restrict m,
                float* __restrict v, int64_t n) {
    for (int64_t i = 0; i < n; ++i) {
        if (R == kAdamW)
            adamw_element(u, g[i], p[i], m[i], v[i]);
        else if (R == kLion)
            lion_element(u, g[i], p[i], m[i]);
        else
            momentum_element(u, g[i], p[i], m[i]);
    }
}

// The moments of AdamW's blocks with 8-bit state. A block is encoded while the next one is updated:
// the update waits for its divisions and roots, of which encoding has none. `old` and `fresh` take
// turns.
struct Moments {
    alignas(64) float pair[2][2][kStateBlock];
    int turn = 0;
    uint8_t* code1 = nullptr; // of the block that waits to be encoded; null: none does
    uint8_t* code2 = nullptr;
    float absmax1 = 0.0f;
    float absmax2 = 0.0f;
};

void encode_waiting(Moments& w) {
    if (w.code1 == nullptr)
        return;
    const float (*old)[kStateBlock] = w.pair[w.turn ^ 1];
    encode_block<true>(old[0], kStateBlock, w.absmax1, w.code1);
    encode_block<false>(old[1], kStateBlock, w.absmax2, w.code2);
    w.code1 = nullptr;
}

// AdamW on a whole block of codes, and the codes of the block before it.
template <bool kWaiting>
void adamw_coded(const Update& u, const float* g, float* p, const uint8_t* code1,
                 const uint8_t* code2, float* absmax1, float* absmax2, Moments& w) {
    using F = typename V::F;
    constexpr int kParts = V::kValues != 0 ? V::kValues / L : 1;
    constexpr int64_t kSpan = V::kCodes > kParts * L ? V::kCodes : kParts * L;
    const F beta1 = V::set1(u.beta1), rest1 = V::set1(u.one_minus_beta1);
    const F beta2 = V::set1(u.beta2), rest2 = V::set1(u.one_minus_beta2);
    const F correction = V::set1(u.inverse_correction), eps = V::set1(u.eps);
    const F decay = V::set1(u.decay), step = V::set1(u.step_size);
    const F scale1 = V::set1(*absmax1), scale2 = V::set1(*absmax2);
    const float inverse1 = kWaiting ? 1.0f / w.absmax1 : 0.0f;
    const float inverse2 = kWaiting ? 1.0f / w.absmax2 : 0.0f;
    float *m = w.pair[w.turn][0], *v = w.pair[w.turn][1];
    const float *old1 = w.pair[w.turn ^ 1][0], *old2 = w.pair[w.turn ^ 1][1];
    typename V::I largest1 = V::zero_bits(), largest2 = V::zero_bits();
    for (int64_t span = 0; span < kStateBlock; span += kSpan) {
        for (int64_t i = span; i < span + kSpan; i += kParts * L) {
            F first[kParts], second[kParts];
            if constexpr (V::kValues != 0) {
                V::template dynamic_values<true>(code1 + i, scale1, first);
                V::template dynamic_values<false>(code2 + i, scale2, second);
            } else {
                first[0] = V::mul(V::pick(kDynamicValues, code1 + i), scale1);
                second[0] = V::mul(V::pick(kUnsignedValues, code2 + i), scale2);
            }
            for (int j = 0; j < kParts; ++j) {
                int64_t at = i + j * L;
                F grad = V::load(g + at);
                F one = V::add(V::mul(first[j], beta1), V::mul(grad, rest1));
                F two = V::add(V::mul(second[j], beta2), V::mul(V::mul(grad, grad), rest2));
                F denominator = V::add(V::mul(V::sqrt(two), correction), eps);
                F change = V::mul(step, V::div(one, denominator));
                V::store(p + at, V::sub(V::mul(V::load(p + at), decay), change));
                V::store(m + at, one);
                V::store(v + at, two);
                largest1 = V::max_magnitude(largest1, one);
                largest2 = V::max_magnitude(largest2, two);
            }
        }
        if constexpr (kWaiting && V::kCodes != 0) {
            encode_part<true>(old1 + span, inverse1, kSpan, w.code1 + span);
            encode_part<false>(old2 + span, inverse2, kSpan, w.code2 + span);
        }
    }
    *absmax1 = bits_float(V::reduce_max(largest1));
    *absmax2 = bits_float(V::reduce_max(largest2));
}

void adamw_coded_block(const Update& u, const float* g, float* p, uint8_t* code1, uint8_t* code2,
                       float* absmax1, float* absmax2, Moments& w) {
    bool waiting = V::kCodes != 0 && w.code1 != nullptr;
    if (!waiting)
        adamw_coded<false>(u, g, p, code1, code2, absmax1, absmax2, w);
    else
        adamw_coded<true>(u, g, p, code1, code2, absmax1, absmax2, w);
    w.turn ^= 1;
    w.code1 = code1;
    w.code2 = code2;
    w.absmax1 = *absmax1;
    w.absmax2 = *absmax2;
    // Zero and denormal statistics have no plain reciprocal.
    if (V::kCodes == 0 || !(w.absmax1 >= kSmallestNormal && w.absmax2 >= kSmallestNormal))
        encode_waiting(w);
}

// Elements at .. at + n of a tensor, n <= 256; false where the gradient is not finite. Whole fp32
// blocks are updated in place, everything else by way of a buffer. Codes may be left to wait in
// `w`.
template <int R>
bool optimizer_block(const OptimizerTensor& t, const Update& u, const int64_t* rounding, int64_t at,
                     int64_t n, Moments& w) {
    alignas(64) float gradient[kStateBlock], parameter[kStateBlock];
    alignas(64) float first[kStateBlock], second[kStateBlock];
    bool whole = n == kStateBlock;
    const float* g = (const float*)t.grad + at;
    if (!whole || t.grad_dtype != kF32 || u.grad_scale != 1.0f) {
        load_run((const char*)t.grad + at * dtype_size((int)t.grad_dtype), (int)t.grad_dtype, n,
                 gradient);
        for (int64_t i = n; i < kStateBlock; ++i)
            gradient[i] = 0.0f;
        float scale = u.grad_scale;
        if (scale != 1.0f)
            for (int64_t i = 0; i < kStateBlock; ++i)
                gradient[i] *= scale;
        g = gradient;
    }
    if (!usable_block(g))
        return false;
    char* target = (char*)t.param + at * dtype_size((int)t.param_dtype);
    bool direct = whole && t.param_dtype == kF32;
    float* p = direct ? (float*)target : parameter;
    if (!direct)
        load_run(target, (int)t.param_dtype, n, p);
    int64_t block = at / kStateBlock;
    bool coded = t.absmax1 != nullptr;
    uint8_t* code1 = (uint8_t*)t.state1 + at;
    uint8_t* code2 = (uint8_t*)t.state2 + at;
    float* m = coded ? first : (float*)t.state1 + at;
    float* v = coded || R != kAdamW ? second : (float*)t.state2 + at;
    bool one_sweep = R == kAdamW && coded && whole;
    if (one_sweep) {
        adamw_coded_block(u, g, p, code1, code2, t.absmax1 + block, t.absmax2 + block, w);
    } else {
        if (coded) {
            decode_block<true>(code1, t.absmax1[block], n, m);
            if (R == kAdamW)
                decode_block<false>(code2, t.absmax2[block], n, v);
        }
        update_run<R>(u, g, p, m, v, n);
    }
    if (rounding != nullptr && t.param_dtype == kBF16)
        store_rounding(p, n, rounding, at, target);
    else if (!direct)
        store_run(p, n, (int)t.param_dtype, target);
    if (coded && !one_sweep) {
        t.absmax1[block] = bits_float(magnitude_bits(m, n));
        if (R == kAdamW)
            t.absmax2[block] = bits_float(magnitude_bits(v, n));
        encode_block<true>(m, n, t.absmax1[block], code1);
        if (R == kAdamW)
            encode_block<false>(v, n, t.absmax2[block], code2);
    }
    return true;
}

template <int R>
void optimizer_body(void* context, Queue* queue) {
    const OptimizerStep& s = *(const OptimizerStep*)context;
    Moments w;
    int64_t tensor = 0; // chunks come in growing order, so the search goes on from here
    for (int64_t chunk = next_chunk(queue); chunk >= 0; chunk = next_chunk(queue)) {
        while (s.tensors[tensor].chunk_end <= chunk)
            ++tensor;
        const OptimizerTensor& t = s.tensors[tensor];
        int64_t chunks = ceil_div(t.numel, kOptimizerChunk * kStateBlock);
        int64_t start = (chunk - (t.chunk_end - chunks)) * kOptimizerChunk * kStateBlock;
        int64_t end = min64(t.numel, start + kOptimizerChunk * kStateBlock);
        const Update& u = s.hyper[tensor];
        const int64_t* rounding = s.rounding == nullptr ? nullptr : s.rounding + 4 * tensor;
        int64_t skipped = 0;
        for (int64_t at = start; at < end; at += kStateBlock)
            if (!optimizer_block<R>(t, u, rounding, at, min64(kStateBlock, end - at), w))
                ++skipped;
        if (skipped != 0)
            __atomic_fetch_add(&s.skipped[tensor], skipped, __ATOMIC_RELAXED);
    }
    encode_waiting(w);
}

// Fills chunk_end; returns the number of chunks and adds up the elements.
int64_t count_chunks(OptimizerTensor* tensors, int64_t count, double* numel) {
    int64_t chunks = 0;
    for (int64_t i = 0; i < count; ++i) {
        chunks += ceil_div(tensors[i].numel, kOptimizerChunk * kStateBlock);
        tensors[i].chunk_end = chunks;
        *numel += (double)tensors[i].numel;
    }
    return chunks;
}

int optimizer_step(OptimizerStep& s) {
    double numel = 0.0;
    int64_t chunks = count_chunks(s.tensors, s.count, &numel);
    if (chunks == 0)
        return kOk;
    Body body = s.rule == kAdamW  ? optimizer_body<kAdamW>
                : s.rule == kLion ? optimizer_body<kLion>
                                  : optimizer_body<kMomentum>;
    run_parallel(worthwhile_threads(s.threads, numel * 2e-3 / V::kSpeed), chunks, body, &s);
    return kOk;
}

// The sum of squares of a chunk in 16 fixed lanes, so that neither threads nor vectors change it.
void square_sums_body(void* context, Queue* queue) {
    const OptimizerStep& s = *(const OptimizerStep*)context;
    constexpr int64_t kSpan = 1024;
    int64_t tensor = 0;
    for (int64_t chunk = next_chunk(queue); chunk >= 0; chunk = next_chunk(queue)) {
        while (s.tensors[tensor].chunk_end <= chunk)
            ++tensor;
        const OptimizerTensor& t = s.tensors[tensor];
        int64_t chunks = ceil_div(t.numel, kOptimizerChunk * kStateBlock);
        int64_t start = (chunk - (t.chunk_end - chunks)) * kOptimizerChunk * kStateBlock;
        int64_t end = min64(t.numel, start + kOptimizerChunk * kStateBlock);
        double lanes[16] = {};
        alignas(64) float g[kSpan];
        for (int64_t at = start; at < end; at += kSpan) {
            int64_t n = min64(kSpan, end - at);
            load_run((const char*)t.grad + at * dtype_size(t.grad_dtype), t.grad_dtype, n, g);
            for (int64_t i = n; i < kSpan; ++i)
                g[i] = 0.0f;
            for (int64_t i = 0; i < kSpan; i += 16)
                for (int64_t j = 0; j < 16; ++j)
                    lanes[j] += (double)g[i + j] * (double)g[i + j];
        }
        double sum = 0.0;
        for (double lane : lanes)
            sum += lane;
        s.sums[chunk] = sum;
    }
}

int square_sums(OptimizerStep& s) {
    double numel = 0.0;
    int64_t chunks = count_chunks(s.tensors, s.count, &numel);
    if (chunks == 0)
        return kOk;
    run_parallel(worthwhile_threads(s.threads, numel * 3e-4 / V::kSpeed), chunks, square_sums_body,
                 &s);
    return kOk;
}

} // namespace
} // namespace pk::PK_ISA
