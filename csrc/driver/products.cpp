// Products of matrices, in every format of the weight, and the formats themselves.
#include "../common/codebooks.h"
#include "cases.h"

namespace driver {

namespace {

constexpr int kBlockShifts[] = {5, 6, 6, 7, 8, 12};

std::string sizes(const char* name, int64_t m, int64_t n, int64_t k, int dtype) {
    return std::string(name) + " m=" + std::to_string(m) + " n=" + std::to_string(n) +
           " k=" + std::to_string(k) + " dtype=" + std::to_string(dtype);
}

pk::Operand operand(const Memory& x, int dtype, int64_t row_stride, int64_t col_stride = 1) {
    pk::Operand o;
    o.p = x->p();
    o.dtype = dtype;
    o.row_stride = row_stride;
    o.col_stride = col_stride;
    return o;
}

pk::Weight dense(const Memory& w, int dtype, int64_t rows, int64_t cols) {
    pk::Weight weight;
    weight.p = w->p();
    weight.dtype = dtype;
    weight.rows = rows;
    weight.cols = cols;
    weight.stride = cols;
    return weight;
}

} // namespace

pk::Dropout draw_mask(Dice& d, int64_t cols) {
    pk::Dropout mask;
    mask.on = d.below(3) == 0;
    mask.seed = d.next();
    mask.threshold = 1u << 30;
    mask.scale = 1.0f / 0.75f;
    mask.cols = cols;
    return mask;
}

pk::Weight draw_weight(Dice& d, int64_t rows, int64_t cols, int dtype, std::vector<Memory>& keep) {
    int64_t numel = rows * cols;
    pk::Weight w;
    w.kind = (int)d.below(3);
    w.dtype = dtype;
    w.rows = rows;
    w.cols = cols;
    if (w.kind == pk::kDense) {
        w.stride = cols + (d.coin() ? 0 : 3);
        keep.push_back(values(d, (rows - 1) * w.stride + cols, dtype));
        w.p = keep.back()->p();
        return w;
    }
    int64_t blocks = rows;
    if (w.kind == pk::kInt8) {
        keep.push_back(random_bytes(d, numel));
    } else {
        w.quant_type = (int)d.below(2);
        w.block_shift = kBlockShifts[d.below(6)];
        blocks = pk::ceil_div(numel, int64_t(1) << w.block_shift);
        keep.push_back(random_bytes(d, pk::ceil_div(numel, 2)));
    }
    w.p = keep.back()->p();
    if (w.kind == pk::k4Bit && d.coin()) {
        keep.push_back(random_bytes(d, blocks));
        w.nested = keep.back()->as<uint8_t>();
        keep.push_back(values(d, pk::ceil_div(blocks, pk::kNestedBlock), pk::kF32));
        w.nested_absmax = keep.back()->as<float>();
        w.nested_offset = 0.1f;
    } else {
        keep.push_back(values(d, blocks, pk::kF32));
        w.absmax = keep.back()->as<float>();
    }
    return w;
}

// A dimension of a weight: any, or whole vectors, for which kernels have ways of their own.
int64_t draw_side(Dice& d, int64_t most) { return d.coin() ? d.size(most) : 64 * (1 + d.below(5)); }

// Values that are added to some entries of a weight.
void draw_entries(Dice& d, pk::Weight& w, std::vector<Memory>& keep) {
    std::vector<int64_t> at, start;
    for (int64_t r = 0; r < w.rows; ++r) {
        start.push_back((int64_t)at.size());
        for (int64_t c = d.below(5); c < w.cols; c += 1 + d.below(40))
            at.push_back(r * w.cols + c);
    }
    start.push_back((int64_t)at.size());
    if (at.empty())
        return;
    for (const std::vector<int64_t>* list : {&at, &start}) {
        keep.push_back(bytes((int64_t)list->size() * 8));
        memcpy(keep.back()->p(), list->data(), keep.back()->bytes());
    }
    w.entries.start = keep.back()->as<int64_t>();
    w.entries.index = keep[keep.size() - 2]->as<int64_t>();
    keep.push_back(values(d, (int64_t)at.size(), pk::kF32));
    w.entries.value = keep.back()->p();
}

// y = scale x W^T + bias in either direction, with renamed rows and added entries at times.
Case draw_linear(Dice& d) {
    int dtype = (int)d.below(3);
    bool transpose = d.coin(), renamed = d.below(4) == 0, biased = d.coin(), scaled = d.coin();
    int64_t m = d.below(3) == 0 ? 1 + d.below(8) : d.size(80);
    int64_t rows = draw_side(d, 300), cols = draw_side(d, 400);
    int64_t depth = transpose ? rows : cols, n = transpose ? cols : rows;
    std::vector<Memory> keep;
    pk::Weight w = draw_weight(d, rows, cols, dtype, keep);
    if (d.below(4) == 0)
        draw_entries(d, w, keep);
    Memory x = values(d, m * depth, dtype), bias = values(d, n, dtype);
    Memory scale = values(d, n, pk::kF32), order = bytes(m * 8);
    for (int64_t i = 0; i < m; ++i)
        order->as<int64_t>()[i] = m - 1 - i;
    pk::Dropout mask = draw_mask(d, depth);
    auto run = [=](const pk::Kernels& k, int threads, Results& out) {
        out = {{bytes(m * n * pk::dtype_size(dtype)), dtype}};
        pk::Product p;
        p.m = m;
        p.n = n;
        p.threads = threads;
        p.segments = 1;
        pk::Operand o = operand(x, dtype, depth);
        o.dropout = mask;
        p.segment[0] = pk::make_segment(o, w, depth, transpose);
        if (renamed)
            p.rows = order->as<int64_t>();
        if (biased)
            p.bias = bias->p();
        p.bias_dtype = dtype;
        if (scaled)
            p.scale = scale->as<float>();
        p.out = out[0].memory->p();
        p.out_dtype = dtype;
        p.out_row_stride = n;
        return (void)keep.size(), k.product(p);
    };
    return {sizes(transpose ? "dx" : "linear", m, n, depth, dtype), false, run};
}

// The four products of LoRA: x A^T, x W^T + s B^T, ds^T dropout(x) and dy^T s.
Case draw_low_rank(Dice& d) {
    int dtype = (int)d.below(3);
    int64_t m = d.size(80), n = draw_side(d, 200), k = draw_side(d, 300), r = d.size(40);
    std::vector<Memory> keep;
    pk::Weight w = draw_weight(d, n, k, dtype, keep);
    Memory x = values(d, m * k, dtype), dy = values(d, m * n, dtype);
    Memory a = values(d, r * k, pk::kF32), b = values(d, n * r, dtype);
    pk::Dropout mask = draw_mask(d, k);
    auto run = [=](const pk::Kernels& kernels, int threads, Results& out) {
        out = {{bytes(m * r * 4), pk::kF32},
               {bytes(m * n * pk::dtype_size(dtype)), dtype},
               {bytes(r * k * 4), pk::kF32},
               {bytes(n * r * pk::dtype_size(dtype)), dtype}};
        pk::Product p;
        p.threads = threads;
        p.m = m;
        p.n = r;
        p.segments = 1;
        pk::Operand dropped = operand(x, dtype, k);
        dropped.dropout = mask;
        p.segment[0] = pk::make_segment(dropped, dense(a, pk::kF32, r, k), k, false);
        p.out = out[0].memory->p();
        p.out_row_stride = r;
        if (int status = kernels.product(p))
            return status;
        p = pk::Product();
        p.threads = threads;
        p.m = m;
        p.n = n;
        p.segments = 2;
        p.segment[0] = pk::make_segment(operand(x, dtype, k), w, k, false);
        pk::Operand low = operand(out[0].memory, pk::kF32, r);
        low.scale = 0.5f;
        p.segment[1] = pk::make_segment(low, dense(b, dtype, n, r), r, false);
        p.out = out[1].memory->p();
        p.out_dtype = dtype;
        p.out_row_stride = n;
        if (int status = kernels.product(p))
            return status;
        p = pk::Product();
        p.threads = threads;
        p.m = r;
        p.n = k;
        p.segments = 1;
        pk::Weight rows = dense(x, dtype, m, k);
        rows.dropout = mask;
        p.segment[0] = pk::make_segment(operand(out[0].memory, pk::kF32, 1, r), rows, m, true);
        p.out = out[2].memory->p();
        p.out_row_stride = k;
        if (int status = kernels.product(p))
            return status;
        p.n = n;
        p.segment[0] = pk::make_segment(operand(out[0].memory, pk::kF32, 1, r),
                                        dense(dy, dtype, m, n), m, true);
        p.out = out[3].memory->p();
        p.out_dtype = dtype;
        p.out_row_stride = 1;
        p.out_col_stride = r;
        return (void)keep.size(), kernels.product(p);
    };
    return {sizes("low rank", m, n, k, dtype) + " r=" + std::to_string(r), false, run};
}

// Quantize, nest the statistics, and decode; an odd number of values, and NaN at times.
Case draw_codes(Dice& d) {
    int dtype = (int)d.below(3), kind = (int)d.below(2), shift = kBlockShifts[d.below(6)];
    int64_t numel = 1 + d.below(d.below(4) == 0 ? 70000 : 3000);
    Memory x = values(d, numel, dtype, d.coin() ? 1.0f : 1e-4f);
    if (d.below(8) == 0)
        pk::store_from_float(x->p(), dtype, d.below(numel), pk::bits_float(0x7fc00000u));
    auto run = [=](const pk::Kernels& k, int threads, Results& out) {
        int64_t blocks = pk::ceil_div(numel, int64_t(1) << shift);
        out = {{zeros(pk::ceil_div(numel, 2)), kExactBytes},
               {zeros(blocks * 4), kExactBytes},
               {zeros(blocks), kExactBytes},
               {zeros(pk::ceil_div(blocks, pk::kNestedBlock) * 4), kExactBytes},
               {zeros(numel * pk::dtype_size(dtype)), kExactBytes}};
        pk::Quantize4 q = {x->p(),
                           dtype,
                           numel,
                           kind,
                           shift,
                           out[0].memory->as<uint8_t>(),
                           out[1].memory->as<float>(),
                           threads,
                           -1};
        int status = k.quantize_4bit(q);
        if (status != pk::kOk || q.first_bad >= 0)
            return status;
        pk::QuantizeAbsmax nest = {out[1].memory->as<float>(), blocks, out[2].memory->as<uint8_t>(),
                                   out[3].memory->as<float>(), threads};
        if ((status = k.quantize_absmax(nest)) != pk::kOk)
            return status;
        pk::Weight w;
        w.kind = pk::k4Bit;
        w.p = out[0].memory->p();
        w.dtype = dtype;
        w.rows = 1;
        w.cols = numel;
        w.nested = out[2].memory->as<uint8_t>();
        w.nested_absmax = out[3].memory->as<float>();
        w.quant_type = kind;
        w.block_shift = shift;
        return k.dequantize({w, out[4].memory->p(), threads});
    };
    return {sizes("4-bit codes", 1, numel, 1 << shift, dtype), true, run};
}

Case draw_int8(Dice& d) {
    int dtype = (int)d.below(3);
    int64_t rows = d.size(90), cols = d.size(500);
    Memory x = values(d, rows * cols, dtype);
    auto run = [=](const pk::Kernels& k, int threads, Results& out) {
        out = {{zeros(rows * cols), kExactBytes},
               {zeros(rows * 4), kExactBytes},
               {zeros(rows * cols * pk::dtype_size(dtype)), kExactBytes}};
        pk::Quantize8 q = {
            x->p(),  dtype, rows, cols, out[0].memory->as<int8_t>(), out[1].memory->as<float>(),
            threads, -1};
        int status = k.quantize_8bit(q);
        if (status != pk::kOk)
            return status;
        pk::Weight w;
        w.kind = pk::kInt8;
        w.p = out[0].memory->p();
        w.dtype = dtype;
        w.rows = rows;
        w.cols = cols;
        w.absmax = out[1].memory->as<float>();
        return k.dequantize({w, out[2].memory->p(), threads});
    };
    return {sizes("8-bit codes", rows, cols, 1, dtype), true, run};
}

} // namespace driver
