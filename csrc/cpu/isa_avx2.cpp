#define PK_ISA avx2
#define PK_KERNELS kAvx2Kernels
#define PK_NAME "avx2"
#define PK_SIMD_AVX2
#include "kernels/all.inl.h"
