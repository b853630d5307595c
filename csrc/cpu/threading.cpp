#include "threading.h"

#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>

namespace pk {

struct Queue {
    alignas(64) std::atomic<int64_t> next{0};
    int64_t count = 0;
};

int64_t next_chunk(Queue* queue) {
    int64_t chunk = queue->next.fetch_add(1, std::memory_order_relaxed);
    return chunk < queue->count ? chunk : -1;
}

namespace {

using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
using OmpInParallel = int (*)();

GompParallel gomp_parallel = nullptr;
OmpInParallel omp_in_parallel_fn = nullptr;
pid_t loader_pid = 0;
OpenMPInfo info;

struct Region {
    Body body;
    void* context;
    Queue* queue;
};

void enter_region(void* p) {
    Region* region = static_cast<Region*>(p);
    region->body(region->context, region->queue);
}

// Freed when its thread ends.
struct Scratch {
    void* memory = nullptr;
    size_t size = 0;
    ~Scratch() {
        if (memory != nullptr)
            munmap(memory, size);
    }
};

thread_local Scratch thread_scratch;

constexpr size_t kHugePage = size_t(2) << 20;

} // namespace

const OpenMPInfo& bind_openmp() {
    if (loader_pid != 0)
        return info;
    loader_pid = getpid();
    // The order in which the dynamic linker resolves torch's own references: the global scope
    // (where LD_PRELOAD puts another runtime), then what libtorch_cpu depends on.
    void* found = dlsym(RTLD_DEFAULT, "GOMP_parallel");
    void* scope = RTLD_DEFAULT;
    if (found == nullptr) {
        scope = dlopen("libtorch_cpu.so", RTLD_LAZY | RTLD_NOLOAD);
        if (scope == nullptr) {
            snprintf(info.reason, sizeof info.reason, "libtorch_cpu.so is not loaded");
            return info;
        }
        found = dlsym(scope, "GOMP_parallel");
    }
    if (found == nullptr) {
        snprintf(info.reason, sizeof info.reason,
                 "torch's OpenMP runtime has no GOMP_parallel; kernels use one thread");
        return info;
    }
    gomp_parallel = reinterpret_cast<GompParallel>(found);
    omp_in_parallel_fn = reinterpret_cast<OmpInParallel>(dlsym(scope, "omp_in_parallel"));
    Dl_info where;
    if (dladdr(found, &where) != 0 && where.dli_fname != nullptr)
        snprintf(info.library, sizeof info.library, "%s", where.dli_fname);
    info.bound = true;
    return info;
}

int worthwhile_threads(int requested, double microseconds) {
    if (requested <= 1 || gomp_parallel == nullptr || microseconds < 50.0)
        return 1;
    if (getpid() != loader_pid)
        return 1;
    if (omp_in_parallel_fn != nullptr && omp_in_parallel_fn() != 0)
        return 1;
    return requested;
}

void run_parallel(int threads, int64_t chunks, Body body, void* context) {
    Queue queue;
    queue.count = chunks;
    if (threads > chunks)
        threads = static_cast<int>(chunks);
    if (threads <= 1 || gomp_parallel == nullptr) {
        body(context, &queue);
        return;
    }
    Region region{body, context, &queue};
    gomp_parallel(enter_region, &region, static_cast<unsigned>(threads), 0u);
}

void* scratch(size_t bytes) {
    Scratch& s = thread_scratch;
    if (s.size >= bytes)
        return s.memory;
    if (s.memory != nullptr)
        munmap(s.memory, s.size);
    s.memory = nullptr;
    s.size = 0;
    // Over-allocate by one huge page and trim, so that the block starts on a huge page.
    size_t size = (bytes + kHugePage - 1) / kHugePage * kHugePage;
    char* raw = static_cast<char*>(mmap(nullptr, size + kHugePage, PROT_READ | PROT_WRITE,
                                        MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (raw == MAP_FAILED)
        return nullptr;
    size_t head = (kHugePage - reinterpret_cast<uintptr_t>(raw) % kHugePage) % kHugePage;
    if (head != 0)
        munmap(raw, head);
    munmap(raw + head + size, kHugePage - head);
    s.memory = raw + head;
    s.size = size;
    madvise(s.memory, size, MADV_HUGEPAGE); // a hint: small pages work as well
    return s.memory;
}

} // namespace pk
