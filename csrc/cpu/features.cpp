#include "features.h"

namespace pk {

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
#else
bool has_avx2() { return false; }

bool has_avx512() { return false; }
#endif

} // namespace pk
