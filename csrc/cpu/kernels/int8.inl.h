// LLM.int8(): rows of x rounded to 8 bits against INT8 weights, exact integer sums, and columns of
// x with large values ("outliers") apart in fp32. Three passes: measure the rows and find the
// outlier columns, round, multiply.

namespace pk::PK_ISA {
namespace {

constexpr int64_t kIntRows = 64;    // rows of x, and of codes, that share a tile of sums
constexpr int64_t kIntDepth = 4096; // bytes of a row that a tile walks at a time
constexpr int64_t kMeasured = 512;  // elements of a row in fp32 at a time
constexpr uint32_t kMagnitude = 0x7fffffffu;
constexpr uint32_t kInfinity = 0x7f800000u;

struct IntTask {
    const Int8Product* p;
    uint32_t threshold; // bits; magnitudes of at least this are outliers
    int64_t chunk_rows;
};

int64_t int_depth(int64_t k) { return ceil_div(k, kIntAlign) * kIntAlign; }

// Magnitudes as integers are in the order of the numbers, NaN above all of them.
void measure_row(const IntTask& task, int64_t i) {
    const Int8Product& p = *task.p;
    float line[kMeasured];
    uint32_t most = 0;
    for (int64_t k0 = 0; k0 < p.k; k0 += kMeasured) {
        int64_t n = min64(kMeasured, p.k - k0);
        load_run((const char*)p.x + (i * p.k + k0) * dtype_size(p.dtype), p.dtype, n, line);
        uint32_t found = 0;
        for (int64_t k = 0; k < n; ++k) {
            uint32_t bits;
            __builtin_memcpy(&bits, line + k, 4);
            bits &= kMagnitude;
            bool outlier = bits >= task.threshold && bits <= kInfinity;
            found |= outlier;
            int32_t kept = outlier ? 0 : (int32_t)bits; // below 2^31: signed order
            most = (int32_t)most < kept ? (uint32_t)kept : most;
        }
        for (int64_t k = 0; found && k < n; ++k) {
            uint32_t bits = float_bits(line[k]) & kMagnitude;
            if (bits >= task.threshold && bits <= kInfinity)
                __atomic_store_n(p.outlier + k0 + k, (uint8_t)1, __ATOMIC_RELAXED);
        }
    }
    p.row_absmax[i] = bits_float(most);
}

void measure_body(void* context, Queue* queue) {
    const IntTask& task = *(const IntTask*)context;
    for (int64_t chunk = next_chunk(queue); chunk >= 0; chunk = next_chunk(queue))
        for (int64_t i = chunk * task.chunk_rows;
             i < min64(task.p->m, (chunk + 1) * task.chunk_rows); ++i)
            measure_row(task, i);
}

// q = nearest(x * (127 / absmax)), ties to even; zeros for rows that hold NaN or Inf.
void round_row(const Int8Product& p, int64_t i) {
    float absmax = p.row_absmax[i];
    bool finite = is_finite(absmax);
    // 127 / absmax must not overflow for tiny rows: those are lifted, exactly.
    float lift = absmax < 0x1p-96f ? 0x1p64f : 1.0f;
    float scale = finite && absmax > 0.0f ? 127.0f / (absmax * lift) : 0.0f;
    int8_t* codes = p.codes_of_x + i * int_depth(p.k);
    float line[kMeasured];
    for (int64_t k0 = 0; k0 < p.k; k0 += kMeasured) {
        int64_t n = min64(kMeasured, p.k - k0);
        load_run((const char*)p.x + (i * p.k + k0) * dtype_size(p.dtype), p.dtype, n, line);
        for (int64_t k = 0; k < n; ++k) {
            float v = line[k] * lift * scale;
            v = v > 127.0f ? 127.0f : v; // an outlier, zero below
            v = v > -127.0f ? v : -127.0f;
            codes[k0 + k] = (int8_t)(int32_t)__builtin_rintf(v);
        }
    }
    if (!finite)
        __builtin_memset(codes, 0, (size_t)p.k);
    for (int64_t c = 0; c < p.outliers; ++c)
        codes[p.columns[c]] = 0;
    __builtin_memset(codes + p.k, 0, (size_t)(int_depth(p.k) - p.k));
    int32_t sum = 0;
    for (int64_t k = 0; k < p.k; ++k)
        sum += codes[k];
    p.row_sum[i] = sum;
    for (int64_t c = 0; c < p.outliers; ++c)
        p.outlier_x[i * p.outliers + c] = load_as_float(p.x, p.dtype, i * p.k + p.columns[c]);
}

void round_body(void* context, Queue* queue) {
    const IntTask& task = *(const IntTask*)context;
    for (int64_t chunk = next_chunk(queue); chunk >= 0; chunk = next_chunk(queue))
        for (int64_t i = chunk * task.chunk_rows;
             i < min64(task.p->m, (chunk + 1) * task.chunk_rows); ++i)
            round_row(*task.p, i);
}

// sums[c][r] += codes row r times row c of x, over `depth` bytes of which whole steps are `whole`.
template <int R, int C>
void int_tile(const int8_t* w, int64_t w_stride, const int8_t* x, int64_t x_stride, int64_t depth,
              int32_t* sums) {
    Ints::Sums acc[R][C];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c)
            acc[r][c] = Ints::zero();
    int64_t k = 0;
    for (; k + Ints::kBytes <= depth; k += Ints::kBytes) {
        Ints::Bytes codes[R];
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r)
            codes[r] = Ints::codes(w + r * w_stride + k);
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c)
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r)
                acc[r][c] = Ints::dot(codes[r], x + c * x_stride + k, acc[r][c]);
    }
    if (k < depth) {
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
            Ints::Bytes codes = Ints::codes(w + r * w_stride + k, depth - k);
#pragma GCC unroll 4
            for (int c = 0; c < C; ++c)
                acc[r][c] = Ints::dot(codes, x + c * x_stride + k, acc[r][c]);
        }
    }
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c)
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r)
            sums[c * kIntRows + r] =
                (int32_t)((uint32_t)sums[c * kIntRows + r] + (uint32_t)Ints::total(acc[r][c]));
}

template <int R, int C>
void int_tile_of(int64_t r, int64_t c, const int8_t* w, int64_t w_stride, const int8_t* x,
                 int64_t x_stride, int64_t depth, int32_t* sums) {
    if constexpr (R > 1) {
        if (r < R)
            return int_tile_of<R - 1, C>(r, c, w, w_stride, x, x_stride, depth, sums);
    }
    if constexpr (C > 1) {
        if (c < C)
            return int_tile_of<R, C - 1>(r, c, w, w_stride, x, x_stride, depth, sums);
    }
    int_tile<R, C>(w, w_stride, x, x_stride, depth, sums);
}

// Rows i0 .. of x by `n` stored rows from j0 on.
void multiply_ints(const Int8Product& p, int64_t i0, int64_t m, int64_t j0, int64_t n,
                   int32_t* sums) {
    int64_t stride = int_depth(p.k);
    __builtin_memset(sums, 0, (size_t)(m * kIntRows) * sizeof(int32_t));
    for (int64_t k0 = 0; k0 < p.k; k0 += kIntDepth) {
        int64_t depth = min64(kIntDepth, p.k - k0);
        for (int64_t j = 0; j < n; j += Ints::kCodeRows) {
            const int8_t* w = p.codes + (j0 + j) * p.k + k0;
            if (k0 == 0 && i0 == 0) // a stretch ahead of what the processor sees as streams
                for (int64_t r = 0; r < min64(Ints::kCodeRows, n - j - Ints::kCodeRows); ++r)
                    for (int64_t b = 0; b < min64(depth, 512); b += 64)
                        __builtin_prefetch(w + (Ints::kCodeRows + r) * p.k + b, 0, 2);
            for (int64_t i = 0; i < m; i += Ints::kRows)
                int_tile_of<Ints::kCodeRows, Ints::kRows>(n - j, m - i, w, p.k,
                                                          p.codes_of_x + (i0 + i) * stride + k0,
                                                          stride, depth, sums + i * kIntRows + j);
        }
    }
}

// The outlier columns of stored row j against every row of x: scb / 127 is still to come.
void multiply_outliers(const Int8Product& p, int64_t i0, int64_t m, int64_t j0, int64_t n,
                       float* out) {
    constexpr int64_t kColumns = 256;
    float codes[kColumns];
    __builtin_memset(out, 0, (size_t)(m * kIntRows) * sizeof(float));
    for (int64_t j = 0; j < n; ++j) {
        const int8_t* row = p.codes + (j0 + j) * p.k;
        for (int64_t c0 = 0; c0 < p.outliers; c0 += kColumns) {
            int64_t count = min64(kColumns, p.outliers - c0);
            for (int64_t c = 0; c < count; ++c)
                codes[c] = (float)row[p.columns[c0 + c]];
            for (int64_t i = 0; i < m; ++i) {
                const float* x = p.outlier_x + (i0 + i) * p.outliers + c0;
                V::F sum = V::zero();
                int64_t c = 0;
                for (; c + L <= count; c += L)
                    sum = V::fma(V::load(codes + c), V::load(x + c), sum);
                float total = V::reduce_add(sum);
                for (; c < count; ++c)
                    total += codes[c] * x[c];
                out[i * kIntRows + j] += total;
            }
        }
    }
}

struct IntScratch {
    alignas(64) int32_t sums[kIntRows * kIntRows];
    alignas(64) float outliers[kIntRows * kIntRows];
    alignas(64) float line[kIntRows];
    alignas(64) float bias[kIntRows];
};

void finish_ints(const Int8Product& p, int64_t i0, int64_t m, int64_t j0, int64_t n,
                 IntScratch& s) {
    if (p.bias != nullptr)
        load_run((const char*)p.bias + j0 * dtype_size(p.bias_dtype), p.bias_dtype, n, s.bias);
    for (int64_t i = 0; i < m; ++i) {
        float scale = p.row_absmax[i0 + i] * kInt8Step;
        if (!is_finite(scale))
            scale = bits_float(0x7fc00000u); // NaN or Inf in the row: NaN all over it
        uint32_t offset = (uint32_t)Ints::kOffset * (uint32_t)p.row_sum[i0 + i];
        const int32_t* sums = s.sums + i * kIntRows;
        for (int64_t j = 0; j < n; ++j) {
            float step = p.scb[j0 + j] * kInt8Step;
            s.line[j] = (float)(int32_t)((uint32_t)sums[j] - offset) * step * scale;
        }
        if (p.outliers > 0)
            for (int64_t j = 0; j < n; ++j)
                s.line[j] += s.outliers[i * kIntRows + j] * (p.scb[j0 + j] * kInt8Step);
        if (p.bias != nullptr)
            add_run(s.line, s.bias, n);
        store_run(s.line, n, p.dtype, (char*)p.out + ((i0 + i) * p.n + j0) * dtype_size(p.dtype));
    }
}

struct ProductTask {
    const Int8Product* p;
    int64_t columns;
    int status;
};

void int_body(void* context, Queue* queue) {
    ProductTask& task = *(ProductTask*)context;
    const Int8Product& p = *task.p;
    IntScratch* s = (IntScratch*)scratch(sizeof(IntScratch));
    if (s == nullptr) {
        __atomic_store_n(&task.status, (int)kNoMemory, __ATOMIC_RELAXED);
        return;
    }
    for (int64_t chunk = next_chunk(queue); chunk >= 0; chunk = next_chunk(queue)) {
        int64_t j0 = chunk * task.columns, n = min64(task.columns, p.n - j0);
        for (int64_t i0 = 0; i0 < p.m; i0 += kIntRows) {
            int64_t m = min64(kIntRows, p.m - i0);
            multiply_ints(p, i0, m, j0, n, s->sums);
            if (p.outliers > 0)
                multiply_outliers(p, i0, m, j0, n, s->outliers);
            finish_ints(p, i0, m, j0, n, *s);
        }
    }
}

int int8_product_here(Int8Product& p) {
    if (p.m == 0 || p.n == 0)
        return kOk;
    double elements = (double)p.m * (double)p.k;
    int threads = worthwhile_threads(p.threads, elements * 5e-4 / V::kSpeed);
    IntTask task = {&p, p.threshold > 0.0f ? float_bits(p.threshold) : 0xffffffffu, 1};
    task.chunk_rows = max64(1, 16384 / max64(1, p.k));
    int64_t chunks = ceil_div(p.m, task.chunk_rows);
    __builtin_memset(p.outlier, 0, (size_t)p.k);
    run_parallel(threads, chunks, measure_body, &task);
    p.outliers = 0;
    for (int64_t k = 0; k < p.k; ++k)
        if (p.outlier[k])
            p.columns[p.outliers++] = (int32_t)k;
    run_parallel(threads, chunks, round_body, &task);

    double bytes = (double)p.n * (double)p.k;
    threads = worthwhile_threads(p.threads, bytes * (5e-5 + (double)p.m * 1e-5) / V::kSpeed);
    // About 10 us of reading a chunk while rows are few, whole tiles when they are many.
    int64_t columns = 131072 / max64(1, p.k) / 8 * 8;
    columns = columns < 8 || p.m > 8 ? (p.m > 8 ? kIntRows : 8) : columns;
    ProductTask product = {&p, min64(columns, kIntRows), kOk};
    run_parallel(threads, ceil_div(p.n, product.columns), int_body, &product);
    return product.status;
}

#if defined(PK_SIMD_AVX512) && !defined(__AVX512VNNI__) && !defined(PK_SIMDE)
// Processors with AVX-512 and VNNI but without BF16 are many: this one kernel asks for VNNI.
int int8_product(Int8Product& p) {
    return use_vnni() ? int8_product_vnni(p) : int8_product_here(p);
}
#else
int int8_product(Int8Product& p) { return int8_product_here(p); }
#endif

} // namespace
} // namespace pk::PK_ISA
