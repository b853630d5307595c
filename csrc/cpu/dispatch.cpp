#include "dispatch.h"

#include <string.h>

#include "features.h"

namespace pk {

extern const Kernels kScalarKernels;
#if defined(PK_BUILD_AVX2)
extern const Kernels kAvx2Kernels;
#endif
#if defined(PK_BUILD_AVX512)
extern const Kernels kAvx512Kernels;
extern const Kernels kAvx512Bf16Kernels;
extern const Kernels kAvx512AmxKernels;
#endif
#if defined(PK_EMULATE_AVX512)
extern const Kernels kAvx512EmulatedKernels;
#endif

static bool always() { return true; }

const Isa kIsas[] = {
#if defined(PK_EMULATE_AVX512)
    {&kAvx512EmulatedKernels, always},
#endif
    {&kScalarKernels, always},
#if defined(PK_BUILD_AVX2)
    {&kAvx2Kernels, has_avx2},
#endif
#if defined(PK_BUILD_AVX512)
    {&kAvx512Kernels, has_avx512},
    {&kAvx512Bf16Kernels, has_avx512_bf16},
    {&kAvx512AmxKernels, has_amx},
#endif
    {nullptr, nullptr},
};

const Kernels* find_isa(const char* name) {
    for (const Isa* isa = kIsas; isa->kernels != nullptr; ++isa)
        if (strcmp(isa->kernels->name, name) == 0 && isa->present())
            return isa->kernels;
    return nullptr;
}

const Kernels* best_isa() {
    const Kernels* best = nullptr;
    for (const Isa* isa = kIsas; isa->kernels != nullptr; ++isa)
        if (isa->present())
            best = isa->kernels;
    return best;
}

} // namespace pk
