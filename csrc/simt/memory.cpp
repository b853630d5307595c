#include "memory.h"

#include <string.h>

#include <map>
#include <string>

#include "executor.h"

extern "C" {
// First and last byte of this shared library: constants of the kernels lie between.
extern char __ehdr_start __attribute__((visibility("hidden")));
extern char _end __attribute__((visibility("hidden")));
}

namespace simt {
namespace {

// Built with the address sanitizer, kernels do not tell of their own accesses: nothing is known
// about what was written or read.
#if defined(__SANITIZE_ADDRESS__)
constexpr bool kWatched = false;
#else
constexpr bool kWatched = true;
#endif
constexpr size_t kRedZone = 64; // between two shared arrays; never accessible
constexpr int kNobody = -1;

enum State : uint8_t { kClosed, kUninitialised, kReady, kInFlight };

struct Cell {
    Stamp write;
    Stamp read;                // the only reader since, unless
    std::vector<Stamp> others; // more came that do not know of each other
    bool other_blocks = false; // threads of several blocks have read it
    bool atomic = false;       // the last write was atomic
    bool held = false;         // a product reads it: see `holders`
    State state = kClosed;
};

struct Region {
    std::string name;
    char* base;
    size_t bytes;
    std::vector<Cell> cells;
};

alignas(1024) char shared_bytes[kSharedBytes];
Region shared = {"shared memory", shared_bytes, kSharedBytes, std::vector<Cell>(kSharedBytes)};
size_t shared_used;
std::map<const void*, void*> shared_arrays;
std::vector<Region> buffers;
const char* parameter_base;
size_t parameter_size;

bool inside(const void* p, size_t bytes, const void* base, size_t size) {
    uintptr_t a = (uintptr_t)p, b = (uintptr_t)base;
    return a >= b && bytes <= size && a - b <= size - bytes;
}

Region* region_of(const void* p, size_t bytes) {
    if (inside(p, bytes, shared.base, shared.bytes))
        return &shared;
    for (Region& b : buffers)
        if (inside(p, bytes, b.base, b.bytes))
            return &b;
    return nullptr;
}

bool reads_seen(const Cell& c) {
    if (c.other_blocks || (c.read.thread != kNobody && !seen(c.read)))
        return false;
    for (const Stamp& other : c.others)
        if (!seen(other))
            return false;
    return true;
}

void note_read(Cell& c, const Stamp& now) {
    if (c.read.thread == kNobody || seen(c.read)) {
        c.read = now; // whoever sees this read also sees the earlier one
        return;
    }
    c.other_blocks |= c.read.block != now.block;
    for (Stamp& other : c.others)
        if (other.thread == now.thread && other.block == now.block) {
            other = now;
            return;
        }
    c.others.push_back(now);
}

std::vector<uint8_t> holders(kSharedBytes); // products in flight that read a byte of shared memory

void race(const Region& r, size_t offset, const char* what, int other, const Stamp& now) {
    if (other >= 0)
        fail("race in %s at byte %zu: thread %d %s what %s %d touched with no barrier between",
             r.name.c_str(), offset, now.thread, what,
             other == kCopyEngine ? "the copy engine" : "thread", other);
    fail("race in %s at byte %zu: thread %d %s what several threads read with no barrier between",
         r.name.c_str(), offset, now.thread, what);
}

void check_cell(Region& r, size_t offset, Access access, const Stamp& now) {
    Cell& c = r.cells[offset];
    if (c.state == kClosed)
        fail("out of bounds: byte %zu of %s belongs to no array", offset, r.name.c_str());
    if (c.state == kInFlight)
        fail("byte %zu of %s is touched before its cp.async was waited for", offset,
             r.name.c_str());
    if (access != Access::kWrite && c.state == kUninitialised)
        fail("uninitialised read of byte %zu of %s", offset, r.name.c_str());
    bool both_atomic = access == Access::kAtomic && c.atomic;
    if (c.write.thread != kNobody && !both_atomic && !seen(c.write))
        race(r, offset, access == Access::kRead ? "reads" : "writes", c.write.thread, now);
    if (access == Access::kRead) {
        note_read(c, now);
        return;
    }
    if (!reads_seen(c))
        race(r, offset, "writes", c.others.empty() ? c.read.thread : kNobody, now);
    if (c.held)
        fail("byte %zu of %s is written while a product reads it", offset, r.name.c_str());
    c.write = now;
    c.atomic = access == Access::kAtomic;
    c.read = Stamp();
    c.others.clear();
    c.other_blocks = false;
    c.state = kReady;
}

void open_cells(size_t from, size_t to) {
    for (size_t i = from; i < to; ++i) {
        shared.cells[i] = Cell();
        shared.cells[i].state = kUninitialised;
        shared_bytes[i] = (char)0xff; // NaN in every float format
    }
}

} // namespace

void begin_launch(const void* parameters, size_t parameter_bytes) {
    parameter_base = (const char*)parameters;
    parameter_size = parameter_bytes;
    for (Region& b : buffers)
        for (Cell& c : b.cells) {
            c = Cell();
            c.state = kReady;
        }
}

void begin_block(size_t dynamic_bytes) {
    for (size_t i = 0; i < shared_used + kRedZone && i < kSharedBytes; ++i)
        shared.cells[i] = Cell();
    shared_arrays.clear();
    holders.assign(kSharedBytes, 0);
    shared_used = 0;
    open_cells(0, dynamic_bytes);
    shared_used = dynamic_bytes;
}

void end_launch() { parameter_base = nullptr; }

void* allocate_shared(const void* key, size_t bytes, size_t align) {
    auto found = shared_arrays.find(key);
    if (found != shared_arrays.end())
        return found->second;
    size_t start = (shared_used + kRedZone + align - 1) / align * align;
    if (start + bytes > kSharedBytes)
        fail("shared arrays need %zu bytes, a block may have %zu", start + bytes, kSharedBytes);
    open_cells(start, start + bytes);
    shared_used = start + bytes;
    return shared_arrays[key] = shared_bytes + start;
}

void* dynamic_shared_memory() { return shared_bytes; }

void check_access(const void* p, size_t bytes, Access access, bool must_be_aligned) {
    if (!kWatched || !in_kernel() || on_current_stack(p, bytes))
        return;
    if (must_be_aligned && (uintptr_t)p % bytes != 0)
        fail("misaligned: a %zu-byte access at an address that ends in %zu", bytes,
             (size_t)((uintptr_t)p % 64));
    Region* r = region_of(p, bytes);
    if (r == nullptr) {
        bool constant = inside(p, bytes, parameter_base, parameter_size) ||
                        inside(p, bytes, &__ehdr_start, (size_t)(&_end - &__ehdr_start));
        if (constant && access == Access::kRead)
            return;
        for (const Region& b : buffers) {
            intptr_t distance = (intptr_t)((uintptr_t)p - (uintptr_t)b.base);
            if (distance > -4096 && distance < (intptr_t)b.bytes + 4096)
                fail("out of bounds: a %zu-byte %s at byte %td of %s, which has %zu bytes", bytes,
                     access == Access::kRead ? "read" : "write", (ptrdiff_t)distance,
                     b.name.c_str(), b.bytes);
        }
        fail("out of bounds: a %zu-byte %s that meets no buffer", bytes,
             access == Access::kRead ? "read" : "write");
    }
    maybe_preempt();
    Stamp now = current_stamp();
    size_t offset = (size_t)((const char*)p - r->base);
    for (size_t i = 0; i < bytes; ++i)
        check_cell(*r, offset + i, access, now);
}

void raw_copy(void* to, const void* from, size_t bytes) { memcpy(to, from, bytes); }

// A copy may land at any moment between issue and wait. Here: what other threads still read or
// wrote must be ordered before the issue, and from now on nobody may touch the bytes.
void issue_copy(const PendingCopy& copy) {
    if ((uintptr_t)copy.shared % (size_t)copy.bytes != 0 ||
        (copy.source_bytes > 0 && (uintptr_t)copy.global % (size_t)copy.bytes != 0))
        fail("misaligned: cp.async of %d bytes", copy.bytes);
    if (!inside(copy.shared, (size_t)copy.bytes, shared.base, shared.bytes))
        fail("out of bounds: cp.async does not write to shared memory");
    check_access(copy.shared, (size_t)copy.bytes, Access::kWrite, true);
    if (copy.source_bytes > 0)
        check_access(copy.global, (size_t)copy.source_bytes, Access::kRead, false);
    size_t offset = (size_t)((char*)copy.shared - shared.base);
    for (int i = 0; i < copy.bytes; ++i) {
        shared.cells[offset + (size_t)i].state = kInFlight;
        shared_bytes[offset + (size_t)i] = (char)0xff;
    }
}

// The data is there for the waiting thread; others need a barrier, as for any write.
void finish_copy(const PendingCopy& copy) {
    size_t offset = (size_t)((char*)copy.shared - shared.base);
    for (int i = 0; i < copy.bytes; ++i) {
        Cell& c = shared.cells[offset + (size_t)i];
        c.state = kReady;
        c.write = current_stamp();
        c.atomic = false;
        c.read = Stamp();
    }
    memcpy(copy.shared, copy.global, (size_t)copy.source_bytes);
    memset((char*)copy.shared + copy.source_bytes, 0, (size_t)(copy.bytes - copy.source_bytes));
}

const char* shared_base() { return shared_bytes; }

void promise_bytes(const void* p, size_t bytes) {
    check_access(p, bytes, Access::kWrite, false);
    size_t offset = (size_t)((const char*)p - shared.base);
    for (size_t i = 0; i < bytes; ++i) {
        shared.cells[offset + i].state = kInFlight;
        shared_bytes[offset + i] = (char)0xff;
    }
}

void land_bytes(void* p, const void* source, size_t bytes, const Stamp& when) {
    size_t offset = (size_t)((const char*)p - shared.base);
    for (size_t i = 0; i < bytes; ++i) {
        shared.cells[offset + i].state = kReady;
        shared.cells[offset + i].write = when;
    }
    if (source != nullptr)
        memcpy(p, source, bytes);
    else
        memset(p, 0, bytes);
}

void hold_bytes(const void* p, size_t bytes, const std::vector<uint32_t>& fence_times) {
    if (!kWatched)
        return;
    check_access(p, bytes, Access::kRead, false);
    size_t offset = (size_t)((const char*)p - shared.base);
    for (size_t i = offset; i < offset + bytes; ++i) {
        Cell& c = shared.cells[i];
        if (c.write.thread != kCopyEngine && fence_times[(size_t)c.write.thread] <= c.write.time)
            fail("byte %zu of %s is read by a product, but thread %d has not fenced its store", i,
                 shared.name.c_str(), c.write.thread);
        c.held = ++holders[i] != 0;
    }
}

void release_bytes(const void* p, size_t bytes) {
    if (!kWatched)
        return;
    size_t offset = (size_t)((const char*)p - shared.base);
    Stamp now = current_stamp();
    for (size_t i = offset; i < offset + bytes; ++i) {
        Cell& c = shared.cells[i];
        c.held = --holders[i] != 0;
        note_read(c, now);
    }
}

} // namespace simt

extern "C" {

void simt_add_buffer(const char* name, void* p, int64_t bytes) {
    if (bytes > 0)
        simt::buffers.push_back(
            {name, (char*)p, (size_t)bytes, std::vector<simt::Cell>((size_t)bytes)});
}

void simt_clear_buffers() { simt::buffers.clear(); }

// What -fsanitize=thread calls.
#define PK_HOOK(bytes)                                                                             \
    void __tsan_read##bytes(void* p) { simt::check_access(p, bytes, simt::Access::kRead, true); }  \
    void __tsan_write##bytes(void* p) {                                                            \
        simt::check_access(p, bytes, simt::Access::kWrite, true);                                  \
    }                                                                                              \
    void __tsan_unaligned_read##bytes(void* p) {                                                   \
        simt::check_access(p, bytes, simt::Access::kRead, false);                                  \
    }                                                                                              \
    void __tsan_unaligned_write##bytes(void* p) {                                                  \
        simt::check_access(p, bytes, simt::Access::kWrite, false);                                 \
    }
PK_HOOK(1)
PK_HOOK(2)
PK_HOOK(4)
PK_HOOK(8)
PK_HOOK(16)
#undef PK_HOOK

void __tsan_read_range(void* p, size_t bytes) {
    simt::check_access(p, bytes, simt::Access::kRead, false);
}
void __tsan_write_range(void* p, size_t bytes) {
    simt::check_access(p, bytes, simt::Access::kWrite, false);
}
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
}
