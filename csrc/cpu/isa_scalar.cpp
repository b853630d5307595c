#define PK_ISA scalar
#define PK_KERNELS kScalarKernels
#define PK_NAME "scalar"
#include "kernels/all.inl.h"
