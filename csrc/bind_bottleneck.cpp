// The bottleneck adapter.

#include "bind.h"

using namespace pk_bind;

namespace {

const void* input(Address p) { return reinterpret_cast<const void*>(p); }
void* output(Address p) { return reinterpret_cast<void*>(p); }
float* floats(Address p) { return reinterpret_cast<float*>(p); }

// (x, dtype, m, k, n, rank, down_w, down_b, up_w, up_b, scale, scales, adapter_dtype, activation,
// dropout); absent tensors are 0.
pk::Bottleneck make_bottleneck(const py::tuple& t) {
    if (t.size() != 15)
        throw std::invalid_argument("bottleneck: expected a tuple of 15 entries");
    pk::Bottleneck b = {};
    b.x = input(t[0].cast<Address>());
    b.dtype = t[1].cast<int>();
    b.m = t[2].cast<int64_t>();
    b.k = t[3].cast<int64_t>();
    b.n = t[4].cast<int64_t>();
    b.rank = t[5].cast<int64_t>();
    b.down_w = input(t[6].cast<Address>());
    b.down_b = input(t[7].cast<Address>());
    b.up_w = input(t[8].cast<Address>());
    b.up_b = input(t[9].cast<Address>());
    b.scale = input(t[10].cast<Address>());
    b.scales = t[11].cast<int64_t>();
    b.adapter_dtype = t[12].cast<int>();
    b.activation = t[13].cast<int>();
    b.dropout = make_dropout(t[14].cast<py::object>());
    return b;
}

void forward(const py::tuple& adapter, Address residual, Address y, Address work, int threads) {
    pk::Bottleneck b = make_bottleneck(adapter);
    b.residual = input(residual);
    b.y = output(y);
    b.work = floats(work);
    b.threads = threads;
    py::gil_scoped_release release;
    check(kernels().bottleneck_forward(b), "bottleneck_adapter");
}

void backward(const py::tuple& adapter, Address dy, bool add_dy, Address dx, Address down_sum,
              Address down_b_sum, Address up_sum, Address up_b_sum, Address scaled_up, Address up_w,
              Address up_b, Address scale, Address work, int64_t block_rows, int threads) {
    pk::Bottleneck b = make_bottleneck(adapter);
    b.work = floats(work);
    b.threads = threads;
    pk::BottleneckGradients g = {
        input(dy),          add_dy,         output(dx),       floats(down_sum),
        floats(down_b_sum), floats(up_sum), floats(up_b_sum), floats(scaled_up),
        output(up_w),       output(up_b),   output(scale),    block_rows};
    py::gil_scoped_release release;
    check(kernels().bottleneck_backward(b, g), "bottleneck_adapter_backward");
}

} // namespace

void bind_bottleneck(py::module_& m) {
    m.def("bottleneck_forward", &forward);
    m.def("bottleneck_backward", &backward);
}
