// A linear with a different low-rank term for each row.

#include "bind.h"

using namespace pk_bind;

namespace {

// An adapter with its rows: `order` [begin, end) of the call.
struct Adapter {
    Address a, b;
    int dtype;
    int64_t rank, begin, end;
    float scaling;
    pk::Dropout drop;
    Address da, db;
};

// (a, b, dtype, rank, begin, end, scaling, dropout, da, db)
std::vector<Adapter> make_adapters(const py::list& list) {
    std::vector<Adapter> adapters;
    for (py::handle item : list) {
        py::tuple t = py::cast<py::tuple>(item);
        adapters.push_back({t[0].cast<Address>(), t[1].cast<Address>(), t[2].cast<int>(),
                            t[3].cast<int64_t>(), t[4].cast<int64_t>(), t[5].cast<int64_t>(),
                            t[6].cast<float>(), make_dropout(t[7]), t[8].cast<Address>(),
                            t[9].cast<Address>()});
    }
    return adapters;
}

// A product over the rows of one adapter, by the kernel that serves the whole batch.
pk::Product rows_of(const Adapter& adapter, const int64_t* order, int64_t m, int threads) {
    pk::Product p;
    p.m = adapter.end - adapter.begin;
    p.rows = order + adapter.begin;
    p.range = m;
    p.threads = threads;
    return p;
}

pk::Segment low_rank(const Adapter& adapter, Address x, int64_t stride, Address w, int64_t rows,
                     int64_t cols, bool along_columns) {
    pk::Segment segment =
        pk::make_segment(matrix(x, pk::kF32, stride), dense(w, adapter.dtype, rows, cols),
                         adapter.rank, along_columns);
    segment.row_begin = adapter.begin;
    segment.row_end = adapter.end;
    return segment;
}

// `order` lists the rows of x by adapter. Row i of s [m, stride] = dropout(x_i) A^T of its adapter
// (fp32; the rest of s is left alone); y_i = x_i W^T + bias + scaling s_i B^T. Without a weight
// (None) the low-rank terms are added to what y holds.
void multi_forward(Address x, int dtype, int64_t m, int64_t in, int64_t out_features,
                   const py::object& weight, Address bias, Address order_address,
                   const py::list& list, Address s, int64_t stride, Address y, int threads) {
    std::vector<Adapter> adapters = make_adapters(list);
    Base base;
    bool has_weight = !weight.is_none();
    if (has_weight)
        base = make_base(weight.cast<py::tuple>());
    const int64_t* order = reinterpret_cast<const int64_t*>(order_address);
    py::gil_scoped_release release;

    pk::Product p;
    std::vector<pk::Segment> segments;
    if (has_weight) {
        segments.push_back(pk::make_segment(matrix(x, dtype, in), base.w, in, base.swapped));
    } else {
        add_to_out(p, y, dtype);
    }
    for (const Adapter& adapter : adapters) {
        pk::Product shrink = rows_of(adapter, order, m, threads);
        shrink.n = adapter.rank;
        pk::Operand dropped = matrix(x, dtype, in);
        dropped.dropout = adapter.drop;
        pk::Weight a = dense(adapter.a, adapter.dtype, adapter.rank, in);
        add_segment(shrink, dropped, a, in, false);
        set_out(shrink, s, pk::kF32, stride);
        check(kernels().product(shrink), "multi_lora_linear");
        segments.push_back(
            low_rank(adapter, s, stride, adapter.b, out_features, adapter.rank, false));
        segments.back().x.scale = adapter.scaling;
    }
    p.m = m;
    p.n = out_features;
    p.rows = order;
    p.threads = threads;
    p.segments = static_cast<int>(segments.size());
    p.list = segments.data();
    p.bias = reinterpret_cast<const void*>(bias);
    p.bias_dtype = dtype;
    set_out(p, y, dtype, out_features);
    check(kernels().product(p), "multi_lora_linear");
}

// ds [m, stride]: caller's scratch (fp32). dx = dy W + mask(ds A), row by row with its adapter;
// dA = ds^T dropout(x) and dB = scaling dy^T s over the rows of each adapter. A null address leaves
// a result out; without a weight (None) the low-rank terms are added to what dx holds.
void multi_backward(Address dy, Address x, Address s, int dtype, int64_t m, int64_t in,
                    int64_t out_features, const py::object& weight, Address order_address,
                    const py::list& list, int64_t stride, Address ds, Address dx, int threads) {
    std::vector<Adapter> adapters = make_adapters(list);
    Base base;
    bool has_weight = !weight.is_none();
    if (has_weight)
        base = make_base(weight.cast<py::tuple>());
    const int64_t* order = reinterpret_cast<const int64_t*>(order_address);
    py::gil_scoped_release release;
    const char* name = "multi_lora_linear_backward";
    const pk::Kernels& k = kernels();

    std::vector<pk::Segment> segments;
    for (const Adapter& adapter : adapters) {
        pk::Product p = rows_of(adapter, order, m, threads);
        p.n = adapter.rank;
        pk::Operand scaled = matrix(dy, dtype, out_features);
        scaled.scale = adapter.scaling;
        pk::Weight b = dense(adapter.b, adapter.dtype, out_features, adapter.rank);
        add_segment(p, scaled, b, out_features, true);
        set_out(p, ds, pk::kF32, stride);
        check(k.product(p), name);
        segments.push_back(low_rank(adapter, ds, stride, adapter.a, adapter.rank, in, true));
        segments.back().mask = adapter.drop;
    }
    if (dx != 0) {
        pk::Product p;
        p.m = m;
        p.n = in;
        p.rows = order;
        p.threads = threads;
        if (has_weight) {
            segments.push_back(pk::make_segment(matrix(dy, dtype, out_features), base.w,
                                                out_features, !base.swapped));
        } else {
            add_to_out(p, dx, dtype);
        }
        p.segments = static_cast<int>(segments.size());
        p.list = segments.data();
        set_out(p, dx, dtype, in);
        check(k.product(p), name);
    }
    for (const Adapter& adapter : adapters) {
        pk::Product p;
        p.m = adapter.rank;
        p.threads = threads;
        int64_t depth = adapter.end - adapter.begin;
        if (adapter.da != 0) {
            p.n = in;
            pk::Weight rows = dense(x, dtype, m, in);
            rows.dropout = adapter.drop;
            add_segment(p, transposed(ds, pk::kF32, stride), rows, depth, true);
            p.segment[0].depth_rows = order + adapter.begin;
            set_out(p, adapter.da, adapter.dtype, in);
            check(k.product(p), name);
        }
        if (adapter.db != 0) {
            p.n = out_features;
            p.segments = 0;
            pk::Operand low = transposed(s, pk::kF32, stride);
            low.scale = adapter.scaling;
            add_segment(p, low, dense(dy, dtype, m, out_features), depth, true);
            p.segment[0].depth_rows = order + adapter.begin;
            set_out(p, adapter.db, adapter.dtype, 1, adapter.rank);
            check(k.product(p), name);
        }
    }
}

} // namespace

void pk_bind::bind_multi_lora(py::module_& m) {
    m.def("multi_forward", &multi_forward);
    m.def("multi_backward", &multi_backward);
}
