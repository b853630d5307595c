// What the bindings share: addresses as integers, and the descriptions that kernels take. Only
// bind*.cpp know pybind11.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "common/codebooks.h"
#include "cpu/dispatch.h"
#include "cpu/threading.h"

namespace pk_bind {

namespace py = pybind11;

using Address = uintptr_t;

// The kernels of the instruction set in use.
const pk::Kernels& kernels();

inline void check(int status, const char* op) {
    if (status != pk::kOk)
        throw std::runtime_error(std::string("peftkern::") + op + ": native status " +
                                 std::to_string(status) + ": " + pk::status_text(status));
}

// Weight as the tuple (kind, dtype, data, rows, cols, stride, swapped, absmax, nested,
// nested_absmax, nested_offset, quant_type, block_shift); `swapped` says that storage is [K, N].
struct Base {
    pk::Weight w;
    bool swapped = false;
};

inline Base make_base(const py::tuple& t) {
    if (t.size() != 13)
        throw std::invalid_argument("weight: expected a tuple of 13 entries");
    Base b;
    b.w.kind = t[0].cast<int>();
    b.w.dtype = t[1].cast<int>();
    b.w.p = reinterpret_cast<const void*>(t[2].cast<Address>());
    b.w.rows = t[3].cast<int64_t>();
    b.w.cols = t[4].cast<int64_t>();
    b.w.stride = t[5].cast<int64_t>();
    b.swapped = t[6].cast<bool>();
    b.w.absmax = reinterpret_cast<const float*>(t[7].cast<Address>());
    b.w.nested = reinterpret_cast<const uint8_t*>(t[8].cast<Address>());
    b.w.nested_absmax = reinterpret_cast<const float*>(t[9].cast<Address>());
    Address offset = t[10].cast<Address>();
    if (offset != 0)
        b.w.nested_offset = *reinterpret_cast<const float*>(offset);
    b.w.quant_type = t[11].cast<int>();
    b.w.block_shift = t[12].cast<int>();
    return b;
}

// (seed, threshold, scale, columns), or None.
inline pk::Dropout make_dropout(const py::object& o) {
    pk::Dropout d;
    if (o.is_none())
        return d;
    py::tuple t = o.cast<py::tuple>();
    d.on = true;
    d.seed = static_cast<uint64_t>(t[0].cast<int64_t>());
    d.threshold = t[1].cast<uint32_t>();
    d.scale = t[2].cast<float>();
    d.cols = t[3].cast<int64_t>();
    return d;
}

inline pk::Operand matrix(Address p, int dtype, int64_t cols) {
    pk::Operand x;
    x.p = reinterpret_cast<const void*>(p);
    x.dtype = dtype;
    x.row_stride = cols;
    return x;
}

inline pk::Operand transposed(Address p, int dtype, int64_t cols) {
    pk::Operand x = matrix(p, dtype, 1);
    x.col_stride = cols;
    return x;
}

inline pk::Weight dense(Address p, int dtype, int64_t rows, int64_t cols) {
    pk::Weight w;
    w.p = reinterpret_cast<const void*>(p);
    w.dtype = dtype;
    w.rows = rows;
    w.cols = cols;
    w.stride = cols;
    return w;
}

inline void set_out(pk::Product& p, Address out, int dtype, int64_t row_stride,
                    int64_t col_stride = 1) {
    p.out = reinterpret_cast<void*>(out);
    p.out_dtype = dtype;
    p.out_row_stride = row_stride;
    p.out_col_stride = col_stride;
}

// Start from what `out` holds.
inline void add_to_out(pk::Product& p, Address out, int dtype) {
    p.add = reinterpret_cast<const void*>(out);
    p.add_dtype = dtype;
}

inline void add_segment(pk::Product& p, const pk::Operand& x, const pk::Weight& w, int64_t depth,
                        bool along_columns) {
    p.segment[p.segments++] = pk::make_segment(x, w, depth, along_columns);
}

// One function a family, called when the module is made.
void bind_optimizer(py::module_& m);
void bind_pages(py::module_& m);
void bind_dora(py::module_& m);
void bind_gated(py::module_& m);
void bind_int8(py::module_& m);
void bind_lora_group(py::module_& m);
void bind_multi_lora(py::module_& m);
void bind_sparse(py::module_& m);
void bind_prefix(py::module_& m);

} // namespace pk_bind

// One for each bind_*.cpp.
void bind_bottleneck(pybind11::module_& m);
