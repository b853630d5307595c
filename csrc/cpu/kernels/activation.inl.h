// Activations over runs of fp32, and their derivatives.
//
// Everything is branch-free arithmetic on blocks of kBlock values, which the compiler vectorises;
// tails go through a padded block, so that a value's bits do not depend on its place.

namespace pk::PK_ISA {
namespace {

constexpr int kActivationBlock = 16;

// e^x within 2 ulp; flushes below e^-87.3 to e^-87.3 and caps at e^88.3.
PK_INLINE float fast_exp(float x) {
    x = x < -87.3f ? -87.3f : x;
    x = x > 88.3f ? 88.3f : x;
    // The sum with 1.5 * 2^23 holds round(x / ln 2) in its low bits.
    float shifted = x * 1.44269504f + 12582912.0f;
    float n = shifted - 12582912.0f;
    float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 0.00139505998f;
    p = p * r + 0.00836895406f;
    p = p * r + 0.0416662060f;
    p = p * r + 0.166665182f;
    p = p * r + 0.5f;
    float y = (p * r) * r + r + 1.0f;
    return y * bits_float((float_bits(shifted) << 23) + 0x3f800000u);
}

PK_INLINE float fast_sigmoid(float x) { return 1.0f / (1.0f + fast_exp(-x)); }

PK_INLINE float magnitude_of(float x) { return bits_float(float_bits(x) & 0x7fffffffu); }

PK_INLINE float with_sign_of(float magnitude, float x) {
    return bits_float(float_bits(magnitude) | (float_bits(x) & 0x80000000u));
}

PK_INLINE float fast_tanh(float x) {
    float s = x * x;
    float p = -0.00571703678f;
    p = p * s + 0.0206505786f;
    p = p * s - 0.0537434965f;
    p = p * s + 0.133314908f;
    p = p * s - 0.333332837f;
    float small = (p * s) * x + x;
    float a = magnitude_of(x);
    float large = with_sign_of(1.0f - 2.0f / (fast_exp(2.0f * a) + 1.0f), x);
    return a < 0.625f ? small : large;
}

PK_INLINE float fast_erf(float x) {
    float s = x * x;
    float p = 7.88911930e-5f;
    p = p * s - 8.02084105e-4f;
    p = p * s + 0.00518953521f;
    p = p * s - 0.0268544443f;
    p = p * s + 0.112836003f;
    p = p * s - 0.376126260f;
    p = p * s + 0.128379166f;
    float small = p * x + x;
    // erfc(a) = e^-q(a); beyond 4 it is less than half an ulp of 1.
    float a = magnitude_of(x);
    float t = a > 4.0f ? 4.0f : a;
    float q = 2.16868501e-5f;
    q = q * t - 4.41336364e-4f;
    q = q * t + 0.00420456193f;
    q = q * t - 0.0252082571f;
    q = q * t + 0.108418576f;
    q = q * t + 0.633219898f;
    q = q * t + 1.12957847f;
    q = q * t - 1.88040227e-4f;
    float large = with_sign_of(1.0f - fast_exp(-q), x);
    return a < 1.0f ? small : large;
}

struct Identity {
    PK_INLINE float value(float z) { return z; }
    PK_INLINE float slope(float) { return 1.0f; }
};
struct Relu {
    PK_INLINE float value(float z) { return z < 0.0f ? 0.0f : z; }
    PK_INLINE float slope(float z) { return z > 0.0f ? 1.0f : 0.0f; }
};
struct LeakyRelu {
    PK_INLINE float value(float z) { return z > 0.0f ? z : z * 0.01f; }
    PK_INLINE float slope(float z) { return z > 0.0f ? 1.0f : 0.01f; }
};
struct Gelu {
    PK_INLINE float share(float z) { return 0.5f * fast_erf(z * 0.707106781f) + 0.5f; }
    PK_INLINE float value(float z) { return z * share(z); }
    PK_INLINE float slope(float z) {
        return share(z) + z * (0.398942280f * fast_exp(-0.5f * (z * z)));
    }
};
struct GeluTanh {
    PK_INLINE float part(float z) {
        return fast_tanh(0.797884561f * (z + 0.044715f * (z * z) * z));
    }
    PK_INLINE float value(float z) { return 0.5f * z * (1.0f + part(z)); }
    PK_INLINE float slope(float z) {
        float t = part(z);
        float inner = 0.797884561f * (1.0f + 0.134145f * (z * z));
        return 0.5f * (1.0f + t) + 0.5f * z * (1.0f - t * t) * inner;
    }
};
struct Silu {
    PK_INLINE float value(float z) { return z * fast_sigmoid(z); }
    PK_INLINE float slope(float z) {
        float s = fast_sigmoid(z);
        return s * (1.0f + z * (1.0f - s));
    }
};
struct Tanh {
    PK_INLINE float value(float z) { return fast_tanh(z); }
    PK_INLINE float slope(float z) {
        float t = fast_tanh(z);
        return 1.0f - t * t;
    }
};
struct Sigmoid {
    PK_INLINE float value(float z) { return fast_sigmoid(z); }
    PK_INLINE float slope(float z) {
        float s = fast_sigmoid(z);
        return s * (1.0f - s);
    }
};

template <class A>
void value_run(float* z, int64_t n) {
    int64_t i = 0;
    for (; i + kActivationBlock <= n; i += kActivationBlock)
        for (int j = 0; j < kActivationBlock; ++j)
            z[i + j] = A::value(z[i + j]);
    if (i < n) {
        float block[kActivationBlock] = {};
        __builtin_memcpy(block, z + i, (size_t)(n - i) * sizeof(float));
        for (int j = 0; j < kActivationBlock; ++j)
            block[j] = A::value(block[j]);
        __builtin_memcpy(z + i, block, (size_t)(n - i) * sizeof(float));
    }
}

// d = d * act'(z), then z = act(z).
template <class A>
void slope_run(float* z, float* d, int64_t n) {
    float zs[kActivationBlock], ds[kActivationBlock];
    for (int64_t i = 0; i < n; i += kActivationBlock) {
        int64_t len = min64(kActivationBlock, n - i);
        if (len < kActivationBlock) {
            __builtin_memset(zs, 0, sizeof(zs));
            __builtin_memset(ds, 0, sizeof(ds));
        }
        __builtin_memcpy(zs, z + i, (size_t)len * sizeof(float));
        __builtin_memcpy(ds, d + i, (size_t)len * sizeof(float));
        for (int j = 0; j < kActivationBlock; ++j)
            ds[j] *= A::slope(zs[j]);
        for (int j = 0; j < kActivationBlock; ++j)
            zs[j] = A::value(zs[j]);
        __builtin_memcpy(z + i, zs, (size_t)len * sizeof(float));
        __builtin_memcpy(d + i, ds, (size_t)len * sizeof(float));
    }
}

// z = act(z) where d is null; else d = d * act'(z) first.
template <class A>
void activate(float* z, float* d, int64_t n) {
    if (d == nullptr)
        value_run<A>(z, n);
    else
        slope_run<A>(z, d, n);
}

void activation_run(int activation, float* z, float* d, int64_t n) {
    switch (activation) {
    case kRelu:
        return activate<Relu>(z, d, n);
    case kGelu:
        return activate<Gelu>(z, d, n);
    case kGeluTanh:
        return activate<GeluTanh>(z, d, n);
    case kSilu:
        return activate<Silu>(z, d, n);
    case kTanh:
        return activate<Tanh>(z, d, n);
    case kSigmoid:
        return activate<Sigmoid>(z, d, n);
    case kLeakyRelu:
        return activate<LeakyRelu>(z, d, n);
    default:
        return activate<Identity>(z, d, n);
    }
}

} // namespace
} // namespace pk::PK_ISA
