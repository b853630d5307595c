#define PK_ISA avx512_amx
#define PK_KERNELS kAvx512AmxKernels
#define PK_NAME "avx512-amx"
#define PK_SIMD_AVX512
#define PK_SIMD_PAIRS
#define PK_SIMD_TILES
#include "kernels/all.inl.h"
