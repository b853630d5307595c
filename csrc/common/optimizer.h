// Optimizer updates with fp32 or blockwise 8-bit state: the maths of one element, once for every
// backend (peftkern/ops/optimizer/reference.py is the same in plain torch). Every product and sum
// is rounded by itself: compile with -ffp-contract=off, on devices with -fmad=false.
#pragma once

#include "codebooks.h"
#include "convert.h"
#include "philox.h"

namespace pk {

enum Rule : int { kAdamW = 0, kLion = 1, kMomentum = 2 };

constexpr int64_t kStateBlock = 256; // elements that share an absmax, and that are skipped together

// One row of the op's `hyper` tensor, in its order of columns.
struct Update {
    float grad_scale;
    float decay; // 1 - lr * weight_decay
    float beta1;
    float one_minus_beta1;
    float beta2;
    float one_minus_beta2;
    float step_size;          // lr; AdamW: lr / (1 - beta1^t)
    float inverse_correction; // AdamW: 1 / sqrt(1 - beta2^t)
    float eps;
    float weight_decay;
    float first; // momentum: 1 in the first step, else 0
};

// What a group of parameters is set to; the op's `hyper` follows from it and the step.
struct Settings {
    double lr;
    double beta1;
    double beta2;
    double eps;
    double weight_decay;
    double direction; // 1; -1 to maximize
};

// base^n by squaring: products only, so that every backend finds the same bits.
PK_HD double power(double base, int64_t n) {
    double result = 1.0;
    for (; n > 0; n >>= 1, base = base * base)
        if (n & 1)
            result = result * base;
    return result;
}

// The numbers of step `step`, counted from 1, worked out in fp64; `clip` is a factor on gradients.
PK_HD Update make_update(int rule, const Settings& s, int64_t step, double clip) {
    bool adam = rule == kAdamW;
    Update u;
    u.grad_scale = (float)(s.direction * clip);
    u.decay = rule == kMomentum ? 1.0f : (float)(1.0 - s.lr * s.weight_decay);
    u.beta1 = (float)s.beta1;
    u.one_minus_beta1 = (float)(1.0 - s.beta1);
    u.beta2 = (float)s.beta2;
    u.one_minus_beta2 = (float)(1.0 - s.beta2);
    u.step_size = (float)(adam ? s.lr / (1.0 - power(s.beta1, step)) : s.lr);
    u.inverse_correction = adam ? (float)(1.0 / __builtin_sqrt(1.0 - power(s.beta2, step))) : 1.0f;
    u.eps = (float)s.eps;
    u.weight_decay = (float)s.weight_decay;
    u.first = step == 1 ? 1.0f : 0.0f;
    return u;
}

PK_HD void adamw_element(const Update& u, float g, float& p, float& m, float& v) {
    m = m * u.beta1 + g * u.one_minus_beta1;
    v = v * u.beta2 + (g * g) * u.one_minus_beta2;
    float denominator = __builtin_sqrtf(v) * u.inverse_correction + u.eps;
    p = p * u.decay - u.step_size * (m / denominator);
}

PK_HD void lion_element(const Update& u, float g, float& p, float& m) {
    float direction = m * u.beta1 + g * u.one_minus_beta1;
    float sign = (float)((int)(direction > 0.0f) - (int)(direction < 0.0f));
    p = p * u.decay - u.step_size * sign;
    m = m * u.beta2 + g * u.one_minus_beta2;
}

PK_HD void momentum_element(const Update& u, float g, float& p, float& m) {
    float d = g + u.weight_decay * p;
    m = u.first != 0.0f ? d : m * u.beta1 + d;
    p = p - u.step_size * m;
}

// The four words of random bits for elements 4 * quad .. 4 * quad + 3 of a parameter.
PK_HD Philox4 rounding_words(uint64_t seed, uint32_t step, uint32_t tensor, uint64_t quad) {
    Philox4 r = {{(uint32_t)quad, (uint32_t)(quad >> 32), step, tensor}};
    uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
    for (int i = 0; i < 10; ++i) {
        philox_round(r.w, k0, k1);
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    return r;
}

// bf16 above or below x, with the chance that keeps the mean; NaN and Inf as usual.
PK_HD uint16_t float_to_bf16_random(float x, uint32_t word) {
    if (!is_finite(x))
        return float_to_bf16(x);
    return (uint16_t)((float_bits(x) + (word >> 16)) >> 16);
}

// Unsigned dynamic 8-bit map, of second moments.
PK_TABLE float kUnsignedValues[256] = {
    0.0f,           3.2500003e-07f, 7.75e-07f,      2.1249998e-06f, 4.3749997e-06f, 6.625e-06f,
    8.874999e-06f,  1.5624999e-05f, 2.6875001e-05f, 3.8125e-05f,    4.9374998e-05f, 6.0625003e-05f,
    7.1875e-05f,    8.312499e-05f,  9.4375e-05f,    0.000128125f,   0.000184375f,   0.00024062501f,
    0.00029687502f, 0.00035312498f, 0.00040937503f, 0.00046562502f, 0.00052187504f, 0.000578125f,
    0.000634375f,   0.00069062505f, 0.000746875f,   0.0008031251f,  0.00085937505f, 0.000915625f,
    0.00097187504f, 0.001140625f,   0.001421875f,   0.001703125f,   0.001984375f,   0.002265625f,
    0.0025468748f,  0.002828125f,   0.0031093748f,  0.0033906251f,  0.003671875f,   0.003953125f,
    0.0042343745f,  0.004515625f,   0.0047968747f,  0.005078125f,   0.005359375f,   0.0056406246f,
    0.005921875f,   0.0062031248f,  0.006484375f,   0.0067656254f,  0.0070468746f,  0.007328125f,
    0.0076093744f,  0.007890625f,   0.008171875f,   0.008453124f,   0.008734375f,   0.009015624f,
    0.0092968745f,  0.009578126f,   0.009859375f,   0.010703126f,   0.012109376f,   0.013515624f,
    0.014921876f,   0.016328124f,   0.017734377f,   0.019140625f,   0.020546874f,   0.021953126f,
    0.023359375f,   0.024765624f,   0.026171876f,   0.027578129f,   0.028984373f,   0.030390626f,
    0.031796873f,   0.033203125f,   0.034609374f,   0.036015626f,   0.03742188f,    0.038828123f,
    0.040234376f,   0.041640624f,   0.043046873f,   0.044453125f,   0.045859374f,   0.047265626f,
    0.04867187f,    0.050078124f,   0.051484372f,   0.052890625f,   0.054296877f,   0.05570313f,
    0.057109382f,   0.058515627f,   0.059921872f,   0.061328124f,   0.06273438f,    0.06414063f,
    0.06554688f,    0.06695312f,    0.068359375f,   0.06976563f,    0.07117188f,    0.072578125f,
    0.07398438f,    0.07539063f,    0.07679688f,    0.07820313f,    0.07960938f,    0.081015624f,
    0.08242188f,    0.08382813f,    0.085234374f,   0.086640626f,   0.08804687f,    0.08945312f,
    0.090859376f,   0.09226563f,    0.09367188f,    0.095078126f,   0.09648438f,    0.09789063f,
    0.099296875f,   0.103515625f,   0.11054687f,    0.11757813f,    0.12460937f,    0.13164061f,
    0.13867188f,    0.14570314f,    0.15273437f,    0.15976563f,    0.16679686f,    0.17382812f,
    0.18085939f,    0.18789062f,    0.19492188f,    0.20195311f,    0.20898438f,    0.21601564f,
    0.22304687f,    0.23007813f,    0.23710936f,    0.24414062f,    0.25117186f,    0.25820312f,
    0.26523438f,    0.2722656f,     0.27929688f,    0.28632814f,    0.29335937f,    0.3003906f,
    0.30742186f,    0.31445312f,    0.3214844f,     0.32851562f,    0.33554685f,    0.3425781f,
    0.34960938f,    0.35664064f,    0.36367187f,    0.3707031f,     0.37773436f,    0.38476562f,
    0.3917969f,     0.39882812f,    0.40585935f,    0.4128906f,     0.41992188f,    0.42695314f,
    0.43398437f,    0.4410156f,     0.44804686f,    0.45507812f,    0.4621094f,     0.46914062f,
    0.47617185f,    0.4832031f,     0.49023438f,    0.4972656f,     0.5042969f,     0.5113281f,
    0.51835936f,    0.5253906f,     0.5324218f,     0.53945315f,    0.54648435f,    0.5535157f,
    0.5605469f,     0.56757814f,    0.5746094f,     0.5816406f,     0.5886719f,     0.5957031f,
    0.6027344f,     0.60976565f,    0.61679685f,    0.6238282f,     0.6308594f,     0.63789064f,
    0.6449219f,     0.6519531f,     0.6589844f,     0.6660156f,     0.6730469f,     0.68007815f,
    0.68710935f,    0.6941407f,     0.7011719f,     0.70820314f,    0.7152344f,     0.7222656f,
    0.7292969f,     0.7363281f,     0.7433594f,     0.75039065f,    0.75742185f,    0.7644532f,
    0.7714844f,     0.7785156f,     0.7855469f,     0.7925781f,     0.7996094f,     0.8066406f,
    0.8136718f,     0.82070315f,    0.82773435f,    0.8347657f,     0.8417969f,     0.8488281f,
    0.8558594f,     0.8628906f,     0.8699219f,     0.8769531f,     0.8839843f,     0.89101565f,
    0.89804685f,    0.9050782f,     0.9121094f,     0.9191406f,     0.9261719f,     0.9332031f,
    0.9402344f,     0.9472656f,     0.9542968f,     0.96132815f,    0.96835935f,    0.9753907f,
    0.9824219f,     0.9894531f,     0.9964844f,     1.0f,
};

// Midpoints of the unsigned map.
PK_TABLE float kUnsignedThresholds[255] = {
    1.6250002e-07f, 5.5e-07f,       1.4499999e-06f, 3.2499997e-06f, 5.5e-06f,       7.75e-06f,
    1.2249999e-05f, 2.125e-05f,     3.25e-05f,      4.375e-05f,     5.5e-05f,       6.625e-05f,
    7.749999e-05f,  8.874999e-05f,  0.00011125f,    0.00015625f,    0.00021250002f, 0.00026875f,
    0.000325f,      0.00038125f,    0.0004375f,     0.00049375003f, 0.00055f,       0.00060625f,
    0.00066250004f, 0.00071875006f, 0.0007750001f,  0.0008312501f,  0.0008875f,     0.00094375f,
    0.00105625f,    0.00128125f,    0.0015624999f,  0.00184375f,    0.002125f,      0.0024062498f,
    0.0026874999f,  0.00296875f,    0.00325f,       0.0035312502f,  0.0038124998f,  0.0040937494f,
    0.0043749996f,  0.0046562497f,  0.0049374998f,  0.00521875f,    0.0055f,        0.00578125f,
    0.0060625f,     0.00634375f,    0.0066250004f,  0.00690625f,    0.0071874997f,  0.00746875f,
    0.00775f,       0.00803125f,    0.008312499f,   0.008593749f,   0.008874999f,   0.009156249f,
    0.0094375f,     0.00971875f,    0.01028125f,    0.01140625f,    0.0128125f,     0.0142187495f,
    0.015625f,      0.01703125f,    0.018437501f,   0.01984375f,    0.02125f,       0.02265625f,
    0.0240625f,     0.02546875f,    0.026875002f,   0.028281251f,   0.0296875f,     0.03109375f,
    0.0325f,        0.03390625f,    0.0353125f,     0.036718752f,   0.038125f,      0.03953125f,
    0.0409375f,     0.04234375f,    0.04375f,       0.045156248f,   0.0465625f,     0.04796875f,
    0.049374998f,   0.05078125f,    0.0521875f,     0.05359375f,    0.055000003f,   0.056406256f,
    0.057812504f,   0.05921875f,    0.060624998f,   0.062031254f,   0.06343751f,    0.06484376f,
    0.06625f,       0.06765625f,    0.0690625f,     0.07046875f,    0.071875006f,   0.07328125f,
    0.0746875f,     0.076093756f,   0.0775f,        0.07890625f,    0.080312505f,   0.08171875f,
    0.083125f,      0.08453125f,    0.0859375f,     0.08734375f,    0.08875f,       0.09015625f,
    0.0915625f,     0.092968754f,   0.094375f,      0.09578125f,    0.097187504f,   0.09859376f,
    0.10140625f,    0.10703125f,    0.1140625f,     0.12109375f,    0.128125f,      0.13515624f,
    0.1421875f,     0.14921875f,    0.15625f,       0.16328125f,    0.1703125f,     0.17734376f,
    0.184375f,      0.19140625f,    0.1984375f,     0.20546874f,    0.2125f,        0.21953125f,
    0.2265625f,     0.23359375f,    0.240625f,      0.24765624f,    0.2546875f,     0.26171875f,
    0.26875f,       0.27578124f,    0.2828125f,     0.28984374f,    0.296875f,      0.30390623f,
    0.3109375f,     0.31796876f,    0.325f,         0.33203125f,    0.33906248f,    0.34609374f,
    0.353125f,      0.36015624f,    0.3671875f,     0.37421873f,    0.38125f,       0.38828126f,
    0.3953125f,     0.40234375f,    0.40937498f,    0.41640624f,    0.4234375f,     0.43046874f,
    0.4375f,        0.44453123f,    0.4515625f,     0.45859376f,    0.465625f,      0.47265625f,
    0.47968748f,    0.48671874f,    0.49374998f,    0.50078124f,    0.5078125f,     0.5148437f,
    0.521875f,      0.5289062f,     0.5359375f,     0.54296875f,    0.55f,          0.5570313f,
    0.5640625f,     0.5710938f,     0.578125f,      0.58515626f,    0.5921875f,     0.5992187f,
    0.60625005f,    0.61328125f,    0.6203125f,     0.6273438f,     0.634375f,      0.6414063f,
    0.6484375f,     0.65546876f,    0.6625f,        0.6695312f,     0.67656255f,    0.68359375f,
    0.690625f,      0.6976563f,     0.7046875f,     0.7117188f,     0.71875f,       0.72578126f,
    0.7328125f,     0.7398437f,     0.74687505f,    0.75390625f,    0.7609375f,     0.7679688f,
    0.775f,         0.78203124f,    0.7890625f,     0.79609376f,    0.803125f,      0.8101562f,
    0.8171875f,     0.82421875f,    0.83125f,       0.8382813f,     0.8453125f,     0.85234374f,
    0.859375f,      0.86640626f,    0.8734375f,     0.8804687f,     0.8875f,        0.89453125f,
    0.9015625f,     0.9085938f,     0.915625f,      0.92265624f,    0.9296875f,     0.93671876f,
    0.94375f,       0.9507812f,     0.9578125f,     0.96484375f,    0.971875f,      0.9789063f,
    0.9859375f,     0.99296874f,    0.9982422f,
};

// Codes by the upper 16 bits of a float: sign, exponent and 7 bits of mantissa pick a bin that at
// most one threshold cuts. An entry holds, above bit 16, the code at the lower end of the bin, and
// below it 0xffff minus the place of the threshold in the bin (0 for none): adding the lower 16
// bits of the float carries into the code exactly where the float is above the threshold. Bin 0 is
// everything below 2^-23, the last one everything from 1 on.
constexpr int kBinBase = (127 - 23) << 7;
constexpr int kBins = (23 << 7) + 2;

struct CodeBins {
    uint32_t entry[2 * kBins]; // t >= 0 first, then t < 0
};

constexpr CodeBins make_code_bins(const float* thresholds) {
    CodeBins bins = {};
    int code = 0;
    for (int b = kBins - 1; b >= 0; --b) { // from the most negative; lower ends have full mantissas
        uint32_t low = 0x80000000u | (((uint32_t)(kBinBase + b) << 16) - 1u);
        float t = __builtin_bit_cast(float, low);
        while (b < kBins - 1 && code < 255 && t > thresholds[code])
            ++code;
        uint32_t next = code < 255 ? __builtin_bit_cast(uint32_t, thresholds[code]) : 0u;
        bool cut = b > 0 && next >> 16 == low >> 16;
        bins.entry[kBins + b] = (uint32_t)code << 16 | (cut ? next & 0xffffu : 0u);
    }
    for (int b = 0; b < kBins; ++b) {
        uint32_t low = b == 0 ? 0u : (uint32_t)(kBinBase + b - 1) << 16;
        float t = __builtin_bit_cast(float, low);
        while (code < 255 && t > thresholds[code])
            ++code;
        uint32_t next = code < 255 ? __builtin_bit_cast(uint32_t, thresholds[code]) : 0u;
        bool cut = b > 0 && next >> 16 == low >> 16;
        bins.entry[b] = (uint32_t)code << 16 | (cut ? 0xffffu - (next & 0xffffu) : 0u);
    }
    return bins;
}

PK_TABLE CodeBins kSignedBins = make_code_bins(kDynamicThresholds);
PK_TABLE CodeBins kUnsignedBins = make_code_bins(kUnsignedThresholds);

// Where in CodeBins::entry to look for t. Arithmetic only, so that compilers make vectors of it.
PK_HD int32_t code_bin(float t) {
    uint32_t bits = float_bits(t);
    int32_t b = (int32_t)((bits & 0x7fffffffu) >> 16) - (kBinBase - 1);
    b = b < 0 ? 0 : b;
    b = b < kBins ? b : kBins - 1;
    return b + (int32_t)(bits >> 31) * kBins;
}

// Number of thresholds strictly below t, from the entry of its bin.
PK_HD uint8_t entry_code(uint32_t entry, float t) {
    uint32_t bits = float_bits(t);
    uint32_t flip = 0u - (bits >> 31); // negative floats grow downwards
    return (uint8_t)((entry + ((bits ^ flip) & 0xffffu)) >> 16);
}

// Both maps and all bins in one table of words, for machines that look up faster than they
// calculate: a code is then two bit operations, one look-up and one addition (lookup_code). The
// place of a bin follows from bits 16 and up of the float; entries have those bits subtracted, so
// that the whole float can be added. Bins of the unsigned map fill only the upper part of theirs;
// the values of both maps lie below.
constexpr int kLookupUnsigned = 8192; // first word of the unsigned bins; before them the signed
constexpr int kLookupValues1 = kLookupUnsigned;
constexpr int kLookupValues2 = kLookupUnsigned + 256;
constexpr int kLookupWords = kLookupUnsigned + 4096;
constexpr int kLookupFree = 3584; // words that hold nothing, between negative and positive bins
constexpr int kLookupFreeWords = 1024;
constexpr uint32_t kLookupSmallest = (uint32_t)(kBinBase - 1) << 16; // of bin 0
static_assert(((kBinBase - 1) & 4095) >= 512, "room for the values");
static_assert((~(kBinBase - 1) & 8191) < kLookupFree, "negative bins end before");
static_assert(((kBinBase - 1) & 8191) >= kLookupFree + kLookupFreeWords,
              "positive ones begin behind");

struct CodeLookup {
    alignas(16) uint32_t word[kLookupWords];
};

constexpr CodeLookup make_code_lookup() {
    CodeLookup lookup = {};
    constexpr CodeBins first = make_code_bins(kDynamicThresholds);
    constexpr CodeBins second = make_code_bins(kUnsignedThresholds);
    for (int b = 0; b < kBins; ++b) {
        uint32_t upper = (uint32_t)(kBinBase - 1 + b);
        lookup.word[upper & 8191] = first.entry[b] - (upper << 16);
        lookup.word[~upper & 8191] = first.entry[kBins + b] - (~upper << 16);
        lookup.word[kLookupUnsigned + (upper & 4095)] = second.entry[b] - (upper << 16);
    }
    for (int i = 0; i < 256; ++i) {
        lookup.word[kLookupValues1 + i] = __builtin_bit_cast(uint32_t, kDynamicValues[i]);
        lookup.word[kLookupValues2 + i] = __builtin_bit_cast(uint32_t, kUnsignedValues[i]);
    }
    return lookup;
}

// What the word of CodeLookup at lookup_place is added to: bits 16 to 23 of the sum are the code.
template <bool kSigned>
PK_HD uint32_t lookup_key(float t) {
    float magnitude = kSigned ? bits_float(float_bits(t) & 0x7fffffffu) : t;
    float smallest = bits_float(kLookupSmallest);
    uint32_t bits = float_bits(__builtin_fmaxf(magnitude, smallest)); // NaN: the smallest
    return kSigned ? bits ^ (uint32_t)((int32_t)float_bits(t) >> 31) : bits;
}

// Inside the table for any key.
template <bool kSigned>
PK_HD uint32_t lookup_place(uint32_t key) {
    return kSigned ? key >> 16 & 8191u : kLookupUnsigned + (key >> 16 & 4095u);
}

// The maps once more, as planes of bytes of their floats, for instructions that look up bytes: the
// magnitudes of codes 127 .. 254 of the signed map (those below 127 are their negatives, 255 is 1),
// and the whole unsigned map.
struct BytePlanes {
    alignas(64) uint8_t magnitude[4][128];
    alignas(64) uint8_t unsigned_value[4][256];
};

constexpr BytePlanes make_byte_planes() {
    BytePlanes planes = {};
    for (int i = 0; i < 256; ++i)
        for (int b = 0; b < 4; ++b) {
            uint32_t second = __builtin_bit_cast(uint32_t, kUnsignedValues[i]);
            planes.unsigned_value[b][i] = (uint8_t)(second >> 8 * b);
            if (i < 128) {
                uint32_t first = __builtin_bit_cast(uint32_t, kDynamicValues[127 + i]);
                planes.magnitude[b][i] = (uint8_t)(first >> 8 * b);
            }
        }
    return planes;
}

// The codes again, without look-ups in memory: within a decade of the map thresholds are evenly
// spaced, so a code is slope * |t| + offset, rounded, up to the decade's last code. Which decade
// follows from the upper bits of the float, as if they were its logarithm, and one comparison with
// the threshold that begins the next one. Sums are fixed-point numbers with 15 bits behind the
// point: 256 is added. Roundings of fp32 move thresholds by less than kSegmentBias of the last of
// these bits: where a sum is that near to a half, the bins above decide.
constexpr int kSegmentShift = 15;
constexpr int kSegmentBias = 2;
constexpr int kSegmentDoubt = (1 << kSegmentShift) - 2 * kSegmentBias; // all zero: near a half
constexpr int kSegmentZero = 0x43800000 >> kSegmentShift; // what stands before the point for code 0
constexpr int kSegmentLogStart = 0x3480;                  // upper 16 bits of 2^-22
constexpr int kSegmentLogScale = 140; // of 2^-16; finds the decade or the one before it

struct CodeSegments {
    alignas(32) float next[8]; // the segment holds |t| up to this
    alignas(32) float slope[8];
    alignas(32) float offset[8];
    alignas(32) int32_t last[8]; // code + kSegmentZero
};

constexpr bool finds_segments(const float* next) {
    for (int upper = 0; upper <= 0x3f80; ++upper) {
        int over = upper > kSegmentLogStart ? upper - kSegmentLogStart : 0;
        int d = over * kSegmentLogScale >> 16;
        float low = __builtin_bit_cast(float, (uint32_t)upper << 16);
        float high = __builtin_bit_cast(float, (uint32_t)upper << 16 | 0xffffu);
        if (d > 7 || (d > 0 && !(low > next[d - 1])))
            return false; // a decade too far
        if (d < 6 && high > next[d + 1])
            return false; // more than one too few
    }
    return true;
}

// `thresholds[k]` lies between codes k and k + 1, counted from zero; segment d > 0 begins with
// code first << d, less `less`.
constexpr CodeSegments make_code_segments(const float* thresholds, int first, int less) {
    CodeSegments s = {};
    constexpr double kBias = (double)kSegmentBias / (1 << kSegmentShift);
    double decade = 0.9e-6;
    for (int d = 0; d < 7; ++d, decade *= 10.0) {
        int begin = (first << d) - less, end = (first << (d + 1)) - less;
        s.next[d] = thresholds[end - 1];
        s.last[d] = end - 1 + kSegmentZero;
        double slope = (double)(first << d) / decade;
        // Zero and the first decade share a segment. Where the other segments end, their sums are
        // at a half by themselves, which leaves ties to the bins; the first one's is made so.
        if (d == 0)
            slope = (first > 1 ? 1.0 : 2.0) / ((double)thresholds[1] - (double)thresholds[0]);
        double low = (double)thresholds[d == 0 ? 0 : begin], high = (double)thresholds[end - 2];
        double center = (d == 0 ? 0.5 : (double)begin + 0.5) + (double)(end - 2) + 0.5;
        s.slope[d] = (float)slope;
        s.offset[d] = (float)(256.5 + kBias + 0.5 * (center - slope * (low + high)));
    }
    int top = (first << 7) - less;
    s.next[7] = 3.0e38f;
    s.offset[7] = (float)(256.5 + (double)top);
    s.last[7] = top + kSegmentZero;
    return s;
}

PK_TABLE BytePlanes kBytePlanes = make_byte_planes();
PK_TABLE CodeSegments kSignedSegments = make_code_segments(kDynamicThresholds + 127, 1, 0);
PK_TABLE CodeSegments kUnsignedSegments = make_code_segments(kUnsignedThresholds, 2, 1);
#if !defined(__CUDACC__)
static_assert(finds_segments(kSignedSegments.next) && finds_segments(kUnsignedSegments.next),
              "the logarithm is near enough");
#endif

} // namespace pk
