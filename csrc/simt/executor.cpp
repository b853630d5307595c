#include "executor.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <set>
#include <string>
#include <vector>

#include "memory.h"

#if defined(__SANITIZE_ADDRESS__)
#include <pthread.h>
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace simt {
namespace {

#if defined(__SANITIZE_ADDRESS__)
constexpr size_t kStack = 512 * 1024; // room for red zones
#else
constexpr size_t kStack = 128 * 1024;
#endif
constexpr size_t kPage = 4096; // below each stack, never accessible

enum class Wait { kNothing, kBlock, kWarp, kCondition, kEnd };

struct Fiber {
    ucontext_t context;
    char* stack = nullptr;
    int thread = 0;
    Wait wait = Wait::kEnd;
    Site site = {"", 0};
    // of the warp operation it waits in
    const char* what = "";
    Apply apply = nullptr;
    void* payload = nullptr;
    uint32_t mask = 0;
    // of the condition it waits for
    bool (*ready)(void*) = nullptr;
    void* condition = nullptr;
    // what it has seen of every thread, itself included
    Clock clock;
    // cp.async: the group being filled, and committed groups, oldest first
    std::vector<PendingCopy> open_group;
    std::vector<std::vector<PendingCopy>> groups;
};

struct Random { // splitmix64: the same numbers everywhere
    uint64_t state = 0;
    uint64_t next() {
        uint64_t z = (state += 0x9E3779B97F4A7C15u);
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
        z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
        return z ^ (z >> 31);
    }
    int below(int n) { return (int)(next() % (uint64_t)n); }
};

std::vector<Fiber> fibers(kMaxThreads);
ucontext_t host;
Fiber* running = nullptr;
int threads = 0; // in the block
int arrived = 0; // at the block barrier
std::vector<int> priority;
dim3 grid_dim, block_dim, block_at;
int block_number = 0;
void (*kernel_entry)(void*);
void* kernel_parameters;
bool failed = false;
std::string report;
int schedule = kAscending;
uint64_t seed = 0;
Random dice;
int64_t launches = 0;
std::set<std::string> kernels;
std::string kernel_list;

const char* base_name(const char* path) {
    const char* slash = strrchr(path, '/');
    return slash == nullptr ? path : slash + 1;
}

bool can_run(int i) {
    Fiber& f = fibers[(size_t)i];
    if (f.wait == Wait::kCondition && f.ready(f.condition))
        f.wait = Wait::kNothing;
    return f.wait == Wait::kNothing;
}

int pick() {
    int from = running != nullptr ? running->thread : 0;
    if (schedule == kStarving) {
        int best = -1;
        for (int i = 0; i < threads; ++i)
            if (can_run(i) && (best < 0 || priority[(size_t)i] > priority[(size_t)best]))
                best = i;
        return best;
    }
    int step = 1;
    if (schedule == kRandom)
        from = dice.below(threads);
    else if (schedule == kDescending)
        step = threads - 1;
    for (int n = 1, i = (from + step) % threads; n <= threads; ++n, i = (i + step) % threads)
        if (can_run(i))
            return i;
    return -1;
}

// Nobody can run: either the block has ended, or threads wait for others that never come.
void describe_deadlock() {
    const Fiber *block = nullptr, *warp = nullptr, *condition = nullptr, *ended = nullptr;
    for (int i = 0; i < threads; ++i) {
        const Fiber& f = fibers[(size_t)i];
        (f.wait == Wait::kBlock       ? block
         : f.wait == Wait::kWarp      ? warp
         : f.wait == Wait::kCondition ? condition
                                      : ended) = &f;
    }
    if (block == nullptr && warp == nullptr && condition == nullptr)
        return;
    const Fiber& f = *(block != nullptr ? block : warp != nullptr ? warp : condition);
    char text[512];
    if (f.wait == Wait::kCondition)
        snprintf(text, sizeof text, "deadlock: thread %d waits in %s at %s:%d, which nobody ends",
                 f.thread, f.what, base_name(f.site.file), f.site.line);
    else
        snprintf(text, sizeof text,
                 "divergent barrier: thread %d waits in %s at %s:%d for threads that %s", f.thread,
                 f.what, base_name(f.site.file), f.site.line,
                 ended != nullptr ? "have ended" : "wait elsewhere");
    report = text;
    failed = true;
}

// From one stack to another; `to` is null for the host's.
void switch_stack(ucontext_t* from, Fiber* to) {
    ucontext_t* target = to != nullptr ? &to->context : &host;
#if defined(__SANITIZE_ADDRESS__)
    static void* host_stack = nullptr;
    static size_t host_size = 0;
    if (host_stack == nullptr) {
        pthread_attr_t attributes;
        if (pthread_getattr_np(pthread_self(), &attributes) != 0 ||
            pthread_attr_getstack(&attributes, &host_stack, &host_size) != 0)
            abort(); // a test tool that does not know its stack
        pthread_attr_destroy(&attributes);
    }
    void* fake = nullptr;
    __sanitizer_start_switch_fiber(&fake, to != nullptr ? to->stack : host_stack,
                                   to != nullptr ? kStack : host_size);
    swapcontext(from, target);
    __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#else
    swapcontext(from, target);
#endif
}

void switch_to_next() {
    Fiber* from = running;
    int next = failed ? -1 : pick();
    while (next < 0 && !failed && deliver_copy())
        next = pick();
    if (next < 0) {
        if (!failed)
            describe_deadlock();
        running = nullptr;
        switch_stack(&from->context, nullptr);
        return; // never: the host does not come back
    }
    if (&fibers[(size_t)next] == from)
        return;
    running = &fibers[(size_t)next];
    switch_stack(&from->context, running);
}

void fiber_main() {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
#endif
    kernel_entry(kernel_parameters);
    running->wait = Wait::kEnd;
    switch_to_next();
}

void prepare(Fiber& f, int thread) {
    if (f.stack == nullptr) {
        void* memory = mmap(nullptr, kStack + kPage, PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (memory == MAP_FAILED || mprotect(memory, kPage, PROT_NONE) != 0)
            abort(); // a test tool without memory for its stacks
        f.stack = (char*)memory + kPage;
    }
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(f.stack, kStack); // frames of what ran here before
#endif
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.stack;
    f.context.uc_stack.ss_size = kStack;
    f.context.uc_link = nullptr;
    makecontext(&f.context, fiber_main, 0);
    f.thread = thread;
    f.wait = Wait::kNothing;
    f.clock.assign(kCopyEngine + 1, 0);
    f.clock[(size_t)thread] = 1;
    f.open_group.clear();
    f.groups.clear();
}

void run_block(size_t shared_bytes) {
    begin_block(shared_bytes);
    begin_copies();
    arrived = 0;
    priority.clear();
    for (int i = 0; i < threads; ++i) {
        prepare(fibers[(size_t)i], i);
        priority.push_back(dice.below(1 << 20));
    }
    running = nullptr;
    running = &fibers[(size_t)pick()];
    switch_stack(&host, running);
    running = nullptr;
}

// Order of the blocks: no kernel may count on one.
std::vector<int> block_order(int blocks) {
    std::vector<int> order((size_t)blocks);
    for (int i = 0; i < blocks; ++i)
        order[(size_t)i] = schedule == kDescending ? blocks - 1 - i : i;
    if (schedule == kRandom || schedule == kStarving)
        for (int i = blocks - 1; i > 0; --i)
            std::swap(order[(size_t)i], order[(size_t)dice.below(i + 1)]);
    return order;
}

} // namespace

// --- what memory.cpp asks -----------------------------------------------------------------------
bool in_kernel() { return running != nullptr; }

Stamp current_stamp() {
    return {running->thread, block_number, running->clock[(size_t)running->thread]};
}

bool seen(const Stamp& before) {
    if (before.block != block_number)
        return false; // blocks of one grid have no order
    return before.thread == running->thread || running->clock[(size_t)before.thread] >= before.time;
}

bool on_current_stack(const void* p, size_t) {
    const char* c = (const char*)p;
    return c >= running->stack && c < running->stack + kStack;
}

void maybe_preempt() {
    if (schedule != kRandom)
        return;
    if (dice.below(64) == 0)
        deliver_copy();
    if (dice.below(32) == 0)
        switch_to_next();
}

void fail(const char* format, ...) {
    char text[512];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    if (report.empty())
        report = text;
    failed = true;
    if (running != nullptr) {
        Fiber* from = running;
        running = nullptr;
        switch_stack(&from->context, nullptr);
    }
    abort(); // a kernel that failed is never resumed
}

// --- what kernels call --------------------------------------------------------------------------
dim3 thread_index() {
    unsigned t = (unsigned)running->thread;
    return {t % block_dim.x, t / block_dim.x % block_dim.y, t / block_dim.x / block_dim.y};
}
dim3 block_index() { return block_at; }
dim3 block_size() { return block_dim; }
dim3 grid_size() { return grid_dim; }
int lane() { return running->thread % kWarp; }

uint32_t now() { return running->clock[(size_t)running->thread]; }
int running_thread() { return running->thread; }
int block_threads() { return threads; }
int choose(int n) { return dice.below(n); }
bool eager_copies() { return schedule == kAscending; }

namespace {

void join(Clock& into, const Clock& from) {
    for (int i = 0; i < threads; ++i)
        into[(size_t)i] = std::max(into[(size_t)i], from[(size_t)i]);
    into[kCopyEngine] = std::max(into[kCopyEngine], from[kCopyEngine]);
}

// All threads of a barrier know what each of them knew.
void meet(const std::vector<Fiber*>& group) {
    Clock common(kCopyEngine + 1, 0);
    for (Fiber* f : group)
        join(common, f->clock);
    for (Fiber* f : group) {
        f->clock = common;
        ++f->clock[(size_t)f->thread];
    }
}

} // namespace

void publish(Clock& clock) {
    join(clock, running->clock);
    ++running->clock[(size_t)running->thread];
}

void learn(const Clock& clock) { join(running->clock, clock); }

void block_until(bool (*ready)(void*), void* condition, const char* what, Site site) {
    if (ready(condition))
        return;
    Fiber& self = *running;
    self.wait = Wait::kCondition;
    self.ready = ready;
    self.condition = condition;
    self.what = what;
    self.site = site;
    switch_to_next();
}

void barrier(Site site) {
    Fiber& self = *running;
    self.wait = Wait::kBlock;
    self.what = "__syncthreads";
    self.site = site;
    if (++arrived == threads) {
        for (int i = 0; i < threads; ++i) {
            const Fiber& f = fibers[(size_t)i];
            if (f.site.line != site.line || strcmp(f.site.file, site.file) != 0)
                fail("divergent barrier: thread %d waits at line %d, thread %d at line %d",
                     self.thread, site.line, f.thread, f.site.line);
        }
        arrived = 0;
        std::vector<Fiber*> group;
        for (int i = 0; i < threads; ++i) {
            fibers[(size_t)i].wait = Wait::kNothing;
            group.push_back(&fibers[(size_t)i]);
        }
        meet(group);
    }
    switch_to_next();
}

void collective(const char* what, Apply apply, void* payload, uint32_t mask, Site site) {
    Fiber& self = *running;
    int first = self.thread / kWarp * kWarp, own = self.thread % kWarp;
    if ((mask >> own & 1) == 0)
        fail("%s at %s:%d: lane %d is not in its own mask", what, base_name(site.file), site.line,
             own);
    self.wait = Wait::kWarp;
    self.what = what;
    self.apply = apply;
    self.payload = payload;
    self.mask = mask;
    self.site = site;
    void* payloads[kWarp] = {};
    bool complete = true;
    for (int i = 0; i < kWarp && complete; ++i) {
        if ((mask >> i & 1) == 0)
            continue;
        const Fiber& f = fibers[(size_t)(first + i)];
        complete = first + i < threads && f.wait == Wait::kWarp;
        if (!complete)
            break;
        if (f.mask != mask || f.apply != apply)
            fail("divergent warp: lane %d is in %s at line %d, lane %d in %s at line %d", own, what,
                 site.line, i, f.what, f.site.line);
        payloads[i] = f.payload;
    }
    if (complete) {
        if (apply != nullptr) {
            running = nullptr; // what it touches are the lanes' registers
            apply(payloads);
            running = &self;
        } else { // only __syncwarp orders memory
            std::vector<Fiber*> group;
            for (int i = 0; i < kWarp; ++i)
                if (mask >> i & 1)
                    group.push_back(&fibers[(size_t)(first + i)]);
            meet(group);
        }
        for (int i = 0; i < kWarp; ++i)
            if (mask >> i & 1)
                fibers[(size_t)(first + i)].wait = Wait::kNothing;
    }
    switch_to_next();
}

void warp_barrier(uint32_t mask, Site site) {
    collective("__syncwarp", nullptr, nullptr, mask, site);
}

void* shared_array(const void* key, size_t bytes, size_t align) {
    return allocate_shared(key, bytes, align);
}

void* dynamic_shared() { return dynamic_shared_memory(); }

void copy_async(void* shared, const void* global, int bytes, int source_bytes, Site) {
    PendingCopy copy = {shared, global, bytes, source_bytes};
    issue_copy(copy);
    running->open_group.push_back(copy);
}

void commit_async() {
    running->groups.push_back(running->open_group);
    running->open_group.clear();
}

void wait_async(int groups_left, Site) {
    std::vector<std::vector<PendingCopy>>& groups = running->groups;
    while ((int)groups.size() > groups_left) {
        for (const PendingCopy& copy : groups.front())
            finish_copy(copy);
        groups.erase(groups.begin());
    }
}

int run_grid(const char* name, void (*entry)(void*), void* parameters, size_t parameter_bytes,
             dim3 grid, dim3 block, size_t shared_bytes) {
    report.clear();
    failed = false;
    threads = (int)(block.x * block.y * block.z);
    int64_t blocks = (int64_t)grid.x * grid.y * grid.z;
    if (threads < 1 || threads > kMaxThreads || blocks < 1 || grid.y > 65535 || grid.z > 65535) {
        report = "launch refused: a block needs 1 to 1024 threads, a grid at least one block and "
                 "at most 65535 in y and z";
        return kFault;
    }
    if (shared_bytes > kSharedBytes) {
        report = "launch refused: more dynamic shared memory than a block may have";
        return kFault;
    }
    kernel_entry = entry;
    kernel_parameters = parameters;
    grid_dim = grid;
    block_dim = block;
    dice.state = seed;
    begin_launch(parameters, parameter_bytes);
    for (int b : block_order((int)blocks)) {
        unsigned u = (unsigned)b;
        block_number = b;
        block_at = dim3(u % grid.x, u / grid.x % grid.y, u / grid.x / grid.y);
        run_block(shared_bytes);
        if (failed) {
            report += std::string(" [") + name + ", block " + std::to_string(b) + "]";
            break;
        }
    }
    end_launch();
    if (failed)
        return kFault;
    ++launches;
    kernels.insert(name);
    return 0;
}

} // namespace simt

extern "C" {

void simt_configure(int schedule, uint64_t seed) {
    simt::schedule = schedule;
    simt::seed = seed;
}

const char* simt_report() { return simt::report.c_str(); }

int64_t simt_launches() { return simt::launches; }

const char* simt_kernels() {
    simt::kernel_list.clear();
    for (const std::string& name : simt::kernels)
        simt::kernel_list += name + "\n";
    return simt::kernel_list.c_str();
}
}
