// The bottleneck adapter. Forward: a task owns a tile of rows; its bottleneck stays in cache
// between the two products, so x is read once and y written once. Backward: products over blocks of
// rows, the bottleneck computed again for each.

namespace pk::PK_ISA {
namespace {

Weight dense_weight(const void* p, int dtype, int64_t rows, int64_t cols) {
    Weight w;
    w.p = p;
    w.dtype = dtype;
    w.rows = rows;
    w.cols = cols;
    w.stride = cols;
    return w;
}

Operand row_operand(const void* p, int dtype, int64_t row_stride) {
    Operand x;
    x.p = p;
    x.dtype = dtype;
    x.row_stride = row_stride;
    return x;
}

const void* at_row(const void* p, int dtype, int64_t row, int64_t cols) {
    return (const char*)p + row * cols * dtype_size(dtype);
}

// Entries [j0, j0 + n) of a vector that may be absent, or one value for all.
void load_entries(const void* p, int dtype, bool single, int64_t j0, int64_t n, float absent,
                  float* out) {
    if (p != nullptr && !single) {
        load_run((const char*)p + j0 * dtype_size(dtype), dtype, n, out);
        return;
    }
    float value = p == nullptr ? absent : load_as_float(p, dtype, 0);
    for (int64_t j = 0; j < n; ++j)
        out[j] = value;
}

// y = mask(scale * (up + bias)) + residual, for `n` columns from j0 of row i.
void finish_run(const Bottleneck& b, int64_t i, int64_t j0, int64_t n, const float* bias,
                const float* scale, float* up, float* line) {
    int64_t j = 0;
    for (; j + L <= n; j += L)
        V::store(up + j, V::mul(V::add(V::load(up + j), V::load(bias + j)), V::load(scale + j)));
    for (; j < n; ++j)
        up[j] = (up[j] + bias[j]) * scale[j];
    int64_t first = i * b.n + j0;
    if (b.dropout.on)
        dropout_run(up, n, b.dropout, first, kF32);
    if (b.residual != nullptr) {
        const char* residual = (const char*)b.residual + first * dtype_size(b.dtype);
        if (b.dtype == kF32) {
            add_run(up, (const float*)residual, n);
        } else {
            load_run(residual, b.dtype, n, line);
            add_run(up, line, n);
        }
    }
    store_run(up, n, b.dtype, (char*)b.y + first * dtype_size(b.dtype));
}

struct BottleneckTask {
    const Bottleneck* b;
    int64_t tile_rows;
    int status;
};

struct BottleneckScratch {
    PanelScratch panel;
    alignas(64) float bias[kRowPanelCols];
    alignas(64) float scale[kRowPanelCols];
    alignas(64) float h[1]; // [tile_rows, rank]
};

void run_bottleneck(const Bottleneck& b, int64_t i0, int64_t rows, BottleneckScratch& s) {
    PanelScratch& panel = s.panel;
    Segment down;
    down.x = row_operand(b.x, b.dtype, b.k);
    down.w = dense_weight(b.down_w, b.adapter_dtype, b.rank, b.k);
    for (int64_t j0 = 0; j0 < b.rank; j0 += kRowPanelCols) {
        int64_t cols = min64(kRowPanelCols, b.rank - j0);
        if (b.k == 0)
            clear_sums(panel.sum, rows, cols);
        for (int64_t k0 = 0; k0 < b.k; k0 += kDepth) {
            int64_t depth = min64(kDepth, b.k - k0);
            for (int64_t i = 0; i < rows; ++i)
                operand_run(down.x, i0 + i, k0, depth, nullptr, panel.x + i * kStride);
            add_block<false>(down, j0, cols, k0, depth, rows, panel.x, panel.sum, k0 == 0, panel);
        }
        load_entries(b.down_b, b.adapter_dtype, false, j0, cols, 0.0f, s.bias);
        for (int64_t i = 0; i < rows; ++i) {
            float* sum = panel.sum + i * kSumStride;
            add_run(sum, s.bias, cols);
            activation_run(b.activation, sum, nullptr, cols);
            __builtin_memcpy(s.h + i * b.rank + j0, sum, (size_t)cols * sizeof(float));
        }
    }
    Segment up;
    up.w = dense_weight(b.up_w, b.adapter_dtype, b.n, b.rank);
    for (int64_t j0 = 0; j0 < b.n; j0 += kRowPanelCols) {
        int64_t cols = min64(kRowPanelCols, b.n - j0);
        if (b.rank == 0)
            clear_sums(panel.sum, rows, cols);
        for (int64_t k0 = 0; k0 < b.rank; k0 += kDepth) {
            int64_t depth = min64(kDepth, b.rank - k0);
            if (j0 == 0 || b.rank > kDepth)
                for (int64_t i = 0; i < rows; ++i)
                    __builtin_memcpy(panel.x + i * kStride, s.h + i * b.rank + k0,
                                     (size_t)depth * sizeof(float));
            add_block<false>(up, j0, cols, k0, depth, rows, panel.x, panel.sum, k0 == 0, panel);
        }
        load_entries(b.up_b, b.adapter_dtype, false, j0, cols, 0.0f, s.bias);
        load_entries(b.scale, b.adapter_dtype, b.scales == 1, j0, cols, 1.0f, s.scale);
        for (int64_t i = 0; i < rows; ++i)
            finish_run(b, i0 + i, j0, cols, s.bias, s.scale, panel.sum + i * kSumStride,
                       panel.line);
    }
}

void bottleneck_body(void* context, Queue* queue) {
    BottleneckTask& task = *(BottleneckTask*)context;
    const Bottleneck& b = *task.b;
    size_t bytes = sizeof(BottleneckScratch) + (size_t)(task.tile_rows * b.rank) * sizeof(float);
    BottleneckScratch* s = (BottleneckScratch*)scratch(bytes);
    if (s == nullptr) {
        __atomic_store_n(&task.status, (int)kNoMemory, __ATOMIC_RELAXED);
        return;
    }
    for (int64_t chunk = next_chunk(queue); chunk >= 0; chunk = next_chunk(queue)) {
        int64_t i0 = chunk * task.tile_rows;
        run_bottleneck(b, i0, min64(task.tile_rows, b.m - i0), *s);
    }
}

// For few rows the weights are most of the traffic: the row kernel reads them once, in order.
int few_rows(const Bottleneck& b) {
    Product p;
    p.m = b.m;
    p.n = b.rank;
    p.threads = b.threads;
    p.segments = 1;
    p.segment[0] = make_segment(row_operand(b.x, b.dtype, b.k),
                                dense_weight(b.down_w, b.adapter_dtype, b.rank, b.k), b.k, false);
    p.bias = b.down_b;
    p.bias_dtype = b.adapter_dtype;
    p.out = b.work;
    p.out_row_stride = b.rank;
    if (int status = product(p))
        return status;
    activation_run(b.activation, b.work, nullptr, b.m * b.rank);
    float* up = b.work + b.m * b.rank;
    p.n = b.n;
    p.segment[0] = make_segment(row_operand(b.work, kF32, b.rank),
                                dense_weight(b.up_w, b.adapter_dtype, b.n, b.rank), b.rank, false);
    p.bias = nullptr;
    p.out = up;
    p.out_row_stride = b.n;
    if (int status = product(p))
        return status;
    float bias[kPiece], scale[kPiece], line[kPiece];
    for (int64_t j0 = 0; j0 < b.n; j0 += kPiece) {
        int64_t cols = min64(kPiece, b.n - j0);
        load_entries(b.up_b, b.adapter_dtype, false, j0, cols, 0.0f, bias);
        load_entries(b.scale, b.adapter_dtype, b.scales == 1, j0, cols, 1.0f, scale);
        for (int64_t i = 0; i < b.m; ++i)
            finish_run(b, i, j0, cols, bias, scale, up + i * b.n + j0, line);
    }
    return kOk;
}

int bottleneck_forward(const Bottleneck& b) {
    if (b.m == 0 || b.n == 0)
        return kOk;
    if (b.m <= kMaxRows)
        return few_rows(b);
    double work = (double)b.m * (double)b.rank * (double)(b.k + b.n);
    int threads = worthwhile_threads(b.threads, work * 3e-5 / V::kSpeed);
    BottleneckTask task = {&b, kVectorRows, kOk};
    int64_t tiles = ceil_div(b.m, kVectorRows);
    if (tiles < threads)
        tiles = threads;
    task.tile_rows = ceil_div(ceil_div(b.m, tiles), V::kTileRows) * V::kTileRows;
    if (task.tile_rows > kVectorRows)
        task.tile_rows = kVectorRows;
    run_parallel(threads, ceil_div(b.m, task.tile_rows), bottleneck_body, &task);
    return task.status;
}

// z -> h and dh -> dz in place, and both transposed for the sums over rows.
struct SlopeTask {
    const Bottleneck* b;
    float *z, *d;   // [rows, rank]
    float *zt, *dt; // [rank, rows]; null where no weight gradient is wanted
    int64_t rows;
};

constexpr int64_t kSlopeRows = 32;

void transpose_rows(const float* from, int64_t rows, int64_t cols, float* to, int64_t stride) {
    int64_t i = 0;
    for (; i + L <= rows; i += L) {
        int64_t j = 0;
        for (; j + L <= cols; j += L)
            V::transpose(from + i * cols + j, cols, to + j * stride + i, stride);
        for (; j < cols; ++j)
            for (int64_t r = 0; r < L; ++r)
                to[j * stride + i + r] = from[(i + r) * cols + j];
    }
    for (; i < rows; ++i)
        for (int64_t j = 0; j < cols; ++j)
            to[j * stride + i] = from[i * cols + j];
}

void slope_body(void* context, Queue* queue) {
    SlopeTask& task = *(SlopeTask*)context;
    int64_t rank = task.b->rank;
    for (int64_t chunk = next_chunk(queue); chunk >= 0; chunk = next_chunk(queue)) {
        int64_t i0 = chunk * kSlopeRows;
        int64_t rows = min64(kSlopeRows, task.rows - i0);
        float *z = task.z + i0 * rank, *d = task.d + i0 * rank;
        activation_run(task.b->activation, z, d, rows * rank);
        if (task.zt != nullptr) {
            transpose_rows(z, rows, rank, task.zt + i0, task.rows);
            transpose_rows(d, rows, rank, task.dt + i0, task.rows);
        }
    }
}

// Adds the column sums of `w` [rows, cols] to `out`. Sums of 16, then of 16 of them, so that the
// error does not grow with the number of rows.
struct ColumnTask {
    Weight w;
    float scale;
    float* out;
};

constexpr int64_t kSumCols = 64;
constexpr int64_t kSumRows = 16;

void column_body(void* context, Queue* queue) {
    const ColumnTask& task = *(ColumnTask*)context;
    for (int64_t chunk = next_chunk(queue); chunk >= 0; chunk = next_chunk(queue)) {
        int64_t j0 = chunk * kSumCols;
        int64_t cols = min64(kSumCols, task.w.cols - j0);
        float line[kSumCols], total[kSumCols] = {}, many[kSumCols] = {}, few[kSumCols] = {};
        for (int64_t i = 0; i < task.w.rows; ++i) {
            decode_run(task.w, i, j0, cols, line);
            add_run(few, line, cols);
            bool last = i + 1 == task.w.rows;
            if (!last && (i + 1) % kSumRows != 0)
                continue;
            add_run(many, few, cols);
            __builtin_memset(few, 0, sizeof(few));
            if (!last && (i + 1) % (kSumRows * kSumRows) != 0)
                continue;
            add_run(total, many, cols);
            __builtin_memset(many, 0, sizeof(many));
        }
        scale_run(total, cols, task.scale);
        add_run(task.out + j0, total, cols);
    }
}

// Many short sums, then one of them.
float run_sum(const float* x, int64_t n) {
    Chains c = {};
    int64_t i = 0;
    for (; i + kChains * L <= n; i += kChains * L)
        for (int v = 0; v < kChains; ++v)
            V::store(c.lane[v], V::add(V::load(c.lane[v]), V::load(x + i + v * L)));
    float tail = 0.0f;
    for (; i < n; ++i)
        tail += x[i];
    return fold(c) + tail;
}

// The gradients that one block of rows adds.
int backward_block(const Bottleneck& b, const BottleneckGradients& g, int64_t i0, int64_t rows) {
    int64_t rank = b.rank;
    float* z = b.work;
    float* d = z + rows * rank;
    float* zt = d + rows * rank;
    float* dt = zt + rows * rank;
    const void* x = at_row(b.x, b.dtype, i0, b.k);
    const void* dy = at_row(g.dy, b.dtype, i0, b.n);
    // The mask keeps or clears; its factor goes to the other side, in fp32.
    Dropout mask = b.dropout;
    mask.scale = 1.0f;
    mask.first = i0 * b.n;
    float factor = b.dropout.on ? b.dropout.scale : 1.0f;

    Product p;
    p.m = rows;
    p.n = rank;
    p.threads = b.threads;
    p.segments = 1;
    p.segment[0] = make_segment(row_operand(x, b.dtype, b.k),
                                dense_weight(b.down_w, b.adapter_dtype, rank, b.k), b.k, false);
    p.bias = b.down_b;
    p.bias_dtype = b.adapter_dtype;
    p.out = z;
    p.out_row_stride = rank;
    if (int status = product(p))
        return status;

    Operand masked = row_operand(dy, b.dtype, b.n);
    masked.dropout = mask;
    masked.scale = factor;
    bool scaled = b.scale != nullptr;
    p.segment[0] = make_segment(
        masked,
        dense_weight(scaled ? g.scaled_up : b.up_w, scaled ? kF32 : b.adapter_dtype, b.n, rank),
        b.n, true);
    p.bias = nullptr;
    p.out = d;
    if (int status = product(p))
        return status;

    bool weights = g.down_sum != nullptr;
    SlopeTask slope = {&b, z, d, weights ? zt : nullptr, dt, rows};
    double microseconds = (double)(rows * rank) * 2e-3 / V::kSpeed;
    run_parallel(worthwhile_threads(b.threads, microseconds), ceil_div(rows, kSlopeRows),
                 slope_body, &slope);

    if (g.dx != nullptr) {
        p.n = b.k;
        p.segment[0] = make_segment(row_operand(d, kF32, rank),
                                    dense_weight(b.down_w, b.adapter_dtype, rank, b.k), rank, true);
        p.out = (void*)at_row(g.dx, b.dtype, i0, b.k);
        p.out_dtype = b.dtype;
        p.out_row_stride = b.k;
        p.add = g.add_dy ? dy : nullptr; // the residual is x: n = k
        p.add_dtype = b.dtype;
        if (int status = product(p))
            return status;
    }
    if (!weights)
        return kOk;
    p = Product();
    p.m = rank;
    p.n = b.n;
    p.threads = b.threads;
    p.segments = 1;
    Operand columns = row_operand(zt, kF32, rows);
    columns.scale = factor;
    Weight kept = dense_weight(dy, b.dtype, rows, b.n);
    kept.dropout = mask;
    p.segment[0] = make_segment(columns, kept, rows, true);
    p.out = g.up_sum;
    p.out_row_stride = b.n;
    p.add = i0 > 0 ? p.out : nullptr;
    if (int status = product(p))
        return status;
    p.m = rank;
    p.n = b.k;
    p.segment[0] =
        make_segment(row_operand(dt, kF32, rows), dense_weight(x, b.dtype, rows, b.k), rows, true);
    p.out = g.down_sum;
    p.add = i0 > 0 ? p.out : nullptr;
    p.out_row_stride = b.k;
    if (int status = product(p))
        return status;
    for (int64_t j = 0; j < rank; ++j)
        g.down_b_sum[j] += run_sum(dt + j * rows, rows);
    if (b.up_b != nullptr) {
        ColumnTask columns = {kept, factor, g.up_b_sum};
        double us = (double)(rows * b.n) * (b.dropout.on ? 2e-3 : 1e-4) / V::kSpeed;
        run_parallel(worthwhile_threads(b.threads, us), ceil_div(b.n, kSumCols), column_body,
                     &columns);
    }
    return kOk;
}

// The sum of a[i] * b[i], short sums in double.
double wide_dot(const float* a, const float* b, int64_t n) {
    double sums[8] = {};
    int64_t i = 0;
    for (; i + 8 <= n; i += 8)
        for (int c = 0; c < 8; ++c)
            sums[c] += (double)a[i + c] * (double)b[i + c];
    for (int c = 0; i + c < n; ++c)
        sums[c] += (double)a[i + c] * (double)b[i + c];
    return ((sums[0] + sums[1]) + (sums[2] + sums[3])) +
           ((sums[4] + sums[5]) + (sums[6] + sums[7]));
}

// to[c][k] = from[k][c] for `count` columns from column n on, from row k0 on.
void turn_columns(const float* from, int64_t n, int64_t columns, int64_t k0, int64_t len,
                  int64_t count, float* to) {
    from += k0 * columns + n;
    int64_t k = 0;
    if (count == L)
        for (; k + L <= len; k += L)
            V::transpose(from + k * columns, columns, to + k, kPiece);
    for (; k < len; ++k)
        for (int64_t c = 0; c < count; ++c)
            to[c * kPiece + k] = from[k * columns + c];
}

// g.up_sum holds h^T masked dy, g.up_b_sum the column sums of masked dy: from them dU, db_u and the
// scale's gradient.
void finish_gradients(const Bottleneck& b, const BottleneckGradients& g) {
    alignas(64) float turned[L * kPiece];
    float row[kPiece];
    double scale_sum = 0.0;
    for (int64_t n0 = 0; n0 < b.n; n0 += L) {
        int64_t count = min64(L, b.n - n0);
        double along[L] = {};
        float scale[L];
        load_entries(b.scale, b.adapter_dtype, b.scales == 1, n0, count, 1.0f, scale);
        for (int64_t k0 = 0; k0 < b.rank; k0 += kPiece) {
            int64_t len = min64(kPiece, b.rank - k0);
            turn_columns(g.up_sum, n0, b.n, k0, len, count, turned);
            for (int64_t c = 0; c < count; ++c) {
                float* sums = turned + c * kPiece;
                int64_t at = ((n0 + c) * b.rank + k0) * dtype_size(b.adapter_dtype);
                if (b.scale != nullptr) {
                    load_run((const char*)b.up_w + at, b.adapter_dtype, len, row);
                    along[c] += wide_dot(row, sums, len);
                }
                scale_run(sums, len, scale[c]);
                store_run(sums, len, b.adapter_dtype, (char*)g.up_w + at);
            }
        }
        for (int64_t c = 0; c < count; ++c) {
            int64_t n = n0 + c;
            if (g.up_b != nullptr)
                store_from_float(g.up_b, b.adapter_dtype, n, scale[c] * g.up_b_sum[n]);
            if (b.up_b != nullptr)
                along[c] +=
                    (double)load_as_float(b.up_b, b.adapter_dtype, n) * (double)g.up_b_sum[n];
            if (g.scale != nullptr && b.scales != 1)
                store_from_float(g.scale, b.adapter_dtype, n, (float)along[c]);
            scale_sum += along[c];
        }
    }
    if (g.scale != nullptr && b.scales == 1)
        store_from_float(g.scale, b.adapter_dtype, 0, (float)scale_sum);
}

int bottleneck_backward(const Bottleneck& b, const BottleneckGradients& g) {
    if (b.scale != nullptr) {
        for (int64_t n = 0; n < b.n; ++n) {
            float s = load_as_float(b.scale, b.adapter_dtype, b.scales == 1 ? 0 : n);
            float* row = g.scaled_up + n * b.rank;
            load_run(at_row(b.up_w, b.adapter_dtype, n, b.rank), b.adapter_dtype, b.rank, row);
            scale_run(row, b.rank, s);
        }
    }
    if (g.down_sum != nullptr && b.m == 0) {
        __builtin_memset(g.down_sum, 0, (size_t)(b.rank * b.k) * sizeof(float));
        __builtin_memset(g.up_sum, 0, (size_t)(b.rank * b.n) * sizeof(float));
    }
    for (int64_t i0 = 0; i0 < b.m; i0 += g.block_rows)
        if (int status = backward_block(b, g, i0, min64(g.block_rows, b.m - i0)))
            return status;
    if (g.down_sum == nullptr)
        return kOk;
    finish_gradients(b, g);
    return kOk;
}

} // namespace
} // namespace pk::PK_ISA
