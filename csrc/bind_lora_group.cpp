// Linears with low-rank terms that share their input.

#include "bind.h"

using namespace pk_bind;

namespace {

// One linear of the group. Its columns of the shared S [m, ranks] begin at `column`.
struct Member {
    Base base;
    bool has_weight;
    int64_t out_features;
    Address bias, a, b;
    int adapter_dtype;
    int64_t rank, column;
    float scaling;
    pk::Dropout drop;
    Address y; // forward: the result; backward: its gradient
    Address da, db;
};

// (weight or None, out_features, bias, a, b, adapter_dtype, rank, scaling, dropout, y or dy, da,
// db)
std::vector<Member> make_members(const py::list& list) {
    std::vector<Member> members;
    int64_t column = 0;
    for (py::handle item : list) {
        py::tuple t = py::cast<py::tuple>(item);
        Member g = {};
        g.has_weight = !t[0].is_none();
        if (g.has_weight)
            g.base = make_base(t[0].cast<py::tuple>());
        g.out_features = t[1].cast<int64_t>();
        g.bias = t[2].cast<Address>();
        g.a = t[3].cast<Address>();
        g.b = t[4].cast<Address>();
        g.adapter_dtype = t[5].cast<int>();
        g.rank = t[6].cast<int64_t>();
        g.column = column;
        g.scaling = t[7].cast<float>();
        g.drop = make_dropout(t[8]);
        g.y = t[9].cast<Address>();
        g.da = t[10].cast<Address>();
        g.db = t[11].cast<Address>();
        column += g.rank;
        members.push_back(g);
    }
    return members;
}

Address at_column(Address s, int64_t column) { return s + (Address)column * sizeof(float); }

// s [m, ranks] = dropout_i(x) A_i^T side by side (fp32); y_i = x W_i^T + bias_i + scaling_i s_i
// B_i^T. Without a weight (None) the low-rank term is added to what y_i holds.
void group_forward(Address x, int dtype, int64_t m, int64_t in, const py::list& list, Address s,
                   int64_t ranks, int threads) {
    std::vector<Member> members = make_members(list);
    py::gil_scoped_release release;
    for (const Member& g : members) {
        pk::Product p;
        p.m = m;
        p.n = g.rank;
        p.threads = threads;
        pk::Operand dropped = matrix(x, dtype, in);
        dropped.dropout = g.drop;
        add_segment(p, dropped, dense(g.a, g.adapter_dtype, g.rank, in), in, false);
        set_out(p, at_column(s, g.column), pk::kF32, ranks);
        check(kernels().product(p), "lora_linear_group");
    }
    for (const Member& g : members) {
        pk::Product p;
        p.m = m;
        p.n = g.out_features;
        p.threads = threads;
        if (g.has_weight)
            add_segment(p, matrix(x, dtype, in), g.base.w, in, g.base.swapped);
        else
            add_to_out(p, g.y, dtype);
        pk::Operand low = matrix(at_column(s, g.column), pk::kF32, ranks);
        low.scale = g.scaling;
        pk::Weight b = dense(g.b, g.adapter_dtype, g.out_features, g.rank);
        add_segment(p, low, b, g.rank, false);
        p.bias = reinterpret_cast<const void*>(g.bias);
        p.bias_dtype = dtype;
        set_out(p, g.y, dtype, g.out_features);
        check(kernels().product(p), "lora_linear_group");
    }
}

// ds [m, ranks] = scaling_i dy_i B_i side by side (fp32, caller's scratch); dx = sum over i of
// dy_i W_i + mask_i(ds_i A_i), in one product, plus `add` (fp32) where that is not null; dA_i and
// dB_i as for a single linear. A null address leaves a result out.
void group_backward(Address x, Address s, int dtype, int64_t m, int64_t in, const py::list& list,
                    int64_t ranks, Address ds, Address add, Address dx, int threads) {
    std::vector<Member> members = make_members(list);
    py::gil_scoped_release release;
    const pk::Kernels& k = kernels();
    const char* name = "lora_linear_group_backward";
    std::vector<pk::Segment> segments;
    for (const Member& g : members) {
        pk::Product p;
        p.m = m;
        p.n = g.rank;
        p.threads = threads;
        pk::Operand scaled = matrix(g.y, dtype, g.out_features);
        scaled.scale = g.scaling;
        pk::Weight b = dense(g.b, g.adapter_dtype, g.out_features, g.rank);
        add_segment(p, scaled, b, g.out_features, true);
        set_out(p, at_column(ds, g.column), pk::kF32, ranks);
        check(k.product(p), name);

        pk::Segment low = pk::make_segment(matrix(at_column(ds, g.column), pk::kF32, ranks),
                                           dense(g.a, g.adapter_dtype, g.rank, in), g.rank, true);
        low.mask = g.drop;
        segments.push_back(low);
        if (g.has_weight)
            segments.push_back(pk::make_segment(matrix(g.y, dtype, g.out_features), g.base.w,
                                                g.out_features, !g.base.swapped));
    }
    if (dx != 0) {
        pk::Product p;
        p.m = m;
        p.n = in;
        p.threads = threads;
        p.segments = static_cast<int>(segments.size());
        p.list = segments.data();
        if (add != 0)
            add_to_out(p, add, pk::kF32);
        set_out(p, dx, dtype, in);
        check(k.product(p), name);
    }
    for (const Member& g : members) {
        pk::Product p;
        p.m = g.rank;
        p.threads = threads;
        if (g.da != 0) {
            p.n = in;
            pk::Weight rows = dense(x, dtype, m, in);
            rows.dropout = g.drop;
            add_segment(p, transposed(at_column(ds, g.column), pk::kF32, ranks), rows, m, true);
            set_out(p, g.da, g.adapter_dtype, in);
            check(k.product(p), name);
        }
        if (g.db != 0) {
            p.n = g.out_features;
            p.segments = 0;
            pk::Operand low = transposed(at_column(s, g.column), pk::kF32, ranks);
            low.scale = g.scaling;
            add_segment(p, low, dense(g.y, dtype, m, g.out_features), m, true);
            set_out(p, g.db, g.adapter_dtype, 1, g.rank);
            check(k.product(p), name);
        }
    }
}

} // namespace

void pk_bind::bind_lora_group(py::module_& m) {
    m.def("group_forward", &group_forward);
    m.def("group_backward", &group_backward);
}
