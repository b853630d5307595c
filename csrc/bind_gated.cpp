// Gated activations.

#include "bind.h"

using namespace pk_bind;

namespace {

// h = act(gate) up; with `dh`, which may be null, also dgate and dup.
void gated(Address dh, Address gate, Address up, int dtype, int64_t numel, int activation,
           Address h, Address dgate, Address dup, int threads) {
    pk::Gated g = {reinterpret_cast<const void*>(dh),
                   reinterpret_cast<const void*>(gate),
                   reinterpret_cast<const void*>(up),
                   dtype,
                   numel,
                   activation,
                   reinterpret_cast<void*>(h),
                   reinterpret_cast<void*>(dgate),
                   reinterpret_cast<void*>(dup),
                   threads};
    py::gil_scoped_release release;
    check(kernels().gated(g), "gated_activation");
}

} // namespace

void pk_bind::bind_gated(py::module_& m) { m.def("gated", &gated); }
