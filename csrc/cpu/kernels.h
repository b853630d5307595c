// What a kernel is given: plain structs of pointers and sizes, and the table of entry points that
// every instruction set fills once.
#pragma once

#include "../common/base.h"
#include "../common/optimizer.h"

namespace pk {

// A dropout mask by Philox over the flattened index of a row-major matrix. `cols` is its width.
struct Dropout {
    bool on = false;
    uint64_t seed = 0;
    uint32_t threshold = 0; // floor(p * 2^32); an element is kept iff its word reaches it
    float scale = 1.0f;     // 1 / (1 - p)
    int64_t cols = 0;
    int64_t first = 0; // index of the matrix's first element
};

// The streamed operand of a matrix product: element (i, k) at p[i * row_stride + k * col_stride],
// multiplied by `scale` in fp32 after the dropout (which rounds to the operand's dtype).
struct Operand {
    const void* p = nullptr;
    int dtype = kF32;
    int64_t row_stride = 0;
    int64_t col_stride = 1;
    float scale = 1.0f;
    Dropout dropout;
    bool rest = false;                  // x - dropout(x) instead of dropout(x)
    const float* depth_scale = nullptr; // one factor per k, in fp32
};

// Values that are added to single entries of a stored matrix: ascending flat positions, and where
// those of each stored row begin (rows + 1 numbers).
struct Entries {
    const int64_t* index = nullptr; // null: there are none
    const int64_t* start = nullptr;
    const void* value = nullptr;
    int dtype = kF32; // of the values
};

enum WeightKind : int { kDense = 0, kInt8 = 1, k4Bit = 2 };

// The stationary operand, as stored: `rows` rows of `cols` elements.
struct Weight {
    int kind = kDense;
    const void* p = nullptr;
    int dtype = kF32; // of the stored elements (dense), or what decoded values are rounded to
    int64_t rows = 0;
    int64_t cols = 0;
    int64_t stride = 0; // elements between rows; dense only, the others are contiguous
    // quantized kinds
    const float* absmax = nullptr;        // one per block (4-bit) or row (int8)
    const uint8_t* nested = nullptr;      // instead of absmax: codes of the dynamic map
    const float* nested_absmax = nullptr; // one per 256 codes
    float nested_offset = 0.0f;
    int quant_type = 0;
    int block_shift = 0; // log2 of the block size
    Dropout dropout;     // dense only
    Entries entries;     // added to the decoded values in fp32
};

// One term of a sum of products: out[i, j] += sum over k < depth of x(i, k) * w(j, k), where
// w(j, k) is storage element (j, k), or (k, j) when `along_columns`.
struct Segment {
    Operand x;
    Weight w;
    int64_t depth = 0;
    bool along_columns = false;
    Dropout mask;      // multiplies the segment's sum, by (i, j)
    bool join = false; // the mask comes after the next segment and covers both
    // Output rows [row_begin, row_end) only: counted before Product::rows renames them.
    int64_t row_begin = 0;
    int64_t row_end = INT64_MAX;
    // Position k of the depth is position depth_rows[k] of x and storage row depth_rows[k] of w;
    // for transposed operands and weights along columns.
    const int64_t* depth_rows = nullptr;
};

PK_HD Segment make_segment(const Operand& x, const Weight& w, int64_t depth, bool along_columns) {
    Segment segment;
    segment.x = x;
    segment.w = w;
    segment.depth = depth;
    segment.along_columns = along_columns;
    return segment;
}

// out[i, j] = round(scale[j] * (segment 0 + segment 1 + ... + add[i, j]) + bias[j]), in fp32.
struct Product {
    int64_t m = 0;
    int64_t n = 0;
    int segments = 0;
    Segment segment[3];
    const Segment* list = nullptr; // instead of `segment`, where there are more of them
    const int64_t* rows = nullptr; // row i is row rows[i] of operands, masks, add and out
    int64_t range = 0;             // row count by which the kernel is chosen; 0: m
    const float* scale = nullptr;
    int scaled = INT32_MAX;    // so many segments are scaled; what follows is added as it is
    void* unscaled = nullptr;  // also out: the sums before scale and bias, like `out`
    const void* add = nullptr; // strides as `out`
    int add_dtype = kF32;
    const void* bias = nullptr;
    int bias_dtype = kF32;
    void* out = nullptr;
    int out_dtype = kF32;
    int64_t out_row_stride = 0;
    int64_t out_col_stride = 1;
    int threads = 1;
};

PK_HD const Segment& segment_of(const Product& p, int n) {
    return p.list != nullptr ? p.list[n] : p.segment[n];
}

PK_HD int64_t row_of(const Product& p, int64_t i) { return p.rows != nullptr ? p.rows[i] : i; }

struct Quantize4 {
    const void* x;
    int dtype;
    int64_t numel;
    int quant_type;
    int block_shift;
    uint8_t* packed;
    float* absmax;
    int threads;
    int64_t first_bad; // out: first block with NaN or Inf, -1 if none
};

struct Dequantize {
    Weight w; // w.dtype is the dtype of `out`
    void* out;
    int threads;
};

struct QuantizeAbsmax {
    const float* x; // offset already subtracted
    int64_t numel;
    uint8_t* codes;
    float* nested_absmax;
    int threads;
};

struct Quantize8 {
    const void* x;
    int dtype;
    int64_t rows;
    int64_t cols;
    int8_t* codes;
    float* scb;
    int threads;
    int64_t first_bad; // out: first row with NaN or Inf, -1 if none
};

// out = x rounded row by row to 8 bits, times the weight, and columns of x with a magnitude of at
// least `threshold` as they are; 0: none.
constexpr int64_t kIntAlign = 64; // bytes to which rows of codes of x are filled up

struct Int8Product {
    const void* x; // [m, k]
    int dtype;     // of x and out
    int64_t m, k, n;
    const int8_t* codes; // [n, k]
    const float* scb;    // [n]
    const void* bias;    // [n], or null
    int bias_dtype;
    float threshold;
    void* out; // [m, n]
    // scratch
    int8_t* codes_of_x; // [m, k to whole kIntAlign]
    float* row_absmax;  // [m]
    int32_t* row_sum;   // [m]
    uint8_t* outlier;   // [k]
    int32_t* columns;   // [k]
    float* outlier_x;   // [m * k], of which [m, outliers] is touched; null for threshold 0
    int threads;
    int64_t outliers; // out: how many columns
};

struct ApplyDropout {
    const void* x;
    int dtype;
    int64_t numel;
    Dropout dropout;
    void* out;
    int threads;
};

enum Activation : int {
    kIdentity = 0,
    kRelu = 1,
    kGelu = 2,
    kGeluTanh = 3,
    kSilu = 4,
    kTanh = 5,
    kSigmoid = 6,
    kLeakyRelu = 7,
};

// y [m, n] = mask(scale * (act(x D^T + down_b) U^T + up_b)) + residual; null pointers are absent.
struct Bottleneck {
    const void* x; // [m, k]
    int dtype;     // of x, y, the residual and their gradients
    int64_t m, k, n, rank;
    const void *down_w, *down_b, *up_w, *up_b, *scale;
    int adapter_dtype; // of the five above and of their gradients
    int64_t scales;    // entries of scale: 1 or n
    const void* residual;
    int activation;
    Dropout dropout;
    void* y;
    float* work; // forward: m * (rank + n) floats for m <= 8; backward: block_rows * 4 rank
    int threads;
};

struct BottleneckGradients {
    const void* dy;
    bool add_dy; // dx takes dy as well
    void* dx;    // null: not wanted
    // null down_sum: no gradients of weights; else fp32 sums over the rows
    float* down_sum;   // [rank, k]
    float* down_b_sum; // [rank], zero to begin with
    float* up_sum;     // [rank, n]
    float* up_b_sum;   // [n], zero to begin with
    float* scaled_up;  // [n, rank] of scratch, where there is a scale
    void *up_w, *up_b, *scale;
    int64_t block_rows;
};

// A parameter, or a piece of one that starts at a multiple of 256 elements.
constexpr int64_t kOptimizerChunk = 64; // blocks of 256 elements that a thread takes at a time

struct OptimizerTensor {
    void* param;
    const void* grad;
    void* state1; // fp32, or codes where absmax1 is given
    void* state2; // AdamW only
    float* absmax1;
    float* absmax2;
    int64_t numel;
    int64_t param_dtype;
    int64_t grad_dtype;
    int64_t chunk_end; // filled in by the kernel
};

struct OptimizerStep {
    OptimizerTensor* tensors;
    int64_t count;
    int rule;
    const Update* hyper;     // one per tensor
    const int64_t* rounding; // seed, step, tensor id, first element per tensor; null: nearest even
    int64_t* skipped;        // out: blocks per tensor whose gradient is not finite
    double* sums;            // square_sums: one per chunk, out
    int threads;
};

// Products along the entries of a sparse matrix [rows, cols]. The activations are copied into tiles
// first, `x_tiles` for cols * m and `dy_tiles` for rows * m elements with m rounded up to a
// multiple of 64; what a product does not read may be null.
struct SparseProduct {
    const void* x;  // [m, cols]
    const void* dy; // [m, rows]
    int dtype;      // of x, dy, their tiles, y and dx
    int64_t m, rows, cols;
    Entries entries;
    void* x_tiles;
    void* dy_tiles;
    float* gradient; // out: one per entry, sum over m of dy[m, row] * x[m, col]
    void* y;         // [m, rows] += sum over a row's entries of value * x[m, col]
    void* dx;        // [m, cols] += sum over a column's entries of value * dy[m, row]
    int threads;
};

// A tensor [B, H, L, D] without gaps in its last dimension; strides in elements.
struct AttentionView {
    const void* p = nullptr;
    int64_t batch = 0;
    int64_t head = 0;
    int64_t row = 0;
};

enum AttentionMaskKind : int { kNoMask = 0, kBoolMask = 1, kFloatMask = 2 };

// Over the sequence's keys; a dimension of size 1 has stride 0.
struct AttentionMask {
    int kind = kNoMask;
    int dtype = kF32;
    const void* p = nullptr;
    int64_t batch = 0;
    int64_t head = 0;
    int64_t row = 0;
    int64_t col = 0;
};

// softmax(scale q [prefix_k; k]^T + mask) [prefix_v; v], and its gradients.
struct PrefixAttention {
    AttentionView q, k, v, prefix_k, prefix_v;
    int dtype = kF32;
    int prefix_dtype = kF32;
    AttentionMask mask;
    int64_t batch = 0;
    int64_t heads = 0;
    int64_t kv_heads = 0;
    int64_t group = 0; // heads / kv_heads
    int64_t queries = 0;
    int64_t keys = 0;
    int64_t prefix = 0;
    int64_t depth = 0;
    int64_t padded = 0; // depth, rounded up to whole register tiles; filled in by the kernel
    bool causal = false;
    float scale = 1.0f;
    Dropout dropout;     // over [B, H, Lq, P + Lk]
    void* out = nullptr; // [B, Lq, H, D]
    float* lse = nullptr;
    // backward only
    AttentionView dout, saved; // saved: the forward pass's out
    bool need_own = false;     // dq, dk and dv
    bool need_prefix = false;
    void* dq = nullptr; // [B, Lq, H, D], with dk and dv [B, Lk, Hkv, D]
    void* dk = nullptr;
    void* dv = nullptr;
    float* partial_k = nullptr; // [B, Hkv, P, D], one for each row of the batch
    float* partial_v = nullptr;
    int threads = 1;
};

// Sums of squares of the rows of a weight, in fp64; of its storage columns if `swapped`.
struct RowSquares {
    Weight w;
    bool swapped;
    double* out;
    int threads;
};

// norm[j] = sqrt(max(0, norm_sq[j] + 2 s cross[., j] . b[j] + s^2 (b[j] a a^T) . b[j])), in fp64.
struct DoraNorm {
    int64_t n, k, rank;
    const float* a;     // [rank, k]
    const float* b;     // [n, rank]
    const float* cross; // [rank, n], a times the transposed base
    const double* norm_sq;
    double scaling;
    double* gram; // scratch, [rank, rank]
    float* norm;
    int threads;
};

// out[j] = sum over rows of x[i, j] * y[i, j].
struct ColumnDots {
    const void* x;
    const void* y;
    int dtype;
    int64_t rows, cols;
    float* out;
    int threads;
};

// h = act(gate) up; where dh is given, also dgate = dh up act'(gate) and dup = dh act(gate).
struct Gated {
    const void* dh;
    const void* gate;
    const void* up;
    int dtype; // of all
    int64_t numel;
    int activation;
    void* h;
    void* dgate;
    void* dup;
    int threads;
};

struct Kernels {
    const char* name;
    int (*product)(const Product&);
    int (*quantize_4bit)(Quantize4&);
    int (*dequantize)(const Dequantize&);
    int (*quantize_absmax)(const QuantizeAbsmax&);
    int (*quantize_8bit)(Quantize8&);
    int (*dropout)(const ApplyDropout&);
    int (*bottleneck_forward)(const Bottleneck&);
    int (*bottleneck_backward)(const Bottleneck&, const BottleneckGradients&);
    int (*optimizer_step)(OptimizerStep&);
    int (*square_sums)(OptimizerStep&);
    int (*sparse_product)(const SparseProduct&);
    int (*prefix_forward)(PrefixAttention&);
    int (*prefix_backward)(PrefixAttention&);
    int (*row_squares)(const RowSquares&);
    int (*dora_norm)(const DoraNorm&);
    int (*column_dots)(const ColumnDots&);
    int (*gated)(const Gated&);
    int (*int8_product)(Int8Product&);
};

// For processors that have VNNI beside plain AVX-512: csrc/cpu/int8_vnni.cpp.
int int8_product_vnni(Int8Product& p);

} // namespace pk
