// DoRA: the linear, its gradients, and the norms of the adapted rows.

#include "bind.h"

using namespace pk_bind;

namespace {

const float* floats(Address p) { return reinterpret_cast<const float*>(p); }

// s [m, r] = dropout(x) A^T (fp32); u = dropout(x) W^T + scaling s B^T; y = scale u + bias, plus
// (x - dropout(x)) W^T under dropout. A null u is not kept. Without a weight (None) u starts from
// `add`, and dropout plays no part beyond s.
void dora_forward(Address x, int dtype, int64_t m, int64_t in, int64_t out_features,
                  const py::object& weight, Address add, Address bias, Address a, Address b,
                  int adapter_dtype, int64_t rank, Address scale, float scaling,
                  const py::object& dropout, Address s, Address u, Address y, int threads) {
    pk::Product shrink;
    shrink.m = m;
    shrink.n = rank;
    shrink.threads = threads;
    pk::Operand dropped = matrix(x, dtype, in);
    dropped.dropout = make_dropout(dropout);
    add_segment(shrink, dropped, dense(a, adapter_dtype, rank, in), in, false);
    set_out(shrink, s, pk::kF32, rank);

    pk::Product p;
    p.m = m;
    p.n = out_features;
    p.threads = threads;
    bool has_weight = !weight.is_none();
    Base base;
    if (has_weight) {
        base = make_base(weight.cast<py::tuple>());
        add_segment(p, dropped, base.w, in, base.swapped);
    } else {
        add_to_out(p, add, dtype);
    }
    pk::Operand low = matrix(s, pk::kF32, rank);
    low.scale = scaling;
    add_segment(p, low, dense(b, adapter_dtype, out_features, rank), rank, false);
    if (has_weight && dropped.dropout.on) {
        p.scaled = p.segments;
        pk::Operand rest = dropped;
        rest.rest = true;
        add_segment(p, rest, base.w, in, base.swapped);
    }
    p.scale = floats(scale);
    p.unscaled = reinterpret_cast<void*>(u);
    p.bias = reinterpret_cast<const void*>(bias);
    p.bias_dtype = dtype;
    set_out(p, y, dtype, out_features);
    py::gil_scoped_release release;
    check(kernels().product(shrink), "dora_linear");
    check(kernels().product(p), "dora_linear");
}

// ds [m, r] = scaling (scale dy) B (fp32, caller's scratch); dA = ds^T dropout(x),
// dB = scaling scale dy^T s; dx = (scale dy) W + ds A, or under dropout
// dy W + mask(((scale - 1) dy) W + ds A), with `less` = scale - 1. A null address leaves a result
// out. Without a weight (None) dx = add + ds A, unmasked.
void dora_backward(Address dy, Address x, Address s, int dtype, int64_t m, int64_t in,
                   int64_t out_features, const py::object& weight, Address add, Address a,
                   Address b, int adapter_dtype, int64_t rank, Address scale, Address less,
                   float scaling, const py::object& dropout, Address ds, Address dx, Address da,
                   Address db, int threads) {
    pk::Dropout drop = make_dropout(dropout);
    bool has_weight = !weight.is_none();
    Base base;
    if (has_weight)
        base = make_base(weight.cast<py::tuple>());
    py::gil_scoped_release release;
    const pk::Kernels& k = kernels();

    pk::Product p;
    p.m = m;
    p.n = rank;
    p.threads = threads;
    pk::Operand scaled = matrix(dy, dtype, out_features);
    scaled.depth_scale = floats(scale);
    pk::Operand first = scaled;
    first.scale = scaling;
    add_segment(p, first, dense(b, adapter_dtype, out_features, rank), out_features, true);
    set_out(p, ds, pk::kF32, rank);
    check(k.product(p), "dora_linear_backward");

    if (dx != 0) {
        p = pk::Product();
        p.m = m;
        p.n = in;
        p.threads = threads;
        add_segment(p, matrix(ds, pk::kF32, rank), dense(a, adapter_dtype, rank, in), rank, true);
        if (!has_weight) {
            add_to_out(p, add, dtype);
        } else if (!drop.on) {
            add_segment(p, scaled, base.w, out_features, !base.swapped);
        } else {
            p.segment[0].join = true;
            pk::Operand part = scaled;
            part.depth_scale = floats(less);
            add_segment(p, part, base.w, out_features, !base.swapped);
            p.segment[1].mask = drop;
            add_segment(p, matrix(dy, dtype, out_features), base.w, out_features, !base.swapped);
        }
        set_out(p, dx, dtype, in);
        check(k.product(p), "dora_linear_backward");
    }
    if (da != 0) {
        p = pk::Product();
        p.m = rank;
        p.n = in;
        p.threads = threads;
        pk::Weight rows = dense(x, dtype, m, in);
        rows.dropout = drop;
        add_segment(p, transposed(ds, pk::kF32, rank), rows, m, true);
        set_out(p, da, adapter_dtype, in);
        check(k.product(p), "dora_linear_backward");
    }
    if (db != 0) {
        p = pk::Product();
        p.m = rank;
        p.n = out_features;
        p.threads = threads;
        pk::Operand low = transposed(s, pk::kF32, rank);
        low.scale = scaling;
        add_segment(p, low, dense(dy, dtype, m, out_features), m, true);
        p.scale = floats(scale);
        set_out(p, db, adapter_dtype, 1, rank);
        check(k.product(p), "dora_linear_backward");
    }
}

void row_squares(const py::tuple& weight, Address out, int threads) {
    Base base = make_base(weight);
    pk::RowSquares q = {base.w, base.swapped, reinterpret_cast<double*>(out), threads};
    py::gil_scoped_release release;
    check(kernels().row_squares(q), "weight_norm_sq");
}

// a [rank, k] and b [n, rank] in fp32; `cross` [rank, n] and `gram` [rank, rank] are scratch.
void dora_norm(const py::tuple& weight, int64_t n, int64_t k, Address a, Address b, int64_t rank,
               double scaling, Address norm_sq, Address cross, Address gram, Address norm,
               int threads) {
    Base base = make_base(weight);
    py::gil_scoped_release release;
    pk::Product p;
    p.m = rank;
    p.n = n;
    p.threads = threads;
    add_segment(p, matrix(a, pk::kF32, k), base.w, k, base.swapped);
    set_out(p, cross, pk::kF32, n);
    check(kernels().product(p), "dora_weight_norm");
    pk::DoraNorm d = {n,
                      k,
                      rank,
                      floats(a),
                      floats(b),
                      floats(cross),
                      reinterpret_cast<const double*>(norm_sq),
                      scaling,
                      reinterpret_cast<double*>(gram),
                      reinterpret_cast<float*>(norm),
                      threads};
    check(kernels().dora_norm(d), "dora_weight_norm");
}

void column_dots(Address x, Address y, int dtype, int64_t rows, int64_t cols, Address out,
                 int threads) {
    pk::ColumnDots d = {reinterpret_cast<const void*>(x),
                        reinterpret_cast<const void*>(y),
                        dtype,
                        rows,
                        cols,
                        reinterpret_cast<float*>(out),
                        threads};
    py::gil_scoped_release release;
    check(kernels().column_dots(d), "dora_linear_backward");
}

} // namespace

void pk_bind::bind_dora(py::module_& m) {
    m.def("dora_forward", &dora_forward);
    m.def("dora_backward", &dora_backward);
    m.def("row_squares", &row_squares);
    m.def("dora_norm", &dora_norm);
    m.def("column_dots", &column_dots);
}
