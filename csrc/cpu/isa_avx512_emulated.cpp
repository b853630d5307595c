// Test builds only (PEFTKERN_EMULATE_AVX512): the AVX-512 body on emulated intrinsics.
#define PK_ISA avx512_emulated
#define PK_KERNELS kAvx512EmulatedKernels
#define PK_NAME "avx512-emulated"
#define PK_SIMD_AVX512
#define PK_SIMDE
#include "kernels/all.inl.h"
