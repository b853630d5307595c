// The panel kernel: any product of kernels.h, for any m.
//
// A task owns a tile of the output, `rows` x `cols`. It walks the depth in blocks of kDepth: decode
// a panel of the weights once into cache, convert the block of x once, multiply by broadcasts into
// registers, add to the tile in fp32. Each output element is summed in an order that depends on the
// depth alone, so neither threads, nor the cut into tiles, nor the other rows change a bit of it.

namespace pk::PK_ISA {
namespace {

constexpr int kDepth = 128;
constexpr int kTileCols = V::kTileVecs * V::kLanes;
constexpr int kPanelCols =
    kTiles ? 256 : 512;            // at most; wide, so that reading down the columns of a row-major
                                   // weight takes whole stretches of each row
constexpr int kRowPanelCols = 256; // where output columns are storage rows
constexpr int kSumStride = kPanelCols + 16;
constexpr int kVectorRows = 144;
// Tiles multiply so fast that decoding a panel must serve more rows.
constexpr int kPanelRows = kTiles ? 512 : kVectorRows;
constexpr int kTilePairs = 16; // depth of a tile
// Row i of the converted x block starts at i * kStride: a constant, so that the tile kernel
// addresses its rows by displacement; not a power of two, so that they do not share cache sets.
constexpr int kStride = kDepth + 16;
// Likewise from one panel of kTileCols columns to the next: a line of decoded weights is written
// to all of them, and at a distance of a power of two they would all fall into one cache set.
constexpr int kPanelStride = kDepth * kTileCols + 16;

// With bf16 pairs all of this counts pairs: a block of the depth is twice as deep, the same bytes.
constexpr int kPanelGroup = 3;
constexpr int kFewRows = 8;
constexpr int kThinDepth = 8;

template <int N>
struct Number {
    static constexpr int value = N;
};

struct PanelScratch {
    alignas(64) float weights[kPanelCols / kTileCols * kPanelStride]; // each panel depth-major
    alignas(64) float x[kPanelRows * kStride];
    alignas(64) float sum[kPanelRows * kSumStride];
    alignas(64) float part[kPanelRows * kSumStride]; // of segments that wait for a mask
    alignas(64) float block[kFewRows * kSumStride];
    alignas(64) float rows[V::kLanes * kStride];
    alignas(64) float line[2 * kPanelCols];
    alignas(64) float bias[kPanelCols];
};

// What becomes of the sums that lie in memory: products are added to them, or take their place, or
// they go on as if an earlier call had not ended.
enum Mode { kAdd, kPut, kGoOn };

// R rows by P panels, S floats from one panel to the next. Few rows take several panels, to have
// enough independent sums in flight.
template <int R, int P, int S, Mode kMode, bool kPair>
void tile(const float* x, const float* w, int64_t depth, float* sum) {
    constexpr int kVecs = P * V::kTileVecs;
    V::F acc[R][kVecs];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
        for (int v = 0; v < kVecs; ++v)
            acc[r][v] = kMode == kGoOn ? V::load(sum + r * kSumStride + v * L) : V::zero();
    for (int64_t k = 0; k < depth; ++k) {
        V::F b[kVecs];
#pragma GCC unroll 16
        for (int v = 0; v < kVecs; ++v)
            b[v] = V::load(w + v / V::kTileVecs * S + k * kTileCols + v % V::kTileVecs * L);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
            V::F a = V::set1(x[r * kStride + k]);
#pragma GCC unroll 16
            for (int v = 0; v < kVecs; ++v)
                acc[r][v] = kPair ? Pairs::dot(a, b[v], acc[r][v]) : V::fma(a, b[v], acc[r][v]);
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
        for (int v = 0; v < kVecs; ++v) {
            float* s = sum + r * kSumStride + v * L;
            V::store(s, kMode == kAdd ? V::add(V::load(s), acc[r][v]) : acc[r][v]);
        }
}

// R or fewer rows by all panels.
template <int R, int S, Mode kMode, bool kPair>
void tiles(int64_t rows, const float* x, const float* w, int64_t panels, int64_t depth,
           float* sum) {
    if constexpr (R > 1) {
        if (rows < R) {
            tiles<R - 1, S, kMode, kPair>(rows, x, w, panels, depth, sum);
            return;
        }
    }
    constexpr int P = R == 1 ? 3 : R <= V::kTileRows / 2 ? 2 : 1;
    int64_t j = 0;
    for (; j + P <= panels; j += P)
        tile<R, P, S, kMode, kPair>(x, w + j * S, depth, sum + j * kTileCols);
    for (; j < panels; ++j)
        tile<R, 1, S, kMode, kPair>(x, w + j * S, depth, sum + j * kTileCols);
}

// Each vector of a line goes to its panel.
template <int S>
struct ToPanels {
    float* out;
    PK_SINK inline void take(int64_t group, int i, V::F v) {
        int64_t at = group * (V::kWide / L) + i;
        V::store(out + at / V::kTileVecs * S + at % V::kTileVecs * L, v);
    }
};

// Zeros after n numbers in pairs, up to a whole tile.
void fill_tile(float* pairs, int64_t n) {
    int64_t end = ceil_div(n, 2 * kTilePairs) * kTilePairs;
    for (int64_t i = ceil_div(n, 2); kTiles && i < end; ++i)
        pairs[i] = 0.0f;
}

// Output columns are storage rows: decode kLanes rows, transpose them into the panel. `depth` and
// `k0` count numbers, also where the panel is made of pairs.
template <bool kPair>
void pack_rows(const Weight& w, int64_t row0, int64_t rows, int64_t k0, int64_t depth,
               PanelScratch& s) {
    // Columns that fill up the last panel are zeros: what lay there could be denormal, and slow.
    for (int64_t j = 0; j < ceil_div(rows, kTileCols) * kTileCols; j += L) {
        for (int64_t r = 0; r < L; ++r) {
            // Each row gives a line or two of memory to a block, so that the processor sees no
            // stream: a row's part of the next block is asked for a whole block ahead.
            if (k0 == 0 && j + r + L < rows)
                prefetch_run(w, row0 + j + r + L, k0, depth);
            if (j + r < rows && k0 + depth < w.cols)
                prefetch_run(w, row0 + j + r, k0 + depth, min64(depth, w.cols - k0 - depth));
            float* row = s.rows + r * kStride;
            if (j + r >= rows)
                __builtin_memset(row, 0, kDepth * sizeof(float));
            else if constexpr (kPair) {
                decode_pairs(w, row0 + j + r, k0, depth, s.line, row);
                fill_tile(row, depth);
            } else
                decode_run(w, row0 + j + r, k0, depth, row);
        }
        float* panel = s.weights + j / kTileCols * kPanelStride + j % kTileCols;
        for (int64_t k = 0; k < elements_of(depth, kPair); k += L)
            V::transpose(s.rows + k, kStride, panel + k * kTileCols, kTileCols);
    }
}

// Output columns are storage columns: runs are already in order.
template <int S>
void pack_columns(const Segment& segment, int64_t col0, int64_t cols, int64_t k0, int64_t depth,
                  PanelScratch& s) {
    const Weight& w = segment.w;
    const int64_t* index = segment.depth_rows;
    constexpr int64_t kAhead = 8;
    int64_t whole = ceil_div(cols, kTileCols) * kTileCols;
    for (int64_t j = cols; j < whole; ++j)
        s.line[j] = 0.0f;
    // 4-bit lines in whole groups are decoded straight into the panels.
    bool direct = w.kind == k4Bit && w.cols % V::kWide == 0 && col0 % V::kWide == 0 &&
                  cols % V::kWide == 0 && ((int64_t)1 << w.block_shift) >= V::kWide &&
                  w.entries.index == nullptr;
    bool plain = plain_floats(w) && whole == cols;
    for (int64_t k = 0; k < depth; ++k) {
        int64_t ahead = k0 + k + kAhead;
        if (ahead < segment.depth)
            prefetch_run(w, index == nullptr ? ahead : index[ahead], col0, cols);
        ToPanels<S> panels = {s.weights + k * kTileCols};
        if (direct) {
            int64_t flat = (k0 + k) * w.cols + col0;
            if (w.dtype == kBF16)
                decode_groups<kBF16>(w, flat, cols / V::kWide, panels);
            else if (w.dtype == kF16)
                decode_groups<kF16>(w, flat, cols / V::kWide, panels);
            else
                decode_groups<kF32>(w, flat, cols / V::kWide, panels);
            continue;
        }
        int64_t row = index == nullptr ? k0 + k : index[k0 + k];
        const float* line = s.line;
        if (plain)
            line = (const float*)w.p + row * w.stride + col0;
        else
            decode_run(w, row, col0, cols, s.line);
        float* to = s.weights + k * kTileCols;
        for (int64_t j = 0; j < whole; j += kTileCols, to += S)
#pragma GCC unroll 4
            for (int v = 0; v < V::kTileVecs; ++v)
                V::store(to + v * L, V::load(line + j + v * L));
    }
}

// The same in pairs of storage rows.
template <int S>
void pack_column_pairs(const Segment& segment, int64_t col0, int64_t cols, int64_t k0,
                       int64_t depth, PanelScratch& s) {
    const int64_t* index = segment.depth_rows;
    auto row = [&](int64_t k) { return index == nullptr ? k : index[k]; };
    constexpr int64_t kAhead = 8;
    int64_t whole = ceil_div(cols, kTileCols) * kTileCols, end = k0 + depth;
    for (int64_t k = k0; k < end; k += 2) {
        for (int64_t ahead = k + kAhead; ahead < min64(k + kAhead + 2, segment.depth); ++ahead)
            prefetch_run(segment.w, row(ahead), col0, cols);
        float* to = s.weights + (k - k0) / 2 * kTileCols;
        auto put = [&](int64_t j, V::F v)
                       PK_SINK { V::store(to + j / kTileCols * S + j % kTileCols, v); };
        for (int64_t j = cols / L * L; j < whole; j += L)
            put(j, V::zero());
        decode_pair_of_rows(segment.w, row(k), k + 1 < end ? row(k + 1) : -1, col0, cols, s.line,
                            kPanelCols, put);
    }
    int64_t lines = ceil_div(depth, 2), tile = ceil_div(lines, kTilePairs) * kTilePairs;
    for (int64_t k = lines; kTiles && k < tile; ++k)
        for (int64_t j = 0; j < whole; j += L)
            V::store(s.weights + k * kTileCols + j / kTileCols * S + j % kTileCols, V::zero());
}

template <int S, bool kPair>
void pack(const Segment& segment, int64_t col0, int64_t cols, int64_t k0, int64_t depth,
          PanelScratch& s) {
    if constexpr (kPair)
        pack_column_pairs<S>(segment, col0, cols, k0, depth, s);
    else
        pack_columns<S>(segment, col0, cols, k0, depth, s);
}

// A block's products by AMX: each sum goes on where the last block left it.
void add_tiles(int64_t rows, const float* x, int64_t panels, int64_t steps, float* sum,
               PanelScratch& s) {
    auto strip = [&](auto height, int64_t i, int64_t j) PK_SINK {
        Tiles::multiply<decltype(height)::value>(x + i * kStride, kStride,
                                                 s.weights + j * kPanelStride, kTileCols, steps,
                                                 sum + i * kSumStride + j * kTileCols, kSumStride);
    };
    int64_t whole = rows / 16 * 16, rest = rows - whole;
    for (int64_t j = 0; j < panels; ++j) {
        int64_t i = 0;
        for (; i + 32 <= whole; i += 32)
            strip(Number<2>(), i, j);
        if (i < whole)
            strip(Number<1>(), i, j);
    }
    if (rest == 0)
        return;
    Tiles::configure((int)rest);
    for (int64_t j = 0; j < panels; ++j)
        strip(Number<1>(), whole, j);
    Tiles::configure(16);
}

// Zeros for the sums of `rows` rows, to whole panels of columns.
void clear_sums(float* sum, int64_t rows, int64_t cols) {
    size_t bytes = (size_t)(ceil_div(cols, kTileCols) * kTileCols) * sizeof(float);
    for (int64_t i = 0; i < rows; ++i)
        __builtin_memset(sum + i * kSumStride, 0, bytes);
}

template <Mode kMode, bool kPair>
void multiply_panels(int64_t panels, int64_t depth, int64_t rows, const float* x, float* sum,
                     PanelScratch& s) {
    // A few panels at a time, so that they stay in the first-level cache over the rows.
    for (int64_t j = 0; j < panels; j += kPanelGroup)
        for (int64_t i = 0; i < rows; i += V::kTileRows)
            tiles<V::kTileRows, kPanelStride, kMode, kPair>(
                rows - i, x + i * kStride, s.weights + j * kPanelStride,
                min64(kPanelGroup, panels - j), elements_of(depth, kPair),
                sum + i * kSumStride + j * kTileCols);
}

// Adds one block of the depth to the sums of a task: `rows` rows of x and of `sum`; to nothing,
// whatever lies in `sum`, when they are `fresh`.
template <bool kPair>
void add_block(const Segment& segment, int64_t j0, int64_t cols, int64_t k0, int64_t depth,
               int64_t rows, const float* x, float* sum, bool fresh, PanelScratch& s) {
    if (segment.along_columns)
        pack<kPanelStride, kPair>(segment, j0, cols, k0, depth, s);
    else
        pack_rows<kPair>(segment.w, j0, cols, k0, depth, s);
    int64_t panels = ceil_div(cols, kTileCols);
    if constexpr (kTiles && kPair) {
        if (fresh)
            clear_sums(sum, rows, cols);
        add_tiles(rows, x, panels, ceil_div(depth, 2 * kTilePairs), sum, s);
    } else if (fresh) {
        multiply_panels<kPut, kPair>(panels, depth, rows, x, sum, s);
    } else {
        multiply_panels<kAdd, kPair>(panels, depth, rows, x, sum, s);
    }
}

// The same, bit for bit, for few rows: the weights are used while a few lines of them are in the
// first-level cache, and the block's sums wait in memory.
template <bool kPair>
void add_thin_block(const Segment& segment, int64_t j0, int64_t cols, int64_t k0, int64_t depth,
                    int64_t rows, const float* x, float* sum, bool fresh, PanelScratch& s) {
    int64_t panels = ceil_div(cols, kTileCols);
    float* block = fresh ? sum : s.block;
    clear_sums(block, rows, cols);
    constexpr int64_t kStep = kPair ? 2 * kThinDepth : kThinDepth;
    for (int64_t k = 0; k < depth; k += kStep) {
        int64_t lines = min64(kStep, depth - k);
        pack<kThinDepth * kTileCols, kPair>(segment, j0, cols, k0 + k, lines, s);
        for (int64_t i = 0; i < rows; i += V::kTileRows)
            tiles<V::kTileRows, kThinDepth * kTileCols, kGoOn, kPair>(
                rows - i, x + i * kStride + elements_of(k, kPair), s.weights, panels,
                elements_of(lines, kPair), block + i * kSumStride);
    }
    for (int64_t i = 0; i < rows && !fresh; ++i)
        add_run(sum + i * kSumStride, block + i * kSumStride, panels * kTileCols);
}

// Adds a segment's products to rows low .. high of `target`, the tile of rows i0 .. of the output.
template <bool kPair>
void add_products(const Product& p, const Segment& segment, int64_t i0, int64_t low, int64_t high,
                  int64_t j0, int64_t cols, float* target, bool fresh, PanelScratch& s) {
    constexpr int64_t kStep = kPair ? 2 * kDepth : kDepth;
    float *x = s.x + low * kStride, *sum = target + low * kSumStride;
    for (int64_t k0 = 0; k0 < segment.depth; k0 += kStep) {
        int64_t depth = min64(kStep, segment.depth - k0);
        bool put = fresh && k0 == 0;
        for (int64_t i = low; i < high; ++i) {
            int64_t row = row_of(p, i0 + i);
            float* to = s.x + i * kStride;
            if constexpr (kPair) {
                operand_pairs(segment.x, row, k0, depth, segment.depth_rows, s.line, to);
                fill_tile(to, depth);
            } else
                operand_run(segment.x, row, k0, depth, segment.depth_rows, to);
        }
        if (segment.along_columns && high - low <= kFewRows && !(kTiles && kPair))
            add_thin_block<kPair>(segment, j0, cols, k0, depth, high - low, x, sum, put, s);
        else
            add_block<kPair>(segment, j0, cols, k0, depth, high - low, x, sum, put, s);
    }
}

struct PanelTask {
    const Product* p;
    int64_t tile_rows, tile_cols;
    int64_t row_tiles;
    int status;
    bool pairs;
};

// Keeps a sum as it is, if asked for, and scales it.
void scale_sum(const Product& p, int64_t at, int64_t j0, int64_t cols, float* sum) {
    if (p.unscaled != nullptr) // only with unit column stride
        store_run(sum, cols, p.out_dtype, (char*)p.unscaled + at * dtype_size(p.out_dtype));
    if (p.scale != nullptr)
        mul_run(sum, p.scale + j0, cols);
}

// Scale, bias, rounding, and the store of a task's sums.
void finish_rows(const Product& p, int64_t i0, int64_t rows, int64_t j0, int64_t cols,
                 PanelScratch& s) {
    if (p.bias != nullptr) {
        const char* b = (const char*)p.bias + j0 * dtype_size(p.bias_dtype);
        load_run(b, p.bias_dtype, cols, s.bias);
    }
    for (int64_t i = 0; i < rows; ++i) {
        float* sum = s.sum + i * kSumStride;
        int64_t at = row_of(p, i0 + i) * p.out_row_stride + j0 * p.out_col_stride;
        if (p.add != nullptr) { // only with unit column stride
            load_run((const char*)p.add + at * dtype_size(p.add_dtype), p.add_dtype, cols, s.line);
            add_run(sum, s.line, cols);
        }
        int64_t byte = at * dtype_size(p.out_dtype);
        if (p.scaled >= p.segments)
            scale_sum(p, at, j0, cols, sum);
        if (p.bias != nullptr)
            add_run(sum, s.bias, cols);
        char* out = (char*)p.out + byte;
        if (p.out_col_stride == 1) {
            store_run(sum, cols, p.out_dtype, out);
        } else {
            for (int64_t j = 0; j < cols; ++j)
                store_from_float(out, p.out_dtype, j * p.out_col_stride, sum[j]);
        }
    }
}

void run_panel(const PanelTask& task, int64_t chunk, PanelScratch& s) {
    const Product& p = *task.p;
    int64_t i0 = chunk % task.row_tiles * task.tile_rows;
    int64_t j0 = chunk / task.row_tiles * task.tile_cols;
    int64_t rows = min64(task.tile_rows, p.m - i0);
    int64_t cols = min64(task.tile_cols, p.n - j0);
    constexpr int64_t stride = kSumStride;
    // The first segment's products take the place of zeros where they are on every row.
    const Segment& first = segment_of(p, 0);
    bool covers =
        p.segments > 0 && first.depth > 0 && first.row_begin <= i0 && first.row_end >= i0 + rows;
    if (!covers)
        clear_sums(s.sum, rows, cols);
    float* target = s.sum;
    bool joined = false;
    for (int n = 0; n < p.segments; ++n) {
        const Segment& segment = segment_of(p, n);
        int64_t low = max64(segment.row_begin - i0, 0), high = min64(segment.row_end - i0, rows);
        if (low >= high)
            continue;
        if (!joined) {
            // What comes first may be masked where the sum will be.
            target = (segment.mask.on || segment.join) && n > 0 ? s.part : s.sum;
            if (target == s.part)
                clear_sums(s.part + low * stride, high - low, cols);
        }
        if (kPairs && task.pairs && in_pairs(segment))
            add_products<kPairs>(p, segment, i0, low, high, j0, cols, target, covers && n == 0, s);
        else
            add_products<false>(p, segment, i0, low, high, j0, cols, target, covers && n == 0, s);
        joined = segment.join;
        if (joined)
            continue;
        for (int64_t i = low; i < high; ++i) {
            float* line = target + i * stride;
            if (segment.mask.on)
                dropout_run(line, cols, segment.mask, row_of(p, i0 + i) * segment.mask.cols + j0,
                            kF32);
            if (target == s.part)
                add_run(s.sum + i * stride, line, cols);
            if (n + 1 == p.scaled && n + 1 < p.segments)
                scale_sum(p, row_of(p, i0 + i) * p.out_row_stride + j0, j0, cols,
                          s.sum + i * stride);
        }
    }
    finish_rows(p, i0, rows, j0, cols, s);
}

void panel_body(void* context, Queue* queue) {
    PanelTask& task = *(PanelTask*)context;
    PanelScratch* s = (PanelScratch*)scratch(sizeof(PanelScratch));
    if (s == nullptr) {
        __atomic_store_n(&task.status, (int)kNoMemory, __ATOMIC_RELAXED);
        return;
    }
    if (kTiles && task.pairs)
        Tiles::configure(16);
    for (int64_t chunk = next_chunk(queue); chunk >= 0; chunk = next_chunk(queue))
        run_panel(task, chunk, *s);
    if (kTiles && task.pairs)
        Tiles::release();
}

int panel_product(const Product& p, int threads) {
    PanelTask task = {&p, 0, kRowPanelCols, 0, kOk, kTiles || (kPairs && fast_pair_products())};
    bool tiles = false;
    for (int n = 0; n < p.segments; ++n) {
        if (segment_of(p, n).along_columns)
            task.tile_cols = kPanelCols;
        tiles = tiles || (kTiles && in_pairs(segment_of(p, n)));
    }
    // Even shares of the rows, in whole register tiles; narrower panels while tasks are few.
    int64_t most = tiles ? kPanelRows : kVectorRows, step = tiles ? 16 : V::kTileRows;
    int64_t blocks = ceil_div(p.m, most);
    task.tile_rows = ceil_div(ceil_div(p.m, blocks), step) * step;
    task.row_tiles = ceil_div(p.m, task.tile_rows);
    while (task.tile_cols > 32 && task.row_tiles * ceil_div(p.n, task.tile_cols) < 4 * threads)
        task.tile_cols /= 2;
    run_parallel(threads, task.row_tiles * ceil_div(p.n, task.tile_cols), panel_body, &task);
    return task.status;
}

} // namespace
} // namespace pk::PK_ISA
