#include "runtime.h"

#include <errno.h>
#include <sys/mman.h>
#include <sys/types.h>

#include <atomic>
#include <thread>
#include <vector>

namespace {

thread_local bool in_region = false;
std::atomic<int64_t> entered{0};
std::atomic<int64_t> made{0};
std::atomic<int64_t> mapped{0};
std::atomic<int64_t> failing{0};

} // namespace

namespace driver {

int64_t regions() { return entered.load(); }
int64_t mappings() { return made.load(); }
int64_t bytes_mapped() { return mapped.load(); }
void fail_mapping(int64_t number) { failing.store(number); }

} // namespace driver

extern "C" {

// pk::bind_openmp() finds these two first, in the program itself.
void GOMP_parallel(void (*body)(void*), void* context, unsigned threads, unsigned) {
    auto enter = [=] {
        in_region = true;
        body(context);
        in_region = false;
    };
    entered.fetch_add(1);
    std::vector<std::thread> others;
    for (unsigned i = 1; i < threads; ++i)
        others.emplace_back(enter);
    enter();
    for (std::thread& other : others)
        other.join();
}

int omp_in_parallel() { return in_region ? 1 : 0; }

// Linked with --wrap: what calls mmap in our own objects comes here.
void* __real_mmap(void*, size_t, int, int, int, off_t);
int __real_munmap(void*, size_t);

void* __wrap_mmap(void* at, size_t bytes, int protection, int flags, int fd, off_t offset) {
    if (made.fetch_add(1) + 1 == failing.load()) {
        errno = ENOMEM;
        return MAP_FAILED;
    }
    void* p = __real_mmap(at, bytes, protection, flags, fd, offset);
    if (p != MAP_FAILED)
        mapped.fetch_add((int64_t)bytes);
    return p;
}

int __wrap_munmap(void* p, size_t bytes) {
    mapped.fetch_sub((int64_t)bytes);
    return __real_munmap(p, bytes);
}
}
