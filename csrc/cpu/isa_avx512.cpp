#define PK_ISA avx512
#define PK_KERNELS kAvx512Kernels
#define PK_NAME "avx512"
#define PK_SIMD_AVX512
#include "kernels/all.inl.h"
