// Bindings of the linear with trainable entries.

#include "bind.h"

using namespace pk_bind;

namespace {

// Where each row's entries begin; returns the first entry that is out of order or out of range, -1
// if there is none. Kernels write and read by these positions, so every call looks at all of them.
int64_t row_starts(const int64_t* index, int64_t entries, int64_t rows, int64_t cols,
                   int64_t* start) {
    int64_t row = 0, end = cols, previous = -1, numel = rows * cols;
    start[0] = 0;
    for (int64_t j = 0; j < entries; ++j) {
        int64_t i = index[j];
        if (i <= previous || i >= numel)
            return j;
        previous = i;
        for (; i >= end; end += cols)
            start[++row] = j;
    }
    while (row < rows)
        start[++row] = entries;
    return -1;
}

// (indices, count, values, dtype of the values, room for rows + 1 starts)
struct Positions {
    pk::Entries entries;
    int64_t bad;
};

Positions make_entries(const py::tuple& t, int64_t rows, int64_t cols) {
    Positions p;
    const int64_t* index = reinterpret_cast<const int64_t*>(t[0].cast<Address>());
    int64_t* start = reinterpret_cast<int64_t*>(t[4].cast<Address>());
    p.bad = row_starts(index, t[1].cast<int64_t>(), rows, cols, start);
    p.entries.index = index;
    p.entries.start = start;
    p.entries.value = reinterpret_cast<const void*>(t[2].cast<Address>());
    p.entries.dtype = t[3].cast<int>();
    return p;
}

// y [m, N] = x [m, K] (W + D)^T + bias, or with `transpose` dx [m, K] = dy [m, N] (W + D). With
// room for tiles of x the entries are added to the base's own product (which `out` holds already
// where there is no weight), else to the weight as it is decoded. Returns the first bad index, or
// -1.
int64_t sparse_linear(Address x, int dtype, int64_t m, int64_t rows, int64_t cols,
                      const py::object& weight, const py::tuple& positions, bool transpose,
                      Address bias, Address tiles, Address out, int threads) {
    Positions at = make_entries(positions, rows, cols);
    if (at.bad >= 0)
        return at.bad;
    pk::Product product;
    if (!weight.is_none()) {
        Base base = make_base(weight.cast<py::tuple>());
        if (tiles == 0 && at.entries.start[rows] > 0)
            base.w.entries = at.entries;
        int64_t depth = transpose ? rows : cols;
        product.m = m;
        product.n = transpose ? cols : rows;
        product.threads = threads;
        add_segment(product, matrix(x, dtype, depth), base.w, depth, base.swapped != transpose);
        product.bias = reinterpret_cast<const void*>(bias);
        product.bias_dtype = dtype;
        set_out(product, out, dtype, product.n);
    }
    pk::SparseProduct term = {};
    term.dtype = dtype;
    term.m = m;
    term.rows = rows;
    term.cols = cols;
    term.entries = at.entries;
    term.threads = threads;
    (transpose ? term.dy : term.x) = reinterpret_cast<const void*>(x);
    (transpose ? term.dy_tiles : term.x_tiles) = reinterpret_cast<void*>(tiles);
    (transpose ? term.dx : term.y) = reinterpret_cast<void*>(out);
    bool has_weight = !weight.is_none();
    py::gil_scoped_release release;
    if (has_weight)
        check(kernels().product(product), "sparse_delta_linear");
    if (tiles != 0)
        check(kernels().sparse_product(term), "sparse_delta_linear");
    return -1;
}

// gradient[j] = sum over m of dy[m, row j] x[m, col j] (fp32). Returns the first bad index, or -1.
int64_t sampled_gradient(Address dy, Address x, int dtype, int64_t m, int64_t rows, int64_t cols,
                         const py::tuple& positions, Address dy_tiles, Address x_tiles,
                         Address gradient, int threads) {
    Positions at = make_entries(positions, rows, cols);
    if (at.bad >= 0)
        return at.bad;
    pk::SparseProduct p = {};
    p.x = reinterpret_cast<const void*>(x);
    p.dy = reinterpret_cast<const void*>(dy);
    p.dtype = dtype;
    p.m = m;
    p.rows = rows;
    p.cols = cols;
    p.entries = at.entries;
    p.x_tiles = reinterpret_cast<void*>(x_tiles);
    p.dy_tiles = reinterpret_cast<void*>(dy_tiles);
    p.gradient = reinterpret_cast<float*>(gradient);
    p.threads = threads;
    py::gil_scoped_release release;
    check(kernels().sparse_product(p), "sampled_gradient");
    return -1;
}

} // namespace

void pk_bind::bind_sparse(py::module_& m) {
    m.def("sparse_linear", &sparse_linear);
    m.def("sampled_gradient", &sampled_gradient);
}
