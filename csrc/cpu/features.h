// What this CPU and its operating system can run.
#pragma once

namespace pk {

bool has_avx2();   // AVX2 + FMA + F16C
bool has_avx512(); // F + BW + DQ + VL, on top of has_avx2()

} // namespace pk
