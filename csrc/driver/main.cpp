// The CPU kernels without Python, for sanitizers and valgrind:
//
//   driver compare CASES SEED   each case on every instruction set, by one thread and by three
//   driver callers CASES SEED   the same cases from 16 threads at once, each with threads of its
//   own driver memory CASES SEED    the k-th request for scratch memory fails, for every k
//
// Prints what differs, and ends with status 1 if anything did.
#include <errno.h>
#include <stdio.h>
#include <unistd.h>

#include <atomic>
#include <cmath>
#include <thread>

#include "../cpu/crc32c.h"
#include "../cpu/dispatch.h"
#include "../cpu/page_io.h"
#include "../cpu/threading.h"
#include "cases.h"
#include "runtime.h"

namespace driver {
namespace {

constexpr int kCallers = 16;
std::atomic<int> findings{0};
int64_t refused = 0; // requests for memory

void finding(const char* isa, const Case& c, const char* what) {
    ++findings;
    fprintf(stderr, "FINDING on %s: %s: %s\n", isa, c.name.c_str(), what);
}

bool same_bits(const Results& a, const Results& b) {
    for (size_t i = 0; i < a.size(); ++i)
        if (memcmp(a[i].memory->p(), b[i].memory->p(), a[i].memory->bytes()) != 0)
            return false;
    return a.size() == b.size();
}

// Whether floats differ by no more than a few roundings of the largest. Kernels that are wrong by
// less are found by the tests against fp64; here it is about calls that run at all.
bool alike(const Results& a, const Results& b) {
    for (size_t i = 0; i < a.size(); ++i) {
        if (a[i].dtype == kExactBytes)
            continue;
        int64_t n = (int64_t)a[i].memory->bytes() / pk::dtype_size(a[i].dtype);
        double largest = 0.0, worst = 0.0;
        for (int64_t j = 0; j < n; ++j) {
            double x = pk::load_as_float(a[i].memory->p(), a[i].dtype, j);
            double y = pk::load_as_float(b[i].memory->p(), b[i].dtype, j);
            if (std::isfinite(x) != std::isfinite(y))
                return false;
            if (!std::isfinite(x))
                continue;
            largest = std::fmax(largest, std::fabs(x));
            worst = std::fmax(worst, std::fabs(x - y));
        }
        if (!(worst <= 0.02 * largest + 1e-6))
            return false;
    }
    return true;
}

void compare(int64_t cases, uint64_t seed) {
    for (int64_t i = 0; i < cases; ++i) {
        Case c = draw(seed + (uint64_t)i);
        Results first;
        for (const pk::Isa* isa = pk::kIsas; isa->kernels != nullptr; ++isa) {
            if (!isa->present())
                continue;
            Results one, three;
            int status = c.run(*isa->kernels, 1, one);
            if (status != pk::kOk && status != pk::kNonFinite)
                finding(isa->kernels->name, c, pk::status_text(status));
            c.run(*isa->kernels, 3, three);
            if (!same_bits(one, three))
                finding(isa->kernels->name, c, "three threads give other bits than one");
            if (first.empty())
                first = one;
            else if (c.exact ? !same_bits(first, one) : !alike(first, one))
                finding(isa->kernels->name, c, "differs from the slowest instruction set");
        }
    }
}

void callers(int64_t cases, uint64_t seed) {
    std::vector<Case> drawn;
    for (int64_t i = 0; i < cases; ++i)
        drawn.push_back(draw(seed + (uint64_t)i));
    for (const pk::Isa* isa = pk::kIsas; isa->kernels != nullptr; ++isa) {
        if (!isa->present())
            continue;
        std::vector<Results> want(drawn.size());
        for (size_t i = 0; i < drawn.size(); ++i)
            drawn[i].run(*isa->kernels, 1, want[i]);
        std::vector<std::thread> threads;
        for (int t = 0; t < kCallers; ++t)
            threads.emplace_back([&, t] {
                for (size_t n = 0; n < drawn.size(); ++n) {
                    size_t i = (n * 7 + (size_t)t * 5) % drawn.size();
                    Results got;
                    drawn[i].run(*isa->kernels, 1 + t % 3, got);
                    if (!same_bits(got, want[i]))
                        finding(isa->kernels->name, drawn[i], "other bits among other callers");
                }
            });
        for (std::thread& thread : threads)
            thread.join();
    }
}

// A thread of its own has no scratch memory yet, as after the start of a process.
int fresh(const Case& c, const pk::Kernels& k, Results& out) {
    int status = 0;
    std::thread([&] { status = c.run(k, 2, out); }).join();
    return status;
}

void memory(int64_t cases, uint64_t seed) {
    for (int64_t i = 0; i < cases; ++i) {
        Case c = draw(seed + (uint64_t)i);
        for (const pk::Isa* isa = pk::kIsas; isa->kernels != nullptr; ++isa) {
            if (!isa->present())
                continue;
            const pk::Kernels& k = *isa->kernels;
            Results want;
            int64_t before = mappings(), held = bytes_mapped();
            int fine = fresh(c, k, want);
            int64_t needed = mappings() - before;
            for (int64_t n = 1; n <= needed; ++n) {
                Results got;
                ++refused;
                fail_mapping(mappings() + n);
                int status = fresh(c, k, got);
                fail_mapping(0);
                if (status != pk::kNoMemory)
                    finding(k.name, c, "does not tell that there was no memory");
                if (fresh(c, k, got) != fine || !same_bits(got, want))
                    finding(k.name, c, "is not usable after a failed request");
            }
            if (bytes_mapped() != held)
                finding(k.name, c, "keeps scratch memory of threads that have ended");
        }
    }
}

// Pages of a file, and their checksums at every alignment.
void pages() {
    Case c = {"pages", true, nullptr};
    Dice d(3);
    Memory data = random_bytes(d, 300000), back = bytes(300000);
    for (size_t at = 0; at < 9; ++at)
        for (size_t size : {0u, 1u, 7u, 8u, 9u, 63u, 64u, 1000u, 70001u})
            if (pk::crc32c(at, data->as<char>() + at, size) !=
                pk::crc32c_tables(at, data->as<char>() + at, size))
                finding("all", c, "the instruction's checksum is not that of the tables");
    char path[] = "/tmp/peftkern-driver-XXXXXX";
    int fd = mkstemp(path);
    unlink(path);
    uint32_t wrote = 0, read = 1;
    size_t done = 0;
    if (pk::write_page(fd, data->p(), data->bytes(), 4096, &wrote, &done) != 0 ||
        done != data->bytes())
        finding("all", c, "a page is not written");
    if (pk::read_page(fd, back->p(), back->bytes(), 4096, &read, &done) != 0 || read != wrote ||
        memcmp(back->p(), data->p(), data->bytes()) != 0)
        finding("all", c, "a page is not read back");
    if (pk::read_page(fd, back->p(), back->bytes(), 8192, &read, &done) != -1)
        finding("all", c, "a short file is not told");
    close(fd);
    if (pk::write_page(fd, data->p(), 1, 0, &wrote, &done) != EBADF)
        finding("all", c, "a closed file is not told");
}

} // namespace
} // namespace driver

int main(int argc, char** argv) {
    using namespace driver;
    if (argc != 4) {
        fprintf(stderr, "usage: driver compare|callers|memory CASES SEED\n");
        return 2;
    }
    int64_t cases = atoll(argv[2]);
    uint64_t seed = strtoull(argv[3], nullptr, 10);
    if (!pk::bind_openmp().bound) {
        fprintf(stderr, "no threads: %s\n", pk::bind_openmp().reason);
        return 2;
    }
    std::string part = argv[1];
    if (part == "compare") {
        compare(cases, seed);
        pages();
    } else if (part == "callers") {
        callers(cases, seed);
    } else if (part == "memory") {
        memory(cases, seed);
    } else {
        fprintf(stderr, "unknown part %s\n", argv[1]);
        return 2;
    }
    for (const pk::Isa* isa = pk::kIsas; isa->kernels != nullptr; ++isa)
        if (isa->present())
            printf("%s ", isa->kernels->name);
    printf("%s: %lld cases, %lld parallel regions, %lld requests refused, %d findings\n", argv[1],
           (long long)cases, (long long)regions(), (long long)refused, findings.load());
    return findings.load() != 0;
}
