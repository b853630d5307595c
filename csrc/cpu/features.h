// What this CPU and its operating system can run.
#pragma once

namespace pk {

bool has_avx2();        // AVX2 + FMA + F16C
bool has_avx512();      // F + BW + DQ + VL, on top of has_avx2()
bool has_avx512_vnni(); // VNNI, on top of has_avx512()
bool has_avx512_bf16(); // BF16 + VBMI + VNNI, on top of has_avx512()
bool has_amx();         // AMX tiles of bf16, granted to this process, on top of has_avx512_bf16()

// Whether products of bf16 pairs outrun fp32's (vdpbf16ps twice as many in the same time, as on
// AMD's) or only save the conversions around them (a quarter of the rate, half as many, on
// Intel's). Results differ between the two by rounding; set_pair_products() is for tests.
bool fast_pair_products();
void set_pair_products(bool fast);

// Whether the plain AVX-512 kernels hand INT8 products to VNNI, as they do where it is; results are
// the same. set_vnni() is for tests.
bool use_vnni();
void set_vnni(bool use);

} // namespace pk
