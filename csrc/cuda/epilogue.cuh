// The end of a matmul: y[m, n] = round(sum + scaling * (s[m, :] . B[n, :]) + bias[n]), all in fp32.
#pragma once

#include "../common/convert.h"
#include "primitives.cuh"

namespace pk {

struct Epilogue {
    void* out; // [M, N]
    int dtype; // of out and bias
    const void* bias;
    const float* low; // s = dropout(x) A^T, [M, rank]; null: no LoRA term
    const void* up;   // B, [N, rank]
    int up_dtype;
    int rank;
    float scaling;
};

__device__ __forceinline__ void finish(const Epilogue& e, float sum, int64_t m, int64_t n,
                                       int64_t columns) {
    if (e.low != nullptr) {
        float term = 0.0f;
        for (int r = 0; r < e.rank; ++r)
            term =
                fmaf(e.low[m * e.rank + r], load_as_float(e.up, e.up_dtype, n * e.rank + r), term);
        sum = fmaf(e.scaling, term, sum);
    }
    if (e.bias != nullptr)
        sum += load_as_float(e.bias, e.dtype, n);
    store_from_float(e.out, e.dtype, m * columns + n, sum);
}

} // namespace pk
