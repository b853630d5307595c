// What DoRA needs besides products: row norms of the adapted weight, and the gradient of the scale.
// Terms of a norm may cancel, so they are summed in fp64.

namespace pk::PK_ISA {
namespace {

constexpr int64_t kNormRows = 8;   // stored rows that a thread takes at a time
constexpr int64_t kNormCols = 256; // likewise storage columns, and the piece of a row at a time
constexpr int kNormSums = 8;       // independent sums, in a fixed order

// Sum of x[i] * y[i] in fp64.
template <class T>
double dot_f64(const T* x, const float* y, int64_t n) {
    double sum[kNormSums] = {};
    int64_t i = 0;
    for (; i + kNormSums <= n; i += kNormSums)
        for (int c = 0; c < kNormSums; ++c)
            sum[c] += (double)x[i + c] * (double)y[i + c];
    for (; i < n; ++i)
        sum[i % kNormSums] += (double)x[i] * (double)y[i];
    return ((sum[0] + sum[1]) + (sum[2] + sum[3])) + ((sum[4] + sum[5]) + (sum[6] + sum[7]));
}

void squares_of_rows(const RowSquares& q, int64_t chunk) {
    float line[kNormCols];
    int64_t end = min64(q.w.rows, (chunk + 1) * kNormRows);
    for (int64_t row = chunk * kNormRows; row < end; ++row) {
        double sum = 0.0;
        for (int64_t k = 0; k < q.w.cols; k += kNormCols) {
            int64_t len = min64(kNormCols, q.w.cols - k);
            decode_run(q.w, row, k, len, line);
            sum += dot_f64(line, line, len);
        }
        q.out[row] = sum;
    }
}

void squares_of_columns(const RowSquares& q, int64_t chunk) {
    float line[kNormCols];
    double sum[kNormCols] = {};
    int64_t col = chunk * kNormCols, len = min64(kNormCols, q.w.cols - col);
    for (int64_t k = 0; k < q.w.rows; ++k) {
        decode_run(q.w, k, col, len, line);
        for (int64_t j = 0; j < len; ++j)
            sum[j] += (double)line[j] * (double)line[j];
    }
    __builtin_memcpy(q.out + col, sum, (size_t)len * sizeof(double));
}

void squares_body(void* context, Queue* queue) {
    const RowSquares& q = *(const RowSquares*)context;
    for (int64_t chunk = next_chunk(queue); chunk >= 0; chunk = next_chunk(queue)) {
        if (q.swapped)
            squares_of_columns(q, chunk);
        else
            squares_of_rows(q, chunk);
    }
}

int row_squares(const RowSquares& q) {
    double weights = (double)q.w.rows * (double)q.w.cols;
    int threads = worthwhile_threads(q.threads, weights * 3e-4 / V::kSpeed);
    int64_t chunks = q.swapped ? ceil_div(q.w.cols, kNormCols) : ceil_div(q.w.rows, kNormRows);
    run_parallel(threads, chunks, squares_body, (void*)&q);
    return kOk;
}

void gram_body(void* context, Queue* queue) {
    const DoraNorm& d = *(const DoraNorm*)context;
    for (int64_t r = next_chunk(queue); r >= 0; r = next_chunk(queue))
        for (int64_t t = 0; t < d.rank; ++t)
            d.gram[r * d.rank + t] = dot_f64(d.a + r * d.k, d.a + t * d.k, d.k);
}

void norm_body(void* context, Queue* queue) {
    const DoraNorm& d = *(const DoraNorm*)context;
    for (int64_t chunk = next_chunk(queue); chunk >= 0; chunk = next_chunk(queue)) {
        int64_t end = min64(d.n, (chunk + 1) * kNormCols);
        for (int64_t j = chunk * kNormCols; j < end; ++j) {
            const float* b = d.b + j * d.rank;
            double cross = 0.0, square = 0.0;
            for (int64_t r = 0; r < d.rank; ++r) {
                cross += (double)d.cross[r * d.n + j] * (double)b[r];
                square += dot_f64(d.gram + r * d.rank, b, d.rank) * (double)b[r];
            }
            double sum = d.norm_sq[j] + 2.0 * d.scaling * cross + d.scaling * d.scaling * square;
            d.norm[j] = (float)__builtin_sqrt(sum < 0.0 ? 0.0 : sum); // NaN stays
        }
    }
}

int dora_norm(const DoraNorm& d) {
    double grams = (double)d.rank * (double)d.rank * (double)d.k;
    double squares = (double)d.rank * (double)d.rank * (double)d.n;
    int threads = worthwhile_threads(d.threads, grams * 3e-4 / V::kSpeed);
    run_parallel(threads, d.rank, gram_body, (void*)&d);
    threads = worthwhile_threads(d.threads, squares * 5e-4 / V::kSpeed);
    run_parallel(threads, ceil_div(d.n, kNormCols), norm_body, (void*)&d);
    return kOk;
}

constexpr int64_t kDotCols = 128;
constexpr int64_t kDotRows = 64; // rows that are summed before they are added to the rest

void dots_body(void* context, Queue* queue) {
    const ColumnDots& d = *(const ColumnDots*)context;
    float x[kDotCols], y[kDotCols], block[kDotCols], sum[kDotCols];
    for (int64_t chunk = next_chunk(queue); chunk >= 0; chunk = next_chunk(queue)) {
        int64_t col = chunk * kDotCols, len = min64(kDotCols, d.cols - col);
        __builtin_memset(sum, 0, sizeof(sum));
        for (int64_t i = 0; i < d.rows; i += kDotRows) {
            __builtin_memset(block, 0, sizeof(block));
            int64_t end = min64(d.rows, i + kDotRows);
            for (int64_t r = i; r < end; ++r) {
                int64_t at = (r * d.cols + col) * dtype_size(d.dtype);
                load_run((const char*)d.x + at, d.dtype, len, x);
                load_run((const char*)d.y + at, d.dtype, len, y);
                mul_run(x, y, len);
                add_run(block, x, len);
            }
            add_run(sum, block, len);
        }
        store_run(sum, len, kF32, d.out + col);
    }
}

int column_dots(const ColumnDots& d) {
    double elements = (double)d.rows * (double)d.cols;
    int threads = worthwhile_threads(d.threads, elements * 4e-4 / V::kSpeed);
    run_parallel(threads, ceil_div(d.cols, kDotCols), dots_body, (void*)&d);
    return kOk;
}

} // namespace
} // namespace pk::PK_ISA
