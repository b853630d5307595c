// Products along the entries of a sparse matrix: the gradient of single entries of a weight, and
// what they add to y and dx where the base product is torch's own.
//
// An entry (r, c) needs all rows m of dy[m, r] and x[m, c]: strides of a whole row in memory. So
// the activations are first copied into tiles of kTile rows, transposed: tile b holds, for every
// column, kTile neighbouring rows in one or two cache lines, in the activation's own dtype (half
// the bytes for 16 bits). A tile of 4096 columns, 256 to 512 KB, stays in the second-level cache
// while all entries pass by in order; an entry then costs kTile multiply-adds and the read of those
// lines. Every sum is taken in an order that depends on m and the entries alone.

namespace pk::PK_ISA {
namespace {

constexpr int kTileParts = 4; // vectors in a tile's row
constexpr int kTile = kTileParts * V::kLanes;
static_assert(64 % kTile == 0, "tiles must divide what the caller has rounded m up to");

template <int kDtype>
PK_SINK inline V::F load_as(const void* p, int64_t i) {
    if constexpr (kDtype == kBF16)
        return V::load_bf16((const uint16_t*)p + i);
    else if constexpr (kDtype == kF16)
        return V::load_f16((const uint16_t*)p + i);
    else
        return V::load((const float*)p + i);
}

template <int kDtype>
PK_SINK inline void store_as(void* p, int64_t i, V::F x) {
    if constexpr (kDtype == kBF16)
        V::store_bf16((uint16_t*)p + i, x);
    else if constexpr (kDtype == kF16)
        V::store_f16((uint16_t*)p + i, x);
    else
        V::store((float*)p + i, x);
}

// --- copying activations into tiles ---------------------------------------------------------

constexpr int64_t kTileSpan = 512; // columns of a chunk

struct TileTask {
    const void* x;
    void* tiles;
    int64_t m, cols;
    int64_t spans;
};

template <int kDtype>
void fill_tile(const TileTask& task, int64_t tile, int64_t first, int64_t last) {
    int64_t m0 = tile * kTile, rows = min64(kTile, task.m - m0);
    int64_t base = tile * task.cols * kTile;
    alignas(64) float in[L * L], out[L * L];
    int64_t c = first;
    for (; c + L <= last; c += L) {
        for (int64_t i = 0; i < kTile; i += L) {
            for (int64_t r = 0; r < L; ++r)
                V::store(in + r * L, i + r < rows
                                         ? load_as<kDtype>(task.x, (m0 + i + r) * task.cols + c)
                                         : V::zero());
            V::transpose(in, L, out, L);
            for (int64_t k = 0; k < L; ++k)
                store_as<kDtype>(task.tiles, base + (c + k) * kTile + i, V::load(out + k * L));
        }
    }
    for (; c < last; ++c)
        for (int64_t i = 0; i < kTile; ++i) {
            float v = i < rows ? load_as_float(task.x, kDtype, (m0 + i) * task.cols + c) : 0.0f;
            store_from_float(task.tiles, kDtype, base + c * kTile + i, v);
        }
}

template <int kDtype>
void tile_body(void* context, Queue* queue) {
    const TileTask& task = *(const TileTask*)context;
    for (int64_t chunk = next_chunk(queue); chunk >= 0; chunk = next_chunk(queue)) {
        int64_t first = chunk % task.spans * kTileSpan;
        fill_tile<kDtype>(task, chunk / task.spans, first, min64(task.cols, first + kTileSpan));
    }
}

template <int kDtype>
void fill_tiles(const void* x, void* tiles, int64_t m, int64_t cols, int threads) {
    TileTask task = {x, tiles, m, cols, ceil_div(cols, kTileSpan)};
    run_parallel(threads, ceil_div(m, kTile) * task.spans, tile_body<kDtype>, &task);
}

// --- the products ---------------------------------------------------------------------------

struct SparseTask {
    const SparseProduct* p;
    int64_t rows_per_chunk;
    int status;
};

// gradient[j] += sum over one tile of dy[m, row] * x[m, col]
template <int kDtype>
void dot_row(const SparseProduct& p, int64_t tile, int64_t row) {
    V::F dy[kTileParts];
#pragma GCC unroll 4
    for (int v = 0; v < kTileParts; ++v)
        dy[v] = load_as<kDtype>(p.dy_tiles, (tile * p.rows + row) * kTile + v * L);
    for (int64_t j = p.entries.start[row]; j < p.entries.start[row + 1]; ++j) {
        int64_t col = p.entries.index[j] - row * p.cols;
        int64_t at = (tile * p.cols + col) * kTile;
        V::F low = V::mul(dy[0], load_as<kDtype>(p.x_tiles, at));
        V::F high = V::mul(dy[1], load_as<kDtype>(p.x_tiles, at + L));
        low = V::fma(dy[2], load_as<kDtype>(p.x_tiles, at + 2 * L), low);
        high = V::fma(dy[3], load_as<kDtype>(p.x_tiles, at + 3 * L), high);
        float sum = V::reduce_add(V::add(low, high));
        p.gradient[j] = tile == 0 ? sum : p.gradient[j] + sum;
    }
}

// sums[0 .. kTile) = sum over the row's entries of value * x[m, col]
template <int kDtype>
void gather_row(const SparseProduct& p, int64_t tile, int64_t row, float* sums) {
    V::F acc[kTileParts];
#pragma GCC unroll 4
    for (int v = 0; v < kTileParts; ++v)
        acc[v] = V::zero();
    for (int64_t j = p.entries.start[row]; j < p.entries.start[row + 1]; ++j) {
        int64_t col = p.entries.index[j] - row * p.cols;
        V::F value = V::set1(load_as_float(p.entries.value, p.entries.dtype, j));
#pragma GCC unroll 4
        for (int v = 0; v < kTileParts; ++v)
            acc[v] = V::fma(
                value, load_as<kDtype>(p.x_tiles, (tile * p.cols + col) * kTile + v * L), acc[v]);
    }
#pragma GCC unroll 4
    for (int v = 0; v < kTileParts; ++v)
        V::store(sums + v * L, acc[v]);
}

// out[m, c] += tile[c * kTile + m] for `cols` columns from `first` on
template <int kDtype>
void add_tile(void* out, int64_t m0, int64_t rows, int64_t stride, int64_t first, int64_t cols,
              const float* tile) {
    alignas(64) float block[L * L];
    int64_t c = 0;
    for (; c + L <= cols; c += L)
        for (int64_t i = 0; i < rows; i += L) {
            V::transpose(tile + c * kTile + i, kTile, block, L);
            for (int64_t r = 0; r < min64(L, rows - i); ++r) {
                int64_t at = (m0 + i + r) * stride + first + c;
                V::F y = V::add(load_as<kDtype>(out, at), V::load(block + r * L));
                store_as<kDtype>(out, at, y);
            }
        }
    for (; c < cols; ++c)
        for (int64_t i = 0; i < rows; ++i) {
            int64_t at = (m0 + i) * stride + first + c;
            float y = load_as_float(out, kDtype, at) + tile[c * kTile + i];
            store_from_float(out, kDtype, at, y);
        }
}

// A chunk is a range of the sparse matrix's rows; all tiles pass by.
template <int kDtype>
void by_rows(void* context, Queue* queue) {
    const SparseTask& task = *(const SparseTask*)context;
    const SparseProduct& p = *task.p;
    alignas(64) float sums[L * kTile];
    for (int64_t chunk = next_chunk(queue); chunk >= 0; chunk = next_chunk(queue)) {
        int64_t first = chunk * task.rows_per_chunk;
        int64_t last = min64(p.rows, first + task.rows_per_chunk);
        for (int64_t tile = 0; tile < ceil_div(p.m, kTile); ++tile) {
            if (p.gradient != nullptr) {
                for (int64_t row = first; row < last; ++row)
                    dot_row<kDtype>(p, tile, row);
                continue;
            }
            int64_t m0 = tile * kTile;
            for (int64_t row = first; row < last; row += L) {
                int64_t count = min64(L, last - row);
                if (p.entries.start[row] == p.entries.start[row + count])
                    continue;
                for (int64_t r = 0; r < count; ++r)
                    gather_row<kDtype>(p, tile, row + r, sums + r * kTile);
                add_tile<kDtype>(p.y, m0, min64(kTile, p.m - m0), p.rows, row, count, sums);
            }
        }
    }
}

// A chunk is a tile: its part of dx is gathered transposed, in the order of the entries.
template <int kDtype>
void by_tiles(void* context, Queue* queue) {
    SparseTask& task = *(SparseTask*)context;
    const SparseProduct& p = *task.p;
    size_t bytes = (size_t)(p.cols * kTile) * sizeof(float);
    float* sums = (float*)scratch(bytes);
    if (sums == nullptr) {
        __atomic_store_n(&task.status, (int)kNoMemory, __ATOMIC_RELAXED);
        return;
    }
    for (int64_t tile = next_chunk(queue); tile >= 0; tile = next_chunk(queue)) {
        __builtin_memset(sums, 0, bytes);
        for (int64_t row = 0; row < p.rows; ++row) {
            if (p.entries.start[row] == p.entries.start[row + 1])
                continue;
            V::F dy[kTileParts];
#pragma GCC unroll 4
            for (int v = 0; v < kTileParts; ++v)
                dy[v] = load_as<kDtype>(p.dy_tiles, (tile * p.rows + row) * kTile + v * L);
            for (int64_t j = p.entries.start[row]; j < p.entries.start[row + 1]; ++j) {
                float* to = sums + (p.entries.index[j] - row * p.cols) * kTile;
                V::F value = V::set1(load_as_float(p.entries.value, p.entries.dtype, j));
#pragma GCC unroll 4
                for (int v = 0; v < kTileParts; ++v)
                    V::store(to + v * L, V::fma(value, dy[v], V::load(to + v * L)));
            }
        }
        int64_t m0 = tile * kTile;
        add_tile<kDtype>(p.dx, m0, min64(kTile, p.m - m0), p.cols, 0, p.cols, sums);
    }
}

template <int kDtype>
int sparse_product_as(const SparseProduct& p) {
    int64_t entries = p.entries.start[p.rows];
    if (p.m == 0 || entries == 0)
        return kOk;
    double work = (double)p.m * (double)(p.rows + p.cols + entries);
    int threads = worthwhile_threads(p.threads, work * 2e-4 / V::kSpeed);
    if (p.x_tiles != nullptr)
        fill_tiles<kDtype>(p.x, p.x_tiles, p.m, p.cols, threads);
    if (p.dy_tiles != nullptr)
        fill_tiles<kDtype>(p.dy, p.dy_tiles, p.m, p.rows, threads);
    SparseTask task = {&p, 0, kOk};
    if (p.dx != nullptr) {
        run_parallel(threads, ceil_div(p.m, kTile), by_tiles<kDtype>, &task);
        return task.status;
    }
    task.rows_per_chunk = ceil_div(ceil_div(p.rows, 4 * threads), L) * L;
    run_parallel(threads, ceil_div(p.rows, task.rows_per_chunk), by_rows<kDtype>, &task);
    return task.status;
}

int sparse_product(const SparseProduct& p) {
    if (p.dtype == kBF16)
        return sparse_product_as<kBF16>(p);
    if (p.dtype == kF16)
        return sparse_product_as<kF16>(p);
    return sparse_product_as<kF32>(p);
}

} // namespace
} // namespace pk::PK_ISA
