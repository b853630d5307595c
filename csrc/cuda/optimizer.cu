// One pass over the parameters, gradients and states of any number of tensors.
//
// A warp takes a chunk of 8 blocks of 256 elements at a time, each lane two runs of four elements
// of a block: every access of the warp is one coalesced run, and the block's statistics are two
// warp reductions without a barrier. The words of CodeLookup lie in shared memory, one copy for
// each block of threads. What is not aligned, or no whole block, goes one element at a time.

#include "../common/block_codec.h"
#include "optimizer.cuh"

namespace pk {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;
constexpr int kBlock = (int)kStateBlock;

struct StepArgs {
    const StateSegment* segments;
    const int32_t* owners; // the segment of each chunk
    int64_t chunks;
    int64_t state; // added to the addresses of states
    const int64_t* grads;
    const Update* hyper;
    const int64_t* rounding; // [rows, 4], or null
    unsigned long long* skipped;
    bool coded; // whether any state is in 8 bits
};

// What a warp knows about the chunk that it works on. It lies in shared memory, between the words
// of CodeLookup, and is read again behind every __syncwarp: registers are for elements.
struct alignas(16) Run {
    char* param; // of the chunk's first element, as all addresses here
    const char* grad;
    char* state1;
    char* state2;
    float* absmax1;
    float* absmax2;
    const int64_t* rounding; // of its parameter, or null
    int64_t first;           // element of the parameter
    Update u;
};
static_assert(sizeof(Run) == 112, "see kRuns");
constexpr int kRuns = kLookupFree; // first word
static_assert(kWarps * (int)sizeof(Run) / 4 <= kLookupFreeWords, "room for a Run a warp");

template <int kDtype>
__device__ __forceinline__ void store_four(char* p, const float v[4]) {
    if (kDtype == kF32) {
        store_once(p,
                   uint4{float_bits(v[0]), float_bits(v[1]), float_bits(v[2]), float_bits(v[3])});
    } else {
        constexpr int kHalf = kDtype == kF16 ? kF16 : kBF16;
        store_once(p, uint2{pack2<kHalf>(v[0], v[1]), pack2<kHalf>(v[2], v[3])});
    }
}

// One element as bf16, up or down at random.
__device__ __forceinline__ void store_random(const Run& r, int e, float p) {
    int64_t index = r.rounding[3] + r.first + e;
    Philox4 w = rounding_words((uint64_t)r.rounding[0], (uint32_t)r.rounding[1],
                               (uint32_t)r.rounding[2], (uint64_t)index >> 2);
    uint32_t low = index % 2 == 0 ? w.w[0] : w.w[1];
    uint32_t high = index % 2 == 0 ? w.w[2] : w.w[3];
    ((uint16_t*)r.param)[e] = float_to_bf16_random(p, index % 4 < 2 ? low : high);
}

// Elements index .. index + 3 as bf16, up or down at random; index is a multiple of 4.
__device__ __forceinline__ void store_four_random(char* p, const float v[4],
                                                  const int64_t* rounding, int64_t index) {
    Philox4 r = rounding_words((uint64_t)rounding[0], (uint32_t)rounding[1], (uint32_t)rounding[2],
                               (uint64_t)index >> 2);
    uint32_t h[4];
#pragma unroll
    for (int j = 0; j < 4; ++j)
        h[j] = float_to_bf16_random(v[j], r.w[j]);
    store_once(p, uint2{h[0] | h[1] << 16, h[2] | h[3] << 16});
}

__device__ __forceinline__ void decode_four(SharedAddress values, uint32_t codes, float absmax,
                                            float v[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        uint32_t place = (i == 0 ? codes << 2 : codes >> (8 * i - 2)) & 0x3fcu; // 4 * code
        v[i] = load_shared_float(values + place) * absmax;
    }
}

// The largest magnitude among the warp's values; a NaN counts as the largest.
template <bool kSigned>
__device__ __forceinline__ float largest(const float v[8]) {
    uint32_t bits = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        uint32_t b = kSigned ? float_bits(v[i]) & 0x7fffffffu : float_bits(v[i]);
        bits = b > bits ? b : bits;
    }
    return bits_float(__reduce_max_sync(kWarp, bits));
}

// The code of x, above bit 16. Denormal blocks are lifted before.
template <bool kSigned>
__device__ __forceinline__ uint32_t code_sum(SharedAddress table, float x, float inverse) {
    uint32_t key = lookup_key<kSigned>(x * inverse);
    // Four times lookup_place, found by one shift and one mask.
    uint32_t place = key >> 14 & (kSigned ? 0x7ffcu : 0x3ffcu);
    return key + load_shared_word(table + (kSigned ? 0 : 4 * kLookupUnsigned) + place);
}

template <bool kSigned>
__device__ __forceinline__ uint8_t encode_one(SharedAddress table, float x, BlockScale scale) {
    return (uint8_t)(code_sum<kSigned>(table, x * scale.lift, scale.inverse) >> 16);
}

template <bool kSigned>
__device__ __forceinline__ void encode(SharedAddress table, float v[8], float absmax,
                                       uint32_t codes[2]) {
    BlockScale scale = block_scale(absmax);
    if (scale.lift != 1.0f) // exact; the whole warp alike
#pragma unroll
        for (int i = 0; i < 8; ++i)
            v[i] *= scale.lift;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        uint32_t sum[4];
#pragma unroll
        for (int j = 0; j < 4; ++j)
            sum[j] = code_sum<kSigned>(table, v[4 * h + j], scale.inverse);
        // The third byte of each.
        codes[h] = permute_bytes(permute_bytes(sum[0], sum[1], 0x0062u),
                                 permute_bytes(sum[2], sum[3], 0x0062u), 0x5410u);
    }
}

// Square root and quotient as IEEE rounds them, by the sequences that compilers for NVIDIA's GPUs
// put before their branch for rare operands. Here the branch is one for all elements of a lane:
// roots of 0 < x < kLeast and of x > kMost, and quotients that leave the normal range or start with
// a numerator below kLeast, are left to the compiler.
constexpr float kLeast = 8.4703295e-22f; // 2^-70
constexpr float kMost = 1.2089258e24f;   // 2^80

__device__ __forceinline__ float fast_root(float x) {
    float r = rsqrt_approximate(fmaxf(x, kLeast));
    float s = x * r, h = r * 0.5f;
    return fmaf(fmaf(-s, s, x), h, s);
}

__device__ __forceinline__ float fast_quotient(float a, float b) {
    float r = reciprocal_approximate(b);
    r = fmaf(fmaf(-b, r, 1.0f), r, r);
    float q = a * r;
    return fmaf(fmaf(-b, q, a), r, q);
}

__device__ __forceinline__ void adamw_four(const Update& u, const float g[4], float p[4],
                                           float m[4], float v[4]) {
    // Twice the bits: without the sign. Zero less one is the largest.
    uint32_t least = ~0u, most = 0;
    float change[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        m[i] = m[i] * u.beta1 + g[i] * u.one_minus_beta1;
        v[i] = v[i] * u.beta2 + (g[i] * g[i]) * u.one_minus_beta2;
        float denominator = fast_root(v[i]) * u.inverse_correction + u.eps;
        change[i] = fast_quotient(m[i], denominator);
        uint32_t bits_m = 2 * float_bits(m[i]) - 1, bits_v = 2 * float_bits(v[i]);
        uint32_t bits_c = 2 * float_bits(change[i]);
        least = bits_m < least ? bits_m : least;
        least = bits_v - 1 < least ? bits_v - 1 : least;
        most = bits_v > most ? bits_v : most;
        most = bits_c > most ? bits_c : most;
    }
    bool rare = least < 2 * float_bits(kLeast) - 1 || most >= 2 * float_bits(kMost) ||
                !(u.inverse_correction <= 1024.0f) || !(u.eps <= 1024.0f);
    if (rare) {
#pragma unroll 1
        for (int n = 0; n < 4; ++n) { // the arrays turn by one each time, so they stay in registers
            float m0 = m[0], v0 = v[0];
#pragma unroll
            for (int i = 0; i < 3; ++i) {
                m[i] = m[i + 1];
                v[i] = v[i + 1];
                change[i] = change[i + 1];
            }
            m[3] = m0;
            v[3] = v0;
            change[3] = m0 / (sqrtf(v0) * u.inverse_correction + u.eps);
        }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i)
        p[i] = p[i] * u.decay - u.step_size * change[i];
}

template <int R>
__device__ __forceinline__ void update_four(const Update& u, const float g[4], float p[4],
                                            float m[4], float v[4]) {
    if (R == kAdamW) {
        adamw_four(u, g, p, m, v);
    } else {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            if (R == kLion)
                lion_element(u, g[i], p[i], m[i]);
            else
                momentum_element(u, g[i], p[i], m[i]);
        }
    }
}

// A whole, aligned block at `at`; false if its gradient is not finite.
template <int R, bool kCoded, int kDtype>
__device__ __forceinline__ bool whole_block(const Run& r, SharedAddress table, int at, int lane) {
    using Word = typename Four<kDtype>::Word;
    const Update& u = r.u;
    constexpr int kSize = kDtype == kF32 ? 4 : 2;
    int own = at + 4 * lane;
    __syncwarp();

    // Everything is asked for before anything is used.
    Word raw_g[2], raw_p[2];
    uint4 raw_m[2], raw_v[2];
    uint32_t codes1[2], codes2[2];
    float scale1 = 0.0f, scale2 = 0.0f;
#pragma unroll
    for (int h = 0; h < 2; ++h)
        raw_g[h] = load_once<Word>(r.grad + (own + 128 * h) * kSize);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        raw_p[h] = load_once<Word>(r.param + (own + 128 * h) * kSize);
        if (kCoded) {
            codes1[h] = load_once<uint32_t>(r.state1 + own + 128 * h);
            if (R == kAdamW)
                codes2[h] = load_once<uint32_t>(r.state2 + own + 128 * h);
        } else {
            raw_m[h] = load_once<uint4>(r.state1 + 4 * (own + 128 * h));
            if (R == kAdamW)
                raw_v[h] = load_once<uint4>(r.state2 + 4 * (own + 128 * h));
        }
    }
    if (kCoded) {
        scale1 = load_once<float>(r.absmax1 + at / kBlock);
        if (R == kAdamW)
            scale2 = load_once<float>(r.absmax2 + at / kBlock);
    }

    uint32_t square = 0;
    float g[8], m[8], v[8];
    widen(raw_g[0], g, kDtype);
    widen(raw_g[1], g + 4, kDtype);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        g[i] *= u.grad_scale;
        uint32_t bits = float_bits(g[i] * g[i]);
        square = bits > square ? bits : square;
    }
    if (__reduce_max_sync(kWarp, square) >= 0x7f800000u)
        return false;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        __syncwarp();
        float p[4];
        widen(raw_p[h], p, kDtype);
        if (kCoded) {
            decode_four(table + 4 * kLookupValues1, codes1[h], scale1, m + 4 * h);
            if (R == kAdamW)
                decode_four(table + 4 * kLookupValues2, codes2[h], scale2, v + 4 * h);
        } else {
            widen(raw_m[h], m + 4 * h, kF32);
            if (R == kAdamW)
                widen(raw_v[h], v + 4 * h, kF32);
        }
        update_four<R>(u, g + 4 * h, p, m + 4 * h, v + 4 * h);
        char* to = r.param + (own + 128 * h) * kSize;
        if (kDtype == kRandomBF16)
            store_four_random(to, p, r.rounding, r.first + own + 128 * h);
        else
            store_four<kDtype>(to, p);
        if (!kCoded) {
            store_four<kF32>(r.state1 + 4 * (own + 128 * h), m + 4 * h);
            if (R == kAdamW)
                store_four<kF32>(r.state2 + 4 * (own + 128 * h), v + 4 * h);
        }
    }
    if (kCoded) {
        scale1 = largest<true>(m);
        encode<true>(table, m, scale1, codes1);
        if (R == kAdamW) {
            scale2 = largest<false>(v);
            encode<false>(table, v, scale2, codes2);
        }
        __syncwarp();
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            store_once(r.state1 + own + 128 * h, codes1[h]);
            if (R == kAdamW)
                store_once(r.state2 + own + 128 * h, codes2[h]);
        }
        if (lane == 0) {
            store_once(r.absmax1 + at / kBlock, scale1);
            if (R == kAdamW)
                store_once(r.absmax2 + at / kBlock, scale2);
        }
    }
    return true;
}

// What a pass over a block looks at.
enum Pass : int { kGradient = 0, kStatistics = 1, kUpdate = 2 };

// A block of n elements that may lie anywhere, one element of a lane at a time: three passes that
// each work it out anew need few registers and little code.
template <int R, bool kCoded>
__device__ __forceinline__ bool any_block(const Run& r, int param_dtype, int grad_dtype,
                                          SharedAddress table, int at, int n, int lane) {
    __syncwarp();
    const Update& u = r.u;
    float* absmax1 = r.absmax1 + at / kBlock;
    float* absmax2 = r.absmax2 + at / kBlock;
    float old1 = kCoded ? *absmax1 : 0.0f, old2 = kCoded && R == kAdamW ? *absmax2 : 0.0f;
    BlockScale scale1 = {}, scale2 = {};
#pragma unroll 1
    for (int pass = kGradient; pass <= kUpdate; ++pass) {
        if (!kCoded && pass == kStatistics)
            continue;
        uint32_t bits = 0, bits1 = 0, bits2 = 0;
#pragma unroll 1
        for (int e = at + lane; e < at + n; e += 32) {
            float g = load_as_float(r.grad, grad_dtype, e) * u.grad_scale;
            if (pass == kGradient) {
                uint32_t square = float_bits(g * g);
                bits = square > bits ? square : bits;
                continue;
            }
            uint8_t* code1 = (uint8_t*)r.state1 + e;
            uint8_t* code2 = (uint8_t*)r.state2 + e;
            float p = load_as_float(r.param, param_dtype, e), m, v = 0.0f;
            if (kCoded) {
                m = load_shared_float(table + 4 * (kLookupValues1 + *code1)) * old1;
                if (R == kAdamW)
                    v = load_shared_float(table + 4 * (kLookupValues2 + *code2)) * old2;
            } else {
                m = ((float*)r.state1)[e];
                if (R == kAdamW)
                    v = ((float*)r.state2)[e];
            }
            if (R == kAdamW)
                adamw_element(u, g, p, m, v);
            else if (R == kLion)
                lion_element(u, g, p, m);
            else
                momentum_element(u, g, p, m);
            if (pass == kStatistics) {
                uint32_t first = float_bits(m) & 0x7fffffffu, second = float_bits(v);
                bits1 = first > bits1 ? first : bits1;
                bits2 = second > bits2 ? second : bits2;
                continue;
            }
            if (kCoded) {
                *code1 = encode_one<true>(table, m, scale1);
                if (R == kAdamW)
                    *code2 = encode_one<false>(table, v, scale2);
            } else {
                ((float*)r.state1)[e] = m;
                if (R == kAdamW)
                    ((float*)r.state2)[e] = v;
            }
            if (r.rounding != nullptr && param_dtype == kBF16)
                store_random(r, e, p);
            else
                store_from_float(r.param, param_dtype, e, p);
        }
        if (pass == kGradient && __reduce_max_sync(kWarp, bits) >= 0x7f800000u)
            return false;
        if (kCoded && pass == kStatistics) {
            float new1 = bits_float(__reduce_max_sync(kWarp, bits1)), new2 = 0.0f;
            scale1 = block_scale(new1);
            if (R == kAdamW) {
                new2 = bits_float(__reduce_max_sync(kWarp, bits2));
                scale2 = block_scale(new2);
            }
            __syncwarp(); // every lane has read the old statistics
            if (lane == 0) {
                *absmax1 = new1;
                if (R == kAdamW)
                    *absmax2 = new2;
            }
        }
    }
    return true;
}

// All whole blocks before `end`; returns how many were skipped.
template <int R, bool kCoded, int kDtype>
__device__ __forceinline__ int whole_blocks(const Run& r, SharedAddress table, int end, int lane) {
    int skipped = 0;
#pragma unroll 1
    for (int at = 0; at < end; at += kBlock)
        skipped += whole_block<R, kCoded, kDtype>(r, table, at, lane) ? 0 : 1;
    return skipped;
}

template <int R, bool kCoded>
__device__ __forceinline__ int blocks_of(const Run& r, const StateSegment& s, SharedAddress table,
                                         int n, bool aligned, int lane) {
    __syncwarp();
    bool random = r.rounding != nullptr && s.param_dtype == kBF16;
    if (random)
        aligned = aligned && r.rounding[3] % 4 == 0;
    int skipped = 0, end = aligned && s.param_dtype == s.grad_dtype ? n / kBlock * kBlock : 0;
    if (s.param_dtype == kF32)
        skipped = whole_blocks<R, kCoded, kF32>(r, table, end, lane);
    else if (s.param_dtype == kF16)
        skipped = whole_blocks<R, kCoded, kF16>(r, table, end, lane);
    else if (random)
        skipped = whole_blocks<R, kCoded, kRandomBF16>(r, table, end, lane);
    else
        skipped = whole_blocks<R, kCoded, kBF16>(r, table, end, lane);
#pragma unroll 1
    for (int at = end; at < n; at += kBlock) {
        int size = n - at < kBlock ? n - at : kBlock;
        skipped +=
            any_block<R, kCoded>(r, s.param_dtype, s.grad_dtype, table, at, size, lane) ? 0 : 1;
    }
    return skipped;
}

PK_TABLE CodeLookup kLookup = make_code_lookup();

template <int R>
__global__ void __launch_bounds__(kThreads, 2) optimizer_step_kernel(StepArgs a) {
    PK_SHARED(uint4, table, kLookupWords / 4);
    if (a.coded) {
        for (int i = (int)threadIdx.x; i < kLookupWords / 4; i += kThreads)
            table[i] = ((const uint4*)kLookup.word)[i];
        __syncthreads();
    }
    SharedAddress words = shared_address(table);
    int lane = (int)threadIdx.x % 32, warp = (int)threadIdx.x / 32;
    Run& run = ((Run*)(table + kRuns / 4))[warp];
    int64_t warps = (int64_t)gridDim.x * kWarps;
    // Few chunks go to as many multiprocessors as there are.
    for (int64_t chunk = blockIdx.x + (int64_t)gridDim.x * warp; chunk < a.chunks; chunk += warps) {
        const StateSegment& s = a.segments[a.owners[chunk]];
        int64_t from = (chunk - s.chunk) * kChunk, first = s.start + from;
        bool coded = s.absmax1 != nullptr;
        int size = coded ? 1 : 4;
        Run r;
        r.param = s.param + first * dtype_size(s.param_dtype);
        r.grad = (const char*)a.grads[s.row] + first * dtype_size(s.grad_dtype);
        r.state1 = s.state1 + a.state + from * size;
        r.state2 = s.state2 + a.state + from * size;
        r.absmax1 = (float*)(s.absmax1 + a.state) + from / kBlock;
        r.absmax2 = (float*)(s.absmax2 + a.state) + from / kBlock;
        r.rounding = a.rounding != nullptr ? a.rounding + 4 * s.row : nullptr;
        r.first = first;
        r.u = a.hyper[s.row];
        bool aligned = ((uintptr_t)r.param | (uintptr_t)r.grad | (uintptr_t)r.state1 |
                        (uintptr_t)r.state2 | (uintptr_t)first) %
                           16 ==
                       0;
        __syncwarp(); // the last chunk is done with
        if (lane == 0)
            run = r;
        int n = (int)min64(kChunk, s.numel - from);
        int skipped = coded ? blocks_of<R, true>(run, s, words, n, aligned, lane)
                            : blocks_of<R, false>(run, s, words, n, aligned, lane);
        if (skipped != 0 && lane == 0)
            atomicAdd(a.skipped + s.row, (unsigned long long)skipped);
    }
}

} // namespace
} // namespace pk

extern "C" {

int pk_cuda_optimizer_step(const void* call, void* stream) {
    const pk::StepCall& c = *(const pk::StepCall*)call;
    if (c.chunks == 0)
        return pk::kOk;
    pk::StepArgs a = {c.segments,  c.owners, c.chunks,   c.state,
                      c.grads,     c.hyper,  c.rounding, (unsigned long long*)c.skipped,
                      c.coded != 0};
    auto kernel = c.rule == pk::kAdamW  ? pk::optimizer_step_kernel<pk::kAdamW>
                  : c.rule == pk::kLion ? pk::optimizer_step_kernel<pk::kLion>
                                        : pk::optimizer_step_kernel<pk::kMomentum>;
    unsigned grid = (unsigned)pk::min64(c.chunks, c.blocks);
    return pk::launch("optimizer_step", kernel, grid, pk::kThreads, 0, stream, a);
}
PK_LAUNCHER(optimizer_step)
}
