// Transaction barriers, bulk tensor copies and the products of a warpgroup; see hopper.h.
#include <string.h>

#include <map>

#include "executor.h"
#include "hopper_units.h"
#include "memory.h"

namespace simt {
namespace {

struct Barrier {
    int count = 0;   // arrivals a phase
    int missing = 0; // of the running one
    int64_t bytes = 0;
    uint32_t phase = 0;
    Clock gathered; // what those who arrived in the running phase know
    Clock known;    // the same for the last phase that ended
};

struct Copy {
    char* shared;
    TensorBox map;
    int64_t row, col; // of the box
    Barrier* barrier;
};

struct Product {
    float* d;
    Operand a, b;
    bool add, half, across;
};

struct Products { // of one thread
    std::vector<Product> open;
    std::vector<std::vector<Product>> groups;
};

std::map<const void*, Barrier> barriers;
std::vector<Copy> copies;
uint32_t engine_time;
std::vector<Products> products(kMaxThreads);
std::vector<uint32_t> fence_times(kMaxThreads);

constexpr int kTileRow = 128; // bytes of a row of an operand of a product

Barrier& barrier_at(const void* p) {
    auto found = barriers.find(p);
    if (found == barriers.end())
        fail("a transaction barrier is used before it was initialised");
    return found->second;
}

void add_clock(Clock& into, const Clock& from) {
    for (size_t i = 0; i < into.size(); ++i)
        into[i] = into[i] < from[i] ? from[i] : into[i];
}

void end_phase_if_complete(Barrier& b) {
    if (b.missing > 0 || b.bytes != 0)
        return;
    b.known = b.gathered;
    b.missing = b.count;
    ++b.phase;
}

// Chunks of 16 bytes change places within a row: see csrc/cuda/hopper.cuh.
size_t exchanged(size_t offset, int row_bytes) {
    size_t bits = row_bytes == 128 ? 7 : row_bytes == 64 ? 3 : 1;
    return offset ^ ((offset >> 7 & bits) << 4);
}

void land(const Copy& c) {
    const TensorBox& m = c.map;
    Stamp when = {kCopyEngine, current_stamp().block, ++engine_time};
    int elements = 16 / m.element_bytes;
    for (int r = 0; r < m.box_rows; ++r)
        for (int chunk = 0; chunk < m.box_bytes / 16; ++chunk) {
            size_t offset =
                exchanged((size_t)r * (size_t)m.box_bytes + 16 * (size_t)chunk, m.box_bytes);
            int64_t row = c.row + r, col = c.col + chunk * elements;
            char bytes[16] = {};
            if (row >= 0 && row < m.rows)
                for (int e = 0; e < elements; ++e)
                    if (col + e >= 0 && col + e < m.cols)
                        memcpy(bytes + e * m.element_bytes,
                               m.base + row * m.pitch + (col + e) * m.element_bytes,
                               (size_t)m.element_bytes);
            land_bytes(c.shared + offset, bytes, 16, when);
        }
    c.barrier->bytes -= (int64_t)m.box_rows * m.box_bytes;
    Clock engine(kCopyEngine + 1, 0);
    engine[kCopyEngine] = engine_time;
    add_clock(c.barrier->gathered, engine);
    end_phase_if_complete(*c.barrier);
}

// The bytes of an operand that the running lane's warp reads, row by row of 16 elements (32 bytes)
// along the depth, or of all columns across it.
template <class F>
void rows_of(const Operand& o, bool across, int first, int count, F&& f) {
    if (!across) {
        for (int r = first; r < first + count; ++r)
            for (int chunk = 0; chunk < 2; ++chunk)
                f(o.start + (size_t)(r * kTileRow + 16 * chunk));
        return;
    }
    for (int k = 0; k < 16; ++k)
        for (int chunk = 0; chunk < count / 8; ++chunk)
            f(o.start + (size_t)(k * kTileRow + chunk / 8 * o.next + chunk % 8 * 16));
}

const char* exchanged_address(size_t offset) { return shared_base() + exchanged(offset, kTileRow); }

float element(const Operand& o, bool across, bool half, int row, int k) {
    size_t offset = across ? o.start + (size_t)(k * kTileRow + row / 64 * o.next + row % 64 * 2)
                           : o.start + (size_t)(row * kTileRow + 2 * k);
    uint16_t h;
    memcpy(&h, exchanged_address(offset), 2);
    return half ? pk::f16_to_float(h) : pk::bf16_to_float(h);
}

// The running thread's share of D.
void compute(const Product& p) {
    int lane = running_thread() % kWarp, warp = running_thread() / kWarp % 4;
    float b[16];
    for (int i = 0; i < 64; ++i) {
        int row = 16 * warp + lane / 4 + 8 * (i / 2 % 2);
        int column = 8 * (i / 4) + 2 * (lane % 4) + i % 2;
        float sum = p.add ? p.d[i] : 0.0f;
        for (int k = 0; k < 16; ++k) {
            b[k] = element(p.b, p.across, p.half, column, k);
            sum += element(p.a, false, p.half, row, k) * b[k];
        }
        p.d[i] = sum;
    }
}

// One lane of each warp answers for its warp: 16 rows of A and all of B.
bool answers() { return running_thread() % kWarp == 0; }

template <class F>
void each_byte_range(const Product& p, F&& f) {
    int warp = running_thread() / kWarp % 4;
    rows_of(p.a, false, 16 * warp, 16, f);
    rows_of(p.b, p.across, 0, 128, f);
}

} // namespace

void begin_copies() {
    barriers.clear();
    copies.clear();
    engine_time = 0;
    for (Products& p : products)
        p = Products();
    fence_times.assign(kMaxThreads, 0);
}

bool deliver_copy() {
    if (copies.empty())
        return false;
    size_t i = (size_t)choose((int)copies.size());
    Copy c = copies[i];
    copies.erase(copies.begin() + (ptrdiff_t)i);
    land(c);
    return true;
}

void tx_init(uint64_t* p, int count) {
    check_access(p, 8, Access::kWrite, true);
    Barrier b;
    b.count = b.missing = count;
    b.gathered.assign(kCopyEngine + 1, 0);
    b.known = b.gathered;
    barriers[p] = b;
}

void tx_arrive(uint64_t* p, int bytes) {
    check_access(p, 8, Access::kAtomic, true);
    Barrier& b = barrier_at(p);
    if (b.missing == 0)
        fail("more threads arrive at a transaction barrier than it counts");
    publish(b.gathered);
    --b.missing;
    b.bytes += bytes;
    end_phase_if_complete(b);
}

void tx_wait(uint64_t* p, uint32_t parity, Site site) {
    struct Condition {
        Barrier* barrier;
        uint32_t parity;
    } c = {&barrier_at(p), parity};
    block_until(
        [](void* v) { return (((Condition*)v)->barrier->phase & 1u) != ((Condition*)v)->parity; },
        &c, "a transaction barrier", site);
    learn(c.barrier->known);
}

void tensor_copy(void* shared, const TensorBox* map, int64_t row, int64_t col, uint64_t* barrier) {
    if ((uintptr_t)shared % 1024 != 0)
        fail("misaligned: a tile must start on 1024 bytes");
    for (int r = 0; r < map->box_rows; ++r) {
        promise_bytes((char*)shared + r * map->box_bytes, (size_t)map->box_bytes);
        int64_t first = col < 0 ? 0 : col, last = col + map->box_bytes / map->element_bytes;
        last = last > map->cols ? map->cols : last;
        if (row + r >= 0 && row + r < map->rows && first < last)
            check_access(map->base + (row + r) * map->pitch + first * map->element_bytes,
                         (size_t)((last - first) * map->element_bytes), Access::kRead, false);
    }
    copies.push_back({(char*)shared, *map, row, col, &barrier_at(barrier)});
    if (eager_copies())
        deliver_copy();
}

void async_fence() {
    Clock unused(kCopyEngine + 1, 0);
    publish(unused); // time goes on: later stores are not fenced
    fence_times[(size_t)running_thread()] = now();
}

void product_issue(float* d, const Operand& a, const Operand& b, bool add, bool half, bool across) {
    Product p = {d, a, b, add, half, across};
    if (answers())
        each_byte_range(
            p, [](size_t offset) { hold_bytes(exchanged_address(offset), 16, fence_times); });
    products[(size_t)running_thread()].open.push_back(p);
}

void product_close_group() {
    Products& own = products[(size_t)running_thread()];
    own.groups.push_back(own.open);
    own.open.clear();
}

void product_await(int groups_left) {
    Products& own = products[(size_t)running_thread()];
    while ((int)own.groups.size() > groups_left) {
        for (const Product& p : own.groups.front()) {
            compute(p);
            if (answers())
                each_byte_range(
                    p, [](size_t offset) { release_bytes(exchanged_address(offset), 16); });
        }
        own.groups.erase(own.groups.begin());
    }
}

} // namespace simt
