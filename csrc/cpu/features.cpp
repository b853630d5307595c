#include "features.h"

#include <atomic>

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

bool has_avx512_bf16() {
    return has_avx512() && __builtin_cpu_supports("avx512bf16") &&
           __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vnni");
}
#else
bool has_avx2() { return false; }

bool has_avx512() { return false; }

bool has_avx512_bf16() { return false; }
#endif

} // namespace pk
