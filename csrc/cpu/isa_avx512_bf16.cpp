#define PK_ISA avx512_bf16
#define PK_KERNELS kAvx512Bf16Kernels
#define PK_NAME "avx512-bf16"
#define PK_SIMD_AVX512
#define PK_SIMD_PAIRS
#include "kernels/all.inl.h"
