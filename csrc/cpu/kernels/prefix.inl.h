// Attention over a trainable prefix and the sequence behind it, tile by tile: logits, running
// maximum and sums, products with the values, without joined keys and without stored probabilities.
//
// Rows of a task are queries by position, then head of the group (row = position * group + head):
// heads that share keys share each packed tile, and causal rows end at nearly the same key.
// Everything is converted to fp32 inside the cache; each sum belongs to one task and has one order.

namespace pk::PK_ISA {
namespace {

constexpr int64_t kAttRows = V::kTileRows * 8;
constexpr int64_t kAttKeys = 64; // a multiple of every register tile's columns
constexpr int64_t kAttPad = V::kTileVecs * L;
static_assert(kAttKeys % kAttPad == 0);
constexpr float kHidden = -__builtin_huge_valf();

// c [R, columns of a tile] = or += a [R, k] * b [k, columns]; a(i, k) at a[i * row + k * col]. The
// product is summed before it is added: short chains keep long sums exact.
template <int R>
void att_tile(const float* a, int64_t row, int64_t col, const float* b, int64_t ldb, float* c,
              int64_t ldc, int64_t depth, bool add) {
    V::F acc[R][V::kTileVecs];
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < V::kTileVecs; ++v)
            acc[r][v] = V::zero();
    for (int64_t k = 0; k < depth; ++k) {
        V::F w[V::kTileVecs];
#pragma GCC unroll 4
        for (int v = 0; v < V::kTileVecs; ++v)
            w[v] = V::load(b + k * ldb + v * L);
#pragma GCC unroll 12
        for (int r = 0; r < R; ++r) {
            V::F x = V::set1(a[r * row + k * col]);
#pragma GCC unroll 4
            for (int v = 0; v < V::kTileVecs; ++v)
                acc[r][v] = V::fma(x, w[v], acc[r][v]);
        }
    }
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < V::kTileVecs; ++v)
            V::store(c + r * ldc + v * L,
                     add ? V::add(V::load(c + r * ldc + v * L), acc[r][v]) : acc[r][v]);
}

template <int R>
void att_tile_of(int64_t rows, const float* a, int64_t row, int64_t col, const float* b,
                 int64_t ldb, float* c, int64_t ldc, int64_t depth, bool add) {
    if constexpr (R > 1) {
        if (rows < R) {
            att_tile_of<R - 1>(rows, a, row, col, b, ldb, c, ldc, depth, add);
            return;
        }
    }
    att_tile<R>(a, row, col, b, ldb, c, ldc, depth, add);
}

// Plain C++ rounds twice a step, where the others fuse: it needs shorter chains for the same error.
constexpr int64_t kAttChain = L == 1 ? 8 : INT64_MAX;

void att_gemm(int64_t m, int64_t n, int64_t depth, const float* a, int64_t row, int64_t col,
              const float* b, int64_t ldb, float* c, int64_t ldc, bool add) {
    for (int64_t k = 0; k < depth; k += min64(kAttChain, depth - k))
        for (int64_t j = 0; j < n; j += kAttPad)
            for (int64_t i = 0; i < m; i += V::kTileRows)
                att_tile_of<V::kTileRows>(m - i, a + i * row + k * col, row, col, b + k * ldb + j,
                                          ldb, c + i * ldc + j, ldc, min64(kAttChain, depth - k),
                                          add || k != 0);
}

// exp(x) for x <= 88 (or NaN) with an error of about one ulp; below 2^-126 it is zero.
PK_INLINE V::F att_exp(V::F x) {
    x = V::max(V::set1(-88.0296919f), x); // -127 ln 2
    V::F magic = V::set1(12582912.0f);
    V::F t = V::fma(x, V::set1(1.44269504f), magic);
    V::F n = V::add(t, V::set1(-12582912.0f));
    V::F r = V::fma(n, V::set1(-0.693359375f), x);
    r = V::fma(n, V::set1(2.12194440e-4f), r);
    V::F p = V::set1(1.9875691500e-4f);
    p = V::fma(p, r, V::set1(1.3981999507e-3f));
    p = V::fma(p, r, V::set1(8.3334519073e-3f));
    p = V::fma(p, r, V::set1(4.1665795894e-2f));
    p = V::fma(p, r, V::set1(1.6666665459e-1f));
    p = V::fma(p, r, V::set1(5.0000001201e-1f));
    p = V::add(V::fma(p, V::mul(r, r), r), V::set1(1.0f));
    return V::mul(p, V::pow2(t));
}

const void* att_at(const AttentionView& x, int dtype, int64_t b, int64_t h, int64_t l) {
    return (const char*)x.p + (b * x.batch + h * x.head + l * x.row) * dtype_size(dtype);
}

// `count` rows of a sequence, zeros up to the padded depth.
void att_rows(const AttentionView& x, int dtype, int64_t b, int64_t h, int64_t first, int64_t count,
              int64_t depth, int64_t padded, float* out) {
    for (int64_t l = 0; l < count; ++l) {
        float* line = out + l * padded;
        load_run(att_at(x, dtype, b, h, first + l), dtype, depth, line);
        for (int64_t d = depth; d < padded; ++d)
            line[d] = 0.0f;
    }
}

// Where the keys of a tile come from.
struct KeyTile {
    bool prefix;
    int64_t first; // in the prefix or in the sequence
    int64_t count;
    int64_t columns; // count, rounded up to whole register tiles
    int64_t at;      // of its first key in the joined row
};

int64_t tiles_of(int64_t keys) { return ceil_div(keys, kAttKeys); }

KeyTile key_tile(const PrefixAttention& a, int64_t tile) {
    int64_t before = tiles_of(a.prefix);
    KeyTile t;
    t.prefix = tile < before;
    t.first = (t.prefix ? tile : tile - before) * kAttKeys;
    t.count = min64(kAttKeys, (t.prefix ? a.prefix : a.keys) - t.first);
    t.columns = ceil_div(t.count, kAttPad) * kAttPad;
    t.at = t.prefix ? t.first : a.prefix + t.first;
    return t;
}

// A tile of keys or values as rows [columns, padded], missing ones zero.
void load_tile(const PrefixAttention& a, const AttentionView& own, const AttentionView& prefix,
               const KeyTile& t, int64_t b, int64_t h, float* out) {
    const AttentionView& from = t.prefix ? prefix : own;
    int dtype = t.prefix ? a.prefix_dtype : a.dtype;
    att_rows(from, dtype, b, h, t.first, t.count, a.depth, a.padded, out);
    for (int64_t i = t.count * a.padded; i < t.columns * a.padded; ++i)
        out[i] = 0.0f;
}

// rows [columns, padded] -> out [padded, kAttKeys]
void turn_tile(const KeyTile& t, const float* rows, int64_t padded, float* out) {
    for (int64_t d = 0; d < padded; d += L)
        for (int64_t j = 0; j < t.columns; j += L)
            V::transpose(rows + j * padded + d, padded, out + d * kAttKeys + j, kAttKeys);
}

struct RowBlock {
    int64_t first;
    int64_t count;
};

// Rows of q or a gradient of its shape; `scale` multiplies them.
void load_queries(const PrefixAttention& a, const AttentionView& x, int64_t b, int64_t h,
                  const RowBlock& rows, float scale, float* out) {
    for (int64_t r = 0; r < rows.count; ++r) {
        int64_t row = rows.first + r;
        int64_t head = h * a.group + row % a.group;
        att_rows(x, a.dtype, b, head, row / a.group, 1, a.depth, a.padded, out + r * a.padded);
        scale_run(out + r * a.padded, a.depth, scale);
    }
}

// The mask's values for one query over a tile: added to logits, or an upper bound of them.
void load_mask(const PrefixAttention& a, const KeyTile& t, int64_t b, int64_t head, int64_t query,
               float* out) {
    const AttentionMask& m = a.mask;
    int64_t at = b * m.batch + head * m.head + query * m.row + t.first * m.col;
    if (m.kind == kBoolMask) {
        const uint8_t* p = (const uint8_t*)m.p + at;
        for (int64_t j = 0; j < t.count; ++j)
            out[j] = p[j * m.col] != 0 ? -kHidden : kHidden;
    } else if (m.col == 1) {
        load_run((const char*)m.p + at * dtype_size(m.dtype), m.dtype, t.count, out);
    } else {
        for (int64_t j = 0; j < t.count; ++j)
            out[j] = load_as_float(m.p, m.dtype, at + j * m.col);
    }
    for (int64_t j = t.count; j < t.columns; ++j)
        out[j] = 0.0f;
}

// Masks logits s [rows, kAttKeys]; columns without a key become -inf.
void mask_logits(const PrefixAttention& a, const KeyTile& t, int64_t b, int64_t h,
                 const RowBlock& rows, float* bias, float* s) {
    bool masked = !t.prefix && a.mask.kind != kNoMask;
    for (int64_t r = 0; r < rows.count; ++r) {
        int64_t row = rows.first + r, query = row / a.group;
        float* line = s + r * kAttKeys;
        if (masked) {
            if (r == 0 || a.mask.row != 0 || a.mask.head != 0)
                load_mask(a, t, b, h * a.group + row % a.group, query, bias);
            if (a.mask.kind == kBoolMask)
                for (int64_t j = 0; j < t.columns; j += L)
                    V::store(line + j, V::min(V::load(line + j), V::load(bias + j)));
            else
                add_run(line, bias, t.columns);
        }
        int64_t seen = t.count;
        if (a.causal && !t.prefix)
            seen = min64(seen, query + a.keys - a.queries + 1 - t.first);
        for (int64_t j = seen < 0 ? 0 : seen; j < t.columns; ++j)
            line[j] = kHidden;
    }
}

// Words of the dropout mask for one row of a tile; returns where they start.
const uint32_t* dropout_words(const PrefixAttention& a, const KeyTile& t, int64_t b, int64_t h,
                              int64_t row, uint32_t* words) {
    int64_t head = h * a.group + row % a.group;
    int64_t line = (b * a.heads + head) * a.queries + row / a.group;
    int64_t first = line * (a.prefix + a.keys) + t.at;
    philox_words(a.dropout.seed, (uint64_t)first / 4, (int)t.columns / 4 + 1, words);
    return words + (first & 3);
}

constexpr int64_t kWords = kAttKeys + 16 * 4 + 4; // philox_words() writes whole batches

void drop_line(const Dropout& d, const uint32_t* words, int64_t columns, float* line) {
    V::F scale = V::set1(d.scale);
    for (int64_t j = 0; j < columns; j += L)
        V::store(line + j, V::keep(V::mul(V::load(line + j), scale), words + j, d.threshold));
}

// Whether no row of the block sees the tile.
bool behind(const PrefixAttention& a, const KeyTile& t, const RowBlock& rows) {
    if (!a.causal || t.prefix)
        return false;
    int64_t last = (rows.first + rows.count - 1) / a.group;
    return t.first > last + a.keys - a.queries;
}

struct AttScratch {
    float* next;
    float* take(int64_t floats) {
        float* p = next;
        next += ceil_div(floats, 16) * 16;
        return p;
    }
};

// s = probabilities of a tile, out and sum rescaled to the new maximum.
void soften(const PrefixAttention& a, const KeyTile& t, const RowBlock& rows, float* s, float* top,
            float* sum, float* out) {
    for (int64_t r = 0; r < rows.count; ++r) {
        float* line = s + r * kAttKeys;
        V::F high = V::load(line);
        for (int64_t j = L; j < t.columns; j += L)
            high = V::max(high, V::load(line + j));
        alignas(64) float lanes[L];
        V::store(lanes, high);
        float most = top[r];
        for (int j = 0; j < L; ++j)
            most = lanes[j] > most ? lanes[j] : most;
        float shift = most == kHidden ? 0.0f : most;
        if (most != top[r]) {
            alignas(64) float factor[L];
            V::store(factor, att_exp(V::set1(top[r] - shift)));
            sum[r] *= factor[0];
            scale_run(out + r * a.padded, a.padded, factor[0]);
            top[r] = most;
        }
        V::F total = V::zero(), minus = V::set1(-shift);
        for (int64_t j = 0; j < t.columns; j += L) {
            V::F e = att_exp(V::add(V::load(line + j), minus));
            V::store(line + j, e);
            total = V::add(total, e);
        }
        sum[r] += V::reduce_add(total);
    }
}

// log by the C library's double: once a row.
float row_lse(float top, float sum) {
    return sum == 0.0f ? kHidden : top + (float)__builtin_log((double)sum);
}

struct AttTask {
    const PrefixAttention* a;
    int status;
};

size_t forward_floats(const PrefixAttention& a) {
    return (size_t)(2 * kAttKeys * a.padded + 2 * kAttRows * a.padded + kAttRows * kAttKeys +
                    kAttKeys + 2 * kAttRows + 16 * 8);
}

void prefix_forward_body(void* context, Queue* queue) {
    AttTask& task = *(AttTask*)context;
    const PrefixAttention& a = *task.a;
    AttScratch scratch_space = {(float*)scratch(forward_floats(a) * sizeof(float))};
    if (scratch_space.next == nullptr) {
        __atomic_store_n(&task.status, (int)kNoMemory, __ATOMIC_RELAXED);
        return;
    }
    float* tile = scratch_space.take(kAttKeys * a.padded);
    float* turned = scratch_space.take(kAttKeys * a.padded);
    float* q = scratch_space.take(kAttRows * a.padded);
    float* out = scratch_space.take(kAttRows * a.padded);
    float* s = scratch_space.take(kAttRows * kAttKeys);
    float* bias = scratch_space.take(kAttKeys);
    float* top = scratch_space.take(kAttRows);
    float* sum = scratch_space.take(kAttRows);
    uint32_t words[kWords];
    int64_t all_rows = a.queries * a.group, blocks = ceil_div(all_rows, kAttRows);
    int64_t tiles = tiles_of(a.prefix) + tiles_of(a.keys);
    for (int64_t chunk = next_chunk(queue); chunk >= 0; chunk = next_chunk(queue)) {
        int64_t b = chunk / blocks / a.kv_heads, h = chunk / blocks % a.kv_heads;
        RowBlock rows = {chunk % blocks * kAttRows, 0};
        rows.count = min64(kAttRows, all_rows - rows.first);
        load_queries(a, a.q, b, h, rows, a.scale, q);
        for (int64_t i = 0; i < rows.count * a.padded; ++i)
            out[i] = 0.0f;
        for (int64_t r = 0; r < rows.count; ++r) {
            top[r] = kHidden;
            sum[r] = 0.0f;
        }
        for (int64_t i = 0; i < tiles; ++i) {
            KeyTile t = key_tile(a, i);
            if (behind(a, t, rows))
                break;
            load_tile(a, a.k, a.prefix_k, t, b, h, tile);
            turn_tile(t, tile, a.padded, turned);
            att_gemm(rows.count, t.columns, a.depth, q, a.padded, 1, turned, kAttKeys, s, kAttKeys,
                     false);
            mask_logits(a, t, b, h, rows, bias, s);
            soften(a, t, rows, s, top, sum, out);
            if (a.dropout.on)
                for (int64_t r = 0; r < rows.count; ++r)
                    drop_line(a.dropout, dropout_words(a, t, b, h, rows.first + r, words),
                              t.columns, s + r * kAttKeys);
            load_tile(a, a.v, a.prefix_v, t, b, h, tile);
            att_gemm(rows.count, a.padded, t.count, s, kAttKeys, 1, tile, a.padded, out, a.padded,
                     true);
        }
        for (int64_t r = 0; r < rows.count; ++r) {
            int64_t row = rows.first + r, head = h * a.group + row % a.group;
            int64_t query = row / a.group;
            float* line = out + r * a.padded;
            scale_run(line, a.depth, sum[r] == 0.0f ? 0.0f : 1.0f / sum[r]);
            int64_t at = ((b * a.queries + query) * a.heads + head) * a.depth;
            store_run(line, a.depth, a.dtype, (char*)a.out + at * dtype_size(a.dtype));
            a.lse[(b * a.heads + head) * a.queries + query] = row_lse(top[r], sum[r]);
        }
    }
}

double attention_microseconds(const PrefixAttention& a, double products) {
    double pairs = (double)a.batch * (double)a.heads * (double)a.queries;
    pairs *= (double)a.prefix + (double)a.keys * (a.causal ? 0.5 : 1.0);
    return pairs * (double)a.depth * products * 4e-5 / V::kSpeed;
}

int prefix_forward(PrefixAttention& a) {
    a.padded = ceil_div(a.depth, kAttPad) * kAttPad;
    int64_t blocks = ceil_div(a.queries * a.group, kAttRows);
    int64_t chunks = a.batch * a.kv_heads * blocks;
    if (chunks == 0)
        return kOk;
    AttTask task = {&a, kOk};
    run_parallel(worthwhile_threads(a.threads, attention_microseconds(a, 2.0)), chunks,
                 prefix_forward_body, &task);
    return task.status;
}

size_t backward_floats(const PrefixAttention& a) {
    int64_t all_rows = a.queries * a.group;
    return (size_t)(6 * kAttKeys * a.padded + 2 * kAttRows * a.padded + 2 * kAttRows * kAttKeys +
                    kAttKeys + 2 * all_rows + (a.need_own ? all_rows * a.padded : 0) + 16 * 16);
}

// sum(dout out) of each row, and its lse with -inf made harmless.
void row_statistics(const PrefixAttention& a, int64_t b, int64_t h, float* one, float* other,
                    float* delta, float* lse) {
    for (int64_t row = 0; row < a.queries * a.group; ++row) {
        load_queries(a, a.dout, b, h, {row, 1}, 1.0f, one);
        load_queries(a, a.saved, b, h, {row, 1}, 1.0f, other);
        V::F total = V::zero();
        for (int64_t d = 0; d < a.padded; d += L)
            total = V::fma(V::load(one + d), V::load(other + d), total);
        delta[row] = V::reduce_add(total);
        int64_t head = h * a.group + row % a.group;
        float x = a.lse[(b * a.heads + head) * a.queries + row / a.group];
        lse[row] = x == kHidden ? 0.0f : x;
    }
}

// From logits s and dout * values (in dp): what multiplies dout (in s) and the logits' gradient
// before the scale (in dp).
void row_gradients(const PrefixAttention& a, const KeyTile& t, int64_t b, int64_t h,
                   const RowBlock& rows, const float* delta, const float* lse, float* s,
                   float* dp) {
    uint32_t buffer[kWords];
    for (int64_t r = 0; r < rows.count; ++r) {
        int64_t row = rows.first + r;
        float *p = s + r * kAttKeys, *d = dp + r * kAttKeys;
        const uint32_t* words = nullptr;
        if (a.dropout.on) {
            words = dropout_words(a, t, b, h, row, buffer);
            drop_line(a.dropout, words, t.columns, d);
        }
        V::F shift = V::set1(-lse[row]), minus = V::set1(-delta[row]);
        for (int64_t j = 0; j < t.columns; j += L) {
            V::F e = att_exp(V::min(V::add(V::load(p + j), shift), V::set1(80.0f)));
            V::store(p + j, e);
            V::store(d + j, V::mul(e, V::add(V::load(d + j), minus)));
        }
        if (a.dropout.on)
            drop_line(a.dropout, words, t.columns, p);
    }
}

struct BackwardBuffers {
    float *k, *k_turned, *v_turned, *dk, *dv, *q, *dout, *s, *dp, *bias, *delta, *lse, *dq;
};

// The gradients of one tile of keys and values, and what it adds to those of the queries.
void backward_tile(const PrefixAttention& a, const KeyTile& t, int64_t b, int64_t h,
                   const BackwardBuffers& w) {
    load_tile(a, a.v, a.prefix_v, t, b, h, w.k);
    turn_tile(t, w.k, a.padded, w.v_turned);
    load_tile(a, a.k, a.prefix_k, t, b, h, w.k);
    turn_tile(t, w.k, a.padded, w.k_turned);
    for (int64_t i = 0; i < kAttKeys * a.padded; ++i)
        w.dk[i] = w.dv[i] = 0.0f;
    int64_t all_rows = a.queries * a.group;
    for (int64_t first = 0; first < all_rows; first += kAttRows) {
        RowBlock rows = {first, min64(kAttRows, all_rows - first)};
        if (behind(a, t, rows))
            continue;
        load_queries(a, a.q, b, h, rows, a.scale, w.q);
        load_queries(a, a.dout, b, h, rows, 1.0f, w.dout);
        att_gemm(rows.count, t.columns, a.depth, w.q, a.padded, 1, w.k_turned, kAttKeys, w.s,
                 kAttKeys, false);
        mask_logits(a, t, b, h, rows, w.bias, w.s);
        att_gemm(rows.count, t.columns, a.depth, w.dout, a.padded, 1, w.v_turned, kAttKeys, w.dp,
                 kAttKeys, false);
        row_gradients(a, t, b, h, rows, w.delta, w.lse, w.s, w.dp);
        att_gemm(t.count, a.padded, rows.count, w.s, 1, kAttKeys, w.dout, a.padded, w.dv, a.padded,
                 true);
        att_gemm(t.count, a.padded, rows.count, w.dp, 1, kAttKeys, w.q, a.padded, w.dk, a.padded,
                 true);
        if (a.need_own)
            att_gemm(rows.count, a.padded, t.count, w.dp, kAttKeys, 1, w.k, a.padded,
                     w.dq + first * a.padded, a.padded, true);
    }
}

// Rows of a finished gradient, to [B, L, H, D] or to fp32 partial sums [B, Hkv, P, D].
void store_tile(const PrefixAttention& a, const KeyTile& t, int64_t b, int64_t h, const float* rows,
                void* own, float* partial) {
    for (int64_t l = 0; l < t.count; ++l) {
        const float* line = rows + l * a.padded;
        if (t.prefix) {
            int64_t at = ((b * a.kv_heads + h) * a.prefix + t.first + l) * a.depth;
            store_run(line, a.depth, kF32, partial + at);
        } else {
            int64_t at = ((b * a.keys + t.first + l) * a.kv_heads + h) * a.depth;
            store_run(line, a.depth, a.dtype, (char*)own + at * dtype_size(a.dtype));
        }
    }
}

void prefix_backward_body(void* context, Queue* queue) {
    AttTask& task = *(AttTask*)context;
    const PrefixAttention& a = *task.a;
    AttScratch space = {(float*)scratch(backward_floats(a) * sizeof(float))};
    if (space.next == nullptr) {
        __atomic_store_n(&task.status, (int)kNoMemory, __ATOMIC_RELAXED);
        return;
    }
    int64_t all_rows = a.queries * a.group, before = tiles_of(a.prefix);
    int64_t tiles = before + tiles_of(a.keys), tile = kAttKeys * a.padded;
    BackwardBuffers w;
    w.k = space.take(tile);
    w.k_turned = space.take(tile);
    w.v_turned = space.take(tile);
    w.dk = space.take(tile);
    w.dv = space.take(tile);
    w.q = space.take(kAttRows * a.padded);
    w.dout = space.take(kAttRows * a.padded);
    w.s = space.take(kAttRows * kAttKeys);
    w.dp = space.take(kAttRows * kAttKeys);
    w.bias = space.take(kAttKeys);
    w.delta = space.take(all_rows);
    w.lse = space.take(all_rows);
    w.dq = a.need_own ? space.take(all_rows * a.padded) : nullptr;
    for (int64_t chunk = next_chunk(queue); chunk >= 0; chunk = next_chunk(queue)) {
        int64_t b = chunk / a.kv_heads, h = chunk % a.kv_heads;
        row_statistics(a, b, h, w.q, w.dout, w.delta, w.lse);
        if (a.need_own)
            for (int64_t i = 0; i < all_rows * a.padded; ++i)
                w.dq[i] = 0.0f;
        for (int64_t i = a.need_own || a.need_prefix ? 0 : tiles; i < tiles; ++i) {
            KeyTile t = key_tile(a, i);
            if (!t.prefix && !a.need_own)
                break;
            backward_tile(a, t, b, h, w);
            if (t.prefix && !a.need_prefix)
                continue;
            store_tile(a, t, b, h, w.dk, a.dk, a.partial_k);
            store_tile(a, t, b, h, w.dv, a.dv, a.partial_v);
        }
        for (int64_t row = 0; a.need_own && row < all_rows; ++row) {
            float* line = w.dq + row * a.padded;
            scale_run(line, a.depth, a.scale);
            int64_t head = h * a.group + row % a.group;
            int64_t at = ((b * a.queries + row / a.group) * a.heads + head) * a.depth;
            store_run(line, a.depth, a.dtype, (char*)a.dq + at * dtype_size(a.dtype));
        }
    }
}

int prefix_backward(PrefixAttention& a) {
    a.padded = ceil_div(a.depth, kAttPad) * kAttPad;
    int64_t chunks = a.batch * a.kv_heads;
    if (chunks == 0)
        return kOk;
    AttTask task = {&a, kOk};
    run_parallel(worthwhile_threads(a.threads, attention_microseconds(a, 5.0)), chunks,
                 prefix_backward_body, &task);
    return task.status;
}

} // namespace
} // namespace pk::PK_ISA
