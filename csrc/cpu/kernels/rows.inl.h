// The row kernel, for up to kMaxRows rows of x: each stored row is decoded once, piece by piece,
// and multiplied with all rows of x while it is in the first-level cache.
//
// Sums live in kChains vectors per output element, fixed by the position in the depth, and are
// folded in one order: the number of rows changes no bit.

namespace pk::PK_ISA {
namespace {

constexpr int64_t kMaxRows = 8;
constexpr int64_t kPiece = 512; // weights decoded at a time; a multiple of 4 * kLanes and kWide
constexpr int64_t kBuffer = 3 * kPiece; // a decoded piece, and the numbers that become pairs
constexpr int64_t kBlockRows = 8;
constexpr int kChains = V::kLanes == 1 ? 16 : 4; // one lane: short sums round less

struct Chains {
    alignas(64) float lane[kChains][V::kLanes];
};

template <bool kPair>
PK_SINK inline V::F step(V::F a, V::F b, V::F acc) {
    return kPair ? Pairs::dot(a, b, acc) : V::fma(a, b, acc);
}

// R rows of x against one piece of a decoded row; both padded with zeros to whole vectors.
template <int R, bool kPair>
void dots(const float* w, const float* x, int64_t x_stride, int64_t vectors, Chains* chains) {
    V::F acc[R][kChains];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
        for (int c = 0; c < kChains; ++c)
            acc[r][c] = V::load(chains[r].lane[c]);
    int64_t v = 0;
    for (; v + kChains <= vectors; v += kChains) {
#pragma GCC unroll 16
        for (int c = 0; c < kChains; ++c) {
            V::F b = V::load(w + (v + c) * L);
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r)
                acc[r][c] = step<kPair>(b, V::load(x + r * x_stride + (v + c) * L), acc[r][c]);
        }
    }
#pragma GCC unroll 16
    for (int c = 0; c < kChains - 1; ++c) {
        if (v + c < vectors) {
            V::F b = V::load(w + (v + c) * L);
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r)
                acc[r][c] = step<kPair>(b, V::load(x + r * x_stride + (v + c) * L), acc[r][c]);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
        for (int c = 0; c < kChains; ++c)
            V::store(chains[r].lane[c], acc[r][c]);
}

template <int R, bool kPair>
void dots_of(int64_t rows, const float* w, const float* x, int64_t x_stride, int64_t vectors,
             Chains* chains) {
    if constexpr (R > 1) {
        if (rows < R) {
            dots_of<R - 1, kPair>(rows, w, x, x_stride, vectors, chains);
            return;
        }
    }
    dots<R, kPair>(w, x, x_stride, vectors, chains);
}

float fold(const Chains& c) {
    V::F sum[kChains];
#pragma GCC unroll 16
    for (int i = 0; i < kChains; ++i)
        sum[i] = V::load(c.lane[i]);
#pragma GCC unroll 4
    for (int width = 1; width < kChains; width *= 2)
#pragma GCC unroll 8
        for (int i = 0; i < kChains; i += 2 * width)
            sum[i] = V::add(sum[i], sum[i + width]);
    return V::reduce_add(sum[0]);
}

int64_t padded(int64_t elements) { return ceil_div(elements, kChains * L) * (kChains * L); }

// Elements of a converted row of x: numbers, or pairs of them.
int64_t line_of(const Segment& segment) {
    return padded(elements_of(segment.depth, in_pairs(segment)));
}

// Whether a segment's weights are decoded in whole groups, in the order that is cheapest.
bool in_groups(const Weight& w) {
    return w.kind == k4Bit && w.cols % V::kWide == 0 && ((int64_t)1 << w.block_shift) >= V::kWide &&
           w.entries.index == nullptr;
}

// Multiplies decoded vectors with one row of x at once; the same sums as dots().
struct ToChains {
    const float* x;
    V::F acc[kChains];
    PK_SINK inline void take(int64_t group, int i, V::F v) {
        acc[i % kChains] = V::fma(v, V::load(x + group * V::kWide + i * L), acc[i % kChains]);
    }
};

template <int kDtype>
void fused_dot(const Weight& w, int64_t row, const float* x, Chains& chains) {
    ToChains sink;
    sink.x = x;
    for (int c = 0; c < kChains; ++c)
        sink.acc[c] = V::load(chains.lane[c]);
    decode_groups<kDtype, false>(w, row * w.cols, w.cols / V::kWide, sink);
    for (int c = 0; c < kChains; ++c)
        V::store(chains.lane[c], sink.acc[c]);
}

// The same with pairs: the chains of two groups differ.
void fused_dot_pairs(const Weight& w, int64_t row, const float* x, Chains& chains) {
    V::F acc[kChains];
    for (int c = 0; c < kChains; ++c)
        acc[c] = V::load(chains.lane[c]);
    decode_row_groups(w, row * w.cols, w.cols / 64, [&](int64_t g, const V::F v[2]) PK_SINK {
        const float* at = x + 32 * g;
        acc[0] = Pairs::dot(v[0], V::load(at), acc[0]);
        acc[1] = Pairs::dot(v[1], V::load(at + L), acc[1]);
        V::F first = acc[0], second = acc[1]; // turns, without a branch
        acc[0] = acc[2 % kChains];
        acc[1] = acc[3 % kChains];
        acc[2 % kChains] = first;
        acc[3 % kChains] = second;
    });
    int turn = w.cols / 64 % 2 == 0 ? 0 : 2;
    for (int c = 0; c < kChains; ++c)
        V::store(chains.lane[(c + turn) % kChains], acc[c]);
}

// The same with INT8 weights, whose vectors come one by one.
bool int8_fuses(const Weight& w, int64_t row) {
    return w.kind == kInt8 && w.cols % (2 * L * kChains) == 0 && rounds_plainly(w.absmax[row]);
}

void fused_dot_int8(const Weight& w, int64_t row, const float* x, Chains& chains) {
    V::F acc[kChains];
    for (int c = 0; c < kChains; ++c)
        acc[c] = V::load(chains.lane[c]);
    const int8_t* codes = int8_codes(w, row, 0);
    V::F absmax = V::set1(w.absmax[row]);
    for (int64_t k = 0; k < w.cols; k += 2 * L * kChains) {
        __builtin_prefetch(codes + k + kAheadBytes, 0, 3);
        if (2 * L * kChains > 64)
            __builtin_prefetch(codes + k + kAheadBytes + 64, 0, 3);
#pragma GCC unroll 16
        for (int c = 0; c < kChains; ++c)
            acc[c] = Pairs::dot(Pairs::int8_along_row(codes + k + 2 * L * c, absmax),
                                V::load(x + k / 2 + L * c), acc[c]);
    }
    for (int c = 0; c < kChains; ++c)
        V::store(chains.lane[c], acc[c]);
}

void decode_piece(const Weight& w, int64_t row, int64_t k, int64_t len, float* piece) {
    if (!in_groups(w)) {
        decode_run(w, row, k, len, piece);
        return;
    }
    ToLine line = {piece};
    int64_t flat = row * w.cols + k;
    if (w.dtype == kBF16)
        decode_groups<kBF16, false>(w, flat, len / V::kWide, line);
    else if (w.dtype == kF16)
        decode_groups<kF16, false>(w, flat, len / V::kWide, line);
    else
        decode_groups<kF32, false>(w, flat, len / V::kWide, line);
}

// Puts a row of x into the order of wide_unordered().
void reorder(float* x, int64_t n, int dtype) {
    float group[V::kWide];
    for (int64_t g = 0; g < n; g += V::kWide) {
        __builtin_memcpy(group, x + g, sizeof(group));
        for (int i = 0; i < V::kWide; ++i)
            x[g + i] = group[V::unordered(dtype, i / L, i % L)];
    }
}

struct RowTask {
    const Product* p;
    int64_t rows_per_chunk;
    int64_t x_stride;
    int status;
};

void convert_pairs(const Segment& segment, int64_t row, float* out) {
    float line[kPiece];
    for (int64_t k = 0; k < segment.depth; k += kPiece) {
        int64_t len = min64(kPiece, segment.depth - k);
        operand_pairs(segment.x, row, k, len, nullptr, line, out + k / 2);
    }
}

void convert_x(const RowTask& task, float* x) {
    const Product& p = *task.p;
    for (int n = 0; n < p.segments; ++n) {
        const Segment& segment = segment_of(p, n);
        bool pairs = in_pairs(segment);
        int64_t whole = line_of(segment), end = min64(segment.row_end, p.m);
        for (int64_t i = segment.row_begin; i < end; ++i) {
            float* line = x + i * task.x_stride;
            if (pairs)
                convert_pairs(segment, row_of(p, i), line);
            else
                operand_run(segment.x, row_of(p, i), 0, segment.depth, nullptr, line);
            if (!pairs && in_groups(segment.w))
                reorder(line, segment.depth, segment.w.dtype);
            for (int64_t k = elements_of(segment.depth, pairs); k < whole; ++k)
                line[k] = 0.0f;
        }
        x += whole;
    }
}

// Adds one segment's products for stored rows j .. j + rows to their chains [rows][m].
void add_segment(const RowTask& task, const Segment& segment, const float* x, int64_t j,
                 int64_t rows, float* piece, Chains* chains) {
    const Weight& w = segment.w;
    int64_t m = task.p->m, end = min64(segment.row_end, m);
    if (segment.row_begin >= end)
        return;
    constexpr bool kFuse = V::kWide / L % kChains == 0;
    bool pairs = in_pairs(segment);
    if (kFuse && m == 1 && in_groups(w)) {
        for (int64_t r = 0; r < rows; ++r) {
            if (pairs)
                fused_dot_pairs(w, j + r, x, chains[r]);
            else if (w.dtype == kBF16)
                fused_dot<kBF16>(w, j + r, x, chains[r]);
            else if (w.dtype == kF16)
                fused_dot<kF16>(w, j + r, x, chains[r]);
            else
                fused_dot<kF32>(w, j + r, x, chains[r]);
        }
        return;
    }
    bool fuses = pairs && m == 1;
    for (int64_t r = 0; r < rows && fuses; ++r)
        fuses = int8_fuses(w, j + r);
    if (fuses) {
        for (int64_t r = 0; r < rows; ++r)
            fused_dot_int8(w, j + r, x, chains[r]);
        return;
    }
    int64_t whole = pairs ? 2 * kPiece : kPiece;
    bool plain = plain_floats(w);
    for (int64_t k = 0; k < segment.depth; k += whole) {
        int64_t len = min64(whole, segment.depth - k);
        int64_t elements = elements_of(len, pairs), vectors = ceil_div(elements, L);
        const float* at = x + elements_of(k, pairs);
        for (int64_t r = 0; r < rows; ++r) {
            const float* line = piece;
            if (pairs) {
                decode_pairs(w, j + r, k, len, piece + kPiece, piece);
            } else if (plain && len % L == 0) {
                line = (const float*)w.p + (j + r) * w.stride + k;
            } else {
                decode_piece(w, j + r, k, len, piece);
            }
            for (int64_t i = elements; i < vectors * L; ++i)
                piece[i] = 0.0f;
            for (int64_t i = segment.row_begin; i < end; i += V::kRowGroup) {
                const float* rows_of_x = at + i * task.x_stride;
                Chains* sums = chains + r * m + i;
                if (kPairs && pairs)
                    dots_of<V::kRowGroup, kPairs>(end - i, line, rows_of_x, task.x_stride, vectors,
                                                  sums);
                else
                    dots_of<V::kRowGroup, false>(end - i, line, rows_of_x, task.x_stride, vectors,
                                                 sums);
            }
        }
    }
}

// round(scale * (sum + add) + bias) for output j of row i.
void store_sum(const Product& p, int64_t i, int64_t j, float y) {
    int64_t at = row_of(p, i) * p.out_row_stride + j * p.out_col_stride;
    if (p.add != nullptr)
        y += load_as_float(p.add, p.add_dtype, at);
    if (p.unscaled != nullptr)
        store_from_float(p.unscaled, p.out_dtype, at, y);
    if (p.scale != nullptr)
        y *= p.scale[j];
    if (p.bias != nullptr)
        y += load_as_float(p.bias, p.bias_dtype, j);
    store_from_float(p.out, p.out_dtype, at, y);
}

void row_body(void* context, Queue* queue) {
    RowTask& task = *(RowTask*)context;
    const Product& p = *task.p;
    float* piece = (float*)scratch((size_t)(p.m * task.x_stride + kBuffer) * sizeof(float));
    if (piece == nullptr) {
        __atomic_store_n(&task.status, (int)kNoMemory, __ATOMIC_RELAXED);
        return;
    }
    float* x = piece + kBuffer;
    bool converted = false; // only threads that get a chunk need x
    for (int64_t chunk = next_chunk(queue); chunk >= 0; chunk = next_chunk(queue)) {
        if (!converted)
            convert_x(task, x);
        converted = true;
        int64_t end = min64(p.n, (chunk + 1) * task.rows_per_chunk);
        // A block of stored rows shares each piece of x while that is in the first-level cache.
        for (int64_t j = chunk * task.rows_per_chunk; j < end; j += kBlockRows) {
            Chains chains[kBlockRows * kMaxRows];
            int64_t rows = min64(kBlockRows, end - j);
            __builtin_memset(chains, 0, sizeof(Chains) * (size_t)(rows * p.m));
            const float* xs = x;
            for (int n = 0; n < p.segments; ++n) {
                add_segment(task, segment_of(p, n), xs, j, rows, piece, chains);
                xs += line_of(segment_of(p, n));
            }
            for (int64_t r = 0; r < rows; ++r)
                for (int64_t i = 0; i < p.m; ++i)
                    store_sum(p, i, j + r, fold(chains[r * p.m + i]));
        }
    }
}

bool row_kernel_serves(const Product& p) {
    if ((p.range > 0 ? p.range : p.m) > kMaxRows || p.scaled < p.segments)
        return false;
    for (int n = 0; n < p.segments; ++n) {
        const Segment& segment = segment_of(p, n);
        if (segment.along_columns || segment.mask.on || segment.join)
            return false;
    }
    return true;
}

int row_product(const Product& p, int threads) {
    int64_t depth = 1;
    for (int n = 0; n < p.segments; ++n)
        depth += segment_of(p, n).depth;
    RowTask task = {&p, 1, 16, kOk}; // 16: rows of x must not all start in the same cache set
    for (int n = 0; n < p.segments; ++n)
        task.x_stride += line_of(segment_of(p, n));
    int64_t blocks = 131072 / (depth * kBlockRows); // about 10 us a chunk
    task.rows_per_chunk = kBlockRows * (blocks < 1 ? 1 : blocks > 8 ? 8 : blocks);
    run_parallel(threads, ceil_div(p.n, task.rows_per_chunk), row_body, &task);
    return task.status;
}

} // namespace
} // namespace pk::PK_ISA
