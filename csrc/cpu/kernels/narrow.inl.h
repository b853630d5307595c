// The narrow kernel, for few rows of x and dense rows of weights so short that the row kernel would
// spend its time on folding sums: a vector holds one sum for each of L outputs instead, over a tile
// of weights turned on its side.

namespace pk::PK_ISA {
namespace {

constexpr int64_t kNarrowDepth = 256;
constexpr int kNarrowChains = 4; // sums an output: position in the depth modulo 4

struct NarrowTask {
    const Product* p;
    int64_t padded; // depth, filled up with zeros
    int64_t columns_per_chunk;
    int status;
};

struct NarrowScratch {
    alignas(64) float lines[L * (kNarrowDepth + 16)];
    alignas(64) float tile[kNarrowDepth * L];
    alignas(64) float x[kMaxRows * kNarrowDepth];
};

// Sums that go on from `add`, as those of LoRA do, stay with the row kernel: a mixed batch has more
// segments, and each of its rows has the bits of a batch of its own.
bool narrow_kernel_serves(const Product& p) {
    if (L == 1 || p.segments != 1 || p.add != nullptr || p.n < L || !row_kernel_serves(p))
        return false;
    const Segment& segment = segment_of(p, 0);
    return segment.w.kind == kDense && segment.depth <= kNarrowDepth && segment.row_begin == 0 &&
           segment.row_end >= p.m;
}

// tile[k][c] = w(j + c, k), zeros beyond the depth and beyond `columns`.
void turn_tile(const Weight& w, int64_t j, int64_t columns, int64_t depth, int64_t padded,
               NarrowScratch& s) {
    const float* from = (const float*)w.p + j * w.stride;
    int64_t stride = w.stride;
    if (!plain_floats(w)) {
        from = s.lines;
        stride = kNarrowDepth + 16;
        for (int64_t c = 0; c < columns; ++c)
            decode_run(w, j + c, 0, depth, s.lines + c * stride);
    }
    int64_t k = 0;
    if (columns == L)
        for (; k + L <= depth; k += L)
            V::transpose(from + k, stride, s.tile + k * L, L);
    for (; k < padded; ++k)
        for (int64_t c = 0; c < L; ++c)
            s.tile[k * L + c] = k < depth && c < columns ? from[c * stride + k] : 0.0f;
}

// L outputs of each of R rows of x.
template <int R>
void narrow_dots(const float* tile, const float* x, int64_t x_stride, int64_t depth, float* out) {
    V::F acc[R][kNarrowChains];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int c = 0; c < kNarrowChains; ++c)
            acc[r][c] = V::set1(0.0f);
    for (int64_t k = 0; k < depth; k += kNarrowChains) {
#pragma GCC unroll 4
        for (int c = 0; c < kNarrowChains; ++c) {
            V::F w = V::load(tile + (k + c) * L);
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r)
                acc[r][c] = V::fma(w, V::set1(x[r * x_stride + k + c]), acc[r][c]);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
        V::store(out + r * L, V::add(V::add(acc[r][0], acc[r][1]), V::add(acc[r][2], acc[r][3])));
}

template <int R>
void narrow_dots_of(int64_t rows, const float* tile, const float* x, int64_t x_stride,
                    int64_t depth, float* out) {
    if constexpr (R > 1) {
        if (rows < R) {
            narrow_dots_of<R - 1>(rows, tile, x, x_stride, depth, out);
            return;
        }
    }
    narrow_dots<R>(tile, x, x_stride, depth, out);
}

// round(scale * sums + bias) for outputs j .. j + n of row i.
void store_sums(const Product& p, int64_t i, int64_t j, int64_t n, float* sums) {
    int64_t at = row_of(p, i) * p.out_row_stride + j * p.out_col_stride;
    if (p.out_col_stride != 1) {
        for (int64_t c = 0; c < n; ++c)
            store_sum(p, i, j + c, sums[c]);
        return;
    }
    float line[L];
    if (p.unscaled != nullptr)
        store_run(sums, n, p.out_dtype, (char*)p.unscaled + at * dtype_size(p.out_dtype));
    if (p.scale != nullptr)
        mul_run(sums, p.scale + j, n);
    if (p.bias != nullptr) {
        load_run((const char*)p.bias + j * dtype_size(p.bias_dtype), p.bias_dtype, n, line);
        add_run(sums, line, n);
    }
    store_run(sums, n, p.out_dtype, (char*)p.out + at * dtype_size(p.out_dtype));
}

void narrow_body(void* context, Queue* queue) {
    NarrowTask& task = *(NarrowTask*)context;
    const Product& p = *task.p;
    const Segment& segment = segment_of(p, 0);
    NarrowScratch* s = (NarrowScratch*)scratch(sizeof(NarrowScratch));
    if (s == nullptr) {
        __atomic_store_n(&task.status, (int)kNoMemory, __ATOMIC_RELAXED);
        return;
    }
    bool converted = false; // only threads that get a chunk need x
    for (int64_t chunk = next_chunk(queue); chunk >= 0; chunk = next_chunk(queue)) {
        for (int64_t i = 0; i < p.m && !converted; ++i) {
            float* line = s->x + i * task.padded;
            operand_run(segment.x, row_of(p, i), 0, segment.depth, nullptr, line);
            for (int64_t k = segment.depth; k < task.padded; ++k)
                line[k] = 0.0f;
        }
        converted = true;
        int64_t end = min64(p.n, (chunk + 1) * task.columns_per_chunk);
        for (int64_t j = chunk * task.columns_per_chunk; j < end; j += L) {
            int64_t columns = min64(L, end - j);
            turn_tile(segment.w, j, columns, segment.depth, task.padded, *s);
            for (int64_t i = 0; i < p.m; i += V::kRowGroup) {
                int64_t rows = min64(V::kRowGroup, p.m - i);
                alignas(64) float sums[V::kRowGroup * L];
                narrow_dots_of<V::kRowGroup>(rows, s->tile, s->x + i * task.padded, task.padded,
                                             task.padded, sums);
                for (int64_t r = 0; r < rows; ++r)
                    store_sums(p, i + r, j, columns, sums + r * L);
            }
        }
    }
}

int narrow_product(const Product& p, int threads) {
    int64_t depth = segment_of(p, 0).depth;
    NarrowTask task = {&p, ceil_div(depth, kNarrowChains) * kNarrowChains, L, kOk};
    int64_t blocks = 131072 / ((depth + 1) * L); // about 10 us a chunk
    task.columns_per_chunk = L * (blocks < 1 ? 1 : blocks > 64 ? 64 : blocks);
    run_parallel(threads, ceil_div(p.n, task.columns_per_chunk), narrow_body, &task);
    return task.status;
}

} // namespace
} // namespace pk::PK_ISA
