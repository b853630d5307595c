#include "features.h"

#include <atomic>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace pk {

static std::atomic<int> pair_products{-1};

bool fast_pair_products() {
    int fast = pair_products.load(std::memory_order_relaxed);
    if (fast < 0) {
#if defined(__x86_64__)
        fast = __builtin_cpu_is("amd") ? 1 : 0;
#else
        fast = 0;
#endif
        pair_products.store(fast, std::memory_order_relaxed);
    }
    return fast == 1;
}

void set_pair_products(bool fast) { pair_products.store(fast ? 1 : 0, std::memory_order_relaxed); }

static std::atomic<bool> vnni{true};

bool use_vnni() { return vnni.load(std::memory_order_relaxed) && has_avx512_vnni(); }

void set_vnni(bool use) { vnni.store(use, std::memory_order_relaxed); }

#if defined(__x86_64__)
// __builtin_cpu_supports reads CPUID and XCR0: it is false where the OS does not save the
// registers.
bool has_avx2() {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
           __builtin_cpu_supports("f16c");
}

bool has_avx512() {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

bool has_avx512_vnni() { return has_avx512() && __builtin_cpu_supports("avx512vnni"); }

bool has_avx512_bf16() {
    return has_avx512() && __builtin_cpu_supports("avx512bf16") &&
           __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vnni");
}

// Asks Linux for the tiles' state, which a process does not have by itself.
static bool ask_for_tiles() {
    unsigned a = 0, b = 0, c = 0, d = 0;
    if (!has_avx512_bf16() || __get_cpuid_count(7, 0, &a, &b, &c, &d) == 0)
        return false;
    constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24;
    if ((d & kBf16) == 0 || (d & kTile) == 0)
        return false;
    unsigned low = 0, high = 0;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    constexpr unsigned kTileState = 3u << 17;
    if ((low & kTileState) != kTileState)
        return false;
#if defined(__linux__)
    constexpr long kRequest = 0x1023, kTileData = 18;
    return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
#else
    return false;
#endif
}

bool has_amx() {
    static const bool has = ask_for_tiles();
    return has;
}
#else
bool has_avx2() { return false; }

bool has_avx512() { return false; }

bool has_avx512_vnni() { return false; }

bool has_avx512_bf16() { return false; }

bool has_amx() { return false; }
#endif

} // namespace pk
