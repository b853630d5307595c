// The INT8 product with VNNI for processors whose other kernels are plain AVX-512.
#define PK_ISA avx512_vnni
#define PK_SIMD_AVX512
#include "features.h"
#include "kernels.h"
#include "simd.h"
#include "threading.h"

#include "simd_ints.h"

#pragma GCC diagnostic ignored "-Wunused-function" // of the runs a few serve here

#include "kernels/runs.inl.h"
#include "kernels/int8.inl.h"

namespace pk {

int int8_product_vnni(Int8Product& p) { return PK_ISA::int8_product(p); }

} // namespace pk
